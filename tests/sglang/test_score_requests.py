"""How sequences are sent to be scored: short ones share a request, and nothing else changes."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from lopd.errors import DataError, EngineError
from lopd.records import int32
from sglang_rollout.requests.scoring import ScoreRequest, score_payload, together
from sglang_rollout.requests.streaming import stream
from tests.sglang.answers import VOCAB_SIZE, sequences
from tests.sglang.fake_server import FakeServer
from tests.sglang.test_streaming import never, opened


def requests(count: int, length: int = 6) -> list[ScoreRequest]:
    return [
        ScoreRequest(f"p{number}", 0, int32([number + 3] * 4), int32([7] * (length + number % 5)))
        for number in range(count)
    ]


def scored(fake: FakeServer, items: list[ScoreRequest], in_flight: int) -> dict[Any, list[float]]:
    engine = fake.engine(max_in_flight=in_flight)
    return {
        one.key: one.teacher_logprobs.tolist() for one in engine.score(items, vocab_size=VOCAB_SIZE)
    }


def test_short_sequences_share_a_request_and_have_the_same_scores(fake: FakeServer) -> None:
    items = requests(45)
    # Values that depend on the sequence and the place: a mistaken order would show.
    fake.change = by_place
    alone = scored(fake, items, in_flight=4)
    assert [len(sequences(body)) for body in fake.paths("/generate")] == [1] * 45
    fake.calls.clear()
    assert scored(fake, items, in_flight=64) == alone
    assert sorted(len(sequences(body)) for body in fake.paths("/generate")) == [5, 8, 8, 8, 8, 8]
    for item in items:
        np.testing.assert_allclose(
            alone[item.key],
            [-(item.prompt_ids[0] + place) / 64 for place in range(1, len(item.token_ids) + 1)],
        )


def by_place(answer: dict[str, Any]) -> dict[str, Any]:
    entries = answer["meta_info"]["input_token_logprobs"]
    for place, entry in enumerate(entries[1:], 1):
        entry[0] = -(entries[0][1] + place) / 64
    return answer


def test_answers_in_another_order_are_noticed(fake: FakeServer) -> None:
    items = requests(16)
    original = fake._answer

    def turned(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        status, answer = original(path, body)
        return status, answer[::-1] if isinstance(answer, list) else answer

    fake._answer = turned  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="the server returned"):
        scored(fake, items, in_flight=64)


def test_a_missing_answer_is_noticed(fake: FakeServer) -> None:
    original = fake._answer

    def shorter(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        status, answer = original(path, body)
        return status, answer[:-1] if isinstance(answer, list) else answer

    fake._answer = shorter  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="is not a generation for each sequence"):
        scored(fake, requests(16), in_flight=64)


def test_one_aborted_sequence_repeats_its_request(fake: FakeServer) -> None:
    aborted: list[str] = []

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        if not aborted:
            aborted.append(answer["meta_info"]["id"])
            answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "as told"}
        return answer

    fake.change = change
    items = requests(16)
    assert len(scored(fake, items, in_flight=64)) == 16
    bodies = fake.paths("/generate")
    assert len(bodies) == 3
    names = [one["rid"] for body in bodies for one in sequences(body)]
    assert len(set(names)) == len(names) == 24, "each attempt has names of its own"


def test_a_sequence_that_cannot_be_scored_is_named(fake: FakeServer) -> None:
    items = requests(16)
    items[11] = ScoreRequest("long", 3, int32([3] * 100), int32([7] * 100))
    with pytest.raises(DataError, match="prompt and response have 200 tokens"):
        scored(fake, items, in_flight=64)


def test_long_sequences_go_alone_and_the_order_stays() -> None:
    items = [*requests(5), *requests(3, length=3000), *requests(5)]
    groups = list(together(items, in_flight=128))
    assert [len(group) for group in groups] == [6, 1, 6]
    assert [one for group in groups for one in group] == items
    # At least eight requests are under way, so few in flight are not put together.
    assert {len(group) for group in together(items, in_flight=15)} == {1}


def test_one_sequence_is_asked_for_as_one() -> None:
    (one, other) = requests(2)
    single = score_payload([one], ["a"])
    assert (single["rid"], single["logprob_start_len"]) == ("a", 3)
    both = score_payload([one, other], ["a", "b"])
    assert (both["rid"], both["logprob_start_len"]) == (["a", "b"], [3, 3])
    assert [len(ids) for ids in both["input_ids"]] == [10, 11]


def test_items_of_several_stay_within_the_limit() -> None:
    open_now: list[int] = []
    most: list[int] = []

    async def work(size: int) -> int:
        open_now.append(size)
        most.append(sum(open_now))
        await asyncio.sleep(0)
        open_now.remove(size)
        return size

    sizes = [3, 1, 4, 1, 5, 9, 2, 6] * 20
    found = list(stream(sizes, opened(work), in_flight=10, watch=never, weigh=lambda size: size))
    assert sorted(found) == sorted(sizes)
    assert 8 < max(most) <= 10
    # The control, and an item above the limit.
    most.clear()
    list(stream(sizes, opened(work), in_flight=10, watch=never))
    assert max(most) > 10
    assert list(stream([12], opened(work), in_flight=10, watch=never, weigh=int)) == [12]
