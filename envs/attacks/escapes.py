"""The programs of attack list A, which run inside a sandbox behind `stage.PRELUDE`: a line for each attempt."""

PATHS = """
secret, token = sys.argv[1:]
def hit(path):
    with open(path, "r+") as file:
        if token not in file.read(): raise FileNotFoundError(2, "another file")
        file.write("written by the sandbox")
pids = [pid for pid in os.listdir("/proc") if pid.isdigit()]
roots = ["", "/proc/self/root"] + [f"/proc/{pid}/{name}" for pid in pids for name in ("root", "cwd")]
for root in roots: attempt(root + secret, hit, root + secret)
attempt("dots", hit, "../" * 64 + secret)
for fd in os.listdir("/proc/self/fd"):
    attempt(f"fd {fd}", hit, f"/proc/self/fd/{fd}/" + "../" * 64 + secret)
    attempt(f"file {fd}", hit, f"/proc/self/fd/{fd}")
top = os.open("/", os.O_RDONLY)
attempt("openat", lambda: os.close(os.open("../" * 8 + secret.lstrip("/"), os.O_RDWR, dir_fd=top)))
"""

CHROOT = """
secret, token = sys.argv[1:]
def escape(how):
    os.makedirs("jail", exist_ok=True)
    top = os.open(".", os.O_RDONLY)
    os.chroot("jail")
    os.fchdir(top) if how else None
    for _ in range(64): os.chdir("..")
    os.chroot(".")
    if token not in open(secret).read(): raise FileNotFoundError(2, "inside")
for how in (0, 1): attempt(f"chroot {how}", escape, how)
"""

MOUNTS = """
points = [line.split()[4] for line in open("/proc/self/mountinfo")]
NULL = ctypes.c_char_p(None)
for point in points:
    name = point.encode()
    say(f"remount {point}", call("mount", NULL, name, NULL, 32, NULL))
    say(f"rebind rw {point}", call("mount", NULL, name, NULL, 32 | 4096, NULL))
    say(f"umount {point}", call("umount2", name, 2))
    say(f"setattr {point}", call("mount_setattr", -100, name, 0, b"\\0" * 8 + b"\\1" + b"\\0" * 23, 32))
for where in (b"/etc", b"/usr", b"/tmp", b"/proc", b"/repo"):
    say(f"tmpfs {where}", call("mount", b"x", where, b"tmpfs", 0, NULL))
    say(f"bind {where}", call("mount", b"/tmp", where, NULL, 4096, NULL))
    say(f"move {where}", call("mount", where, b"/tmp", NULL, 8192, NULL))
for kind in (b"proc", b"sysfs", b"cgroup", b"cgroup2", b"overlay", b"devtmpfs", b"bpf", b"debugfs"):
    say(f"mount {kind}", call("mount", b"x", b"/tmp", kind, 0, NULL))
    say(f"fsopen {kind}", call("fsopen", kind, 0))
say("open_tree", call("open_tree", -100, b"/", 1))
say("fspick", call("fspick", -100, b"/", 0))
say("pivot_root", call("pivot_root", b"/repo", b"/repo"))
def touch(path):
    open(path, "w").close()
for where in ("/", "/usr", "/etc", "/usr/bin", "/proc", "/sys"):
    attempt(f"write {where}", touch, f"{where}/{sys.argv[1]}")
for path in ("/etc/passwd", "/etc/ld.so.cache", "/usr/bin/env", sys.executable):
    attempt(f"open {path}", lambda: os.close(os.open(path, os.O_WRONLY)))
"""

KERNEL = """
def overwrite(path, text):
    fd = os.open(path, os.O_WRONLY)
    try: os.write(fd, text.encode())
    finally: os.close(fd)
K = "/proc/sys/kernel/"
for path, text in ((K + "core_pattern", "attack"), (K + "modprobe", "/tmp/x"), (K + "hostname", "attack"),
    (K + "poweroff_cmd", "/tmp/x"), (K + "ns_last_pid", "300"), (K + "hotplug", "/tmp/x"), ("/proc/sysrq-trigger", "h"),
    ("/proc/sys/fs/binfmt_misc/register", ":x:E::x::/tmp/x:"), ("/sys/kernel/uevent_helper", "/tmp/x"),
    ("/sys/power/state", ""), ("/proc/irq/default_smp_affinity", "1"), ("/proc/1/oom_score_adj", "1000")):
    attempt(path, overwrite, path, text)
for top in ("/proc/sys", "/sys"):
    for directory, _, names in os.walk(top):
        for name in names:
            path = os.path.join(directory, name)
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                if os.path.dirname(path) != "/sys/fs/selinux": say("write " + path, "ok")
            except OSError: pass
            if name in ("release_agent", "notify_on_release", "cgroup.procs", "tasks", "devices.allow"):
                attempt("write " + path, overwrite, path, "/tmp/x")
say("init_module", call("init_module", b"", 0, b""))
say("finit_module", call("finit_module", 0, b"", 0))
say("delete_module", call("delete_module", b"attack", 0))
attempt("/proc/kcore", lambda: os.read(os.open("/proc/kcore", os.O_RDONLY), 4096)[:4] == b"\\x7fELF" or 1 / 0)
"""

