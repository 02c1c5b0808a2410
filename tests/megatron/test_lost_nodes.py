"""What a machine says of the others when a training over several ends. Machines that are lost for
real: tests/launching/test_three_machines.py.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from lopd.megatron.ranks.lost_nodes import (
    COLLECTIVE,
    describe_other_nodes,
    log_of,
    lost_peer_address,
    remove_reports_of_others,
)
from lopd.megatron.ranks.nodes import Node

FIRST = Node(0, 3)
SECOND = Node(1, 3)


def heartbeat(folder: Path, name: str) -> Path:
    path = folder / f"{name}.log.heartbeats" / "1"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path


def error(folder: Path, name: str, where: str, what: str) -> None:
    (folder / f"{name}.log.error.json").write_text(json.dumps({"where": where, "what": what}))


def test_each_machine_knows_the_others_logs(tmp_path: Path) -> None:
    for node, log in ((FIRST, "train.log"), (SECOND, "train-node1.log")):
        assert [log_of(tmp_path / log, node, index).name for index in range(3)] == [
            "train.log",
            "train-node1.log",
            "train-node2.log",
        ]


def test_silent_alive_and_gone(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    error(tmp_path, "train-node2", COLLECTIVE, "waited")
    assert describe_other_nodes(log, FIRST, 0.2) == "machine 1 of 3 has no running ranks"
    beats = heartbeat(tmp_path, "train-node1")
    assert describe_other_nodes(log, FIRST, 0.2) == "machine 1 of 3 has no sign of life"
    ended = threading.Event()

    def beat() -> None:
        moment = 1
        while not ended.wait(0.01):
            moment += 1
            os.utime(beats, ns=(moment, moment))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert (
            describe_other_nodes(log, FIRST, 60)
            == "machines 1, 2 of 3 have signs of life: see the network between them"
        )
    finally:
        ended.set()
        thread.join()


def test_the_machine_that_failed_for_a_reason_of_its_own_is_named(tmp_path: Path) -> None:
    error(tmp_path, "train", "shard-00001.parquet", "damaged")
    error(tmp_path, "train-node2", COLLECTIVE, "waited")
    assert (
        describe_other_nodes(tmp_path / "train-node1.log", SECOND, 60)
        == "machine 0 of 3 ended first: damaged"
    )


def test_what_a_former_run_left_is_forgotten(tmp_path: Path) -> None:
    heartbeat(tmp_path, "train-node1")
    error(tmp_path, "train-node2", "x", "y")
    own = heartbeat(tmp_path, "train")
    remove_reports_of_others(tmp_path / "train.log", FIRST)
    assert [path.name for path in tmp_path.iterdir()] == ["train.log.heartbeats"]
    assert own.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[gloo/transport/tcp/pair.cc:538] Connection closed by peer [192.0.2.7]:4242",
            "192.0.2.7",
        ),
        ("Read error [::ffff:192.0.2.7]:4242: Connection reset by peer", "192.0.2.7"),
        # This is a rank of this machine: its own message says why it ended.
        (
            "Connection closed by peer [127.0.0.1]:4242",
            None,
        ),
        ("shape '[2, 3]' is invalid for input of size 5", None),
    ],
)
def test_a_lost_connection_tells_whose(text: str, expected: str | None) -> None:
    assert lost_peer_address(RuntimeError(text)) == expected
