"""The programs of attack list B, which run inside a sandbox behind `stage.PRELUDE`: a line for each attempt."""

BOMB = """
refusals = 0
for i in range(400):
    try: pid = os.fork()
    except OSError: refusals += 1; time.sleep(0.002)
    else:
        if pid: continue
        os.setsid()
        try:
            if i % 2 and os.fork(): os._exit(0)
        except OSError: pass
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2): os.dup2(null, fd)
        os.execvp("sleep", ["sleep", sys.argv[1]])
    if refusals > 50: break
print("refused", refusals, flush=True)
sys.exit(refusals > 0)
"""

INODES = """
made = 0
try:
    for made in range(1_000_000): open(f"many/{made}", "x").close()
except OSError as error: print(os.strerror(error.errno), made, flush=True); sys.exit(1)
"""

BURN = """
def refuse(name, act):
    try: act()
    except OSError: return
    print("possible:", name)
refuse("SCHED_FIFO", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50)))
refuse("SCHED_RR", lambda: os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1)))
refuse("nice -10", lambda: os.setpriority(os.PRIO_PROCESS, 0, -10))
end = time.monotonic() + 1
for i in range(4):
    if not os.fork(): break
while time.monotonic() < end: pass
"""

NESTED = """
import bz2, gzip, io, tarfile, zipfile
zeros = b"\\0" * (8 << 20)
bomb = gzip.compress(zeros)
for _ in range(3): bomb = gzip.compress(bomb)
open("bomb.gz", "wb").write(gzip.compress(b"\\0" * (64 << 20)))
open("nested.gz", "wb").write(bomb)
with zipfile.ZipFile("bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
    for i in range(20): z.writestr("../" * 9 + f"tmp/{sys.argv[1]}-{i}", zeros[:1 << 20])
with tarfile.open("bomb.tar.bz2", "w:bz2") as tar:
    entry = tarfile.TarInfo("/tmp/" + sys.argv[1]); entry.size = len(zeros); tar.addfile(entry, io.BytesIO(zeros))
os.mkdir("deep"); os.chdir("deep")
for i in range(800): os.mkdir("d" * 200); os.chdir("d" * 200)
open("end", "w").close()
os.chdir("/repo")
for i in range(50): open(f"{i:03}" + "n" * 252, "w").close()
"""

WATCH = """
def watch():
    fd = libc.inotify_init()
    if fd < 0: raise OSError(ctypes.get_errno(), "inotify")
    return fd
"""

EXHAUST = (
    WATCH
    + """
def fill(make, most=200_000):
    held = []
    try:
        for _ in range(most): held.append(make())
    except OSError as error: return held, errno.errorcode.get(error.errno, "E?")
    return held, "ok"
def pipe():
    ends = os.pipe()
    libc.fcntl(ends[1], 1031, 1 << 20)
    os.set_blocking(ends[1], False)
    try: os.write(ends[1], b"x" * (1 << 20))
    except OSError: pass
    return ends
server = socket.create_server(("127.0.0.1", 0), backlog=4096)
held, what = fill(lambda: open("/dev/null")); say("files", what); del held
held, what = fill(lambda: socket.create_connection(server.getsockname(), 1)); say("sockets", what); del held
watches, what = fill(watch); say("inotify", what)
for fd in watches[200:]: os.close(fd)
pipes, what = fill(pipe); say("pipes", what)
for pair in pipes[-8:]: list(map(os.close, pair))
say("end", "")
time.sleep(float(sys.argv[1]))
"""
)

AFFORD = (
    WATCH
    + """
attempt("files", lambda: [open("/dev/null") for _ in range(100)])
attempt("inotify", watch)
def pipe():
    ends = os.pipe()
    os.set_blocking(ends[1], False)
    if os.write(ends[1], b"x" * 65536) < 65536: raise OSError(28, "a small pipe")
attempt("pipe of 64 KiB", pipe)
server = socket.create_server(("127.0.0.1", 0))
attempt("socket", lambda: socket.create_connection(server.getsockname(), 2))
"""
)

CLOCK = """
now = time.time()
attempt("clock_settime", time.clock_settime, time.CLOCK_REALTIME, now + 1)
two = (ctypes.c_long * 2)(int(now) + 1, 0)
say("settimeofday", call("settimeofday", ctypes.byref(two), None))
say("clock_adjtime", call("clock_adjtime", 0, ctypes.byref((ctypes.c_long * 32)(0x100, 1))))
for path in ("/dev/rtc", "/dev/rtc0"): attempt(path, lambda: os.close(os.open(path, os.O_RDONLY)))
def zone(): open("/etc/localtime", "wb").close()
attempt("/etc/localtime", zone)
attempt("timens", lambda: os.write(os.open("/proc/self/timens_offsets", os.O_WRONLY), b"1 86400 0"))
"""
