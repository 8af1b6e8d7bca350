/* The broker: PID 1 of a sandbox, which runs commands and moves files for the owner.
 *
 * It runs as the sandbox's user, without capabilities, behind the same system call filter as everything that it starts,
 * and undumpable, so that nothing inside can read its memory or take its descriptors. It interprets no path or limit
 * policy: that is the owner's. What a process inside says about its own exit status is a claim of that process.
 *
 * Control stream: first u32 length and that many bytes of a BPF program, the system call filter. Then, both ways, u32
 * length, u8 kind, body; integers are little-endian.
 *   S workdir\0 cwd\0 env\0...   start the shell in cwd                  -> K
 *   R u32 timeout_ms u32 silence_ms(0: off) u32 guard u32 cap u32 n stdin[n] script   run in the shell
 *        -> H* (alive, every 10 s), then K u8 how(0 exit 1 signal 2 timeout 3 silence) i32 status u8 restarted
 *           u64 total u32 ncwd u32 nhead cwd head tail
 *   G u64 offset u32 max path                        read a regular file  -> K u64 size data
 *   W (u32 mode u64 offset u64 size u32 npath u32 ndata path data)*  write files -> K
 *   X                     kill everything but the broker                 -> K
 * Failures: N i32 errno u32 index (a request failed), E text (the sandbox could not be made).
 */
#include "helper.h"
#include <dirent.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/vfs.h>
#include <time.h>

#define SCRIPT_MAX (1u << 20)
#define STATE_MAX (1u << 20)
#define MODE_KEEP 0xffffffffu
#define BEAT_MS 10000
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

/* What the shell runs: it takes a command from `cmd`, leaves the exports after it, and says the status in one write, for
 * which the broker wakes once. Its own descriptors are closed while a command runs (bash keeps close-on-exec copies), so
 * that no process of the command inherits them; its 1 and 2 are /dev/null, where what `set -x` says of the loop goes, its
 * 0 is the output. */
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
    if (pread(cmd, text, (size_t)n, shell.at) != n) { free(text); return -1; }
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

/* 1 when the shell said something that no command was waiting for: somebody else has hold of its socket. */
static int out_of_step(void) {
    int left = 0;
    return shell.pid > 0 && shell.talk >= 0 && !ioctl(shell.talk, FIONREAD, &left) && left;
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

/* CPU ms used so far by all that ran here but the broker; *ready: a process has a core now or waits for one. What a
 * parent that ignores SIGCHLD has reaped is missing: hiding there makes a command look idle, which ends it sooner. */
static int64_t cpu_ms(int *ready) {
    struct rusage reaped;
    getrusage(RUSAGE_CHILDREN, &reaped);
    int64_t us = reaped.ru_utime.tv_usec + reaped.ru_stime.tv_usec, ticks = 0, hz = sysconf(_SC_CLK_TCK);
    DIR *proc = opendir("/proc");
    *ready = 0;
    for (struct dirent *e; proc && (e = readdir(proc));) {
        char path[64], text[1024], state, *after;
        long user, sys, child_user, child_sys;
        if (atoi(e->d_name) < 2) continue;
        snprintf(path, sizeof path, "/proc/%d/stat", atoi(e->d_name));
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
        if (fd >= 0) close(fd);
        text[n > 0 ? n : 0] = 0, after = strrchr(text, ')'); /* the name before it may hold anything */
        if (!after || sscanf(after, ") %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %ld %ld %ld %ld", &state, &user, &sys,
                             &child_user, &child_sys) != 5) continue;
        ticks += user + sys + child_user + child_sys, *ready |= state == 'R';
    }
    if (proc) closedir(proc);
    return (reaped.ru_utime.tv_sec + reaped.ru_stime.tv_sec) * 1000 + us / 1000 + ticks * 1000 / hz;
}

/* A command's clock, in ms: `limit` (below 0: none) of wall time since `since`, when all had used `cpu` (-1: not known). */
struct watch { int64_t limit, since, cpu; };

/* Past its limit, a command goes on while it is starved (not idle, less CPU time used than the limit), up to the guard. */
static int over(struct watch *w, int64_t now, int64_t cpu, int idle, uint32_t guard) {
    int64_t wall = now - w->since;
    if (w->cpu < 0) w->cpu = cpu;
    return w->limit >= 0 && wall >= w->limit && (idle || cpu - w->cpu >= w->limit || wall >= guard * w->limit);
}

/* Waits for the command's end. how: 0 exit, 1 signal, 2 timeout, 3 silence; *again: the shell has to be started again. */
static int await(const uint32_t clocks[3], int *value, int *again) { /* timeout_ms, silence_ms, guard */
    int64_t now = now_ms(), last = -1, at = now, beat = now, idle;
    struct watch whole = {clocks[0], now, -1}, quiet = {clocks[1] ? (int64_t)clocks[1] : -1, now, -1};
    int64_t least = clocks[1] && clocks[1] < clocks[0] ? clocks[1] : clocks[0];
    int64_t every = least / 20 < 200 ? 200 : least / 20 > 1000 ? 1000 : least / 20; /* between looks at CPU clocks */
    if (every > least / 2) every = least / 2; /* the second look is no later than the first limit */
    for (int st, ready;;) {
        struct pollfd p[4] = {
            {ctl, POLLRDHUP, 0}, {shell.out, POLLIN, 0}, {shell.talk, POLLIN, 0}, {sigfd, POLLIN, 0}};
        uint64_t before = total;
        int64_t left = at + every - now_ms();
        if (poll(p, 4, left > 0 ? (int)left : 0) < 0 && errno != EINTR) _exit(71);
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
        now = now_ms();
        if (total != before) quiet.since = now, quiet.cpu = -1;
        int how = done < 0;
        if (!how && now >= at + every) {
            int64_t cpu = cpu_ms(&ready);
            idle = last >= 0 && !ready && (cpu - last) * 20 < now - at; /* it slept: less than 5 % of a core */
            how = over(&whole, now, cpu, idle, clocks[2]) ? 2 : over(&quiet, now, cpu, idle, clocks[2]) ? 3 : 0;
            last = cpu, at = now;
            if (now - beat >= BEAT_MS) frame(ctl, 'H', "", 0, "", 0), beat = now;
        }
        if (how) {
            kill_everything(), *again = 1, *value = SIGKILL;
            return how;
        }
    }
}

static void refuse(int error, uint32_t index) {
    int32_t e = error;
    frame(ctl, 'N', &e, 4, &index, 4);
}

/* how u8, status i32, restarted u8, total u64, lengths of cwd and head u32, cwd, head, tail */
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
    uint32_t clocks[3], want, nin;
    if (n < 20) _exit(72);
    memcpy(clocks, body, 12), memcpy(&want, body + 12, 4), memcpy(&nin, body + 16, 4), body += 20, n -= 20;
    if (nin > n || want < 2 || want > FRAME_MAX / 2) _exit(72);
    size_t nscript = n - nin;
    if (nscript > SCRIPT_MAX) { refuse(E2BIG, 0); return; }
    if (want != cap) cap_buf = must(realloc(cap_buf, want)), cap = want, total = 0;
    char input[64] = "";
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
    if (out_of_step()) kill_everything(), again = 1;
    for (int tries = 0; tries < 2; tries++) {
        if (shell.pid < 0 && start_shell() < 0) { kill_everything(), again = 1; continue; }
        if (!send_script(body + nin, nscript, input)) { how = await(clocks, &value, &again); break; }
        kill_everything(), again = 1;
    }
    int left = 0; /* what the command wrote is in the pipe by now; no more is waited for */
    if (shell.out >= 0 && !ioctl(shell.out, FIONREAD, &left) && left > 0) drain((size_t)left);
    if (nin) unlink(input);
    reply_run(how, value, again);
}

