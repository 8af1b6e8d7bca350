/* The launcher and the broker of sandboxes, one static binary.
 *
 * helper zygote FD        Reads requests on the seqpacket socket FD. A request is a list of operations (below) with the
 *                         control stream of the new sandbox attached. Clones the sandbox, reaps it and removes its
 *                         cgroups; the control stream reaches end of file on the owner's side only after that. Ends,
 *                         and every sandbox with it, when FD closes or the process that started it dies.
 * helper broker SOCK DIR  PID 1 of a container: connects to the unix socket SOCK and serves the same control stream.
 *
 * The broker runs as the sandbox's user, without capabilities, behind the same system call filter as everything that
 * it starts, and undumpable, so that nothing inside can read its memory or take its descriptors. It interprets no path
 * or limit policy: that is the owner's. What a process inside says about its own exit status is a claim of that process.
 *
 * Control stream, both ways: u32 length, u8 kind, body; integers are little-endian.
 *   S env\0..., then cwd is the work directory   start the shell                    -> K
 *   s cwd\0 env\0...                             the same with another cwd          -> K
 *   R u32 timeout_ms u32 cap u32 n stdin[n] script  run in the shell
 *        -> K u8 how(0 exit 1 signal 2 timeout) i32 status u8 restarted u64 total u32 ncwd u32 nhead cwd head tail
 *   G u64 offset u32 max path                    read a regular file                -> K u64 size data
 *   W (u32 mode u64 offset u64 size u32 npath u32 ndata path data)*  write files    -> K
 *   X                                            kill everything but the broker     -> K
 * Failures: N i32 errno u32 index (a request failed), E text (the sandbox could not be made).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <grp.h>

#define FRAME_MAX (8u << 20)
#define SCRIPT_MAX (1u << 20)
#define STATE_MAX (1u << 20)
#define MODE_KEEP 0xffffffffu
#define STAGE "/sys" /* the new root is mounted over it: a place that is never the source of a bind */
enum { FD_OUT = 196, FD_CMD, FD_GO, FD_STATUS };

static int ctl = -1; /* the control stream of this sandbox */

static void *must(void *p) { if (!p) _exit(70); return p; }

static void write_all(int fd, const void *data, size_t n) {
    for (const char *p = data; n;) {
        ssize_t k = send(fd, p, n, MSG_NOSIGNAL);
        if (k < 0 && errno == EINTR) continue;
        if (k <= 0) _exit(0); /* the owner is gone */
        p += k, n -= (size_t)k;
    }
}

static void read_all(int fd, void *data, size_t n) {
    for (char *p = data; n;) {
        ssize_t k = read(fd, p, n);
        if (k < 0 && errno == EINTR) continue;
        if (k <= 0) _exit(0);
        p += k, n -= (size_t)k;
    }
}

static void frame(int fd, char kind, const void *a, size_t na, const void *b, size_t nb) {
    char head[5];
    uint32_t n = (uint32_t)(1 + na + nb);
    memcpy(head, &n, 4), head[4] = kind;
    write_all(fd, head, 5), write_all(fd, a, na), write_all(fd, b, nb);
}

static void fail(int fd, const char *what, const char *arg) {
    char text[512];
    int n = snprintf(text, sizeof text, "%d %s%s%s: %s", errno, what, *arg ? " " : "", arg, strerror(errno));
    frame(fd, 'E', text, (size_t)n < sizeof text ? (size_t)n : sizeof text - 1, "", 0);
    shutdown(fd, SHUT_WR);
}

static void die(const char *what, const char *arg) { fail(ctl, what, arg); _exit(1); }

static int put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t n = (ssize_t)strlen(text), k = write(fd, text, (size_t)n);
    int saved = errno;
    close(fd), errno = saved;
    return k == n ? 0 : -1;
}

/* ---- the system call filter ------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#else
#error "codeworld's sandbox knows x86_64 and aarch64"
#endif
#define NEW_API_FIRST 428 /* open_tree .. fspick, mount_setattr: one numbering on every architecture */

