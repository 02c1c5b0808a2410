"""Slow: a server of lopd's that is lost in the middle of a sync is started again and gets all of
it, and no rank of the trainer is left behind.

In every run of the tests: tests/pipeline/test_kill.py, by broadcast, between two buckets; and which
syncs are repeated, test_sync_remembered.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_rollout.requests.fleet import serve
from tests.megatron.launch import run_ranks
from tests.models import write_qwen3_moe
from tests.sglang.conftest import settings
from tests.sglang.lost_cases import PLACES, push_while_servers_are_lost
from tests.sglang.weight_syncing import TRANSPORTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
Case = tuple[str, str, str]  # transport, place, signal
ALL: list[Case] = [
    *(
        (transport, place, signal)
        for transport in TRANSPORTS
        for place in PLACES[:-1]
        for signal in ("SIGKILL", "SIGSTOP")
    ),
    *((transport, "committed", "SIGKILL") for transport in TRANSPORTS),
]


def push(cases: list[Case], folder: Path, replicas: int = 1) -> None:
    model = write_qwen3_moe(folder / "model", vocab_size=515)
    told: list[str] = []
    with serve(
        model,
        settings(restarts=2, replicas=replicas),
        log=folder / "server.log",
        name="student",
        tell=told.append,
    ) as engine:
        assert engine.server is not None
        reached = {
            "urls": [one.url for one in engine.engines],
            "key": engine.api_key,
            "weights_file": str(engine.server.weights_file),
        }
        named = [dict(zip(("transport", "place", "signal"), case, strict=True)) for case in cases]
        found, _ = run_ranks(
            push_while_servers_are_lost,
            2,
            cases=named,
            model=str(model),
            server=reached,
            folder=str(folder),
        )
    for number, (case, after) in enumerate(zip(cases, found, strict=True)):
        assert after["served"] == [f"step-{number}"] * replicas, case
        assert after["verified_tensors"] == after["sent_tensors"] == after["num_tensors"] > 20, case
        assert after["starts"] == [number + 2, 1][:replicas], (
            f"{case}: not the first alone, not once more"
        )
        assert len(after["said"]) == 1, case
        assert after["said"][0].startswith(
            f"a sync of step-{number} has lost the server at {engine.engines[0].url} ("
        ), case
        assert after["said"][0].endswith("); the weights are sent again"), case
    assert len(told) == len(cases), told


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_wherever_it_is_lost(transport: str, tmp_path: Path) -> None:
    """Killed and stopped when the sync begins, between two buckets, at commit and at the
    verification; killed when all is done.
    """
    push([case for case in ALL if case[0] == transport], tmp_path)


def test_one_of_two_servers(tmp_path: Path) -> None:
    """By broadcast the one that lives may be the one that complains; it is sent the weights again,
    and is not started again.
    """
    push(
        [
            ("distributed", "bucket", "SIGKILL"),
            ("distributed", "bucket", "SIGSTOP"),
            ("tensor", "bucket", "SIGKILL"),
        ],
        tmp_path,
        replicas=2,
    )
