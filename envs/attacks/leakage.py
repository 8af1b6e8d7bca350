"""Attack list D, as far as sandboxes go: what the hidden half of a task, the host or another episode leaves in sight."""

from __future__ import annotations

import os
import pwd
import secrets
import socket
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from envs.attacks.stage import QUICK, Case, NotRun, Stage, case, check, refused
from envs.swe.env import SWEEnv
from envs.task import Grader, Task, sha256
from envs.tiny.repairs import runner_source

CASES: list[Case] = []
leakage = partial(case, CASES)

# ---- a task full of canaries ----


def canary_task() -> tuple[Task, dict[str, str]]:
    """A task, and what of it the agent must never see: name → canary."""
    names = ("task id", "hidden path", "hidden test", "gold patch", "grader command")
    canaries = {name: f"canary{secrets.token_hex(8)}" for name in names}
    setup = {"shop.py": b"def total(a, b):\n    return a - b\n", "runner.py": runner_source()}
    test = f"from shop import total\n\n\ndef test_total():\n    assert total(2, 3) == 5  # {canaries['hidden test']}\n"
    path = f"tests/test_{canaries['hidden path']}.py"
    hidden = {path: test.encode()}
    gold = {"shop.py": f"def total(a, b):\n    return a + b  # {canaries['gold patch']}\n".encode()}
    blobs = {sha256(data): data for data in (*setup.values(), *hidden.values(), *gold.values())}
    digests = [{path: sha256(data) for path, data in files.items()} for files in (setup, hidden, gold)]
    grader = Grader(
        command=f"env {canaries['grader command']}=1 python3 runner.py",
        expected={f"{path}::test_total": "pass"},
        hidden=digests[1],
        gold=digests[2],
        protected=("tests/*", "runner.py"),
    )
    task = Task(id=canaries["task id"], prompt="Repair total().", setup=digests[0], grader=grader, blobs=blobs)
    return task, canaries


def call(tool: str, body: str = "") -> str:
    """A tool call of the text protocol."""
    return f"<tool: {tool}>\n{body}\n</tool>" if body else f"<tool: {tool}>\n</tool>"


_SEARCH = """
import hashlib
sought, looked = set(sys.argv[1].split(",")), 0
word = len("canary") + 16
def search(name, data):
    at = data.find(b"canary")
    while at >= 0:
        found = data[at:at + word].decode("latin-1")
        if hashlib.sha256(found.encode()).hexdigest()[:16] in sought: say(f"{name}: {found}", "ok")
        at = data.find(b"canary", at + 1)
def read(path):
    global looked
    looked += 1
    name = path.encode("utf-8", "replace")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try: search(path, name + b" " + os.pread(fd, 1 << 20, 0))
        finally: os.close(fd)
    except OSError: search(path, name)
for top in ("/repo", "/tmp", "/dev/shm", "/run", "/etc", "/var", "/home", "/root", "/mnt", "/srv", "/opt"):
    for where, directories, names in os.walk(top):
        if where.count("/") > 12 or looked > 20000: break
        for name in directories: search(where, name.encode("utf-8", "replace"))
        for name in names: read(os.path.join(where, name))
for pid in os.listdir("/proc"):
    if pid.isdigit():
        for name in ("environ", "cmdline", "comm", "mountinfo", "status", "cgroup"): read(f"/proc/{pid}/{name}")
for name in ("/proc/mounts", "/proc/net/unix", "/proc/keys", "/proc/sysvipc/shm"): read(name)
for fd in os.listdir(f"/proc/{os.getppid()}/fd"): read(f"/proc/{os.getppid()}/fd/{fd}")
say("looked", looked)
"""


def search(stage: Stage, env: SWEEnv, canaries: Mapping[str, str]) -> str:
    """Look for the canaries from inside the episode: by their hashes, so that the search doesn't plant them."""
    sandbox = env._sandbox
    assert sandbox is not None
    sought = ",".join(sha256(text.encode())[:16] for text in canaries.values())
    found = stage.tries(sandbox, _SEARCH, sought, timeout=60)
    looked = found.pop("looked")
    if int(looked) < 5:
        raise NotRun(f"only {looked} files could be looked at")
    check(not found, f"found {', '.join(found)}")
    return looked