static const int denied[] = {
    SYS_mount, SYS_umount2, SYS_pivot_root, SYS_chroot, SYS_setns, SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev,
    SYS_kcmp, SYS_bpf, SYS_perf_event_open, SYS_userfaultfd, 425, 426, 427 /* io_uring */, NEW_API_FIRST, 429, 430, 431, 432,
    433, 438 /* pidfd_getfd */, 442 /* mount_setattr */, 467 /* open_tree_attr */, 447 /* memfd_secret */, SYS_kexec_load,
    SYS_kexec_file_load, SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_add_key, SYS_request_key, SYS_keyctl,
    SYS_open_by_handle_at, SYS_name_to_handle_at, SYS_quotactl, SYS_acct, SYS_swapon, SYS_swapoff, SYS_reboot,
    SYS_settimeofday, SYS_clock_settime, SYS_clock_adjtime, SYS_adjtimex, SYS_syslog, SYS_vhangup, SYS_fanotify_init,
    SYS_sethostname, SYS_setdomainname, SYS_lookup_dcookie,
#ifdef __x86_64__
    SYS_iopl, SYS_ioperm, SYS_modify_ldt,
#endif
};

static struct sock_filter code[256];
static unsigned ncode;
static void bpf(uint16_t op, uint8_t yes, uint8_t no, uint32_t k) { code[ncode++] = (struct sock_filter){op, yes, no, k}; }
static void answer(uint32_t what) { bpf(BPF_RET | BPF_K, 0, 0, what); }
static void deny(int nr, int error) {
    bpf(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, (uint32_t)nr);
    answer(SECCOMP_RET_ERRNO | (uint32_t)error);
}

/* no_rlimit_escape: also refuse memory that neither RLIMIT_AS nor the tmpfs cap counts (there is no cgroup). */
static void filter(int no_rlimit_escape) {
    const uint32_t spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWUSER |
                            CLONE_NEWCGROUP | 0x80 /* time */;
    const uint32_t arg0 = offsetof(struct seccomp_data, args[0]);
    bpf(BPF_LD | BPF_W | BPF_ABS, 0, 0, offsetof(struct seccomp_data, arch));
    bpf(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, ARCH);
    answer(SECCOMP_RET_ERRNO | ENOSYS);
    bpf(BPF_LD | BPF_W | BPF_ABS, 0, 0, offsetof(struct seccomp_data, nr));
    bpf(BPF_JMP | BPF_JGE | BPF_K, 0, 1, 0x40000000u); /* x32 */
    answer(SECCOMP_RET_ERRNO | ENOSYS);
    for (unsigned i = 0; i < sizeof denied / sizeof *denied; i++) deny(denied[i], EPERM);
    deny(435 /* clone3: its flags are behind a pointer; libc falls back to clone */, ENOSYS);
    if (no_rlimit_escape) deny(SYS_memfd_create, ENOSYS), deny(SYS_shmget, ENOSYS), deny(SYS_mq_open, ENOSYS);
    for (int i = 0; i < 2; i++) {
        bpf(BPF_JMP | BPF_JEQ | BPF_K, 0, 4, i ? SYS_unshare : SYS_clone);
        bpf(BPF_LD | BPF_W | BPF_ABS, 0, 0, arg0);
        bpf(BPF_JMP | BPF_JSET | BPF_K, 0, 1, spaces);
        answer(SECCOMP_RET_ERRNO | EPERM);
        answer(SECCOMP_RET_ALLOW);
    }
    bpf(BPF_JMP | BPF_JEQ | BPF_K, 0, 6, SYS_socket); /* vsock and others are not in the network namespace */
    bpf(BPF_LD | BPF_W | BPF_ABS, 0, 0, arg0);
    bpf(BPF_JMP | BPF_JEQ | BPF_K, 4, 0, AF_UNIX);
    bpf(BPF_JMP | BPF_JEQ | BPF_K, 3, 0, AF_INET);
    bpf(BPF_JMP | BPF_JEQ | BPF_K, 2, 0, AF_INET6);
    bpf(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, AF_NETLINK);
    answer(SECCOMP_RET_ERRNO | EAFNOSUPPORT);
    answer(SECCOMP_RET_ALLOW);
    struct sock_fprog prog = {(unsigned short)ncode, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) die("no_new_privs", "");
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog)) die("seccomp", "");
}

