"""What only rank 0 can do, as it alone talks to the servers, while the others wait for it as long as it takes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait
from typing import TypeVar

from lopd.megatron import parallel
from sglang_rollout.weight_sync.interface import started

T = TypeVar("T")
_POLL_S = 0.1


def by_first_rank(work: Callable[[], T]) -> T:
    """What work returns on rank 0 (small, plain), on every rank. What it raises is raised on rank 0 alone, whose end ends the others.

    They wait in one short collective after another: a server that is started again, or answers thousands of prompts, may take longer than one may last.
    """
    if parallel.world_size() == 1:
        return work()
    running = started(work) if parallel.rank() == 0 else None
    while True:
        done = running is not None and bool(wait([running], _POLL_S).done)
        told = parallel.gather_objects((running.result(),) if running is not None and done else None)[0]
        if told is not None:
            result: T = told[0]
            return result
