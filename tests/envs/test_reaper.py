"""What killed runs leave is freed, whoever was killed; what lives, or is not ours, is left alone."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from envs.__main__ import main
from envs.errors import InfraError, SandboxDead
from envs.sandbox import cgroups, hoststore, make_backend, reaper
from envs.sandbox.hostbase import HOST_IMAGE
from envs.sandbox.native import NativeBackend
from envs.sandbox.owner import PREFIX, Owner, current
from envs.sandbox.reaper import Leftover, Reaped, reap
from tests.envs.images import tar

ROOT = Path(__file__).parents[2]
BACKENDS = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("native", "docker")]
NAP = 200_000_000 + os.getpid()
"""Seconds that a process of this test sleeps, by which the host sees it."""
DEAD = Owner(4_194_303, "1", current().host)

OWNER = """
import sys
from envs.sandbox import make_backend
backend = make_backend(sys.argv[1])
box = backend.create()
box.run("setsid sleep {0} & :".format(sys.argv[2]), timeout=20)
print("ready", flush=True)
for line in sys.stdin:
    print(box.run(line, timeout=60).text(), end="", flush=True)
"""


@contextmanager
def owner_of_a_sandbox(backend: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has one; it runs the lines that it is sent."""
    command, pipe = [sys.executable, "-c", OWNER, backend, str(NAP)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def ask(owner: subprocess.Popen[str], script: str, *, wait: bool = True) -> str:
    assert owner.stdin and owner.stdout
    owner.stdin.write(script + "\n")
    owner.stdin.flush()
    return owner.stdout.readline() if wait else ""


def naps() -> int:
    return sum(command.startswith(f"sleep\0{NAP}") for _, command in processes())


def processes() -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield int(path.parent.name), path.read_text(errors="replace")
        except OSError:
            continue


def left_by(owner: Owner) -> list[str]:
    """Whatever on this host bears the owner's name."""
    places = [Path("/tmp"), hoststore.ROOT, *(set(found.parents.values()) if (found := cgroups.hierarchy()) else ())]
    named = [str(path) for place in places for path in place.glob(f"{PREFIX}{owner.tag}*")]
    return named + [f"{pid} {command}" for pid, command in processes() if owner.tag in command]


def eventually(check: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not check() and time.monotonic() < deadline:
        time.sleep(0.01)
    return check()


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Temporary and mounts directory of this test alone."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(reaper, "ROOT", tmp_path / "mounts")
    (tmp_path / "mounts").mkdir()
    return tmp_path, tmp_path / "mounts"


# ---- whose it is, and whether they live ----


def test_an_owner_is_one_process_for_good() -> None:
    me = current()
    assert Owner.parse(f"{PREFIX}{me.tag}-17") == Owner.parse(me.tag) == Owner.of(os.getpid()) == me
    assert not me.ended
    assert me._replace(start=str(int(me.start) - 1)).ended  # its pid was another's before
    assert DEAD.ended
    assert not DEAD._replace(host="0" * 8).ended  # of another boot or container: nothing is known
    with pytest.raises(ProcessLookupError):
        Owner.of(DEAD.pid)
    assert not Owner.of(1).ended


@pytest.mark.parametrize(
    "name", ["codeworld-1000", "codeworld-2024-01-15", "2024-01", "codeworld-1-2-3", "codeworld-0-1.0123abcd", "x", ""]
)
def test_other_names_name_no_owner(name: str) -> None:
    assert Owner.parse(name) is None


def test_a_zombie_and_a_forked_child() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0 if current() == Owner.of(os.getpid()) else 1)
    owner = Owner.of(pid)
    assert eventually(lambda: owner.ended)  # not waited for yet
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert owner.ended


# ---- killed processes ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_owner_killed_in_a_command_leaves_nothing(backend: str) -> None:
    with owner_of_a_sandbox(backend) as process:
        owner = Owner.of(process.pid)
        ask(process, f"sleep {NAP}", wait=False)
        assert eventually(lambda: naps() == 2)
        reap()
        assert naps() == 2 and left_by(owner)
        process.send_signal(signal.SIGKILL)
    reap()
    assert not left_by(owner)
    assert eventually(lambda: not naps())
    assert not [row for row in reap() if owner.tag in row.name]


@pytest.mark.parametrize("backend", BACKENDS)
def test_living_runs_of_other_processes_go_on(backend: str) -> None:
    with owner_of_a_sandbox(backend) as process:
        owner = Owner.of(process.pid)
        before = left_by(owner)
        assert before
        assert not [row for row in reap() if owner.tag in row.name]
        assert left_by(owner) == before and eventually(lambda: naps() == 1)
        assert ask(process, "echo $((6 * 7))") == "42\n"


@pytest.mark.native
def test_a_killed_helper_takes_its_sandboxes_along() -> None:
    backend = make_backend("native")
    box = backend.create()
    box.run(f"setsid sleep {NAP} & :", timeout=20)
    assert eventually(lambda: naps() == 1)  # a job in the background takes its time to become a sleep
    assert isinstance(backend, NativeBackend) and backend._zygote
    os.kill(backend._zygote._process.pid, signal.SIGKILL)  # another backend of this process may have one, too
    assert eventually(lambda: not naps())
    with pytest.raises(SandboxDead):
        box.run("true", timeout=5)
    with backend.create() as again:
        assert again.run("true", timeout=20).ok
    box.close()
    backend.close()
    assert not [name for name in left_by(current()) if name.endswith("-" + box.id.rpartition("-")[2])]


@pytest.mark.native
def test_a_hung_helper_of_a_killed_owner_is_ended() -> None:
    """Stopped processes don't see their owner's end, and hold on to everything."""
    with owner_of_a_sandbox("native") as process:
        owner = Owner.of(process.pid)
        assert eventually(lambda: naps() == 1)
        helper = next(pid for pid, command in processes() if command.startswith(f"{PREFIX}{owner.tag}\0zygote"))
        brokers = Path(f"/proc/{helper}/task/{helper}/children").read_text().split()
        for pid in (helper, *map(int, brokers)):
            os.kill(pid, signal.SIGSTOP)
        process.send_signal(signal.SIGKILL)
    time.sleep(0.05)
    assert naps() == 1 and left_by(owner)  # it would be gone by now
    kinds = {row.kind for row in reap() if not row.why}
    assert "process" in kinds and (cgroups.hierarchy() is None or "cgroup" in kinds)
    assert eventually(lambda: not naps() and not left_by(owner))


@pytest.mark.native
@pytest.mark.root
def test_processes_in_a_dead_owners_cgroup_are_killed() -> None:
    found = cgroups.hierarchy()
    assert found
    paths = [place / f"{PREFIX}{DEAD.tag}-7" for place in set(found.parents.values())]
    with subprocess.Popen(["sleep", str(NAP)]) as process:
        for path in paths:
            path.mkdir()
            (path / "cgroup.procs").write_text(str(process.pid))
        assert [row for row in reap(finders=[reaper.groups]) if DEAD.tag in row.name] == [
            Reaped("cgroup", f"{PREFIX}{DEAD.tag}-7")
        ]
        assert process.wait(timeout=10) == -signal.SIGKILL
    assert not any(path.exists() for path in paths)


@pytest.mark.native
def test_a_run_reaps_when_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / f"{PREFIX}{DEAD.tag}-abc").mkdir()
    with owner_of_a_sandbox("native"):
        assert not list(tmp_path.glob(f"{PREFIX}*"))