/* ---- the broker ------------------------------------------------------------------------------------------------- */

static struct { pid_t pid; int out, go, status, fresh; } shell = {-1, -1, -1, -1, 0};
static int lost;        /* a shell that was not ended by us is gone since the last reply */
static int sigfd = -1, cmd = -1, workdir_fd = -1;
static char cwd[4096], workdir[4096];
static char **env;      /* of the first shell */
static char *exports;   /* `export -p` after the last command, for the next shell */
static char *status_text;
static size_t nstatus;
static char *cap_buf;   /* output kept: the first half is the head, the second a ring */
static uint32_t cap;
static uint64_t total;

/* The loop that the shell runs. Its own descriptors are closed while a command runs (bash keeps close-on-exec copies), so
 * that no process of the command inherits them; its own 0-2 are /dev/null, so that traps and `set -x` stay out of them. */
static const char LOOP[] =
    "IFS= builtin read -r -d '' -u 197 __cw; builtin eval \"$__cw\"\n"
    "while IFS= builtin read -r -u 198 __cw_in; do\n"
    "IFS= builtin read -r -d '' -u 197 __cw\n"
    "builtin eval \"$__cw\" <\"$__cw_in\" >&196 2>&196 196>&- 197<&- 198<&- 199>&-\n"
    "builtin printf '%s\\n' \"$?\" >&199; builtin export -p >&199; builtin printf '\\0' >&199\n"
    "done";

static void keep(const char *p, size_t n) {
    uint32_t half = cap / 2, ring = cap - half;
    while (n) {
        size_t at = total < half ? total : half + (total - half) % ring, k = (total < half ? half : cap) - at;
        if (k > n) k = n;
        memcpy(cap_buf + at, p, k);
        p += k, n -= k, total += k;
    }
}

/* Takes what the output pipe holds, at most `most` bytes; 0 when nothing was there. */
static int drain(size_t most) {
    static char chunk[65536];
    int any = 0;
    while (shell.out >= 0 && most) {
        ssize_t k = read(shell.out, chunk, most < sizeof chunk ? most : sizeof chunk);
        if (k < 0 && errno == EINTR) continue;
        if (k == 0) close(shell.out), shell.out = -1;
        if (k <= 0) break;
        keep(chunk, (size_t)k), most -= (size_t)k, any = 1;
    }
    return any;
}

static void drop_shell(void) { /* its output is read first: a background process may hold the pipe for ever */
    int left = 0;
    if (shell.out >= 0 && !ioctl(shell.out, FIONREAD, &left)) drain((size_t)left);
    if (shell.out >= 0) close(shell.out);
    if (shell.go >= 0) close(shell.go);
    if (shell.status >= 0) close(shell.status);
    shell.pid = shell.out = shell.go = shell.status = -1;
}

/* Reaps everything that ended; 1 with *how set when the shell was among it. */
static int reap(int *how) {
    struct signalfd_siginfo info;
    int gone = 0, st;
    while (read(sigfd, &info, sizeof info) > 0) {}
    for (pid_t pid; (pid = waitpid(-1, &st, WNOHANG)) > 0;)
        if (pid == shell.pid) gone = 1, *how = st;
    return gone;
}

static void kill_everything(void) {
    int st;
    kill(-1, SIGKILL); /* from PID 1: every other process of the namespace, atomically against fork */
    for (int i = 0; i < 500; i++) {
        reap(&st);
        if (waitpid(-1, &st, WNOHANG) < 0 && errno == ECHILD) break;
        struct pollfd p = {sigfd, POLLIN, 0};
        poll(&p, 1, 10);
    }
    if (shell.pid > 0) drop_shell();
}