DEVICES = """
FINE = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "console"}
for directory, names, files in os.walk("/dev"):
    names[:] = [n for n in names if n not in ("shm", "mqueue", "fd")]
    for name in files:
        path = os.path.join(directory, name)
        mode = os.lstat(path).st_mode
        if (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)) and name not in FINE and directory != "/dev/pts":
            attempt("open " + path, lambda: os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)))
for name in ("kmsg", "mem", "port", "kmem", "fuse", "kvm", "net/tun", "loop-control", "sda", "vda", "mapper/control"):
    attempt(name, lambda: os.close(os.open("/dev/" + name, os.O_RDONLY | os.O_NONBLOCK)))
for kind, major, minor in ((stat.S_IFCHR, 1, 1), (stat.S_IFCHR, 1, 11), (stat.S_IFCHR, 10, 229), (stat.S_IFCHR, 10, 232),
                           (stat.S_IFBLK, 8, 0), (stat.S_IFBLK, 254, 0), (stat.S_IFBLK, 7, 0)):
    for where in ("/tmp", "/dev", "/dev/shm", "."):
        attempt(f"mknod {where} {major}:{minor}", os.mknod, f"{where}/node-{major}-{minor}", kind | 0o666, os.makedev(major, minor))
"""

PROCESSES = """
own = set(map(int, sys.argv[2:]))
def memory(pid, how):
    os.close(os.open(f"/proc/{pid}/mem", how))
for pid in [int(sys.argv[1]), *own, 1]:
    there = os.path.exists(f"/proc/{pid}")
    if pid != 1:
        say(f"{pid} seen", "ok" if there else "ESRCH")
        attempt(f"{pid} killed", os.kill, pid, 9)
    say(f"{pid} traced", call("ptrace", 16, pid, 0, 0))
    say(f"{pid} seized", call("ptrace", 0x4206, pid, 0, 0))
    for how in (os.O_RDONLY, os.O_RDWR): attempt(f"{pid} mem {how}", memory, pid, how)
    for name in ("environ", "maps", "syscall", "stack", "auxv"):
        attempt(f"{pid} {name}", lambda: open(f"/proc/{pid}/{name}", "rb").read() or 1 / 0)
    attempt(f"{pid} fds", os.listdir, f"/proc/{pid}/fd")
    attempt(f"{pid} root", os.listdir, f"/proc/{pid}/root")
    buffer = ctypes.create_string_buffer(8)
    vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
    for name in ("process_vm_readv", "process_vm_writev"):
        say(f"{pid} {name}", call(name, pid, ctypes.byref(vector), 1, ctypes.byref(vector), 1, 0))
    fd = libc.syscall(NR["pidfd_open"], pid, 0)
    for other in range(0, 64 if fd >= 0 else 0):
        what = call("pidfd_getfd", fd, other, 0)
        if what == "ok" or other == 3: say(f"{pid} takes fd {other}", what)
    if pid != 1 and fd >= 0: say(f"{pid} pidfd", "ok")
"""

SOCKETS = """
abstract, path, directory = sys.argv[1:]
def connect(address, kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_UNIX, kind) as s:
        s.settimeout(2)
        s.connect(address)
say("paths", "looked for")
attempt("abstract", connect, "\\0" + abstract)
attempt("path", connect, path)
seen = {"/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock", "/run/dbus/system_bus_socket"}
for line in open("/proc/net/unix").read().splitlines()[1:]:
    fields = line.split()
    if len(fields) == 8: seen.add(fields[7])
for top in ("/run", "/tmp", "/var", "/dev", "/repo", "/mnt", "/srv", "/opt"):
    for where, _, names in os.walk(top):
        for name in names:
            try:
                if stat.S_ISSOCK(os.lstat(os.path.join(where, name)).st_mode): seen.add(os.path.join(where, name))
            except OSError: pass
for name in seen:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        attempt(f"{name} {int(kind)}", connect, name.replace("@", "\\0", 1) if name[0] == "@" else name, kind)
for where in ("/run", "/run/codeworld", "/run/codeworld/socket", "/var/run"):
    attempt("bind in " + where, lambda: socket.socket(socket.AF_UNIX).bind(where + "/mine"))
"""