def episode(stage: Stage) -> tuple[SWEEnv, dict[str, str]]:
    """A started episode of a canary task, closed after the case."""
    task, canaries = canary_task()
    env = SWEEnv(tasks=[task], backend=stage.backend, reward="binary")
    stage.after(env.close)
    env.reset(options={"task": task})
    return env, canaries


_HISTORY = """
import subprocess
tops = [os.getcwd(), *(top for top in sys.argv[1].split(",") if os.path.isdir(top))]
stores = set()
for top in tops:
    for where, directories, names in os.walk(top):
        if where.count("/") > 8 or len(stores) > 50: directories.clear()
        if "HEAD" in names and "objects" in directories: stores.add(where)
for store in sorted(stores):
    def git(*words): return subprocess.run(["git", "-c", "safe.directory=*", f"--git-dir={store}", *words], capture_output=True, text=True).stdout.splitlines()
    kinds = git("cat-file", "--batch-all-objects", "--unordered", "--batch-check=%(objectname) %(objecttype)")
    reached = {line.split()[0] for line in git("rev-list", "--objects", "HEAD")}
    commits = sum(line.endswith(" commit") for line in kinds)
    say(f"{store}: {commits} commits", "ok" if commits > 1 else "one")
    more = len(kinds) - len(reached)
    say(f"{store}: {more} objects beyond the tree", "ok" if more > 0 else "none")
    names = git("remote") + git("for-each-ref", "--format=%(refname)")[1:] + git("stash", "list") + git("reflog", "--all")[1:]
    for name in (*names, *(n for n in ("ORIG_HEAD", "FETCH_HEAD") if os.path.exists(f"{store}/{n}"))): say(f"{store}: {name}", "ok")
say("stores", len(stores))
"""
_TWO_COMMITS = """mkdir /tmp/planted && cd /tmp/planted && git init -q . && git config user.email a@b && git config user.name a &&
echo 1 >f && git add f && git commit -qm one && echo 2 >f && git commit -qam two && git reset -q --hard HEAD^"""


@leakage("D1", "git: all commits, reflog, stash, tags, remotes, dangling and packed objects", "at most one commit, and no object beyond its tree", harmless=True)  # fmt: skip
def history(stage: Stage) -> str:
    """A repository whose second commit was reset away proves that the search finds what is there."""
    env, _ = episode(stage)
    box = env._sandbox
    assert box is not None
    tops = "/tmp,/root,/home,/opt,/srv,/mnt,/var"
    found = stage.tries(box, _HISTORY, tops, timeout=60)
    stores = found.pop("stores")
    check("ok" not in found.values(), "; ".join(name for name, what in found.items() if what == "ok"))
    planted = stage.box()
    stage.sh(planted, f"({_TWO_COMMITS})")
    rows = stage.tries(planted, _HISTORY, "/tmp", timeout=60)
    if rows.get("/tmp/planted/.git: 2 commits") != "ok":
        raise NotRun("the search does not find even a commit that was reset away")
    return f"{stores} repositories"


_INSTALLED = """
import glob, sysconfig
names, here = sys.argv[1].split(","), os.getcwd()
places = [path for path in {*sys.path, *sysconfig.get_paths().values()} if path and path != here and os.path.isdir(path)]
for name in names:
    for place in places:
        for path in glob.glob(f"{place}/{name}") + glob.glob(f"{place}/{name}.py") + glob.glob(f"{place}/{name}-*.*-info"): say(path, "ok")
for top in ("/tmp", "/root", "/home", "/opt", "/var/cache", os.path.expanduser("~")):
    for where, directories, files in os.walk(top):
        if where.count("/") > 10: directories.clear()
        for file in files:
            if file.endswith((".whl", ".tar.gz", ".zip")) and file.split("-")[0].lower() in names: say(os.path.join(where, file), "ok")
say("places", len(places))
"""


