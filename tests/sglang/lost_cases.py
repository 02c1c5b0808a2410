"""What the ranks of tests/sglang/test_weight_sync_lost.py run: a trainer of two ranks whose server
is lost where a case says, in the middle of a sync.
"""

from __future__ import annotations

import datetime
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.distributed_c10d import _set_pg_timeout

from lopd.config import SGLangSection, SyncSection
from lopd.megatron.ranks import parallel
from lopd.stages.sync import StudentWeights
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.fleet import fleet_of
from sglang_rollout.servers.weights_file import num_starts
from tests.sglang.sync_cases import _trainer, samples

LONG_S = 240.0
PLACES = ("begin", "bucket", "commit", "verification", "committed")


def push_while_servers_are_lost(
    cases: list[dict[str, str]], model: str, server: dict[str, Any], folder: str
) -> list[dict[str, Any]]:
    """For every case (transport, place, signal): the report, what was said, the versions served,
    and how often each server has been started. Of rank 0.

    server: urls, key and weights_file. It is the first of them that is lost.
    """
    template = Path(model)
    found = []
    engine = None
    if os.environ["RANK"] == "0":
        settings = SGLangSection(dtype="float32", context_length=128, restarts=2)
        engine = fleet_of(
            [
                SGLangEngine(
                    url, server["key"], settings, weights_file=Path(server["weights_file"])
                )
                for url in server["urls"]
            ]
        )
    trainer = _trainer(template, "tensor-expert")
    for number, case in enumerate(cases):
        with torch.no_grad():
            for parameter in trainer.module.parameters():
                parameter.mul_(1 + 0.01 * (number + 1))
        section = SyncSection.model_validate(
            {"transport": case["transport"], "bucket_bytes": 20_000, "timeout_s": LONG_S}
        )
        said: list[str] = []
        weights = StudentWeights(
            trainer,
            samples(515),
            section,
            engine,
            folder=Path(folder) / "sync",
            template=template,
            weights_file=Path(server["weights_file"]),
            print_line=said.append,
        )
        if engine is not None:
            _lose(weights, engine, Path(server["weights_file"]), case)
        report = weights.push(f"step-{number}")
        if engine is not None and report is not None:
            versions = [one.model_info()["weight_version"] for one in engine.engines]
            starts = [
                num_starts(Path(server["weights_file"]), replica)
                for replica in range(len(versions))
            ]
            found.append({**asdict(report), "said": said, "served": versions, "starts": starts})
    parallel.shutdown()
    return found


def _lose(
    weights: StudentWeights, engine: SGLangEngine, weights_file: Path, case: dict[str, str]
) -> None:
    """Has the server killed or stopped at that place of the next sync, once."""
    to: Any = weights._receiver
    servers: Any = weights._restarted
    patient = servers._answer_s
    start = num_starts(weights_file, 0)
    number = signal.Signals[case["signal"]]

    def wait_at_most(timeout_s: float, answer_s: float) -> None:
        to._timeout_s = to._session._timeout_s = to._verification._timeout_s = timeout_s
        servers._answer_s = answer_s
        for group in getattr(to, "_group", []):
            _set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)

    def lose() -> None:
        # Wait until all that was sent has arrived. After that, a late answer means a stopped
        # server, and not a slow machine.
        if number is signal.SIGSTOP:
            if case["transport"] != "disk":
                to._await_sent()
            wait_at_most(1.0, 1.0)
        os.killpg(_group_at(engine.address[1]), number)

    def once(call: Callable[..., Any], *, skip: int = 0, after: bool = False) -> Callable[..., Any]:
        left = [skip]

        def called(*arguments: Any) -> Any:
            result = call(*arguments) if after else None
            left[0] -= 1
            if left[0] == -1:
                lose()
                if after:
                    _until(lambda: num_starts(weights_file, 0) > start)
            return result if after else call(*arguments)

        return called

    def end(replicas: Any) -> None:
        ended(replicas)
        wait_at_most(LONG_S, patient)

    ended = servers.end
    servers.end = end
    if case["place"] == "verification":
        to._verification.check = once(to._verification.check)
    elif case["place"] == "committed":
        to.commit = once(to.commit, after=True)
    elif case["place"] == "bucket":
        to.receive = once(to.receive, skip=2)
    else:
        setattr(to, case["place"], once(getattr(to, case["place"])))


def _group_at(port: int) -> int:
    """The process group of whoever listens there."""
    [process] = {
        found.pid
        for found in psutil.net_connections("tcp")
        if found.status == psutil.CONN_LISTEN and found.laddr.port == port
    }
    assert process is not None
    return os.getpgid(process)


def _until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)
