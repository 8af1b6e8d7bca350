/* The broker: PID 1 of a sandbox, which runs commands and moves files for the owner.
 *
 * It runs as the sandbox's user, without capabilities, behind the same system call filter as everything that it starts,
 * and undumpable, so that nothing inside can read its memory or take its descriptors. It interprets no path or limit
 * policy, nor does it know when a command has had its time: that is the owner's (envs/sandbox/clocks.py). What a
 * process inside says about its own exit status is a claim of that process.
 *
 * Control stream: first u32 length and that many bytes of a BPF program, the system call filter. Then, both ways, u32
 * length, u8 kind, body; integers are little-endian.
 *   S workdir\0 cwd\0 env\0...          start the shell in cwd -> K
 *   R u32 tick_ms u32 cap u32 n input[n] script     run in the shell, stdin from the file `input`, which is removed
 *        -> (H u64 total)*, every tick_ms, then K u8 how(0 exit 1 signal 2 ended by X) i32 status u8 restarted
 *           u64 total u32 ncwd u32 nhead cwd head tail
 *   G u64 offset u32 max path           read a regular file -> K u64 size data
 *   W (u32 mode u64 offset u64 size u32 npath u32 ndata path data)*     write files -> K
 *   X                                   kill everything but the broker -> K; while a command runs, only its own reply
 * Failures: N i32 errno u32 index (a request failed), E text (the sandbox could not be made).
 */
#include "helper.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/vfs.h>
#include <time.h>

#define SCRIPT_MAX (1u << 20)
#define STATE_MAX (1u << 20)
#define MODE_KEEP 0xffffffffu
enum { FD_CMD = 197, FD_TALK };

static struct { pid_t pid; int out, talk; off_t at; } shell = {-1, -1, -1, 0}; /* at: what it has read of cmd */
static int lost;        /* a shell that was not ended by us is gone since the last reply */
static int cmd = -1;
static char cwd[4096], workdir[4096];
static char **env;      /* of the first shell */
static char *exports;   /* `export -p` after the last command, for the next shell */
static uint32_t ticket; /* of the command that was sent last: its status bears it */
static char *cap_buf;   /* output kept: the first half is the head, the second a ring */
static uint32_t cap;
static uint64_t total;

/* What the shell runs: it takes a command from `cmd`, leaves the exports after it, and says the status in one write,
 * for which the broker wakes once. Its own descriptors are closed while a command runs (bash keeps close-on-exec
 * copies), so that no process of the command inherits them; its 1 and 2 are /dev/null, where what `set -x` says of the
 * loop goes, its 0 is the output. */
static const char LOOP[] = /* on one line: the shell's messages then number the lines of the command from 1 */
    "IFS= builtin read -r -d '' -u 197 __cw; builtin eval \"$__cw\"; "
    "while IFS=' ' builtin read -r -u 198 __cw_ticket __cw_in; do "
    "IFS= builtin read -r -d '' -u 197 __cw; "
    "builtin eval \"$__cw\" >&0 2>&0 <\"${__cw_in:-/dev/null}\" 197<&- 198<&-; __cw=$?; "
    "builtin export -p >&197 || __cw=x; builtin printf '%s %s\\0' \"$__cw\" \"$__cw_ticket\" >&198; "
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

/* Takes what the output pipe holds, at most `most` bytes. */
static void drain(size_t most) {
    static char chunk[65536];
    while (shell.out >= 0 && most) {
        ssize_t k = read(shell.out, chunk, most < sizeof chunk ? most : sizeof chunk);
        if (k == 0) close(shell.out), shell.out = -1;
        if (k <= 0) break;
        keep(chunk, (size_t)k), most -= (size_t)k;
    }
}

/* Bytes that can be read now. */
static int waiting(int fd) {
    int n = 0;
    return fd >= 0 && !ioctl(fd, FIONREAD, &n) ? n : 0;
}