@leakage("D2", "an installed copy of the package, wheels in caches, metadata", "only the repository has the package", harmless=True)  # fmt: skip
def installed(stage: Stage) -> str:
    """By the names of what the repository has at its top."""
    env, _ = episode(stage)
    assert env._sandbox is not None and env.task is not None
    names = ",".join(sorted({path.split("/")[0].removesuffix(".py") for path in env.task.grader.gold}))
    found = stage.tries(env._sandbox, _INSTALLED, names, timeout=60)
    places = found.pop("places")
    check(not found, f"found {', '.join(found)}")
    env._sandbox.write("/tmp/cache/shop-1.0-py3-none-any.whl", b"")
    if len(stage.tries(env._sandbox, _INSTALLED, names, timeout=60)) != 2:
        raise NotRun("the search does not find even a planted wheel")
    return f"{places} directories"


@leakage("D3", "search for hidden tests, task id, gold patch, run script", "no canary in files, environment, processes, mounts", harmless=True)  # fmt: skip
def canaries(stage: Stage) -> str:
    """A canary in the repository proves that the search finds what is there."""
    env, secret = episode(stage)
    planted = {"planted": f"canary{secrets.token_hex(8)}"}
    looked = search(stage, env, secret)
    assert env._sandbox is not None
    env._sandbox.write("/tmp/planted", planted["planted"].encode())
    rows = stage.tries(env._sandbox, _SEARCH, sha256(planted["planted"].encode())[:16], timeout=60)
    if len(rows) < 2:
        raise NotRun("the search does not find even what was planted")
    return f"{len(secret)} canaries, {looked} files"


_NETWORK = """
port, udp = int(sys.argv[1]), int(sys.argv[2])
token, hosts = sys.argv[3].encode(), sys.argv[4].split(",")
def tcp(host, port):
    with socket.create_connection((host, port), 1): pass
for host in hosts:
    attempt(f"tcp {host}", tcp, host, port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try: socket.socket(family, socket.SOCK_DGRAM).sendto(token, (host, udp))
    except OSError: pass
for host, port in (("169.254.169.254", 80), ("192.0.2.1", 80), ("2001:db8::1", 80), ("172.17.0.1", 2375)):
    attempt(f"tcp {host}:{port}", tcp, host, port)
echo = b"\\x08\\0\\xf7\\xff\\0\\0\\0\\0"
attempt("icmp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 1).sendto(echo, ("192.0.2.1", 0)))
attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
signal.alarm(20)
attempt("dns", socket.getaddrinfo, "example.com", 80)
for line in open("/proc/net/route").read().splitlines()[1:]: say("route by " + line.split()[0], "ok")
for line in open("/proc/net/if_inet6").read().splitlines() if os.path.exists("/proc/net/if_inet6") else ():
    say("IPv6 on " + line.split()[-1], "loopback" if line.split()[-1] == "lo" else "ok")
for name in os.environ:
    if name.lower().endswith("_proxy"): say(name, "ok")
"""


@leakage("D4", "DNS, ICMP, IPv6, metadata address, the host's loopback", "unreachable", harmless=True)
def network(stage: Stage) -> str:
    """Listeners on every address of the host must hear nothing."""
    heard: list[str] = []
    tcp = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) if socket.has_dualstack_ipv6() else socket.create_server(("0.0.0.0", 0))  # fmt: skip
    udp = socket.socket(tcp.family, socket.SOCK_DGRAM)
    udp.bind((tcp.getsockname()[0], 0))
    for one in (tcp, udp):
        one.settimeout(60)
        stage.after(one.close)
    threading.Thread(target=_hear, args=(tcp.accept, "a connection", heard), daemon=True).start()
    threading.Thread(target=_hear, args=(partial(udp.recvfrom, 64), "a datagram", heard), daemon=True).start()
    hosts = ["127.0.0.1", "::1", *_addresses()]
    ports = tcp.getsockname()[1], udp.getsockname()[1]
    found = stage.tries(stage.shared, _NETWORK, *ports, secrets.token_hex(4), ",".join(hosts), timeout=60)
    check(not heard, f"the host heard {' and '.join(heard)}")
    return refused(found)


