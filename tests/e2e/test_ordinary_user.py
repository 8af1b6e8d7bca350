"""As an ordinary user: two steps of training and an episode without root and without a daemon; and where no sandbox is
possible, one line with the remedy and status 2."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_DAEMON = {"DOCKER_HOST": "unix:///nonexistent/docker.sock"}
SMALL = "--steps=2 --learn.groups_per_step=2 --rollout.group_size=4 --rollout.episodes=8 --eval.every=0"
TRAIN = f"rl/train.py rl/recipes/tiny.toml {SMALL}"

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")]


@pytest.fixture
def place():
    """A directory with a short name (Ray's sockets live below it), gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="cw", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def as_nobody(place, command, stdin=""):
    """Run in the repository as uid 65534, with the interpreter and its packages bound where that user can reach them.
    PYTHON in `command` is that interpreter."""
    site, base = sysconfig.get_paths()["purelib"], sys.base_prefix
    for name in ("repo", "site", "base", "home"):
        (place / name).mkdir()
    place.chmod(0o755)
    shutil.chown(place / "home", 65534, 65534)
    binds = "".join(
        f"mount --bind {source} {place / name}; " for name, source in (("repo", ROOT), ("site", site), ("base", base))
    )
    python = place / "base" / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    setting = f"LD_LIBRARY_PATH={place}/base/lib HOME={place}/home PYTHONPATH={place}/site:{place}/repo RAY_TMPDIR={place}/home PYTHONDONTWRITEBYTECODE=1"
    script = f"set -e; {binds} cd {place}/repo; exec setpriv --reuid=65534 --regid=65534 --clear-groups env {setting} {command.replace('PYTHON', str(python))}"
    return subprocess.run(
        ["unshare", "--mount", "bash", "-c", script],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **NO_DAEMON},
    )


@pytest.mark.slow
def test_two_steps_of_training(place):
    """`make train` with an installed environment: the installation itself is what CI begins with."""
    arguments = f"ARGS='{SMALL} --runs={place}/home/runs'"
    done = as_nobody(place, f"make -o .venv/installed train PY=PYTHON {arguments}")
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert "sandboxes: native" in done.stdout and "step 2/2" in done.stdout
    assert (place / "home/runs/tiny/report.html").stat().st_uid == 65534


def test_an_episode_by_hand(place):
    done = as_nobody(place, "PYTHON -m envs play --task 3", stdin="bash id -u; ls\nsubmit\n")
    assert done.returncode == 0, done.stderr[-1500:]
    assert "runner.py" in done.stdout and "outcome unresolved" in done.stdout


def test_without_any_sandbox_it_is_one_line(tmp_path):
    script = f"echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} {TRAIN} --runs={tmp_path}"
    done = subprocess.run(
        ["unshare", "--user", "--map-user=1000", "--map-group=1000", "--keep-caps", "bash", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **NO_DAEMON},
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "max_user_namespaces" in done.stderr and "docker" in done.stderr.lower()
    assert not (tmp_path / "tiny").exists()