static void drop_shell(void) { /* its output is read first: a background process may hold the pipe for ever */
    drain((size_t)waiting(shell.out));
    if (shell.out >= 0) close(shell.out);
    if (shell.talk >= 0) close(shell.talk);
    shell.pid = shell.out = shell.talk = -1;
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

static void shell_child(const int out, const int talk) {
    static char *const argv[] = {"bash", "--norc", "--noprofile", "-c", (char *)LOOP, NULL}, *none[] = {NULL};
    sigset_t empty;
    sigemptyset(&empty);
    setsid();
    put("/proc/self/oom_score_adj", "1000"); /* never the broker first */
    int null = open("/dev/null", O_RDWR);
    if (null < 0 || dup2(out, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0) _exit(126);
    if (dup2(cmd, FD_CMD) < 0 || dup2(talk, FD_TALK) < 0) _exit(126);
    syscall(SYS_close_range, 3, FD_CMD - 1, 0);
    syscall(SYS_close_range, FD_TALK + 1, ~0u, 0);
    if (chdir(cwd) && chdir(workdir) && chdir("/")) _exit(126);
    for (int i = 1; i < NSIG; i++) signal(i, SIG_DFL); /* an owner started in the background ignores SIGINT */
    sigprocmask(SIG_SETMASK, &empty, NULL);
    execve("/bin/bash", argv, exports ? (char **)none : env);
    _exit(127);
}

static int start_shell(void) {
    int out[2] = {-1, -1}, talk[2] = {-1, -1};
    const char *restore = exports ? exports : "";
    size_t n = strlen(restore) + 1;
    if (pwrite(cmd, restore, n, 0) != (ssize_t)n || lseek(cmd, 0, SEEK_SET)) return -1;
    if (pipe2(out, O_CLOEXEC) || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, talk)) return -1;
    fcntl(out[0], F_SETFL, O_NONBLOCK), fcntl(talk[0], F_SETFL, O_NONBLOCK);
    pid_t pid = fork();
    if (!pid) shell_child(out[1], talk[1]);
    close(out[1]), close(talk[1]);
    shell.pid = pid, shell.out = out[0], shell.talk = talk[0], shell.at = (off_t)n;
    if (pid < 0) drop_shell();
    return pid < 0 ? -1 : 0;
}

/* Takes the exports that the shell has left behind the command. */
static int take_exports(void) {
    off_t n = lseek(cmd, 0, SEEK_CUR) - shell.at;
    if (n < 0 || n >= STATE_MAX) return -1;
    char *text = must(malloc((size_t)n + 1));
    if (pread(cmd, text, (size_t)n, shell.at) != n) return free(text), -1;
    free(exports), exports = text, text[n] = 0, shell.at = 0;
    return 0;
}

/* 1 when "STATUS TICKET" came, -1 when it is nonsense or bears another command's ticket, else 0. */
static int read_status(int *exit_status) {
    char text[20] = "", link[64], *rest, *last;
    ssize_t n = read(shell.talk, text, sizeof text - 1);
    if (n == 0) close(shell.talk), shell.talk = -1; /* by `exec`: its end is still waited for */
    if (n <= 0) return 0;
    long value = strtol(text, &rest, 10);
    unsigned long given = strtoul(rest, &last, 10);
    if (rest == text || last == rest || last != text + n - 1 || *last || value < 0 || value > 255) return -1;
    if (given != ticket || take_exports()) return -1;
    *exit_status = (int)value;
    snprintf(link, sizeof link, "/proc/%d/cwd", shell.pid);
    if ((n = readlink(link, cwd, sizeof cwd - 1)) > 0) cwd[n] = 0;
    return 1;
}

/* Hands the script, which a 0 ends, to the shell; 0, or -1 when the shell can't take it (it is dead). */
static int send_script(const char *script, size_t n, const char *input) {
    char line[80];
    if (!shell.at && lseek(cmd, 0, SEEK_SET)) return -1;
    if (pwrite(cmd, script, n + 1, shell.at) != (ssize_t)n + 1) return -1;
    shell.at += (off_t)n + 1;
    if (getrandom(&ticket, sizeof ticket, 0) != sizeof ticket) return -1;
    int k = snprintf(line, sizeof line, "%u %s\n", ticket, input);
    return write(shell.talk, line, (size_t)k) == k ? 0 : -1;
}

static int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Waits for the command's end, says every tick how much it has written. how: 0 exit, 1 signal, 2 ended by the owner;
 * *again: the shell has to be started again. */
static int await(int64_t tick, int *value, int *again) {
    char head[5];
    int64_t next = now_ms() + tick;
    for (int st, done;;) {
        struct pollfd p[4] = {
            {ctl, POLLIN | POLLRDHUP, 0}, {shell.out, POLLIN, 0}, {shell.talk, POLLIN, 0}, {sigfd, POLLIN, 0}};
        int64_t left = next - now_ms();
        if (poll(p, 4, left > 0 ? (int)left : 0) < 0 && errno != EINTR) _exit(71);
        if (p[1].revents) drain(1 << 20);
        if ((done = p[2].revents ? read_status(value) : 0) > 0) return 0;
        if (p[3].revents && reap(&st)) {
            done = read_status(value); /* it may have answered and died since the poll */
            drop_shell(), *again = 1;
            if (done > 0) return 0;
            *value = WIFSIGNALED(st) ? WTERMSIG(st) : WEXITSTATUS(st);
            return WIFSIGNALED(st);
        }
        if (p[0].revents) read_all(ctl, head, sizeof head); /* an X, or the end */
        if (p[0].revents || done < 0) {
            kill_everything(), *again = 1, *value = SIGKILL;
            return done < 0 ? 1 : 2;
        }
        if (now_ms() < next) continue;
        frame(ctl, 'H', &(struct iovec){&total, sizeof total}, 1);
        next = now_ms() + tick;
    }
}

struct __attribute__((packed)) reply { char how; int32_t value; char again; uint64_t total; uint32_t ncwd, nhead; };

static void reply_run(int how, int value, int again) {
    uint32_t half = cap / 2, ncwd = (uint32_t)strlen(cwd), nhead = total > cap ? half : (uint32_t)total;
    uint32_t ntail = total > cap ? cap - half : 0, at = ntail ? (uint32_t)((total - half) % ntail) : 0;
    struct reply reply = {(char)how, value, (char)again, total, ncwd, nhead};
    char *ring = cap_buf + half;
    struct iovec parts[] = {
        {&reply, sizeof reply}, {cwd, ncwd}, {cap_buf, nhead}, {ring + at, ntail - at}, {ring, at}};
    frame(ctl, 'K', parts, 5);
    total = 0;
}

/* Takes the first bytes of a request. */
static void take(void *to, size_t size, const char **body, size_t *n) {
    if (size > *n) _exit(72);
    memcpy(to, *body, size), *body += size, *n -= size;
}

static int op_run(const char *body, size_t n) {
    struct { uint32_t tick, cap, nin; } ask;
    char input[64];
    take(&ask, sizeof ask, &body, &n);
    if (ask.nin >= sizeof input || ask.cap < 2 || ask.cap > FRAME_MAX / 2) _exit(72);
    take(input, ask.nin, &body, &n), input[ask.nin] = 0;
    if (n > SCRIPT_MAX) return E2BIG;
    if (ask.cap != cap) cap_buf = must(realloc(cap_buf, ask.cap)), cap = ask.cap, total = 0;
    int how = 1, value = SIGKILL, again = lost, sent = 0, st;
    lost = 0;
    if (reap(&st)) drop_shell(), again = 1;
    if (shell.pid > 0 && waiting(shell.talk)) kill_everything(), again = 1; /* somebody else has hold of its socket */
    for (int tries = 0; tries < 2 && !sent; tries++) {
        sent = (shell.pid >= 0 || !start_shell()) && !send_script(body, n, input);
        if (!sent) kill_everything(), again = 1;
    }
    if (sent) how = await(ask.tick, &value, &again);
    drain((size_t)waiting(shell.out)); /* what the command wrote is in the pipe by now; no more is waited for */
    if (ask.nin) unlink(input);
    reply_run(how, value, again);
    return 0;
}

/* Opens for the owner, as the sandbox's user. Not through magic links, never on procfs: there, the broker is "self". */
static int open_inside(const char *path, size_t n, int flags, mode_t mode) {
    char full[2 * sizeof cwd];
    struct { uint64_t flags, mode, resolve; } how = {(uint64_t)flags, mode, 2 /* RESOLVE_NO_MAGICLINKS */};
    struct statfs fs;
    struct stat st;
    snprintf(full, sizeof full, "%s%s%.*s", *path == '/' ? "" : cwd, *path == '/' ? "" : "/", (int)n, path);
    if (flags & O_CREAT)
        for (char *p = strchr(full + 1, '/'); p; p = strchr(p + 1, '/')) *p = 0, mkdir(full, 0755), *p = '/';
    int fd = (int)syscall(437 /* openat2 */, AT_FDCWD, full, &how, sizeof how);
    if (fd < 0) return -1;
    int e = fstat(fd, &st) || fstatfs(fd, &fs) ? errno : 0;
    if (!e && S_ISDIR(st.st_mode)) e = EISDIR;
    if (!e && !S_ISREG(st.st_mode)) e = EINVAL;
    if (!e && fs.f_type == 0x9fa0 /* proc */) e = EACCES;
    if (!e) return fd;
    close(fd), errno = e;
    return -1;
}

static int op_read(const char *body, size_t n) {
    struct __attribute__((packed)) { uint64_t offset; uint32_t most; } ask;
    struct stat st;
    take(&ask, sizeof ask, &body, &n);
    int fd = open_inside(body, n, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0);
    if (fd < 0 || fstat(fd, &st)) return errno;
    if (ask.most > FRAME_MAX / 2) ask.most = FRAME_MAX / 2;
    char *data = must(malloc(ask.most + 1));
    ssize_t k = pread(fd, data, ask.most, (off_t)ask.offset);
    uint64_t size = (uint64_t)st.st_size;
    int e = k < 0 ? errno : 0;
    if (!e) frame(ctl, 'K', (struct iovec[]){{&size, 8}, {data, (size_t)k}}, 2);
    close(fd), free(data);
    return e;
}

struct __attribute__((packed)) file { uint32_t mode; uint64_t at, size; uint32_t npath, ndata; };

static int write_one(const struct file *file, const char *path, const char *data) {
    int keep_mode = file->mode == MODE_KEEP, flags = O_WRONLY | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, e = 0;
    int fd = open_inside(path, file->npath, flags, keep_mode ? 0644 : file->mode & 0777);
    if (fd < 0) return errno;
    /* room first: a full disk must not cost the file that was there */
    if (file->size && fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, (off_t)file->size) && errno != EOPNOTSUPP) e = errno;
    ssize_t k = e ? 0 : pwrite(fd, data, file->ndata, (off_t)file->at);
    if (!e && k != (ssize_t)file->ndata) e = k < 0 ? errno : ENOSPC;
    if (!e && (ftruncate(fd, (off_t)file->size) || (!keep_mode && fchmod(fd, file->mode & 0777)))) e = errno;
    close(fd);
    return e;
}

