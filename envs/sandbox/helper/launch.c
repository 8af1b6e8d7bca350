/* The launcher: makes sandboxes and ends them. What a sandbox is, its owner says, as lists of system calls
 * (envs/sandbox/launch.py); here they are carried out, in the order and in the process where they belong. */
#include "helper.h"

/* One system call, followed by what its pointers lead to. */
struct call {
    uint32_t size;      /* of all of it, a multiple of 8 */
    int16_t number;     /* or PUT or MAKE */
    int16_t forgiven;   /* the errno that is no failure; ANY: every one */
    uint32_t pointers;  /* bit i: argument i is an offset from the call's start */
    uint32_t step;      /* the offset of what is said when it fails */
    int64_t args[6];
};
enum { PUT = -1 /* path, text */, MAKE = -2 /* path, is a directory */, ANY = -1 };

/* A message to the zygote, or to a process that carries out one list. inner: which id `uid` has in a user namespace of
 * its own, -1 for none. Bytes of calls: those to make before there is a sandbox, those inside; the rest, when it has
 * ended. Without any inside, there is no sandbox. */
struct request {
    int32_t uid, inner;
    uint32_t before, inside;
    char calls[];
};

enum { BUSY_TRIES = 200, BUSY_US = 500 }; /* a dead task leaves its cgroup a moment after it was reaped */

static uid_t maker = (uid_t)-1; /* who gets what is made, where a user namespace has only one user */

/* Makes what is missing of a path below the new root. What is there may be of a sandbox's making: no link is
 * followed. */
static int make_path(char *path, int directory) {
    struct stat st;
    for (char *p = path, *end; *p; p = end + !!*end) {
        end = strchrnul(p, '/');
        char slash = *end;
        mode_t kind = slash || directory ? S_IFDIR : S_IFREG;
        *end = 0;
        if (lstat(path, &st)) {
            if (kind == S_IFDIR ? mkdir(path, 0755) : mknod(path, S_IFREG | 0644, 0)) return -1;
            if (maker != (uid_t)-1 && lchown(path, maker, maker)) return -1;
        } else if ((st.st_mode & S_IFMT) != kind) {
            errno = kind == S_IFDIR ? ENOTDIR : EEXIST;
            return -1;
        }
        *end = slash;
    }
    return 0;
}

/* Makes the calls in turn. NULL, or what the one that failed was for, with errno. */
static const char *make_calls(char *at, const char *end) {
    for (struct call *call; at < end; at += call->size) {
        long a[6], result = -1;
        call = (struct call *)at;
        for (int i = 0; i < 6; i++) a[i] = call->args[i] + (call->pointers >> i & 1 ? (long)at : 0);
        for (int tries = 0; result < 0 && tries < BUSY_TRIES && (!tries || errno == EBUSY); tries++) {
            if (tries) usleep(BUSY_US);
            if (call->number == PUT) result = put((char *)a[0], (char *)a[1]);
            else if (call->number == MAKE) result = make_path((char *)a[0], (int)a[1]);
            else result = syscall(call->number, a[0], a[1], a[2], a[3], a[4], a[5]);
        }
        if (result < 0 && errno != call->forgiven && call->forgiven != ANY) return at + call->step;
    }
    return NULL;
}

/* A user namespace in which `id` is this namespace's `uid`, and nobody else is anybody; -1 with errno. */
static int make_userns(int id, int uid) {
    char path[64], line[64];
    pid_t pid = (pid_t)syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
    if (!pid) for (prctl(PR_SET_PDEATHSIG, SIGKILL);;) pause();
    if (pid < 0) return -1;
    snprintf(line, sizeof line, "%u %u 1", id, uid);
    int fd = -1, n = snprintf(path, sizeof path, "/proc/%d/", pid);
    strcpy(path + n, "uid_map");
    if (!put(path, line) && (strcpy(path + n, "gid_map"), !put(path, line)))
        strcpy(path + n, "ns/user"), fd = open(path, O_RDONLY | O_CLOEXEC);
    int saved = errno;
    kill(pid, SIGKILL), waitpid(pid, NULL, 0), errno = saved;
    return fd;
}

/* Leaves open 0 to 2, the control stream as 3 and the user namespace as 4: what the calls open is FIRST_SEEN and up. */
void take_places(int stream, int space) {
    int high = fcntl(stream, F_DUPFD, 10), other = fcntl(space < 0 ? stream : space, F_DUPFD, 10);
    if (dup3(high, 3, O_CLOEXEC) < 0 || dup3(other, 4, O_CLOEXEC) < 0) _exit(73);
    syscall(SYS_close_range, FIRST_SEEN, ~0u, 0);
    ctl = 3;
}

