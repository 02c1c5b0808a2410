"""Two ranks that wait for a refresh, and for what only rank 0 can do, for longer than a collective
may last; started by run_ranks.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lopd.errors import EngineError
from lopd.megatron.ranks.rank_errors import reporting_errors
from lopd.records import Sample

COLLECTIVE_TIMEOUT_S, REFRESH_S = 2.0, 3.0


class Server:
    """Takes and gives nothing."""

    shares_gpus = False

    def push(self, step: int, *, again: bool = False) -> None: ...

    def free_gpus(self) -> None: ...

    def gpus_to_trainer(self) -> None: ...


class Batches:
    """Keeps what the steps are to learn from."""

    def use_refreshed(self, samples: Sequence[Sample], start: int) -> None:
        self.samples = samples
        self.start = start


def wait(job_file: Path) -> None:
    from lopd.config import ParallelSection
    from lopd.megatron.ranks import parallel
    from lopd.megatron.ranks.first_rank import run_on_first_rank
    from lopd.stages.refresh_requester import RefreshRequester
    from lopd.stages.training import TrainingJob

    parallel.initialize(ParallelSection(ranks=2), seed=1, timeout_s=600)
    job = TrainingJob.from_json(json.loads(job_file.read_text()))
    batches = Batches()
    state: dict[str, Any] = {"refresh_due": "2 steps"}
    training: Any = SimpleNamespace(state=state, batches=batches)
    requester = RefreshRequester(job, Server())
    requester.begin(training)
    parallel.gather_objects("here")
    collectives_last(COLLECTIVE_TIMEOUT_S)
    requester.before_step(2)
    assert batches.start == 2
    assert run_on_first_rank(partial(_work, job_file)) == f"of rank 0 in {job_file}"
    try:
        run_on_first_rank(_refused)
    except EngineError as error:
        say(f"rank {parallel.rank()} is told: {error}")
    # What the ranks read after the wait takes one of them longer than the other.
    collectives_last(600)
    count = len(batches.samples)
    parallel.gather_objects(count)
    say(f"rank {parallel.rank()} learns from {count}, next refresh: {state['refresh_due']}")
    collectives_last(COLLECTIVE_TIMEOUT_S)
    while parallel.rank() == 0:  # the control: the other rank waits in a collective
        time.sleep(1)
    parallel.gather_objects("late")
    say("waited in a collective")


def _work(job_file: Path) -> str:
    time.sleep(REFRESH_S)
    return f"of rank {os.environ['RANK']} in {job_file}"


def _refused() -> None:
    from sglang_rollout.requests.client import Refused

    raise Refused(f"no, says rank {os.environ['RANK']}", where="a server", remedy="ask another")


def collectives_last(timeout_s: float) -> None:
    """From now on so long at most."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(datetime.timedelta(seconds=timeout_s))


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    with reporting_errors():
        wait(Path(sys.argv[1]))