static int op_write(const char *body, size_t n, uint32_t *index) {
    struct file file;
    for (; n; ++*index) {
        take(&file, sizeof file, &body, &n);
        if (file.npath > n || file.ndata > n - file.npath) _exit(72);
        int e = write_one(&file, body, body + file.npath);
        if (e) return e;
        body += file.npath + file.ndata, n -= file.npath + file.ndata;
    }
    frame(ctl, 'K', NULL, 0);
    return 0;
}

static void op_start(char *body, size_t n) { /* the body lives on: env points into it */
    char *p = body, *end = body + n;
    size_t count = 0;
    if (n < 2 || body[n - 1]) _exit(72);
    p += snprintf(workdir, sizeof workdir, "%s", p) + 1;
    p += snprintf(cwd, sizeof cwd, "%s", p) + 1;
    env = must(calloc(n, sizeof *env));
    for (; p < end; p += strlen(p) + 1) env[count++] = p;
    frame(ctl, 'K', NULL, 0);
    start_shell(); /* a failure shows, and is tried again, at the first command */
}

static void serve(void) {
    uint32_t n, index = 0;
    int32_t error = 0;
    char kind;
    read_all(ctl, &n, 4), read_all(ctl, &kind, 1);
    if (n < 1 || n > FRAME_MAX) _exit(72);
    char *body = must(malloc(n));
    read_all(ctl, body, n - 1), body[n - 1] = 0;
    if (kind == 'S') op_start(body, n - 1);
    else if (kind == 'R') error = op_run(body, n - 1);
    else if (kind == 'G') error = op_read(body, n - 1);
    else if (kind == 'W') error = op_write(body, n - 1, &index);
    else if (kind == 'X') kill_everything(), lost = 1, total = 0, frame(ctl, 'K', NULL, 0);
    else _exit(72);
    if (error) frame(ctl, 'N', (struct iovec[]){{&error, 4}, {&index, 4}}, 2);
    if (kind != 'S') free(body);
}

