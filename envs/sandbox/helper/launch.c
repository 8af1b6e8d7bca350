/* The launcher: makes sandboxes from namespaces and ends them. See helper.h for how it is used. */
#include "helper.h"
#include <grp.h>
#include <linux/capability.h>
#include <net/if.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/xattr.h>

#define STAGE "/sys" /* the new root is mounted over it: a place that is never the source of a bind */

/* Operations of a request: one letter, then its arguments, each ended by NUL; in the order they are carried out.
 *   I id             the uid and gid that the sandbox runs as      U id           which id that is inside: a user namespace
 *   G dir file       a cgroup, joined by writing 0 to dir/file     W file value   write a cgroup limit
 *   S name options   its store: a tmpfs with these options         Y dir          where the base layers lie
 *   N layers         the same without what is written, only for the owner to compare with (two layers at least)
 *   T layers         the root: an overlay of layers, top first     Q              read-only but for its own directories
 *   O path           a directory of its own                        B src dst      bind, read-only, with what is below
 *   V src dst        bind a device                                 F path text    a file
 *   P path           procfs                                        Z number value a resource limit
 *   C path           the work directory
 * A store has u (the overlay's upper directory), w (its work directory) and b (where Y is attached); layers are named
 * relative to all stores, e.g. "7/u:9/b/LAYER". A message "R name" without a stream frees a store: its sandbox has
 * ended then, and no other has it as a layer.
 */
static int arity(char op) { return op == 'Q' ? 0 : strchr("IUYNTOPC", op) ? 1 : strchr("GWSBVFZ", op) ? 2 : -1; }

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

static uid_t uid;              /* who the sandbox is, in the launcher's user namespace, and its gid */
static uid_t inner;            /* the same in its own user namespace, where it has one */
static int userns = -1;        /* that namespace */
static int rootless, readonly; /* the launcher was started by an ordinary user; op Q */

/* Makes what is missing of a path below the new root, in an image as the sandbox's own. What is there may be of a sandbox's
 * making: no link is followed. */
static void make_path(char *path, int directory) {
    struct stat st;
    for (char *p = path, *end; *p; p = end + !!*end) {
        end = strchrnul(p, '/');
        char slash = *end;
        int inner = slash || directory, fd;
        *end = 0;
        if (lstat(path, &st)) {
            if (inner ? mkdir(path, 0755) : (fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644)) < 0)
                die("make", path);
            if (!inner) close(fd);
            if (userns >= 0 && lchown(path, uid, uid)) die("chown", path);
        } else if (inner ? !S_ISDIR(st.st_mode) : !S_ISREG(st.st_mode)) {
            errno = inner ? ENOTDIR : EEXIST, die("make", path);
        }
        *end = slash;
    }
}

enum { RDONLY = 1, NOSUID = 2, NODEV = 4, NOEXEC = 8, IDMAP = 0x100000 };
struct attr { uint64_t set, clear, propagation, userns; };

static void set_mount(int at, const char *path, struct attr attr, int flags) {
    if (syscall(442 /* mount_setattr */, at, path, flags, &attr, sizeof attr))
        die(attr.set & IDMAP ? "mount_setattr with owners mapped" : "mount_setattr", path);
}

static void bind_mount(const char *from, char *to, uint64_t flags) {
    struct stat st;
    if (stat(from, &st)) die("stat", from);
    make_path(to, S_ISDIR(st.st_mode));
    if (mount(from, to, NULL, MS_BIND | MS_REC, NULL)) die("bind", from);
    set_mount(AT_FDCWD, to, (struct attr){.set = flags}, 0x8000 /* AT_RECURSIVE */);
}

static char *store;

/* The directory of the base layers, in the store. Whoever unpacked them, they are the sandbox's own inside. */
static void attach_base(const char *dir) {
    struct attr attr = {.set = RDONLY | NOSUID | NODEV};
    char to[64];
    snprintf(to, sizeof to, "%s/b", store);
    int fd = (int)syscall(428 /* open_tree */, AT_FDCWD, dir, 1 /* OPEN_TREE_CLONE */ | O_CLOEXEC);
    if (fd < 0) die("open_tree", dir);
    if (userns >= 0 && !rootless) attr.set |= IDMAP, attr.userns = (uint64_t)userns;
    set_mount(fd, "", attr, AT_EMPTY_PATH);
    if (syscall(429 /* move_mount */, fd, "", AT_FDCWD, to, 4 /* MOVE_MOUNT_F_EMPTY_PATH */)) die("move_mount", to);
    close(fd);
}

