"""Attack list E, second half: the text protocol, the env's life cycle, the objects and task sets."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import random
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from envs.attacks.leakage import call, canary_task, episode
from envs.attacks.stage import (
    QUICK,
    Breach,
    Case,
    Stage,
    Traces,
    case,
    check,
    descriptors,
    eventually,
    mounts,
    naps,
    new_nap,
)
from envs.errors import CodeworldError, SandboxDead
from envs.sandbox.base import Sandbox
from envs.swe.env import SWEEnv
from envs.task import load_tasks, save_tasks

CASES: list[Case] = []
tools = partial(case, CASES)

_MALFORMED = ("", " ", "\0", "\ud800", "<tool: bash>", "</tool>", "<tool: bash>\n</tool>", "<tool: >\nx\n</tool>", "<tool: ../bash>\nls\n</tool>",
              "<tool: rm>\nx\n</tool>", '{"name": "bash", "arguments": {"command": 5}}', "<tool: bash>\nls\n</tool>" * 2,
              "<tool: bash>" * 5000, "<tool: bash>\n" + "(" * 100_000 + "\n</tool>", "<tool: bash>\n" + "x" * (10 << 20) + "\n</tool>",
              "<tool: edit>\n" + "a\n" * 100_000 + "</tool>", "<tool: create>\n" + "/" * 100_000 + "\nx\n</tool>",
              "<tool: create>\nbig\n" + "y" * (10 << 20) + "\n</tool>", "<tool: __class__>\nx\n</tool>", "<tool: submit", "<tool: bash>\n\0\n</tool>",
              "<tool: bash>\n\ud800\udcff\n</tool>", "<tool: create>\nx\n\ud800\n</tool>", "<TOOL: bash>\nls\n</TOOL>")  # fmt: skip


@tools(
    "E8",
    "malformed tool calls: wrong, missing, nested, 10 MB, unknown",
    "an observation with an error, no reward",
    harmless=True,
)
def malformed(stage: Stage) -> str:
    """Between them a good call, so that the episode goes on; in a row, they end it without a reward."""
    env, _ = episode(stage)
    for action in _MALFORMED:
        try:
            observation, reward, terminated, truncated, _ = env.step(action)
        except Exception as error:
            raise Breach(f"{action[:40]!r}: {type(error).__name__}: {error}") from error
        check(
            not reward and not terminated and not truncated,
            f"{action[:40]!r}: reward {reward}, end {terminated or truncated}",
        )
        check(
            isinstance(observation, str) and len(observation) <= 40_000,
            f"{action[:40]!r}: {len(observation)} characters",
        )
        check("good" in env.step(call("bash", "echo good"))[0], f"after {action[:40]!r} the shell is not there")
    steps = [env.step("no call") for _ in range(3)]
    _, reward, _, truncated, info = steps[-1]
    check(
        bool(truncated and reward <= 0 and info["stop"] == "format_error"),
        f"three in a row end as {info.get('stop')}, reward {reward}",
    )
    return f"{len(_MALFORMED)} actions"


@tools("E9", "step after the end, before reset; double close; reset and close during a step", "defined errors, no leak")
def life_cycle(stage: Stage) -> str:
    """An episode that another thread ends answers its step with an error that the loop knows."""
    task, _ = canary_task()
    env = SWEEnv(tasks=[task], backend=stage.backend, reward="binary")
    stage.after(env.close)
    nap, before = new_nap(), mounts()
    for act in (lambda: env.step(call("submit")), lambda: env.fork(1)):
        _raises(act, RuntimeError)
    env.close()
    env.close()
    env.reset(options={"task": task})
    env.step(call("submit"))
    _raises(lambda: env.step(call("submit")), RuntimeError)
    for cancel in (env.close, lambda: env.reset(options={"task": task})):
        env.reset(options={"task": task})
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(env.step, call("bash", f"sleep {nap}"))
            eventually(lambda: bool(naps(nap)), 5.0)
            seen = Traces.of(naps(nap), before)
            cancel()
            _raises(partial(running.result, timeout=60), (CodeworldError, RuntimeError))
        check(eventually(partial(_all_gone, nap, seen)), f"left: {', '.join(seen.left())}")
    check("good" in env.step(call("bash", "echo good"))[0], "the episode that was reset during a step does not answer")
    return "6 orders of calls"


def _all_gone(nap: int, traces: Traces) -> bool:
    return not naps(nap) and not traces.left()


def _raises(act: Callable[[], object], kinds: type[Exception] | tuple[type[Exception], ...]) -> None:
    try:
        act()
    except kinds:
        return
    except Exception as error:
        raise Breach(f"{type(error).__name__}: {error}") from error
    raise Breach("no error where one is due")


@tools("E10", "many episodes at once, random cancels and kills", "no cross-talk, nothing left")
def crowd(stage: Stage) -> str:
    """As many as start within seconds; a third is closed amid a command."""
    began = time.monotonic()
    stage.box().run(":", timeout=QUICK)
    count = max(6, min(48, int(3 / (time.monotonic() - began))))
    stage.end_case()
    fds, nap, before, workers = descriptors(), new_nap(), mounts(), max(2, count // 3)
    seen: list[Traces] = []

    def one(index: int) -> str:
        chance = random.Random(index)
        box = stage.backend.create(files={"n": b"%d" % index})
        try:
            for step in range(3):
                result = box.run(f"cat n; export N=$((N + {index})); echo -$N", timeout=60)
                if result.text() != f"{index}-{index * (step + 1)}\n":
                    return f"{index} answered {result.text()!r}"
            if index % 3 == 0:
                closer = threading.Timer(chance.random() / 5, box.close)
                closer.start()
                closed = time.monotonic()
                with contextlib.suppress(SandboxDead):
                    box.run(f"sleep {nap}", timeout=60)
                if time.monotonic() - closed > QUICK:
                    return f"{index} waited {time.monotonic() - closed:.0f} s for a command that close() ended"
                closer.join()
            elif index % 3 == 1:
                box.run(f"(setsid sleep {nap} &) >/dev/null 2>&1; kill -9 $$", timeout=60)
                seen.append(Traces.of(naps(nap), before))
            return ""
        finally:
            box.close()

    with ThreadPoolExecutor(workers) as pool:
        wrong = [said for said in pool.map(one, range(count)) if said]
    check(not wrong, f"wrong: {'; '.join(wrong[:3])}")
    check(eventually(lambda: not naps(nap)), f"{len(naps(nap))} processes are left")
    left = [row for traces in seen for row in traces.left()]
    check(eventually(lambda: not any(traces.left() for traces in seen)), f"left: {', '.join(left[:5])}")
    check(eventually(lambda: descriptors() <= fds), f"{descriptors() - fds} descriptors of the owner are left")
    return f"{count} episodes, {workers} at once"


@tools(
    "E11",
    "pickled, copied, or used from another thread",
    "a clear error, or works; the original is untouched",
    harmless=True,
)
def copies(stage: Stage) -> str:
    """A copy would own the same descriptors: it must not exist, or be a world of its own."""
    env, _ = episode(stage)
    box: Sandbox = stage.box({"f": b"1\n"})
    for name, thing in (("sandbox", box), ("env", env)):
        for how, act in (
            ("pickle", lambda one=thing: pickle.loads(pickle.dumps(one))),
            ("deepcopy", lambda one=thing: copy.deepcopy(one)),
        ):
            try:
                twin = act()
            except (TypeError, AttributeError, NotImplementedError, pickle.PicklingError, ValueError):
                continue
            twin.close()
            check(box.run("true", timeout=QUICK).ok, f"{how} of a {name} gave a copy that closed the original")
            del twin
    stage.works(box)
    with ThreadPoolExecutor(1) as pool:
        check(pool.submit(box.run, "cat f", timeout=QUICK).result().text() == "1\n", "another thread gets no answer")
        check("good" in pool.submit(env.step, call("bash", "echo good")).result()[0], "another thread gets no step")
    return "4 copies refused; another thread works"


@tools(
    "E12",
    "hostile task sets: absolute and .. paths, links, duplicates, bad digests",
    "refused at load, nothing executed",
    harmless=True,
)
def task_sets(stage: Stage) -> str:
    """A row that is refused is named by its number; a linked or changed blob is no blob."""
    task, _ = canary_task()
    raw = task.to_json()
    digest = raw["setup"]["shop.py"]
    rows: dict[str, object] = {f"path {path!r}": {**raw, "setup": {path: digest}} for path in
                               ("/etc/x", "../x", "a/../../x", "", "a\0b", "./x", "a//b")}  # fmt: skip
    rows |= {"hidden path": {**raw, "grader": {**raw["grader"], "hidden": {"../../x": digest}}}, "digest": {**raw, "setup": {"x": "../../etc/passwd"}},
             "field": {**raw, "__reduce__": "os.system"}, "list": [], "text": "x", "limits": {**raw, "limits": {"memory_mb": -1}},
             "types": {**raw, "setup": [1]}, "id": {**raw, "id": 5}}  # fmt: skip
    texts = {name: json.dumps(row) for name, row in rows.items()}
    texts |= {
        "not JSON": "!!python/object/apply:os.system [id]",
        "deep": "[" * 100_000,
        "twice": json.dumps(raw) + "\n" + json.dumps(raw),
    }
    with tempfile.TemporaryDirectory() as home:
        save_tasks([task], home)
        for text in texts.values():
            Path(home, "tasks.jsonl").write_text(text + "\n")
            _raises(lambda: load_tasks(home), ValueError)
        Path(home, "tasks.jsonl").write_text(json.dumps(raw) + "\n")
        blob = Path(home, "blobs", digest)
        for act in (partial(blob.write_bytes, b"other"), partial(_link, blob), blob.unlink):
            act()
            _raises(lambda: load_tasks(home)[0].files(task.setup), ValueError)
    return f"{len(texts) + 3} sets refused"


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")
