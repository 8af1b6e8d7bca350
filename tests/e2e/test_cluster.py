"""Two nodes of Ray on one host: parts run where they belong, and a run survives the loss of a node."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.systems.base import tree
from tests.e2e.test_failures import begun, command, wait_for, whole

MEMORY = 200_000_000
"""Bytes of a node's object store."""


def parents(name):
    """Process ids of the parents of this process's descendants of that name."""
    found = []
    for pid, _ in tree(os.getpid()):
        try:
            if name in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def raylet(node):
    return node.all_processes["raylet"][0].process.pid


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_parts_are_where_they_belong_and_a_lost_node_ends_no_run(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")
    log = tmp_path / "log"
    of_head = {"num_cpus": 1, "resources": {"learner": 1}, "object_store_memory": MEMORY, "include_dashboard": False}
    of_node = {"num_cpus": 1, "resources": {"engine": 1, "sandbox": 1}, "object_store_memory": MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args=of_head)
    try:
        node = cluster.add_node(**of_node)
        with begun(log, tmp_path, f"--rollout.address={cluster.address}") as process:
            wait_for(log, "step 3/10", process)
            assert parents("ray::LearnerPart") == [raylet(cluster.head_node)]
            assert parents("ray::EnginePart") == parents("ray::RolloutWorker") == [raylet(node)]
            cluster.remove_node(node, allow_graceful=False)
            wait_for(log, "on from the last checkpoint", process)
            cluster.add_node(**of_node)
            assert process.wait(900) == 0, log.read_text()[-3000:]
        whole(tmp_path / "tiny")
    finally:
        cluster.shutdown()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_where_no_cluster_answers_it_is_one_line(address, tmp_path):
    done = subprocess.run(
        command(tmp_path, f"--rollout.address={address}"), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"no Ray cluster answers at rollout.address='{address}'" in done.stderr