static void show(const char *path) {
    if ((seen_fds[nseen++] = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0) die("open", path);
}

/* An overlay of layers. part: which of the store's upper directories takes what is written; NULL for none. */
static void mount_overlay(const char *layers, const char *part, const char *at) {
    char options[4096], top[128] = "";
    if (part) snprintf(top, sizeof top, ",upperdir=%s/u%s,workdir=%s/w%s,redirect_dir=nofollow,metacopy=off", store, part, store, part);
    int n = snprintf(options, sizeof options, "lowerdir=%s%s%s", layers, top, rootless ? ",userxattr" : "");
    if (n >= (int)sizeof options) errno = E2BIG, die("overlay", "with that many layers");
    if (mount("sandbox", at, "overlay", MS_NOSUID | MS_NODEV | (part ? 0 : MS_RDONLY), options)) die("overlay", layers);
}

static void mount_root(const char *layers) {
    char upper[64];
    snprintf(upper, sizeof upper, "%s/u", store);
    if (rootless && setxattr(upper, "user.codeworld", "", 0, 0)) die("tmpfs without user xattrs (Linux 6.6)", "");
    if (userns >= 0 && chown(upper, uid, uid)) die("chown", upper);
    show(upper);
    mount_overlay(layers, "", STAGE);
    if (chdir(STAGE)) die("chdir", STAGE);
}

static void show_origin(const char *layers, const char *at) {
    mount_overlay(layers, NULL, at);
    show(at);
    if (umount2(at, MNT_DETACH)) die("umount", at);
}

static void make_file(char *path, const char *text) {
    make_path(path, 0);
    int fd = open(path, O_WRONLY | O_TRUNC | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text)) die("write", path);
    close(fd);
}

static void own_directory(char *path) {
    struct stat st;
    make_path(path, 1);
    if (lstat(path, &st) || (st.st_uid != uid && lchown(path, uid, uid))) die("chown", path);
    if (!readonly) return;
    if (mount(path, path, NULL, MS_BIND, NULL)) die("bind", path);
    set_mount(AT_FDCWD, path, (struct attr){.set = NOSUID | NODEV}, 0);
}

static void make(struct op *op) {
    char *in = op->kind == 'B' || op->kind == 'V' ? op->b : op->a;
    if (*in == '/') in++; /* the new root is the current directory */
    switch (op->kind) {
    case 'Y': attach_base(op->a); break;
    case 'N': show_origin(op->a, STAGE); break;
    case 'T': mount_root(op->a); break;
    case 'O': own_directory(in); break;
    case 'B': bind_mount(op->a, in, RDONLY | NOSUID | NODEV); break;
    case 'V': bind_mount(op->a, in, NOSUID | NOEXEC); break;
    case 'F': make_file(in, op->b); break;
    case 'P':
        make_path(in, 1);
        if (mount("proc", in, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL)) die("proc", in);
        if (mount("proc/sys", "proc/sys", NULL, MS_BIND, NULL)) die("bind", "proc/sys");
        set_mount(AT_FDCWD, "proc/sys", (struct attr){.set = RDONLY | NOSUID | NODEV | NOEXEC}, 0);
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

static void drop_privileges(void) {
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[2] = {{0}};
    uid_t id = userns >= 0 ? inner : uid;
    if (!rootless && setgroups(0, NULL)) die("setgroups", "");
    if (userns >= 0 && setns(userns, CLONE_NEWUSER)) die("setns", "");
    for (int c = 0; c < 64; c++)
        if (prctl(PR_CAPBSET_DROP, c, 0, 0, 0) && errno != EINVAL) die("bounding set", "");
    if (setresgid(id, id, id) || setresuid(id, id, id)) die("setuid", "");
    if (syscall(SYS_capset, &head, none)) die("capset", "");
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) || prctl(PR_SET_DUMPABLE, 0)) die("prctl", "");
}