static void shell_child(const int out, const int go, const int status) {
    static char *const argv[] = {"bash", "--norc", "--noprofile", "-c", (char *)LOOP, NULL}, *none[] = {NULL};
    sigset_t empty;
    sigemptyset(&empty);
    setsid();
    put("/proc/self/oom_score_adj", "1000"); /* never the broker first */
    int null = open("/dev/null", O_RDWR);
    if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0) _exit(126);
    if (dup2(out, FD_OUT) < 0 || dup2(cmd, FD_CMD) < 0 || dup2(go, FD_GO) < 0 || dup2(status, FD_STATUS) < 0) _exit(126);
    syscall(SYS_close_range, 3, FD_OUT - 1, 0);
    syscall(SYS_close_range, FD_STATUS + 1, ~0u, 0);
    if (chdir(cwd) && chdir(workdir) && chdir("/")) _exit(126);
    signal(SIGPIPE, SIG_DFL);
    sigprocmask(SIG_SETMASK, &empty, NULL);
    execve("/bin/bash", argv, exports ? (char **)none : env);
    _exit(127);
}

static int start_shell(void) {
    int out[2] = {-1, -1}, go[2] = {-1, -1}, status[2] = {-1, -1};
    const char *restore = exports ? exports : "";
    size_t n = strlen(restore) + 1;
    if (pwrite(cmd, restore, n, 0) != (ssize_t)n || lseek(cmd, 0, SEEK_SET)) return -1;
    if (pipe2(out, O_CLOEXEC) || pipe2(go, O_CLOEXEC) || pipe2(status, O_CLOEXEC)) return -1;
    fcntl(out[0], F_SETFL, O_NONBLOCK), fcntl(status[0], F_SETFL, O_NONBLOCK);
    pid_t pid = fork();
    if (!pid) shell_child(out[1], go[0], status[1]);
    close(out[1]), close(go[0]), close(status[1]);
    shell.pid = pid, shell.out = out[0], shell.go = go[1], shell.status = status[0], shell.fresh = (int)n;
    if (pid < 0) drop_shell();
    nstatus = 0;
    return pid < 0 ? -1 : 0;
}

/* 1 when the whole status came, -1 when the shell sends nonsense, else 0. */
static int read_status(int *exit_status) {
    for (;;) {
        ssize_t k = read(shell.status, status_text + nstatus, STATE_MAX - nstatus);
        if (k < 0 && errno == EINTR) continue;
        if (k <= 0) break;
        nstatus += (size_t)k;
        if (nstatus >= STATE_MAX) return -1;
    }
    if (!nstatus || status_text[nstatus - 1]) return 0;
    char *rest;
    long value = strtol(status_text, &rest, 10);
    if (rest == status_text || *rest != '\n' || value < 0 || value > 255) return -1;
    *exit_status = (int)value;
    free(exports), exports = must(strdup(rest + 1)), nstatus = 0;
    char link[64];
    snprintf(link, sizeof link, "/proc/%d/cwd", shell.pid);
    ssize_t n = readlink(link, cwd, sizeof cwd - 1);
    if (n > 0) cwd[n] = 0;
    return 1;
}

/* Hands the script to the shell; 0, or -1 when the shell can't take it (it is dead, or its pipe is). */
static int send_script(const char *script, size_t n, const char *input) {
    off_t at = shell.fresh;
    char line[80];
    if (!at && lseek(cmd, 0, SEEK_SET)) return -1;
    shell.fresh = 0;
    if (pwrite(cmd, script, n, at) != (ssize_t)n || pwrite(cmd, "", 1, at + (off_t)n) != 1) return -1;
    int k = snprintf(line, sizeof line, "%s\n", input);
    return write(shell.go, line, (size_t)k) == k ? 0 : -1;
}

static int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Waits for the command's end. how: 0 exit, 1 signal, 2 timeout; *again: the shell has to be started again. */
static int await(uint32_t timeout_ms, int *value, int *again) {
    int64_t deadline = now_ms() + timeout_ms;
    for (int st;;) {
        struct pollfd p[4] = {{ctl, POLLRDHUP, 0}, {shell.out, POLLIN, 0}, {shell.status, POLLIN, 0}, {sigfd, POLLIN, 0}};
        int64_t left = deadline - now_ms();
        if (left > 0 && poll(p, 4, left > 1 << 30 ? 1 << 30 : (int)left) < 0 && errno != EINTR) _exit(71);
        if (p[0].revents) _exit(0);
        if (p[1].revents) drain(1 << 20);
        int done = p[2].revents ? read_status(value) : 0;
        if (done > 0) return 0;
        if (p[3].revents && reap(&st)) {
            done = read_status(value); /* it may have answered and died since the poll */
            drop_shell(), *again = 1;
            if (done > 0) return 0;
            *value = WIFSIGNALED(st) ? WTERMSIG(st) : WEXITSTATUS(st);
            return WIFSIGNALED(st);
        }
        if (done < 0 || left <= 0) {
            kill_everything(), *again = 1, *value = SIGKILL;
            return done < 0 ? 1 : 2;
        }
    }
}