# ---- containers ----


@pytest.mark.docker
def test_a_host_image_without_containers_that_nobody_named_for_a_week_is_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import docker

    client, tag = docker.from_env(), f"test-{os.getpid()}"
    client.api.import_image_from_data(tar({"x": b""}), repository=HOST_IMAGE, tag=tag)
    name = f"{HOST_IMAGE}:{tag}"
    assert name not in [left.name for left in reaper.images(client)]
    monkeypatch.setattr(reaper, "KEPT_SECONDS", -60)
    (left,) = [left for left in reaper.images(client) if left.name == name]
    container = client.containers.create(name, ["x"])
    with pytest.raises(FileNotFoundError, match="in use"):
        left.free()
    container.remove()
    left.free()
    with pytest.raises(FileNotFoundError, match="gone"):
        left.free()
    client.close()


@pytest.mark.docker
def test_containers_of_dead_runs_go_with_their_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    import docker

    make_backend("docker").close()  # the image is there then
    client = docker.from_env()
    image = next(tag for found in client.images.list("codeworld-host") for tag in found.tags)
    far = DEAD._replace(host="0" * 8).tag
    hour = int(time.time()) + 3600
    labels = {
        "dead": (DEAD.tag, hour),
        "lives": (current().tag, 0),
        "far, lease over": (far, 1),
        "far, lease holds": (far, hour),
    }
    mark = secrets.token_hex(4)
    made = {
        what: client.containers.create(
            image,
            command=["/never-started"],
            volumes=["/data"],
            labels={reaper.OWNER_LABEL: tag, reaper.LEASE_LABEL: str(lease), "test": mark},
        )
        for what, (tag, lease) in labels.items()
    }
    try:
        volume = client.api.inspect_container(made["dead"].id)["Mounts"][0]["Name"]
        calls: list[str] = []
        send = requests.Session.send
        monkeypatch.setattr(requests.Session, "send", lambda *a, **k: calls.append(a[1].url) or send(*a, **k))
        assert {left.name for left in reaper.containers(client)} >= {made["dead"].id[:12]}
        assert len(calls) == 1
        reap()
        kept = {found["Id"] for found in client.api.containers(all=True, filters={"label": f"test={mark}"})}
        assert kept == {made["lives"].id, made["far, lease holds"].id}
        with pytest.raises(docker.errors.NotFound):
            client.volumes.get(volume)
    finally:
        for container in made.values():
            try:
                container.remove(v=True, force=True)
            except docker.errors.NotFound:
                pass
        client.close()


