"""What only rank 0 does (it talks to the servers, it writes the model), while the other ranks wait
as long as it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any, TypeVar

from lopd import errors
from lopd.errors import LopdError
from lopd.megatron.ranks import parallel

T = TypeVar("T")
_POLL_S = 0.1


def by_first_rank(work: Callable[[], T]) -> T:
    """What work returns on rank 0 (small, plain), on every rank. A LopdError of it is raised on
    every rank; what else it raises, on rank 0 alone, whose end ends the others.

    They wait in one short collective after another: a server that is started again, or answers
    thousands of prompts, may take longer than one may last.
    """
    if parallel.world_size() == 1:
        return work()
    running = _started(work) if parallel.rank() == 0 else None
    told = None
    while told is None:
        told = parallel.gather_objects(None if running is None else _told(running))[0]
    if running is not None:
        return running.result()
    result, error = told
    if error is not None:
        kind, what, about = error
        raise getattr(errors, kind)(what, **about)
    value: T = result
    return value


def _started(work: Callable[[], T]) -> Future[T]:
    """The work in a thread of its own, which does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)

    Thread(target=run, name="first-rank", daemon=True).start()
    return future


def _told(running: Future[Any]) -> tuple[Any, tuple[str, str, dict[str, str]] | None] | None:
    """For the other ranks: the result, or the error in parts; None: there is neither yet. Raises
    what is no LopdError.
    """
    if not wait([running], _POLL_S).done:
        return None
    error = running.exception()
    if not isinstance(error, LopdError):
        return running.result(), None
    kind = next(
        one.__name__ for one in type(error).__mro__ if one.__module__ == errors.__name__
    )  # a package's own kind of one says no more to them
    return None, (
        kind,
        error.what,
        {"where": error.where, "limit": error.limit, "remedy": error.remedy},
    )