static void refuse(int error, uint32_t index) {
    int32_t e = error;
    frame(ctl, 'N', &e, 4, &index, 4);
}

static void reply_run(int how, int value, int again) {
    uint32_t half = cap / 2, ncwd = (uint32_t)strlen(cwd), nhead = total > cap ? half : (uint32_t)total;
    char *body = must(malloc(22 + ncwd + cap)), *p = body;
    int32_t value32 = value;
    *p++ = (char)how, memcpy(p, &value32, 4), p += 4, *p++ = (char)again, memcpy(p, &total, 8), p += 8;
    memcpy(p, &ncwd, 4), memcpy(p + 4, &nhead, 4), p += 8, memcpy(p, cwd, ncwd), p += ncwd;
    memcpy(p, cap_buf, nhead), p += nhead;
    if (total > cap) {
        uint32_t ring = cap - half, at = (uint32_t)((total - half) % ring);
        memcpy(p, cap_buf + half + at, ring - at), memcpy(p + ring - at, cap_buf + half, at), p += ring;
    }
    frame(ctl, 'K', body, (size_t)(p - body), "", 0);
    free(body), total = 0;
}

static void op_run(const char *body, size_t n) {
    uint32_t timeout_ms, want, nin;
    if (n < 12) _exit(72);
    memcpy(&timeout_ms, body, 4), memcpy(&want, body + 4, 4), memcpy(&nin, body + 8, 4), body += 12, n -= 12;
    if (nin > n || want < 2 || want > FRAME_MAX / 2) _exit(72);
    size_t nscript = n - nin;
    if (nscript > SCRIPT_MAX) { refuse(E2BIG, 0); return; }
    if (want != cap) cap_buf = must(realloc(cap_buf, want)), cap = want, total = 0;
    char input[64] = "/dev/null";
    if (nin) {
        strcpy(input, "/tmp/.stdin-XXXXXX");
        int fd = mkostemp(input, O_CLOEXEC);
        ssize_t k = fd < 0 ? -1 : write(fd, body, nin);
        int e = fd >= 0 && k >= 0 ? ENOSPC : errno;
        if (fd >= 0) close(fd);
        if (k != (ssize_t)nin) { if (fd >= 0) unlink(input); refuse(e, 0); return; }
    }
    int how = 1, value = SIGKILL, again = lost, st;
    lost = 0;
    if (reap(&st)) drop_shell(), again = 1;
    for (int tries = 0; tries < 2; tries++) {
        if (shell.pid < 0 && start_shell() < 0) { kill_everything(), again = 1; continue; }
        if (!send_script(body + nin, nscript, input)) { how = await(timeout_ms, &value, &again); break; }
        kill_everything(), again = 1;
    }
    int left = 0; /* what the command wrote is in the pipe by now; no more is waited for */
    if (shell.out >= 0 && !ioctl(shell.out, FIONREAD, &left) && left > 0) drain((size_t)left);
    if (nin) unlink(input);
    reply_run(how, value, again);
}

