"""The stream: bounded, lazy, in order of completion, and cancelled when it is left. No server."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sglang_rollout.requests.streaming import OpenHandler, pulled_ahead, stream

AT_ONCE_S = 30.0  # for what takes milliseconds, on a machine with much else to do


def opened(work: Callable[[Any], Awaitable[Any]]) -> OpenHandler[Any, Any]:
    @asynccontextmanager
    async def open_handler() -> AsyncIterator[Callable[[Any], Awaitable[Any]]]:
        yield work

    return open_handler


def never() -> None:
    """A watch that finds nothing wrong."""


class Item:
    def __init__(self, number: int) -> None:
        self.number = number


async def _double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


def test_every_item_is_worked_on_once() -> None:
    assert sorted(stream(range(1000), opened(_double), in_flight=7, watch=never)) == [
        2 * number for number in range(1000)
    ]


def test_an_empty_input_gives_nothing() -> None:
    assert list(stream([], opened(_double), in_flight=7, watch=never)) == []


def test_results_come_as_they_finish() -> None:
    ended = []

    async def last_first(number: int) -> int:
        while len(ended) < 7 - number:
            await asyncio.sleep(0.001)
        ended.append(number)
        return number

    assert list(stream(range(8), opened(last_first), in_flight=8, watch=never)) == [
        7,
        6,
        5,
        4,
        3,
        2,
        1,
        0,
    ]


def test_work_begins_where_some_has_ended_without_a_turn_of_the_caller_and_never_more_at_once() -> (
    None
):
    begun = []
    at_once = 0
    most = 0

    async def work(number: int) -> int:
        nonlocal at_once, most
        begun.append(number)
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.01)
        at_once -= 1
        return number

    results = stream(range(100), opened(work), in_flight=8, watch=never)
    next(results)
    deadline = time.monotonic() + AT_ONCE_S
    while len(begun) < 8 + pulled_ahead(8) and time.monotonic() < deadline:  # nobody pulls
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(begun) == 8 + pulled_ahead(8)
    assert most == 8
    assert len(list(results)) == 99
    assert most == 8


@pytest.mark.parametrize("in_flight", [1, 5])
def test_never_more_items_alive_than_in_flight_however_many_there_are(in_flight: int) -> None:
    alive: weakref.WeakSet[Item] = weakref.WeakSet()
    most = 0

    def items() -> Iterator[Item]:
        for number in range(500):
            item = Item(number)
            alive.add(item)
            yield item

    async def work(item: Item) -> int:
        await asyncio.sleep(0)
        return item.number

    count = 0
    gc.freeze()  # else each collection looks at all that other tests have imported
    try:
        for _ in stream(items(), opened(work), in_flight=in_flight, watch=never):
            count += 1
            if count % 50 == 0:
                gc.collect()
                most = max(most, len(alive))
    finally:
        gc.unfreeze()
    assert count == 500
    # The generator's own variables hold one or two responses that are done.
    assert most <= in_flight + pulled_ahead(in_flight) + 2


def test_the_input_is_pulled_in_the_callers_thread() -> None:
    threads = set()

    def items() -> Iterator[int]:
        for number in range(20):
            threads.add(threading.get_ident())
            yield number

    list(stream(items(), opened(_double), in_flight=3, watch=never))
    assert threads == {threading.get_ident()}


def test_leaving_early_cancels_what_is_under_way_and_pulls_no_more() -> None:
    pulled = []
    cancelled = []

    def items() -> Iterator[int]:
        for number in range(1000):
            pulled.append(number)
            yield number

    async def work(number: int) -> int:
        try:
            await asyncio.sleep(0.001 if number < 3 else 10 * AT_ONCE_S)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        return number

    results = stream(items(), opened(work), in_flight=10, watch=never)
    first = next(results)
    began = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < AT_ONCE_S
    assert first < 3
    assert len(pulled) <= 10 + pulled_ahead(10)
    assert len(cancelled) >= 7
    assert not any(thread.name == "sglang-requests" for thread in threading.enumerate())


def test_an_error_of_one_item_ends_the_stream() -> None:
    async def work(number: int) -> int:
        if number == 5:
            raise ValueError("the fifth")
        await asyncio.sleep(0.01)
        return number

    with pytest.raises(ValueError, match="the fifth"):
        list(stream(range(100), opened(work), in_flight=4, watch=never))


def test_an_error_of_the_input_is_raised_and_the_thread_ends() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise RuntimeError("the input broke")

    with pytest.raises(RuntimeError, match="the input broke"):
        list(stream(items(), opened(_double), in_flight=4, watch=never))
    assert not any(thread.name == "sglang-requests" for thread in threading.enumerate())


def test_watch_ends_a_stream_in_which_nothing_arrives() -> None:
    async def hang(_: int) -> int:
        await asyncio.sleep(10 * AT_ONCE_S)
        return 0

    def watch() -> None:
        raise RuntimeError("dead")

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="dead"):
        list(stream(range(3), opened(hang), in_flight=2, watch=watch))
    assert time.monotonic() - began < AT_ONCE_S


def test_work_that_cannot_be_opened_raises_at_once() -> None:
    @asynccontextmanager
    async def open_handler() -> AsyncIterator[Any]:
        raise OSError("no connections")
        yield

    with pytest.raises(OSError, match="no connections"):
        list(stream(range(3), open_handler, in_flight=2, watch=never))
