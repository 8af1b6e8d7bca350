"""Sinks: what a resumed run lost is gone from both."""

from pathlib import Path

from rl.metrics import GLOSSARY, Sink, read, truncate


def test_steps_that_did_not_survive_are_in_neither_sink(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, behind in ((1, 0), (2, 1)):
        truncate(tmp_path / "metrics.jsonl", behind)
        sink = Sink(tmp_path, behind=behind)
        for step in range(first, 4):
            sink.write("step", {"step": step, "reward": float(first), "stops": {"submitted": step}})
        sink.close()
    assert [(r["step"], r["reward"]) for r in read(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 2.0), (3, 2.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("step/reward")] == [(1, 1.0), (2, 2.0), (3, 2.0)]
    assert [e.value for e in board.Scalars("step/stops/submitted")] == [1.0, 2.0, 3.0]


def test_every_number_of_a_step_is_explained(tmp_path):
    import json
    import re

    from rl import record

    source = Path(record.__file__).read_text()
    named = set(re.findall(r'^ {12}"(\w+)":', source, re.M))
    assert {"trajectories", "stops", "dropped", "infra"} <= named
    assert named - {"split", "summary", "ledgers"} <= set(GLOSSARY), json.dumps(sorted(named - set(GLOSSARY)))