def test_without_an_engine_the_rest_is_reaped(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/socket")
    path = places[0] / f"{PREFIX}{DEAD.tag}-x"
    path.mkdir()
    rows = reap()
    assert Reaped("directory", str(path)) in rows
    assert next(row.why for row in rows if (row.kind, row.name) == ("containers", "")).startswith("no docker engine")


# ---- directories and mounts ----


def test_only_dead_owners_directories_go(places: tuple[Path, Path]) -> None:
    temp, mounts = places
    me = current()
    gone = [
        temp / f"{PREFIX}{DEAD.tag}-x",
        temp / f"{PREFIX}{me._replace(start='9').tag}-y",
        mounts / f"{PREFIX}{DEAD.tag}-1",
    ]
    kept = [
        temp / f"{PREFIX}{me.tag}-x",
        temp / DEAD.tag,  # not a name of ours there
        temp / "codeworld-1000",
        temp / "codeworld-2024-01-15",
        mounts / f"{PREFIX}{me.tag}-1",
        temp / f"{PREFIX}{DEAD._replace(host='0' * 8).tag}-z",
    ]
    for path in (*gone, *kept):
        (path / "sub").mkdir(parents=True)
        (path / "sub" / "file").write_text("x")
    (gone[0] / "link").symlink_to(kept[0])
    assert {row.name for row in reap(True) if row.kind == "directory"} == {str(path) for path in gone}
    assert all(path.exists() for path in gone)
    rows = reap()
    assert {(row.name, row.why) for row in rows if row.kind == "directory"} == {(str(path), "") for path in gone}
    assert not any(path.exists() for path in gone)
    assert all((path / "sub" / "file").exists() for path in kept)


def test_many_reapers_at_once(places: tuple[Path, Path]) -> None:
    for number in range(40):
        (places[0] / f"{PREFIX}{DEAD.tag}-{number}" / "a" / "b").mkdir(parents=True)
    with ThreadPoolExecutor(4) as pool:
        rows = [row for found in pool.map(lambda _: reap(finders=[reaper.directories]), range(4)) for row in found]
    assert not list(places[0].glob(f"{PREFIX}*"))
    assert len({row.name for row in rows}) == 40 and not any(row.why for row in rows)


@pytest.mark.root
def test_what_is_mounted_is_unmounted_never_emptied(places: tuple[Path, Path], tmp_path: Path) -> None:
    treasure, inside = tmp_path / "treasure", places[1] / f"{PREFIX}{DEAD.tag}-1" / "a b"
    for path in (treasure, inside):
        path.mkdir(parents=True)
    (treasure / "file").write_text("x")
    subprocess.run(["mount", "--bind", treasure, inside], check=True)
    try:
        (stuck,) = reap(finders=[reaper.directories])
        assert "still mounted" in stuck.why and (inside / "file").exists()
        assert reap(finders=[reaper.mounts, reaper.directories]) == [
            Reaped("mount", str(inside)),
            Reaped("directory", str(inside.parent)),
        ]
    finally:
        subprocess.run(["umount", "-q", inside], check=False)
    assert (treasure / "file").read_text() == "x" and not inside.parent.exists()


# ---- what is said ----


def test_what_can_not_be_freed_is_said_and_what_vanished_is_not() -> None:
    def fails(error: Exception) -> Callable[[], None]:
        def free() -> None:
            raise error

        return free

    def things() -> Iterator[Leftover]:
        yield Leftover("thing", "a", fails(PermissionError(1, "Operation not permitted", "a")))
        yield Leftover("thing", "b", fails(FileNotFoundError()))
        yield Leftover("thing", "c", fails(ProcessLookupError()))
        yield Leftover("thing", "d", lambda: None)

    def blind() -> Iterator[Leftover]:
        raise InfraError("nobody answers")
        yield

    assert reap(finders=[blind, things]) == [
        Reaped("blind", "", "nobody answers"),
        Reaped("thing", "a", "Operation not permitted"),
        Reaped("thing", "d"),
    ]


def test_the_command_line(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reaper, "everything", lambda: [reaper.directories])
    (path := places[0] / f"{PREFIX}{DEAD.tag}-x").mkdir()
    out = places[0] / "out.json"
    assert main(["doctor", "--reap", "--json", str(out)]) == 0
    assert capsys.readouterr().out == f"directory {path}: freed\n1 freed, 0 not\n"
    assert json.loads(out.read_text()) == [{"kind": "directory", "name": str(path), "why": ""}]
    assert main(["doctor", "--reap"]) == 0
    assert capsys.readouterr().out == "nothing to reap\n"
    rows = [Reaped("containers", "", "no engine"), Reaped("mount", "/m", "busy")]
    monkeypatch.setattr(reaper, "reap", lambda: rows)
    assert main(["doctor", "--reap"]) == 1
    assert capsys.readouterr().out == (
        "containers: not looked for: no engine\nmount /m: NOT freed: busy\n0 freed, 1 not\n"
    )