/* Opens for the owner, as the sandbox's user. Not through magic links and never on procfs: there, the broker is "self". */
static int open_inside(const char *path, size_t n, int flags, mode_t mode) {
    char full[2 * sizeof cwd];
    struct { uint64_t flags, mode, resolve; } how = {(uint64_t)flags, mode, 2 /* RESOLVE_NO_MAGICLINKS */};
    struct statfs fs;
    struct stat st;
    if (!n || memchr(path, 0, n)) { errno = EINVAL; return -1; }
    if (n >= sizeof cwd) { errno = ENAMETOOLONG; return -1; }
    snprintf(full, sizeof full, "%s%s%.*s", *path == '/' ? "" : cwd, *path == '/' ? "" : "/", (int)n, path);
    if (flags & O_CREAT)
        for (char *p = strchr(full + 1, '/'); p; p = strchr(p + 1, '/')) *p = 0, mkdir(full, 0755), *p = '/';
    int fd = (int)syscall(437 /* openat2 */, AT_FDCWD, full, &how, sizeof how);
    if (fd < 0) return -1;
    int e = fstat(fd, &st) || fstatfs(fd, &fs) ? errno : S_ISDIR(st.st_mode) ? EISDIR : !S_ISREG(st.st_mode) ? EINVAL :
            fs.f_type == 0x9fa0 /* proc */ ? EACCES : 0;
    if (!e) return fd;
    close(fd), errno = e;
    return -1;
}

static void op_read(const char *body, size_t n) {
    uint64_t offset;
    uint32_t most;
    struct stat st;
    if (n < 12) _exit(72);
    memcpy(&offset, body, 8), memcpy(&most, body + 8, 4);
    int fd = open_inside(body + 12, n - 12, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0);
    if (fd < 0 || fstat(fd, &st)) { refuse(errno, 0); return; }
    if (most > FRAME_MAX / 2) most = FRAME_MAX / 2;
    char *data = must(malloc(most + 1));
    ssize_t k = pread(fd, data, most, (off_t)offset);
    uint64_t size = (uint64_t)st.st_size;
    if (k < 0) refuse(errno, 0); else frame(ctl, 'K', &size, 8, data, (size_t)k);
    close(fd), free(data);
}

static int write_one(const char *path, uint32_t npath, uint32_t mode, uint64_t at, uint64_t size, const char *data, uint32_t n) {
    int keep_mode = mode == MODE_KEEP, e = 0;
    int fd = open_inside(path, npath, O_WRONLY | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, keep_mode ? 0644 : mode & 0777);
    if (fd < 0) return errno;
    /* room first: a full disk must not cost the file that was there */
    if (size && fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, (off_t)size) && errno != EOPNOTSUPP) e = errno;
    for (uint32_t done = 0; !e && done < n;) {
        ssize_t k = pwrite(fd, data + done, n - done, (off_t)(at + done));
        if (k < 0 && errno != EINTR) e = errno;
        if (k > 0) done += (uint32_t)k;
    }
    if (!e && (ftruncate(fd, (off_t)size) || (!keep_mode && fchmod(fd, mode & 0777)))) e = errno;
    close(fd);
    return e;
}

static void op_write(const char *body, size_t n) {
    for (uint32_t index = 0; n; index++) {
        uint32_t mode, npath, ndata;
        uint64_t at, size;
        if (n < 28) _exit(72);
        memcpy(&mode, body, 4), memcpy(&at, body + 4, 8), memcpy(&size, body + 12, 8);
        memcpy(&npath, body + 20, 4), memcpy(&ndata, body + 24, 4), body += 28, n -= 28;
        if (npath > n || ndata > n - npath) _exit(72);
        int e = write_one(body, npath, mode, at, size, body + npath, ndata);
        if (e) { refuse(e, index); return; }
        body += npath + ndata, n -= npath + ndata;
    }
    frame(ctl, 'K', "", 0, "", 0);
}

static void op_start(char *body, size_t n, int with_cwd) { /* the body lives on: env points into it */
    size_t count = 0;
    if (!n || body[n - 1]) _exit(72);
    if (with_cwd) snprintf(cwd, sizeof cwd, "%s", body);
    char *p = with_cwd ? body + strlen(body) + 1 : body, *end = body + n;
    env = must(calloc(n + 1, sizeof *env));
    for (; p < end; p += strlen(p) + 1) if (*p) env[count++] = p;
    frame(ctl, 'K', "", 0, "", 0);
    start_shell(); /* a failure shows, and is tried again, at the first command */
}

