"""Many requests at once behind a plain generator.

The caller's thread pulls the input and receives the results as they finish. A second thread runs
the event loop. At most ``in_flight`` items are worked on, and at most twice as many are between
being pulled and being yielded. So memory does not grow with the number of items.
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
# Handles one item. The context manager around it holds what all items share: the connections.
Handler: TypeAlias = Callable[[T], Awaitable[R]]
OpenHandler: TypeAlias = Callable[[], AbstractAsyncContextManager[Handler[T, R]]]

# How long the caller's thread waits for a result before it calls watch().
_WATCH_INTERVAL_S = 0.2


def stream(
    items: Iterable[T],
    open_handler: OpenHandler[T, R],
    *,
    in_flight: int,
    watch: Callable[[], None],
    weigh: Callable[[T], int] = lambda _: 1,
) -> Iterator[R]:
    """Handle every item and yield the results in the order of completion.

    To leave the generator, by close() or by an error, cancels everything that is under way.

    Args:
        items: The input. It is pulled as results are taken, and never all at once.
        open_handler: Makes a context manager, which is entered once in the thread of the event
            loop and gives the function that handles an item.
        in_flight: The largest number of items that are handled at the same time.
        watch: A function that is called while no result arrives. It raises to give up.
        weigh: As how many items an item counts for in_flight. One that counts for more is handled
            alone.

    Raises:
        Exception: The first error of an item, of the input or of watch() ends the stream.
    """
    assert in_flight >= 1
    remaining = iter(items)
    loop = _HandlerThread(open_handler, in_flight, weigh)
    limit = in_flight + pulled_ahead(in_flight)
    num_outstanding = 0
    exhausted = False
    try:
        while True:
            # The input is refilled before every wait. Otherwise the event loop would run dry while
            # the caller works on a result.
            while num_outstanding < limit and not exhausted:
                try:
                    item = next(remaining)
                except StopIteration:
                    exhausted = True
                else:
                    loop.submit(item)
                    num_outstanding += weigh(item)
            if num_outstanding == 0:
                return
            try:
                outcome, weight = loop.results.get(timeout=_WATCH_INTERVAL_S)
            except queue.Empty:
                # A dead server that nobody restarts gives no results for ever. watch() finds that.
                watch()
                continue
            num_outstanding -= weight
            # result() raises the error of a failed item here, in the caller's thread.
            yield outcome.result()
    finally:
        # Also where the caller stops early: that raises GeneratorExit at the yield.
        loop.close()


def pulled_ahead(in_flight: int) -> int:
    """Return how many items wait in the thread of the event loop, beyond those in work.

    With them a new item begins at once where one has ended, also while the caller's thread is busy,
    for example with writing a shard.
    """
    return in_flight


class _HandlerThread(Generic[T, R]):
    """A thread with an event loop that handles submitted items, in_flight of them at a time.

    The methods submit() and close() belong to the caller's thread. All others run in the loop, so
    the tasks and the waiting items need no lock.
    """

    def __init__(
        self, open_handler: OpenHandler[T, R], in_flight: int, weigh: Callable[[T], int]
    ) -> None:
        # The way back to the caller's thread. A future carries a result or an error across. Beside
        # it stands the weight of the item.
        self.results: queue.SimpleQueue[tuple[Future[R], int]] = queue.SimpleQueue()
        self._in_flight = in_flight
        self._weigh = weigh
        self._waiting = deque[T]()
        # The loop itself has only weak references to tasks. This table keeps them alive, with the
        # weights of their items.
        self._tasks: dict[asyncio.Task[R], int] = {}
        self._open_weight = 0
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(open_handler, started)),
            name="sglang-requests",
            daemon=True,
        )
        self._thread.start()
        # An error of open_handler is raised here. And submit() needs the loop, which exists then.
        started.result()

    async def _main(self, open_handler: OpenHandler[T, R], started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            async with open_handler() as handler:
                self._handler = handler
                started.set_result(None)
                await self._stop.wait()
                # The waiting items go first: a cancelled task would start the next of them.
                self._waiting.clear()
                for task in self._tasks:
                    task.cancel()
                # A cancelled request still tells its server to forget it, for which it needs the
                # connections. So they are closed only after all tasks have ended.
                await asyncio.gather(*self._tasks, return_exceptions=True)
        except BaseException as error:
            if started.done():
                raise
            # Otherwise the caller would wait for ever in __init__.
            started.set_exception(error)

    def submit(self, item: T) -> None:
        # asyncio allows this one call from another thread.
        self._loop.call_soon_threadsafe(self._begin, item)

    def _begin(self, item: T) -> None:
        self._waiting.append(item)
        self._fill()

    def _fill(self) -> None:
        while self._waiting:
            weight = self._weigh(self._waiting[0])
            # With nothing in flight even a heavy item goes out. Otherwise it would wait for ever.
            if self._tasks and self._open_weight + weight > self._in_flight:
                return
            task = asyncio.ensure_future(self._handler(self._waiting.popleft()))
            self._tasks[task] = weight
            self._open_weight += weight
            task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[R]) -> None:
        weight = self._tasks.pop(task)
        self._open_weight -= weight
        # The next item begins before the result is handed over, so that the server is never idle
        # because of the caller.
        self._fill()
        # Only close() cancels, and after it nobody takes results any more.
        if task.cancelled():
            return
        outcome: Future[R] = Future()
        error = task.exception()
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(task.result())
        self.results.put((outcome, weight))

    def close(self) -> None:
        # The thread is awaited, so that every abort has reached its server when the stream is
        # closed.
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