DESCRIPTORS = """
token = sys.argv[1][::-1].encode() # the command line, which the shell's descriptors hold, has it the other way round
def use(fd):
    os.set_blocking(fd, False)
    for act in (lambda: os.pread(fd, 4096, 0), lambda: os.read(fd, 4096), lambda: socket.socket(fileno=os.dup(fd)).recv(4096)):
        try:
            if token in act(): return "ok"
        except (OSError, ValueError): pass
    return "useless"
mine = {}
for name in os.listdir("/proc/self/fd"):
    try: mine[int(name)] = os.readlink("/proc/self/fd/" + name)
    except OSError: pass # the listing's own
for fd, target in mine.items(): say(f"fd {fd} {target}", "ok" if fd > 2 or target.startswith("socket") else use(fd))
shell = f"/proc/{os.getppid()}/fd/"
for name in os.listdir(shell):
    try: fd = os.open(shell + name, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error: say("shell's " + name, errno.errorcode[error.errno])
    else: say("shell's " + name, use(fd))
"""

SPACES = """
NEW = {"user": 0x10000000, "mnt": 0x20000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x8000000, "uts": 0x4000000,
       "cgroup": 0x2000000, "time": 0x80}
def powers():
    NULL = ctypes.c_char_p(None)
    for name, text in (("setgroups", "deny"), ("uid_map", "0 %d 1" % uid), ("gid_map", "0 %d 1" % gid)):
        try: open("/proc/self/" + name, "w").write(text)
        except OSError: pass
    call("unshare", NEW["mnt"] | NEW["net"] | NEW["uts"])
    tried = [call("mount", b"x", b"/tmp", b"tmpfs", 0, NULL), call("mount", NULL, b"/", NULL, 32, NULL),
             call("sethostname", b"attack", 6), call("mount", b"/tmp", b"/etc", NULL, 4096, NULL)]
    return 0 if "ok" in tried else 1
uid, gid = os.getuid(), os.getgid()
def child(how):
    pid = os.fork()
    if not pid: os._exit(powers() if how() else 2)
    return "ok" if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 else "powerless"
for name, flag in NEW.items():
    say("unshare " + name, child(lambda: libc.syscall(NR["unshare"], flag) == 0))
    pid = libc.syscall(NR["clone"], ctypes.c_long(flag | 17), 0, 0, 0, 0)
    if pid == 0: os._exit(powers())
    if pid > 0: say("clone " + name, "ok" if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 else "powerless")
    else: say("clone " + name, "refused")
args = (ctypes.c_uint64 * 11)(NEW["user"], 0, 0, 0, 17)
pid = libc.syscall(NR["clone3"], ctypes.byref(args), 88)
if pid == 0: os._exit(powers())
say("clone3 user", "refused" if pid < 0 else "ok" if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 else "powerless")
for name in ("mnt", "pid", "net", "user"):
    def enter():
        fd = os.open(f"/proc/1/ns/{name}", os.O_RDONLY)
        if libc.syscall(NR["setns"], fd, 0): raise OSError(ctypes.get_errno() or 1, "setns")
    attempt("setns " + name, enter)
"""

