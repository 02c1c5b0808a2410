"""Many requests at once behind a plain generator: bounded, lazily fed, results as they finish.

The caller's thread pulls the input and receives the results; a second thread runs the event loop.
Never more than ``in_flight`` items are worked on, and never more than twice as many are between
being pulled and being yielded: memory does not grow with their number. The other half waits in the
loop's thread, so that work begins at once where some has ended, also while the caller writes a
shard. Leaving the generator, by close() or an error, cancels what is under way.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T")
R = TypeVar("R")
Work: TypeAlias = Callable[[T], Awaitable[R]]
OpenWork: TypeAlias = Callable[[], AbstractAsyncContextManager[Work[T, R]]]

_WATCH_EVERY_S = 0.2


def stream(
    items: Iterable[T], open_work: OpenWork[T, R], *, in_flight: int, watch: Callable[[], None]
) -> Iterator[R]:
    """Apply the opened work to every item, at most in_flight at once, and yield the results in
    order of completion.

    open_work: entered once in the loop's thread (connections live there). watch: called while
    nothing arrives; it raises to give up. The first error of an item, of the input or of watch ends
    the stream and is raised.
    """
    assert in_flight >= 1
    remaining = iter(items)
    crew, at_most = _Crew(open_work, in_flight), in_flight + pulled_ahead(in_flight)
    outstanding, exhausted = 0, False
    try:
        while True:
            while outstanding < at_most and not exhausted:
                try:
                    item = next(remaining)
                except StopIteration:
                    exhausted = True
                else:
                    crew.submit(item)
                    outstanding += 1
            if outstanding == 0:
                return
            try:
                outcome = crew.results.get(timeout=_WATCH_EVERY_S)
            except queue.Empty:
                watch()
                continue
            outstanding -= 1
            yield outcome.result()
    finally:
        crew.close()


def pulled_ahead(in_flight: int) -> int:
    """Items that wait in the loop's thread beyond those that are worked on."""
    return in_flight


class _Crew(Generic[T, R]):
    """A thread with an event loop that works on what is submitted, in_flight items at a time."""

    def __init__(self, open_work: OpenWork[T, R], in_flight: int) -> None:
        self.results: queue.SimpleQueue[Future[R]] = queue.SimpleQueue()
        self._in_flight, self._waiting = in_flight, deque[T]()
        self._tasks: set[asyncio.Task[R]] = set()
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(open_work, started)),
            name="sglang-requests",
            daemon=True,
        )
        self._thread.start()
        started.result()

    async def _main(self, open_work: OpenWork[T, R], started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            async with open_work() as work:
                self._work = work
                started.set_result(None)
                await self._stop.wait()
                self._waiting.clear()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    def submit(self, item: T) -> None:
        self._loop.call_soon_threadsafe(self._begin, item)

    def _begin(self, item: T) -> None:
        if len(self._tasks) >= self._in_flight:
            self._waiting.append(item)
            return
        task = asyncio.ensure_future(self._work(item))
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[R]) -> None:
        self._tasks.discard(task)
        if self._waiting:
            self._begin(self._waiting.popleft())
        if task.cancelled():
            return
        outcome: Future[R] = Future()
        error = task.exception()
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(task.result())
        self.results.put(outcome)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
