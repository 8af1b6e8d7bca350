"""The sandbox measurement: medians, ratios and goals are what the rows say, reasons stand where a number can't, nothing stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.systems import images, node, sandbox, workload
from benchmarks.systems.base import row, tree
from benchmarks.systems.lanes import IMAGE, Failed
from benchmarks.systems.sandbox import MINI, REX, Quantity, Record, compared
from tests.conftest import missing


class Lane:
    """Answers with given times, then fails."""

    def __init__(self, name, times):
        self.name, self.times, self.asked = name, list(times), 0

    def ask(self, call, args):
        self.asked += 1
        if not self.times:
            raise Failed(f"{self.name} is out of order")
        return {call: self.times.pop(0)}

    def close(self):
        pass


def recorded(**lanes):
    record = Record(0)
    found = [Lane({"mini": MINI, "rex": REX}.get(name, name), times) for name, times in lanes.items()]
    record.rounds(3, found, "start", ("start",))
    return record, {lane.name: lane for lane in found}


def test_a_cost_is_compared_by_how_many_times_less_it_is_and_a_goal_is_of_that():
    record, _ = recorded(native=[0.010, 0.030, 0.020], mini=[0.9, 0.3, 0.6], rex=[2, 2, 2])
    goal, other = compared(record, Quantity("start", "start", goals={"native": ">=25"}), ["native"], [MINI, REX])
    assert (goal["ours"], goal["peer"], goal["ratio"], goal["met"], goal["n"]) == (20, 600, 30, True, 3)
    assert goal["spread"] == {"ours": [10, 15, 25], "peer": [300, 450, 750]}
    assert (other["ratio"], other["goal"], other["met"]) == (100, "", None)


def test_a_rate_is_compared_as_it_is():
    record, _ = recorded(native=[600, 800, 400], mini=[20, 10, 30])
    (found,) = compared(record, Quantity("start", "rate", "/s", {"native": ">=31"}), ["native"], [MINI])
    assert (found["ratio"], found["met"]) == (30, False)


@pytest.mark.parametrize("broken", ["native", "mini"])
def test_what_could_not_be_measured_says_why_and_meets_no_goal(broken):
    record, lanes = recorded(**{"native": [0.01] * 3, "mini": [1.0] * 3} | {broken: []})
    (found,) = compared(record, Quantity("start", "start", goals={"native": ">=1"}), ["native"], [MINI])
    assert "is out of order" in found["why"]
    assert found["ratio"] is None and found["goal"] == ">=1" and found["met"] is None
    assert lanes[MINI if broken == "mini" else "native"].asked == 2, "a lane that fails is not asked again and again"


def test_a_failure_among_answers_costs_one_sample():
    record, _ = recorded(native=[0.01, 0.01], mini=[1.0] * 3)
    (found,) = compared(record, Quantity("start", "start"), ["native"], [MINI])
    assert (found["n"], found["ratio"]) == (2, 100) and "why" not in found


def test_the_order_within_rounds_changes_and_is_the_seeds():
    def order(seed):
        record, seen = Record(seed), []
        lanes = [Lane(str(i), [1.0] * 20) for i in range(6)]
        for lane in lanes:
            lane.ask = lambda call, args, name=lane.name: seen.append(name) or {}
        record.rounds(20, lanes, "start", ())
        return seen

    first = order(1)
    assert first == order(1) != order(2)
    assert len({tuple(first[i : i + 6]) for i in range(0, 120, 6)}) > 10


def test_a_row_without_a_number_is_a_row_all_the_same():
    found = row("x", None, goal="<=1", why="no such thing here")
    assert (found["ours"], found["met"], found["why"]) == (None, None, "no such thing here")


def test_files_are_written_by_scripts_that_fit_into_an_argument(tmp_path):
    files = {f"d{i}/f'{i}": f"it's {i}\n" * 300 for i in range(60)}
    scripts = list(workload.writing(files))
    assert len(scripts) > 1 and max(map(len, scripts)) < 131_072
    for script in scripts:
        assert subprocess.run(["bash", "-c", script], cwd=tmp_path).returncode == 0
    assert {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("f*")} == files


def test_every_worker_plays_at_least_one_episode_and_none_after_the_window():
    class World:
        name, lock, made, open = "counting", threading.Lock(), 0, 0

        def start(self, files):
            with self.lock:
                self.made, self.open = self.made + 1, self.open + 1
            return self

        def run(self, script):
            return "1\n"

        def close(self):
            with self.lock:
                self.open -= 1

    world = World()
    assert workload.Bench(world).episodes(workers=5, seconds=0)["episodes"] > 0
    assert (world.made, world.open) == (5, 0)


def test_memory_of_a_process_is_seen():
    child = subprocess.Popen(["sleep", "30"])
    try:
        assert (child.pid,) in {(pid,) for pid, _ in tree(child.pid)}
        assert 0.01 < node.pss([child.pid]) < 10
        assert "sleep" in node.command_line(child.pid)
    finally:
        child.kill()
        child.wait()
    assert node.pss([child.pid]) == 0 and node.command_line(child.pid) == ""


def test_a_wrong_option_is_one_line(capsys):
    for argv, named in (["--backends", "podman"], "podman"), (["--rounds", "0"], "--rounds 0"):
        with pytest.raises(ValueError, match=named):
            main(["systems", "sandbox", "--no-peers", *argv])


def test_time_of_what_has_ended_counts_whoever_started_it():
    burn = f"{sys.executable} -c 'import time\nwhile time.process_time() < 0.2: pass'"
    spent = images.cpu_of(lambda: subprocess.run(["bash", "-c", f"{burn}; {burn}; :"], check=True) and None)
    assert 0.4 <= spent < 2


def test_images_that_can_not_be_made_say_why(monkeypatch):
    monkeypatch.setattr(images, "PACKAGES", ("no-such-package",))
    ((found,),) = images.measure(1, 1, 1)
    assert "no-such-package" in found["why"] and (found["goal"], found["met"]) == ("<=5", None)


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.native
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="the floor needs a C compiler")
def test_native_alone_gives_every_row_and_leaves_nothing(tmp_path, capsys):
    before = set(tree(os.getpid()))
    out = tmp_path / "rows.json"
    assert (
        main(
            ["systems", "sandbox", "--quick", "--rounds", "1", "--no-peers", "--backends", "native", "--json", str(out)]
        )
        == 0
    )
    result = json.loads(out.read_text())
    rows = [r for r in result["rows"] if r["backend"] == "native"]
    wanted = [q.what for q in sandbox.quantities(sandbox.plan(True, 1)) if q.key != "idle"]
    assert [r["what"] for r in rows if r["what"] in wanted] == wanted
    assert all(r["ours"] > 0 for r in rows if r["what"] in wanted), "each is measured"
    floor = next(r for r in rows if r["peer_name"] == "floor: fork, exec, wait")
    assert floor["ratio"] > 1, "a sandbox costs more than the process in it"
    assert any(r["goal"] == "<=1" for r in rows) and any("false timeouts" in r["what"] for r in rows)
    on_image = [r for r in result["rows"] if r["backend"] == "native, image"]
    assert [r["what"] for r in on_image if r["what"] in wanted] == wanted
    assert missing("docker") or all(r["ours"] for r in on_image), "the image of the engine is measured as well"
    tests, layer = (next(r for r in on_image if r["what"] == what) for what in (images.OVERHEAD, images.LAYER))
    assert all(seconds > 0.3 for times in tests["spread"].values() for seconds in times), "the tests are in both"
    assert 12 <= layer["ours"] < 100, "three files"
    assert result["name"] == "sandbox" and isinstance(result["ok"], bool)
    assert set(tree(os.getpid())) <= before, "no process is left"
    assert not [
        *Path("/sys/fs/cgroup").glob(f"*/codeworld-{os.getpid()}-*"),
        *Path("/sys/fs/cgroup").glob("*/codeworld-floor-*"),
    ]
    assert "start to first answer" in capsys.readouterr().out


def test_the_table_gives_each_reason_once_below_it(capsys):
    rows = [row(f"x {i}", None, goal=">=2", backend="native", why="no such base") for i in range(2)]
    sandbox.show([*rows, row("y", 3.0, peer=1.5, peer_name="other", goal=">=2", backend="docker")])
    out = capsys.readouterr().out
    assert out.count("no such base") == 1 and out.count("[1]") == 3 and out.count("not measured") == 2
    assert "met" in out.partition("\ny\n")[2] and "other" in out


@pytest.mark.docker
def test_the_peers_process_says_what_it_lacks_and_sweeps_when_its_asker_is_gone(tmp_path):
    label = f"codeworld.bench=test-{os.getpid()}"
    workload.docker("run", "-d", "--network", "none", "--label", label, IMAGE, "sleep", "60")
    home = tmp_path / "home"
    home.mkdir()
    try:
        done = subprocess.run(
            [
                sys.executable,
                "-S",
                str(Path(workload.__file__).with_name("peer_driver.py")),
                json.dumps({"label": label}),
            ],
            input='{"world": "mini-docker", "call": "single", "args": {}}\n' * 2,
            capture_output=True,
            text=True,
            cwd=home,
        )
        replies = [json.loads(answer) for answer in done.stdout.splitlines()]
        assert done.returncode == 0 and len(replies) == 2
        assert all("error" in reply for reply in replies)
        assert not home.exists()
    finally:
        assert workload.sweep(label) == 0, "it has swept"