static void serve(void) {
    uint32_t n;
    char kind;
    read_all(ctl, &n, 4), read_all(ctl, &kind, 1);
    if (n < 1 || n > FRAME_MAX) _exit(72);
    char *body = must(malloc(n));
    read_all(ctl, body, n - 1), body[n - 1] = 0;
    if (kind == 'S' || kind == 's') { op_start(body, n - 1, kind == 's'); return; }
    if (kind == 'R') op_run(body, n - 1);
    else if (kind == 'G') op_read(body, n - 1);
    else if (kind == 'W') op_write(body, n - 1);
    else if (kind == 'X') kill_everything(), lost = 1, total = 0, frame(ctl, 'K', "", 0, "", 0);
    else _exit(72);
    free(body);
}

/* Says that the sandbox is ready (with its work directory's descriptor) and serves the control stream for ever. */
static void broker(void) {
    char ready[5] = {1, 0, 0, 0, 'K'}, space[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec iov = {ready, sizeof ready};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
    c->cmsg_level = SOL_SOCKET, c->cmsg_type = SCM_RIGHTS, c->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(c), &workdir_fd, sizeof(int));
    if (sendmsg(ctl, &msg, MSG_NOSIGNAL) != sizeof ready) _exit(0);
    close(workdir_fd), strcpy(cwd, workdir);
    cap = 4096, cap_buf = must(malloc(cap)), status_text = must(malloc(STATE_MAX));
    for (int st;;) {
        struct pollfd p[3] = {{ctl, POLLIN | POLLRDHUP, 0}, {shell.out, POLLIN, 0}, {sigfd, POLLIN, 0}};
        if (poll(p, 3, -1) < 0 && errno != EINTR) _exit(71);
        if (p[2].revents && reap(&st)) drop_shell(), lost = 1;
        if (p[1].revents) drain(1 << 20); /* a background job must not block on a full pipe; the next reply has it */
        if (p[0].revents) serve();
    }
}

/* What the broker needs of before the filter closes behind it. */
static void prepare_broker(const char *dir) {
    sigset_t chld;
    sigemptyset(&chld), sigaddset(&chld, SIGCHLD);
    snprintf(workdir, sizeof workdir, "%s", dir);
    if (getpid() != 1) { errno = EPERM; die("the broker must be PID 1", ""); }
    if (sigprocmask(SIG_SETMASK, &chld, NULL) || (sigfd = signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK)) < 0) die("signalfd", "");
    cmd = memfd_create("commands", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (cmd < 0 || ftruncate(cmd, SCRIPT_MAX + STATE_MAX + 2) || fcntl(cmd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL))
        die("memfd", "");
    if ((workdir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0) die("open", dir);
    umask(022);
    signal(SIGPIPE, SIG_IGN);
}

/* ---- making a sandbox ------------------------------------------------------------------------------------------- */

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
    if (syscall(442 /* mount_setattr */, AT_FDCWD, path, recursive ? 0x8000 : 0, &attr, sizeof attr)) die("mount_setattr", path);
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
        if (!getrlimit(atoi(op->a), &old) && limit.rlim_max > old.rlim_max) limit.rlim_cur = limit.rlim_max = old.rlim_max;
        if (setrlimit(atoi(op->a), &limit)) die("rlimit", op->a);
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
    if (own_user) map_user(outer_uid, outer_gid);
    put("/proc/self/oom_score_adj", "-1000"); /* where allowed; else the shell's higher score does */
    for (char *at = ops; next_op(&at, end, &op) > 0;) make(&op);
    if (sethostname("sandbox", 7)) die("hostname", "");
    loopback();
    if (syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/")) die("pivot_root", "");
    set_mount("/", RDONLY | NOSUID | NODEV, 0);
    prepare_broker(dir);
    drop_privileges();
    filter(strict);
    broker();
}

/* ---- the zygote ------------------------------------------------------------------------------------------------- */

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
    if (argc == 3 && !strcmp(argv[1], "zygote")) return zygote(atoi(argv[2]));
    if (argc == 4 && !strcmp(argv[1], "broker")) return container(argv[2], argv[3]);
    fputs("usage: helper zygote FD | helper broker SOCKET WORKDIR\n", stderr);
    return 2;
}