def _hear(wait: partial[object], what: str, heard: list[str]) -> None:
    try:
        wait()
        heard.append(what)
    except OSError:
        pass


def _addresses() -> list[str]:
    """The host's own IPv4 addresses beside loopback."""
    lines = Path("/proc/net/fib_trie").read_text().splitlines() if Path("/proc/net/fib_trie").exists() else []
    found = {lines[i - 1].split()[-1] for i, line in enumerate(lines) if "/32 host LOCAL" in line}
    return sorted(address for address in found if not address.startswith("127."))[:4]


@leakage("D5", "error texts of the sandbox and the tools", "nothing of the host's paths, users or hidden results", harmless=True)  # fmt: skip
def error_texts(stage: Stage) -> str:
    """What an agent reads of its mistakes, and of a submission, right or wrong."""
    env, secret = episode(stage)
    texts = []
    for action in (
        call("bash", "cat /none; cd /none; ./none; exit 9"),
        call("bash", "kill -9 $$"),
        call("edit", "/etc/passwd\n<<<<<<< SEARCH\nroot\n=======\nx\n>>>>>>> REPLACE"),
        call("edit", "none\n<<<<<<< SEARCH\nroot\n=======\nx\n>>>>>>> REPLACE"),
        call("create", "/none/x\ny"),
        call("create", "/proc/1/mem\ny"),
        call("create", "n" * 5000),
        "no call",
        call("submit"),
    ):
        observation, _, terminated, _, _ = env.step(action)
        texts.append(observation)
        check(not terminated or not observation.strip(), f"the end of an episode says {observation[:80]!r}")
    for body in (b"def total(a, b):\n    return a + b\n", b"1 / 0\n", b"import os\nos._exit(0)\n", b"print('PASS')\n"):
        again, canaries = episode(stage)
        secret |= {f"{name} of {body[:9]!r}": text for name, text in canaries.items()}
        assert again._sandbox is not None
        again._sandbox.write("shop.py", body)
        ending = again.step(call("submit"))
        texts.append(ending[0])
        check(not ending[0] and ending[2], f"a submission is answered by {ending[0][:80]!r}")
    said = "\n".join(texts)
    host = {
        "this repository": str(Path(__file__).parents[2]),
        "this host": socket.gethostname(),
        "Traceback": "Traceback (most recent",
    }
    home = os.environ.get("TMPDIR", "")
    leaks = [name for name, text in {**secret, **host, "TMPDIR": home}.items() if len(text) > 3 and text in said]
    check(not leaks, f"an observation has {', '.join(leaks)}")
    return f"{len(texts)} texts"


_RESIDUE = """
import hashlib
rows, tops = set(), ("/repo", ".", "/tmp", "/dev/shm", "/var/tmp", "/run", "/dev/mqueue", os.environ.get("HOME", "/tmp"))
def tree():
    for top in tops:
        for where, directories, names in os.walk(top):
            for name in directories + names: yield os.path.join(where, name)
for path in tree():
    if len(rows) > 2000: break
    try:
        kind = stat.S_IFMT(os.lstat(path).st_mode)
        data = open(path, "rb").read(65536) if kind == stat.S_IFREG else b""
    except OSError: kind, data = 0, b"?"
    if "/attack-" not in path: rows.add((path, kind, hashlib.sha256(data).hexdigest()))
say("state", hashlib.sha256(repr(sorted(rows)).encode()).hexdigest())
say("files", len(rows))
inside = any(sys.argv[1] in path for path, _, _ in rows)
say("token", "ok" if inside or any(os.path.exists(f"{top}/{sys.argv[1]}") for top in tops) else "absent")
"""