/* Puts on the system call filter that the owner sends first. A malformed one is refused by the kernel. */
static void filter(void) {
    uint32_t n;
    read_all(ctl, &n, 4);
    struct sock_filter *code = must(malloc(n));
    read_all(ctl, code, n);
    struct sock_fprog program = {(unsigned short)(n / sizeof *code), code};
    if (prctl(PR_SET_DUMPABLE, 0)) die("prctl");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) die("no_new_privs");
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) die("seccomp");
    free(code);
}

/* What it needs of before the filter closes behind it. */
static void prepare(void) {
    if (getpid() != 1) errno = EPERM, die("the broker must be PID 1");
    watch_children();
    cmd = memfd_create("commands", MFD_CLOEXEC | MFD_ALLOW_SEALING); /* sealed: the shell's user could grow it */
    if (cmd < 0 || ftruncate(cmd, SCRIPT_MAX + 2 * STATE_MAX + 2)) die("memfd");
    if (fcntl(cmd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL)) die("memfd seal");
    umask(022);
}

/* Says that the sandbox is ready, with descriptors of `view` and of /proc, and serves the control stream for ever. */
void broker(const char *view) {
    if (open(view, O_RDONLY | O_DIRECTORY | O_CLOEXEC) < 0) die("open the view");
    int last = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (last < 0) die("open /proc");
    close(4);
    prepare();
    filter();
    ready(last);
    cap = 4096, cap_buf = must(malloc(cap));
    for (int st;;) {
        struct pollfd p[3] = {{ctl, POLLIN | POLLRDHUP, 0}, {shell.out, POLLIN, 0}, {sigfd, POLLIN, 0}};
        if (poll(p, 3, -1) < 0 && errno != EINTR) _exit(71);
        if (p[2].revents && reap(&st)) drop_shell(), lost = 1;
        if (p[1].revents) drain(1 << 20); /* a background job must not block on a full pipe; the next reply has it */
        if (p[0].revents) serve();
    }
}