/* The new sandbox, as PID 1 of its namespaces, from the host's root file system to the broker's loop. */
static void become_sandbox(char *ops, char *end) {
    struct op op;
    char file[4096], *dir = "/";
    for (char *at = ops; next_op(&at, end, &op) > 0;) { /* first what needs the host's file system as it is */
        if (op.kind == 'C') dir = op.a;
        if (op.kind == 'Q') readonly = 1;
        if (op.kind == 'S') store = op.a;
        snprintf(file, sizeof file, "%s/%s", op.a, op.b);
        if (op.kind == 'G' && put(file, "0")) die("join cgroup", file);
    }
    unshare(CLONE_NEWCGROUP); /* hides where it sits on the host; a kernel without it has nothing to hide */
    put("/proc/self/oom_score_adj", "-1000"); /* where allowed; else the shell's higher score does */
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) die("private mounts", "");
    for (char *at = ops; next_op(&at, end, &op) > 0;) make(&op);
    if (sethostname("sandbox", 7)) die("hostname", "");
    loopback();
    if (syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/")) die("pivot_root", "");
    if (readonly) set_mount(AT_FDCWD, "/", (struct attr){.set = RDONLY | NOSUID | NODEV}, 0);
    strncpy(title, "sandbox", title_room); /* its command line is all that the sandbox sees of the helper */
    prepare_broker(dir, "/");
    drop_privileges();
    filter();
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

static const char *broken; /* why the zygote can launch nothing */
static int broken_errno;

static void say(const char *path, const char *text, const char *what) {
    if (!broken && put(path, text)) broken = what, broken_errno = errno;
}

/* Where stores are mounted: a mount namespace of the zygote's own, so that they end with it, whatever ends it. */
static void make_nursery(const char *dir) {
    char line[64];
    uid_t user = geteuid();
    gid_t group = getegid();
    umask(022); /* the owner's may hide what is made from the sandbox's user */
    if (unshare(CLONE_NEWNS | (rootless ? CLONE_NEWUSER : 0))) { broken = "unshare", broken_errno = errno; return; }
    if (rootless) {
        say("/proc/self/setgroups", "deny", "setgroups");
        snprintf(line, sizeof line, "0 %u 1", user), say("/proc/self/uid_map", line, "uid_map");
        snprintf(line, sizeof line, "0 %u 1", group), say("/proc/self/gid_map", line, "gid_map");
    }
    if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL)) broken = "slave mounts", broken_errno = errno;
    else if (mount("codeworld", dir, "tmpfs", MS_NOSUID | MS_NODEV, "size=4m,mode=700") || chdir(dir))
        broken = "tmpfs for stores", broken_errno = errno;
}

static int make_store(const char *name, const char *options) {
    static const char *const parts[] = {"u", "w", "b"};
    char path[64];
    if (mkdir(name, 0755) || mount("sandbox", name, "tmpfs", MS_NOSUID | MS_NODEV, options)) return -1;
    for (int i = 0; i < 3; i++)
        if (snprintf(path, sizeof path, "%s/%s", name, parts[i]), mkdir(path, 0755)) return -1;
    return 0;
}

void free_store(const char *name) {
    umount2(name, MNT_DETACH);
    rmdir(name);
}

