/* The launcher: makes sandboxes from namespaces and ends them. See helper.h for how it is used. */
#include "helper.h"
#include <grp.h>
#include <linux/capability.h>
#include <net/if.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/un.h>

#define STAGE "/sys" /* the new root is mounted over it: a place that is never the source of a bind */

/* Operations of a request: one letter, then its arguments, each ended by NUL; in the order they are carried out.
 *   U                a user namespace, one uid and gid mapped      I uid gid      who the sandbox runs as
 *   G dir file       a cgroup, joined by writing 0 to dir/file     W file value   write a cgroup limit
 *   T options        the root: a tmpfs with these options          D path         a directory
 *   O path           a writable directory, the sandbox's own       B src dst      bind, read-only, with what is below
 *   V src dst        bind a device                                 L target path  a symbolic link
 *   F path text      a file                                        P path         procfs
 *   Z number value   a resource limit                              C path         the work directory
 *   M                refuse memory that no limit counts
 */
static int arity(char op) { return strchr("UM", op) ? 0 : strchr("TDOPC", op) ? 1 : strchr("IGWBVLFZ", op) ? 2 : -1; }

struct op { char kind, *a, *b; };

/* The next operation, 0 at the end, -1 when malformed. */
static int next_op(char **at, char *end, struct op *op) {
    static char nothing[1];
    if (*at >= end) return 0;
    op->kind = *(*at)++, op->a = op->b = nothing;
    int n = op->kind ? arity(op->kind) : -1;
    for (int i = 0; i < n; i++) {
        char *stop = *at < end ? memchr(*at, 0, (size_t)(end - *at)) : NULL;
        if (!stop) return -1;
        *(i ? &op->b : &op->a) = *at, *at = stop + 1;
    }
    return n < 0 ? -1 : 1;
}

static void make_parents(char *path) {
    for (char *p = strchr(path + 1, '/'); p; p = strchr(p + 1, '/')) {
        *p = 0;
        if (mkdir(path, 0755) && errno != EEXIST) die("mkdir", path);
        *p = '/';
    }
}

static void make_dir(char *path) {
    make_parents(path);
    if (mkdir(path, 0755) && errno != EEXIST) die("mkdir", path);
}

static void make_file(char *path, const char *text) {
    make_parents(path);
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text)) die("write", path);
    close(fd);
}

enum { RDONLY = 1, NOSUID = 2, NODEV = 4, NOEXEC = 8 };
static void set_mount(const char *path, uint64_t flags, int recursive) {
    struct { uint64_t set, clear, propagation, userns; } attr = {flags, 0, 0, 0};
    int at_recursive = recursive ? 0x8000 : 0;
    if (syscall(442 /* mount_setattr */, AT_FDCWD, path, at_recursive, &attr, sizeof attr)) die("mount_setattr", path);
}

static void bind_mount(const char *from, char *to, uint64_t flags) {
    struct stat st;
    if (stat(from, &st)) die("stat", from);
    if (S_ISDIR(st.st_mode)) make_dir(to); else make_file(to, "");
    if (mount(from, to, NULL, MS_BIND | MS_REC, NULL)) die("bind", from);
    set_mount(to, flags, 1);
}

static uid_t uid; static gid_t gid;
static int own_user;

static void make(struct op *op) {
    char *in = op->kind == 'B' || op->kind == 'V' || op->kind == 'L' ? op->b : op->a;
    if (*in == '/') in++; /* the new root is the current directory */
    switch (op->kind) {
    case 'T':
        if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) die("private mounts", "");
        if (mount("sandbox", STAGE, "tmpfs", MS_NOSUID | MS_NODEV, op->a) || chdir(STAGE)) die("tmpfs", op->a);
        break;
    case 'D': make_dir(in); break;
    case 'O':
        make_dir(in);
        if ((!own_user && chown(in, uid, gid)) || mount(in, in, NULL, MS_BIND, NULL)) die("directory", in);
        set_mount(in, NOSUID | NODEV, 0);
        break;
    case 'B': bind_mount(op->a, in, RDONLY | NOSUID | NODEV); break;
    case 'V': bind_mount(op->a, in, NOSUID | NOEXEC); break;
    case 'L': make_parents(in); if (symlink(op->a, in)) die("symlink", in); break;
    case 'F': make_file(in, op->b); break;
    case 'P':
        make_dir(in);
        if (mount("proc", in, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL)) die("proc", in);
        if (mount("proc/sys", "proc/sys", NULL, MS_BIND, NULL)) die("bind", "proc/sys");
        set_mount("proc/sys", RDONLY | NOSUID | NODEV | NOEXEC, 0);
        break;
    case 'Z': {
        struct rlimit limit = {strtoul(op->b, NULL, 10), strtoul(op->b, NULL, 10)}, old;
        int which = atoi(op->a);
        if (!getrlimit(which, &old) && limit.rlim_max > old.rlim_max) limit.rlim_cur = limit.rlim_max = old.rlim_max;
        if (setrlimit(which, &limit)) die("rlimit", op->a);
    }
    }
}