/* ---- the zygote ---- */

struct box { pid_t pid; int ctl; char *after; size_t size; };
static struct box *boxes;
static size_t nboxes;

static void forget(size_t i) {
    make_calls(boxes[i].after, boxes[i].after + boxes[i].size);
    close(boxes[i].ctl);
    free(boxes[i].after);
    boxes[i] = boxes[--nboxes];
}

static void reap_boxes(int flags) {
    for (pid_t pid; (pid = waitpid(-1, NULL, flags)) > 0;)
        for (size_t i = 0; i < nboxes; i++)
            if (boxes[i].pid == pid) forget(i);
}

static struct { char *at; size_t room; } title; /* its command line */

/* The new sandbox, as PID 1 of its namespaces, from the host's root file system to the broker's loop. */
static void become_sandbox(const struct request *request, char *calls, const char *end) {
    maker = request->inner < 0 ? (uid_t)-1 : (uid_t)request->uid;
    const char *wrong = make_calls(calls, end);
    if (wrong) die(wrong);
    strncpy(title.at, "sandbox", title.room); /* it is all that the sandbox sees of the helper */
    broker("/");
}

static void launch(struct request *request, size_t n, int stream) {
    const int flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | SIGCHLD;
    char *inside = request->calls + request->before, *after = inside + request->inside;
    size_t size = (size_t)((char *)request + n - after);
    int space = request->inner < 0 ? -1 : make_userns(request->inner, request->uid);
    const char *wrong = request->inner >= 0 && space < 0 ? "user namespace" : make_calls(request->calls, inside);
    pid_t pid = wrong || inside == after ? -1 : (pid_t)syscall(SYS_clone, flags, 0, 0, 0, 0);
    if (!pid) {
        take_places(stream, space);
        become_sandbox(request, inside, after);
    }
    if (!wrong && pid < 0 && inside != after) wrong = "clone";
    if (wrong) fail(stream, wrong);
    else if (pid < 0 && stream >= 0) frame(stream, 'K', NULL, 0);
    if (space >= 0) close(space);
    boxes = must(realloc(boxes, (nboxes + 1) * sizeof *boxes));
    boxes[nboxes++] = (struct box){pid, stream, memcpy(must(malloc(size + 1)), after, size), size};
    if (pid < 0) forget(nboxes - 1);
}

static void receive(int from) {
    static char request[1 << 18] __attribute__((aligned(8)));
    char space[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec iov = {request, sizeof request};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    ssize_t n = recvmsg(from, &msg, MSG_CMSG_CLOEXEC);
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
    int fd = -1;
    if (n > 0 && c && c->cmsg_type == SCM_RIGHTS) memcpy(&fd, CMSG_DATA(c), sizeof fd);
    if (n >= (ssize_t)sizeof(struct request)) {
        launch((struct request *)request, (size_t)n, fd);
        return;
    }
    for (size_t i = 0; i < nboxes; i++) kill(boxes[i].pid, SIGKILL);
    reap_boxes(0);
    _exit(0);
}

int zygote(int from, char *line, size_t room) {
    title.at = line, title.room = room;
    watch_children();
    setsid(); /* a Ctrl-C on the owner's terminal is the owner's to handle */
    int owner = (int)syscall(434 /* pidfd_open */, getppid(), 0); /* a forked copy of the owner may hold the socket */
    if (owner < 0 || fcntl(from, F_SETFD, FD_CLOEXEC)) return 74;
    for (;;) {
        struct signalfd_siginfo info;
        struct pollfd p[3] = {{from, POLLIN, 0}, {owner, POLLIN, 0}, {sigfd, POLLIN, 0}};
        if (poll(p, 3, -1) < 0 && errno != EINTR) return 71;
        while (p[2].revents && read(sigfd, &info, sizeof info) > 0) {}
        if (p[2].revents) reap_boxes(WNOHANG);
        if (p[1].revents) shutdown(from, SHUT_RDWR);
        if (p[0].revents || p[1].revents) receive(from);
    }
}

/* Makes the calls of the request that it reads from a stream, and answers there with what they left open. */
int carry_out(int stream) {
    struct request request;
    read_all(stream, &request, sizeof request);
    char *calls = must(malloc(request.before));
    read_all(stream, calls, request.before);
    int space = request.inner < 0 ? -1 : make_userns(request.inner, request.uid);
    ctl = stream;
    if (request.inner >= 0 && space < 0) die("user namespace");
    take_places(stream, space);
    const char *wrong = make_calls(calls, calls + request.before);
    if (wrong) die(wrong);
    ready(dup(ctl) - 1);
    return 0;
}