/* A user namespace in which `id` is this namespace's `uid`, and nobody else is anybody; -1 with errno. */
static int make_userns(uid_t id) {
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

static void launch(char *request, size_t n, int fd) {
    struct box box = {-1, fd, must(malloc(n)), NULL};
    struct op op;
    int flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | SIGCHLD, more;
    memcpy(box.ops, request, n), box.end = box.ops + n, userns = -1, errno = broken_errno;
    const char *wrong = broken, *where = "";
    for (char *at = box.ops; !wrong && (more = next_op(&at, box.end, &op));) {
        if (more < 0) errno = EINVAL, wrong = "malformed request";
        else if (op.kind == 'I') uid = (uid_t)strtoul(op.a, NULL, 10);
        else if (op.kind == 'U' && (userns = make_userns(inner = (uid_t)strtoul(op.a, NULL, 10))) < 0) wrong = "user namespace";
        else if (op.kind == 'G' && mkdir(op.a, 0755) && errno != EEXIST) wrong = "mkdir", where = op.a;
        else if (op.kind == 'W' && put(op.a, op.b)) wrong = "write", where = op.a;
        else if (op.kind == 'S' && make_store(op.a, op.b)) wrong = "tmpfs", where = op.b;
    }
    if (!wrong) box.pid = (pid_t)syscall(SYS_clone, flags, 0, 0, 0, 0);
    if (!wrong && box.pid < 0) wrong = "clone";
    if (!box.pid) {
        int high = fcntl(fd, F_DUPFD, 10), space = userns < 0 ? -1 : fcntl(userns, F_DUPFD, 10);
        ctl = 3;
        if (high < 0 || dup3(high, 3, O_CLOEXEC) < 0) _exit(73);
        if (userns >= 0 && (userns = dup3(space, 4, O_CLOEXEC)) < 0) _exit(73);
        syscall(SYS_close_range, userns < 0 ? 4 : 5, ~0u, 0);
        become_sandbox(box.ops, box.end);
    }
    if (userns >= 0) close(userns);
    boxes = must(realloc(boxes, (nboxes + 1) * sizeof *boxes)), boxes[nboxes++] = box;
    if (wrong) fail(fd, wrong, where), forget(nboxes - 1);
}

static void receive(int from) {
    static char request[(1 << 18) + 1];
    char space[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec iov = {request, sizeof request - 1};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    ssize_t n = recvmsg(from, &msg, MSG_CMSG_CLOEXEC);
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
    int fd = -1;
    if (n < 0 && errno == EINTR) return;
    if (n > 0 && c && c->cmsg_type == SCM_RIGHTS) memcpy(&fd, CMSG_DATA(c), sizeof fd);
    if (n > 0 && fd >= 0) { launch(request, (size_t)n, fd); return; }
    if (n > 1 && *request == 'R') { request[n] = 0, free_store(request + 1); return; }
    for (size_t i = 0; i < nboxes; i++) kill(boxes[i].pid, SIGKILL);
    reap_boxes(0);
    _exit(0);
}

int zygote(int from, const char *dir, const char *user) {
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
    rootless = !strcmp(user, "user");
    make_nursery(dir);
    for (;;) {
        struct signalfd_siginfo info;
        struct pollfd p[3] = {{from, POLLIN, 0}, {owner, POLLIN, 0}, {sigfd, POLLIN, 0}};
        if (poll(p, 3, -1) < 0 && errno != EINTR) return 71;
        if (p[2].revents) { while (read(sigfd, &info, sizeof info) > 0) {} reap_boxes(WNOHANG); }
        if (p[1].revents) shutdown(from, SHUT_RDWR);
        if (p[0].revents || p[1].revents) receive(from);
    }
}

/* A store that a container engine sees too. In it, for each list of layers (their names relative to the store): an upper
 * directory u/I and the overlay m/I. The owner is shown the first list's: its origin, if there is one, u/0 and m/0. */
int host_store(char *name, uid_t owner, const char *options, const char *base, const char *origin, char **lists) {
    char path[64];
    umask(022), store = ".", uid = owner;
    if (make_store(name, options) || chdir(name) || chmod(".", 0700) || mkdir("m", 0755) || mkdir("empty", 0755)
        || mkdir("socket", 0711))
        die("store", name);
    if (*base && (userns = make_userns(0)) < 0) die("user namespace", "");
    if (*base) attach_base(base);
    if (*origin) show_origin(origin, "m");
    for (int i = 0; lists[i]; i++) {
        for (const char *part = "mwu"; *part; part++)
            if (snprintf(path, sizeof path, "%c/%d", *part, i), mkdir(path, 0755)) die("mkdir", path);
        if (chown(path, uid, uid)) die("chown", path);
        if (!i) show(path);
        *path = 'm', mount_overlay(lists[i], path + 1, path);
    }
    show("m/0");
    if (*base && umount2("b", MNT_DETACH)) die("umount", "b"); /* the overlays hold what they need of it */
    ready();
    return 0;
}
