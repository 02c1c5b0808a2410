"""How several machines find each other. Two of them for real:
tests/launching/test_three_machines.py.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lopd.config import TrainSection
from lopd.errors import ConfigError
from lopd.megatron.ranks import nodes
from lopd.megatron.ranks.launch import ANNOUNCEMENT_FILE
from lopd.megatron.ranks.nodes import (
    ADDRESS,
    NODE,
    Node,
    announcing,
    await_announcement,
    interface_towards,
    own_address,
    this_node,
)
from lopd.stages import training


def test_one_machine_needs_no_place_and_several_do() -> None:
    assert this_node(1, {}) is None
    assert this_node(2, {NODE: "1/2"}) == Node(1, 2)
    with pytest.raises(ConfigError, match="lopd launch"):
        this_node(2, {})
    with pytest.raises(ConfigError, match=r"parallel\.nodes = 4"):
        this_node(4, {NODE: "1/2"})


def test_addresses() -> None:
    assert own_address({ADDRESS: "10.0.0.7"}) == "10.0.0.7"
    assert interface_towards("127.0.0.1") == "lo"


def test_a_live_announcement_is_joined(tmp_path: Path) -> None:
    path = tmp_path / "first"
    with announcing(path, "10.0.0.1", 4000):
        assert await_announcement(path, done=lambda: False, interval_s=0.05) == ("10.0.0.1", 4000)
    assert not path.exists()


def test_the_announcement_of_a_killed_run_is_not_joined(tmp_path: Path) -> None:
    path = tmp_path / "first"
    path.write_text('{"address": "10.0.0.1", "port": 4000}')
    asked = 0

    def done() -> bool:
        nonlocal asked
        asked += 1
        return asked > 20

    assert await_announcement(path, done=done, interval_s=0.01) is None
    # control: a file that changes while it is watched is
    joined = threading.Event()

    def beat() -> None:
        while not joined.wait(0.05):
            os.utime(path)

    first_machine = threading.Thread(target=beat, daemon=True)
    first_machine.start()
    assert await_announcement(path, done=lambda: False, interval_s=0.02) == ("10.0.0.1", 4000)
    joined.set()
    first_machine.join()


def test_nothing_to_join_once_the_stage_is_done(tmp_path: Path) -> None:
    assert await_announcement(tmp_path / "first", done=lambda: True) is None


def test_a_machine_follows_every_training_of_the_stage_until_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first machine may be started again in the middle: two announcements are two trainings
    joined, at the address of each.
    """
    joined: list[dict[str, Any]] = []
    ended, withdrawn = ([threading.Event(), threading.Event()] for _ in range(2))

    def run_ranks(module: str, args: list[str], **about: Any) -> None:
        number = len(joined)
        joined.append(about)
        ended[number].set()
        assert withdrawn[number].wait(120), "the ranks of all machines end together"

    monkeypatch.setattr(training, "run_ranks", run_ranks)
    monkeypatch.setattr(
        training, "await_announcement", partial(await_announcement, interval_s=0.05)
    )
    monkeypatch.setattr(nodes, "_BEAT_S", 0.05)
    settings = TrainSection.model_validate({"parallel": {"ranks": 4, "nodes": 2}, "timeout_s": 5.0})

    def first_machine() -> None:
        for port, over, gone in zip((4000, 4001), ended, withdrawn, strict=True):
            with announcing(tmp_path / ANNOUNCEMENT_FILE, "10.0.0.1", port):
                assert over.wait(120)
            gone.set()

    driver = threading.Thread(target=first_machine, daemon=True)
    driver.start()
    count = training.follow_trainings(
        tmp_path, "sft", settings, index=1, count=2, is_done=lambda: len(joined) == 2
    )
    assert count == 2
    driver.join()
    assert [about["join"] for about in joined] == [("10.0.0.1", 4000), ("10.0.0.1", 4001)]
    assert {(about["node"], about["ranks"]) for about in joined} == {(Node(1, 2), 4)}
    assert joined[0]["log"] == tmp_path / "train-node1.log", "each machine has a log of its own"
