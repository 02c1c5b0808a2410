"""Servers that stop, die or refuse in the middle of a sync: a clear error in bounded time, and the
next sync works.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lopd.errors import EngineError
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.servers.server import SGLangServer
from sglang_rollout.weight_sync import WeightReceiver, load_folder
from tests.sglang.conftest import settings
from tests.sglang.test_parity import MAX_DIFFERENCE
from tests.sglang.weight_syncing import (
    TRANSPORTS,
    Named,
    lose_patience,
    receiver,
    send,
    tensors,
    worst_difference,
)

TIMEOUT_S = 1.0
# for what takes a second or two, and the time-outs of 10 s for tidying up, on a busy machine;
# without an end to it, it would take LONG_S
BOUND_S = 100.0
LONG_S = 250.0


def finish(to: WeightReceiver, named: Named) -> None:
    to.receive(named)
    to.commit()


@pytest.fixture(scope="module")
def victims(
    student_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, SGLangServer]]:
    """A server for each transport, to be stopped, and killed by the last test of all; restarts = 0:
    they stay dead. No other file's tests suffer from it.
    """
    folder = tmp_path_factory.mktemp("victims")
    servers = {
        name: SGLangServer(student_dir, settings(restarts=0), log=folder / f"{name}.log")
        for name in TRANSPORTS
    }
    with ThreadPoolExecutor(len(servers)) as pool:
        starts = [pool.submit(server.start) for server in servers.values()]
    try:
        for start in starts:
            start.result()
        yield servers
    finally:
        for server in servers.values():
            server.stop()


@pytest.fixture
def engine(transport: str, victims: dict[str, SGLangServer]) -> SGLangEngine:
    server = victims[transport]
    return SGLangEngine(server.url, server.api_key, server.settings, server=server)


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_a_trainer_that_gives_up_leaves_no_server_waiting(
    transport: str, engine: SGLangEngine, student_dir: Path, tmp_path: Path
) -> None:
    to = receiver(transport, engine, tmp_path, student_dir)
    to.begin("v1")
    to.abandon()  # nothing was sent: the old weights go on serving
    assert worst_difference(engine, student_dir) <= MAX_DIFFERENCE
    assert engine.model_info()["weight_version"] == "default"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_stopped_in_the_middle(
    transport: str, engine: SGLangEngine, student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    to = receiver(transport, engine, tmp_path, student_dir, timeout_s=LONG_S, verify="off")
    named = tensors(other_dir)
    to.begin("v1")
    to.receive(named[:5])
    assert engine.server is not None
    lose_patience(to, TIMEOUT_S)
    os.killpg(engine.server.group_id, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(EngineError, match=r"[Tt]ime"):
            finish(to, named[5:])
        to.abandon()
        assert time.monotonic() - began < BOUND_S
    finally:
        os.killpg(engine.server.group_id, signal.SIGCONT)
    # A half-done sync does not matter to the next one.
    send(receiver(transport, engine, tmp_path, student_dir), "v2", tensors(student_dir))
    assert engine.model_info()["weight_version"] == "v2"
    assert worst_difference(engine, student_dir) <= MAX_DIFFERENCE
    load_folder([engine], student_dir, "default")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_killed_in_the_middle(
    transport: str, engine: SGLangEngine, student_dir: Path, tmp_path: Path
) -> None:
    # A trainer's rank has an engine like this: without a handle on the server.
    elsewhere = SGLangEngine(engine.url, engine.api_key, engine.settings)
    to = receiver(transport, elsewhere, tmp_path, student_dir, timeout_s=LONG_S)
    named = tensors(student_dir)
    to.begin("v1")
    to.receive(named[:5])
    assert engine.server is not None
    os.killpg(engine.server.group_id, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineError):
        finish(to, named[5:])
    to.abandon()
    # This is long before the time-out: the lost connection itself is noticed.
    assert time.monotonic() - began < BOUND_S