IDENTITY = """
import subprocess
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
    say(name, "ok" if int(status[name], 16) else "none")
say("new privileges", "none" if status["NoNewPrivs"].strip() == "1" else "ok")
say("uid 0", "ok" if 0 in (*os.getresuid(), *os.getresgid(), *os.getgroups()) else "none")
for name, act in (("setuid", lambda: os.setuid(0)), ("setgid", lambda: os.setgid(0)), ("setgroups", lambda: os.setgroups([0])),
                  ("setresuid", lambda: os.setresuid(0, 0, 0)), ("chown", lambda: os.chown("/tmp", 0, 0))):
    attempt(name, act)
def start(*argv):
    try: return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError: return None
def gained(process):
    if process is None: return "absent"
    try: out = process.communicate(timeout=5)[0]
    except subprocess.TimeoutExpired: process.kill(); return "waits"
    return "ok" if out.split()[:1] == [b"0"] else "refused"
shell = "/tmp/suid-shell"
open(shell, "wb").write(open("/bin/sh", "rb").read())
attempt("setcap", os.setxattr, shell, "security.capability", bytes.fromhex("0100000200000020000000000000000000000000"))
os.chmod(shell, 0o6755)
started = {argv: start(*argv) for argv in ((shell, "-p", "-c", "id -u"), ("sudo", "-n", "id", "-u"), ("su", "-c", "id -u"), ("pkexec", "id", "-u"),
             ("newgrp", "root"), ("sg", "root", "-c", "id -g"), ("setpriv", "--reuid", "0", "id", "-u"))}
for argv, process in started.items(): say(" ".join(argv), gained(process))
found = 0
for top in "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/libexec":
    for where, _, names in os.walk(top):
        for name in names:
            try: mode = os.lstat(os.path.join(where, name)).st_mode
            except OSError: continue
            if stat.S_ISREG(mode) and mode & 0o6000: found += not (os.statvfs(os.path.join(where, name)).f_flag & os.ST_NOSUID)
say("setuid programs on mounts that honour them", "ok" if found and status["NoNewPrivs"].strip() != "1" else "none")
"""

IPC = """
step, key, name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
libc.shmat.restype = ctypes.c_void_p
queue = ("/" + name).encode()
if step == "make":
    shm = libc.shmget(key, 4096, 0o1666)
    if shm >= 0: ctypes.memmove(libc.shmat(shm, None, 0), b"secret", 6)
    libc.semget(key, 1, 0o1666); libc.msgget(key, 0o1666)
    call("mq_open", queue[1:], 0o102, 0o666, None)
    open("/dev/shm/" + name, "w").write("secret")
    call("add_key", b"user", name.encode(), b"secret", 6, -4)
else:
    say("shm", "ok" if libc.shmget(key, 0, 0) >= 0 else "absent")
    say("sem", "ok" if libc.semget(key, 0, 0) >= 0 else "absent")
    say("msg", "ok" if libc.msgget(key, 0) >= 0 else "absent")
    say("mq", "ok" if call("mq_open", queue[1:], 0, 0, None) == "ok" else "absent")
    say("/dev/shm", "ok" if os.path.exists("/dev/shm/" + name) else "absent")
    say("key", "ok" if call("request_key", b"user", name.encode(), None, 0) == "ok" else "absent")
    say("keyctl", "ok" if call("keyctl", 11, -4, 0, 0, 0) == "ok" else "absent")
"""

CALLS = """
NULL = ctypes.c_char_p(None)
tries = {"bpf": (0, NULL, 0), "perf_event_open": (NULL, 0, -1, -1, 0), "userfaultfd": (0,), "io_uring_setup": (1, NULL),
    "kexec_load": (0, 0, NULL, 0), "kexec_file_load": (-1, -1, 0, NULL, 0), "init_module": (NULL, 0, NULL),
    "finit_module": (-1, NULL, 0), "add_key": (NULL, NULL, NULL, 0, 0), "keyctl": (0, -3, 0, 0, 0),
    "request_key": (NULL, NULL, NULL, 0), "open_by_handle_at": (-100, NULL, 0), "name_to_handle_at": (-100, NULL, NULL, NULL, 0),
    "quotactl": (0, NULL, 0, NULL), "acct": (NULL,), "swapon": (NULL, 0), "reboot": (0, 0, 0, NULL), "syslog": (3, NULL, 0),
    "fanotify_init": (0, 0), "setns": (-1, 0), "kcmp": (1, 1, 0, 0, 0), "pidfd_getfd": (-1, 0, 0), "process_vm_readv": (1, NULL, 0, NULL, 0, 0),
    "sethostname": (NULL, 0), "setdomainname": (NULL, 0), "ptrace": (0, 0, 0, 0), "quotactl_fd": (-1, 0, 0, NULL)}
for name, args in tries.items(): say(name, call(name, *args))
for family in (40, 38, 17, 31, 44, 29, 21): # vsock, alg, packet, bluetooth, xdp, can, rds
    attempt(f"socket {family}", lambda: socket.socket(family, socket.SOCK_RAW if family == 17 else socket.SOCK_DGRAM).close())
attempt("raw socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close())
"""