/* Opens for the owner, as the sandbox's user. Not through magic links, never on procfs: there, the broker is "self". */
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
    int e = fstat(fd, &st) || fstatfs(fd, &fs) ? errno : 0;
    if (!e && S_ISDIR(st.st_mode)) e = EISDIR;
    if (!e && !S_ISREG(st.st_mode)) e = EINVAL;
    if (!e && fs.f_type == 0x9fa0 /* proc */) e = EACCES;
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

static int write_one(const char *path, uint32_t npath, uint32_t mode, uint64_t at, uint64_t size, const char *data,
                     uint32_t n) {
    int keep_mode = mode == MODE_KEEP, e = 0;
    int flags = O_WRONLY | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
    int fd = open_inside(path, npath, flags, keep_mode ? 0644 : mode & 0777);
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

static void op_start(char *body, size_t n) { /* the body lives on: env points into it */
    char *p = body, *end = body + n;
    size_t count = 0;
    if (n < 2 || body[n - 1]) _exit(72);
    p += snprintf(workdir, sizeof workdir, "%s", p) + 1;
    p += snprintf(cwd, sizeof cwd, "%s", p) + 1;
    env = must(calloc(n, sizeof *env));
    for (; p < end; p += strlen(p) + 1) env[count++] = p;
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
    if (kind == 'S') { op_start(body, n - 1); return; }
    if (kind == 'R') op_run(body, n - 1);
    else if (kind == 'G') op_read(body, n - 1);
    else if (kind == 'W') op_write(body, n - 1);
    else if (kind == 'X') kill_everything(), lost = 1, total = 0, frame(ctl, 'K', "", 0, "", 0);
    else _exit(72);
    free(body);
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
    sigset_t chld;
    sigemptyset(&chld), sigaddset(&chld, SIGCHLD);
    if (getpid() != 1) errno = EPERM, die("the broker must be PID 1");
    if (sigprocmask(SIG_SETMASK, &chld, NULL)) die("sigprocmask");
    if ((sigfd = signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK)) < 0) die("signalfd");
    cmd = memfd_create("commands", MFD_CLOEXEC | MFD_ALLOW_SEALING); /* sealed: the shell's user could grow it */
    if (cmd < 0 || ftruncate(cmd, SCRIPT_MAX + 2 * STATE_MAX + 2)) die("memfd");
    if (fcntl(cmd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL)) die("memfd seal");
    umask(022);
    signal(SIGPIPE, SIG_IGN);
}

/* Says that the sandbox is ready, with a descriptor of `view`, and serves the control stream for ever. */
void broker(const char *view) {
    if (open(view, O_RDONLY | O_DIRECTORY | O_CLOEXEC) < 0) die("open the view");
    int shown = seen();
    close(4);
    prepare();
    filter();
    ready(shown);
    cap = 4096, cap_buf = must(malloc(cap));
    for (int st;;) {
        struct pollfd p[3] = {{ctl, POLLIN | POLLRDHUP, 0}, {shell.out, POLLIN, 0}, {sigfd, POLLIN, 0}};
        if (poll(p, 3, -1) < 0 && errno != EINTR) _exit(71);
        if (p[2].revents && reap(&st)) drop_shell(), lost = 1;
        if (p[1].revents) drain(1 << 20); /* a background job must not block on a full pipe; the next reply has it */
        if (p[0].revents) serve();
    }
}