@leakage(
    "D6", "files of other episodes, shared caches, residue", "every sandbox starts byte for byte alike", harmless=True
)
def residue(stage: Stage) -> str:
    """One sandbox leaves a file in each place that it can write; neither a live nor a later one sees any."""
    token, files = f"residue-{secrets.token_hex(8)}", {"a.py": b"1\n", "sub/b.py": b"2\n"}
    places = ("/repo", "/tmp", "/dev/shm", "/var/tmp", "/run", "/dev/mqueue", "/etc", "/usr/local", "/")
    for place in places[1:]:
        stage.after(partial(Path(place, token).unlink, missing_ok=True))
    first = stage.box(files)
    fresh = stage.tries(first, _RESIDUE, token)
    first.run(f"for d in {' '.join(places)} ~ .; do echo {token} >$d/{token}; done", timeout=QUICK)
    second = stage.box(files)
    first.run(f"mkdir -p ~/.cache/{token}; echo >>~/.bashrc", timeout=QUICK)
    live = stage.tries(second, _RESIDUE, token)
    second.close()
    first.close()
    later = stage.tries(stage.box(files), _RESIDUE, token)
    for name, state in (("a live", live), ("a later", later)):
        check(state["token"] != "ok", f"{name} sandbox sees the files of another")
        check(state == fresh, f"{name} sandbox starts from another state than a fresh one")
    return f"three equal starts of {fresh['files']} files"


_ENVIRONMENT = """
for name, value in sorted(os.environ.items()): say("env " + name, value.replace("\\n", " "))
for pid in os.listdir("/proc"):
    try: data = open(f"/proc/{pid}/environ", "rb").read() if pid.isdigit() else b""
    except OSError: continue
    if sys.argv[1][::-1].encode() in data: say("environ of " + pid, "token")
"""
_BASICS = {
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TERM",
    "PWD",
    "OLDPWD",
    "SHLVL",
    "_",
    "HOSTNAME",
}


@leakage("D7", "the owner's secrets, keys and user names in the environment", "an allowlist", harmless=True)
def environment(stage: Stage) -> str:
    """A secret set before the sandbox starts, and whatever else the owner's environment holds."""
    token = secrets.token_hex(16)
    os.environ["CODEWORLD_ATTACK_API_KEY"] = token
    stage.after(lambda: os.environ.pop("CODEWORLD_ATTACK_API_KEY", None))
    box = stage.box()
    found = stage.tries(box, _ENVIRONMENT, token[::-1])
    values = {name.removeprefix("env "): value for name, value in found.items() if name.startswith("env ")}
    check(
        all(token not in value for value in found.values()) and "token" not in found.values(),
        "the owner's API key is there",
    )
    same = [name for name, value in values.items() if name not in _BASICS and value and os.environ.get(name) == value
            and not name.startswith("PYTHON")]  # fmt: skip
    check(not same, f"variables of the owner: {', '.join(same)}")
    user = next((entry.pw_name for entry in pwd.getpwall() if entry.pw_uid == os.getuid()), str(os.getuid()))
    named = [name for name in ("USER", "LOGNAME", "HOSTNAME") if values.get(name) in (user, socket.gethostname())]
    check(not named, f"{', '.join(named)} name the host or its user {user}")
    return f"{len(values)} variables: {', '.join(sorted(values))}"


@leakage("D8", "hidden files after a fork, a failed grading, a new start", "never in what descends from the agent")
def lineage(stage: Stage) -> str:
    """A child is graded, and fails; its parent goes on, its sibling looks, and a new episode starts."""
    env, secret = episode(stage)
    env.step(call("bash", "echo '# mine' >>shop.py; export MINE=1"))
    child, sibling = env.fork(2)
    assert isinstance(sibling, SWEEnv)
    for one in (child, sibling):
        stage.after(one.close)
    info = child.step(call("submit"))[4]
    check(info["outcome"] == "unresolved", f"a repository without a repair is graded {info['outcome']}")
    search(stage, env, secret)
    search(stage, sibling, secret)
    check("# mine" in sibling.step(call("bash", "tail -n 1 shop.py"))[0], "the sibling lost the fork's state")
    again, _ = episode(stage)
    search(stage, again, secret)
    return "parent, sibling and successor see none of 5 canaries"
