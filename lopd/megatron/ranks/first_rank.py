"""What only rank 0 does, for example to talk to the servers or to write the model.

The other ranks wait for it, however long it takes.
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
# Seconds that rank 0 waits for its result before it tells the other ranks that there is none yet.
_POLL_S = 0.1
# What other ranks need to raise a LopdError: the name of its class, what, and its other fields.
ErrorParts = tuple[str, str, dict[str, str]]


def run_on_first_rank(action: Callable[[], T]) -> T:
    """Run an action on rank 0 and return its result on every rank. Collective.

    Args:
        action: A function that is called only on rank 0. Its result is sent to the other ranks, so
            it must be small and plain.

    Raises:
        LopdError: The action raised it. Every rank raises it. Other errors of the action are
            raised on rank 0 alone. The end of rank 0 then ends the other ranks.
    """
    if parallel.world_size() == 1:
        return action()
    # In a thread: this one must take part in the collectives in the meantime.
    running = _start(action) if parallel.rank() == 0 else None
    # A single collective would fail: the action may take longer than the timeout of a collective,
    # for example while a server is started again or answers thousands of prompts. So the ranks meet
    # in one short collective after another until rank 0 has an outcome.
    outcome = None
    while outcome is None:
        mine = None if running is None else _outcome_of(running)
        outcome = parallel.gather_objects(mine)[0]
    if running is not None:
        return running.result()
    result, error = outcome
    if error is not None:
        # The error comes as plain values, from which each rank makes it again with its own class.
        kind, what, fields = error
        raise getattr(errors, kind)(what, **fields)
    value: T = result
    return value


def _start(action: Callable[[], T]) -> Future[T]:
    """Run the action in a thread of its own."""
    # A pool of threads would be joined when the process ends. This thread must not keep a process
    # from ending whose other ranks are lost.
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        # The error is raised where the result is asked for, in the main thread.
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="first-rank", daemon=True).start()
    return future


def _outcome_of(running: Future[Any]) -> tuple[Any, ErrorParts | None] | None:
    """Return (result, error) for the other ranks, or None while the action still runs.

    Raises:
        BaseException: The action raised it, and it is not a LopdError.
    """
    if not wait([running], _POLL_S).done:
        return None
    error = running.exception()
    if not isinstance(error, LopdError):
        # This raises an error that only rank 0 can understand.
        return running.result(), None
    # The error may be of a subclass that another package defines. The other ranks have perhaps not
    # imported it, so they raise the nearest class of lopd.errors.
    kind = next(one.__name__ for one in type(error).__mro__ if one.__module__ == errors.__name__)
    fields = {"where": error.where, "limit": error.limit, "remedy": error.remedy}
    return None, (kind, error.what, fields)