static void loopback(void) {
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request)) die("loopback", "");
    close(fd);
}

static void map_user(uid_t outer_uid, gid_t outer_gid) {
    char line[64];
    if (put("/proc/self/setgroups", "deny") && errno != ENOENT) die("setgroups", "");
    snprintf(line, sizeof line, "%u %u 1", uid, outer_uid);
    if (put("/proc/self/uid_map", line)) die("uid_map", line);
    snprintf(line, sizeof line, "%u %u 1", gid, outer_gid);
    if (put("/proc/self/gid_map", line)) die("gid_map", line);
}

static void drop_privileges(void) {
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[2] = {{0}};
    for (int c = 0; c < 64; c++)
        if (prctl(PR_CAPBSET_DROP, c, 0, 0, 0) && errno != EINVAL) die("bounding set", "");
    if (!own_user && setgroups(0, NULL)) die("setgroups", "");
    if (setresgid(gid, gid, gid) || setresuid(uid, uid, uid)) die("setuid", "");
    if (syscall(SYS_capset, &head, none)) die("capset", "");
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) || prctl(PR_SET_DUMPABLE, 0)) die("prctl", "");
}

static char *title;
static size_t title_room;

/* The new sandbox, as PID 1 of its namespaces, from the host's root file system to the broker's loop. */
static void become_sandbox(char *ops, char *end, uid_t outer_uid, gid_t outer_gid) {
    struct op op;
    char file[4096], *dir = "/";
    int strict = 0;
    for (char *at = ops; next_op(&at, end, &op) > 0;) { /* first what needs the host's file system as it is */
        if (op.kind == 'I') uid = (uid_t)strtoul(op.a, NULL, 10), gid = (gid_t)strtoul(op.b, NULL, 10);
        if (op.kind == 'C') dir = op.a;
        if (op.kind == 'M') strict = 1;
        snprintf(file, sizeof file, "%s/%s", op.a, op.b);
        if (op.kind == 'G' && put(file, "0")) die("join cgroup", file);
    }
    umask(022); /* the owner's may hide what is made from the sandbox's user */
    if (own_user) map_user(outer_uid, outer_gid);
    unshare(CLONE_NEWCGROUP); /* hides where it sits on the host; a kernel without it has nothing to hide */
    put("/proc/self/oom_score_adj", "-1000"); /* where allowed; else the shell's higher score does */
    for (char *at = ops; next_op(&at, end, &op) > 0;) make(&op);
    if (sethostname("sandbox", 7)) die("hostname", "");
    loopback();
    if (syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/")) die("pivot_root", "");
    set_mount("/", RDONLY | NOSUID | NODEV, 0);
    strncpy(title, "sandbox", title_room); /* its command line is all that the sandbox sees of the helper */
    prepare_broker(dir);
    drop_privileges();
    filter(strict);
    broker();
}

/* ---- the zygote ---- */

struct box { pid_t pid; int ctl; char *ops, *end; };
static struct box *boxes;
static size_t nboxes;

static void remove_cgroups(struct box *box) { /* a dead task leaves its cgroup a moment after it was reaped */
    struct op op;
    for (char *at = box->ops; next_op(&at, box->end, &op) > 0;)
        for (int i = 0; op.kind == 'G' && i < 200 && rmdir(op.a) && errno == EBUSY; i++) usleep(500);
}

static void forget(size_t i) {
    remove_cgroups(&boxes[i]);
    close(boxes[i].ctl), free(boxes[i].ops);
    boxes[i] = boxes[--nboxes];
}

static void reap_boxes(int flags) {
    for (pid_t pid; (pid = waitpid(-1, NULL, flags)) > 0;)
        for (size_t i = 0; i < nboxes; i++)
            if (boxes[i].pid == pid) { forget(i); break; }
}

static void launch(char *request, size_t n, int fd) {
    struct box box = {-1, fd, must(malloc(n)), NULL};
    struct op op;
    int flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | SIGCHLD, more;
    memcpy(box.ops, request, n), box.end = box.ops + n, own_user = 0;
    const char *wrong = NULL, *where = "";
    for (char *at = box.ops; !wrong && (more = next_op(&at, box.end, &op));) {
        if (more < 0) errno = EINVAL, wrong = "malformed request";
        else if (op.kind == 'U') flags |= CLONE_NEWUSER, own_user = 1;
        else if (op.kind == 'G' && mkdir(op.a, 0755) && errno != EEXIST) wrong = "mkdir", where = op.a;
        else if (op.kind == 'W' && put(op.a, op.b)) wrong = "write", where = op.a;
    }
    uid_t outer_uid = geteuid();
    gid_t outer_gid = getegid();
    if (!wrong) box.pid = (pid_t)syscall(SYS_clone, flags, 0, 0, 0, 0);
    if (!wrong && box.pid < 0) wrong = "clone";
    if (!box.pid) {
        ctl = 3;
        if (fd != 3 ? dup3(fd, 3, O_CLOEXEC) < 0 : 0) _exit(73);
        syscall(SYS_close_range, 4, ~0u, 0);
        become_sandbox(box.ops, box.end, outer_uid, outer_gid);
    }
    boxes = must(realloc(boxes, (nboxes + 1) * sizeof *boxes)), boxes[nboxes++] = box;
    if (wrong) fail(fd, wrong, where), forget(nboxes - 1);
}

static void receive(int from) {
    static char request[1 << 18];
    char space[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec iov = {request, sizeof request};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    ssize_t n = recvmsg(from, &msg, MSG_CMSG_CLOEXEC);
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
    int fd = -1;
    if (n < 0 && errno == EINTR) return;
    if (n > 0 && c && c->cmsg_type == SCM_RIGHTS) memcpy(&fd, CMSG_DATA(c), sizeof fd);
    if (n > 0 && fd >= 0) { launch(request, (size_t)n, fd); return; }
    for (size_t i = 0; i < nboxes; i++) kill(boxes[i].pid, SIGKILL);
    reap_boxes(0);
    _exit(0);
}

static int zygote(int from) {
    sigset_t chld;
    struct rlimit files;
    sigemptyset(&chld), sigaddset(&chld, SIGCHLD);
    sigprocmask(SIG_SETMASK, &chld, NULL);
    signal(SIGPIPE, SIG_IGN);
    setsid(); /* a Ctrl-C on the owner's terminal is the owner's to handle */
    if (!getrlimit(RLIMIT_NOFILE, &files)) files.rlim_cur = files.rlim_max, setrlimit(RLIMIT_NOFILE, &files);
    sigfd = signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK);
    int owner = (int)syscall(434 /* pidfd_open */, getppid(), 0); /* a forked copy of the owner may hold the socket */
    if (sigfd < 0 || owner < 0 || fcntl(from, F_SETFD, FD_CLOEXEC)) return 74;
    for (;;) {
        struct signalfd_siginfo info;
        struct pollfd p[3] = {{from, POLLIN, 0}, {owner, POLLIN, 0}, {sigfd, POLLIN, 0}};
        if (poll(p, 3, -1) < 0 && errno != EINTR) return 71;
        if (p[2].revents) { while (read(sigfd, &info, sizeof info) > 0) {} reap_boxes(WNOHANG); }
        if (p[1].revents) shutdown(from, SHUT_RDWR);
        if (p[0].revents || p[1].revents) receive(from);
    }
}

static int container(const char *path, const char *dir) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof to.sun_path) return 2;
    strcpy(to.sun_path, path);
    ctl = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (ctl < 0 || connect(ctl, (struct sockaddr *)&to, sizeof to)) return 75;
    prepare_broker(dir);
    if (prctl(PR_SET_DUMPABLE, 0)) die("prctl", "");
    filter(0);
    broker();
    return 0;
}

int main(int argc, char **argv) {
    title = argv[0], title_room = (size_t)(argv[argc - 1] + strlen(argv[argc - 1]) - title);
    if (argc == 3 && !strcmp(argv[1], "zygote")) return zygote(atoi(argv[2]));
    if (argc == 4 && !strcmp(argv[1], "broker")) return container(argv[2], argv[3]);
    fputs("usage: helper zygote FD | helper broker SOCKET WORKDIR\n", stderr);
    return 2;
}
