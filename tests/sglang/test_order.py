"""In which order responses are asked for and scored: samples of a prompt far enough apart for its
prefix to be cached, like lengths together; and that no published byte depends on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lopd import cache
from lopd.artifacts import ArtifactWriter
from lopd.megatron.scoring.scorer import MegatronScorer
from lopd.records import Key, Prompt, Response, TeacherScores, token_hash
from lopd.stages.request_order import by_length, in_passes
from lopd.stages.sample_shards import sample_into
from lopd.stages.score_shards import score_into
from sglang_rollout.requests.sampling import SamplingRequest
from sglang_rollout.requests.scoring import ScoreRequest
from tests.sglang.answers import STOP_ID, VOCAB_SIZE
from tests.sglang.conftest import sampling
from tests.sglang.fake_server import FakeServer

PARAMS = sampling(stop_token_ids=(STOP_ID,))
IN_FLIGHT = 8


def response(prompt: int, sample: int, length: int) -> Response:
    ids = np.arange(10, 10 + length, dtype=np.int32)
    logprobs = np.full(length, -1, np.float32)
    prompt_ids = np.array([4 + prompt, 5], np.int32)
    return Response(
        f"p{prompt}", sample, prompt_ids, ids, logprobs, finish_reason="length", weight_version="0"
    )


RESPONSES = [
    response(0, 0, 3),
    response(0, 1, 9),
    response(1, 0, 20),
    response(1, 1, 4),
    response(2, 0, 12),
]


def least_distance(keys: Iterable[Key]) -> int:
    """Between two samples of one prompt, in requests."""
    last: dict[str, int] = {}
    found = []
    for place, (prompt, _) in enumerate(keys):
        if prompt in last:
            found.append(place - last[prompt])
        last[prompt] = place
    return min(found)


# ---- the order alone ----


@pytest.mark.parametrize("num_prompts", [8, 9, 15, 16, 17, 100])
@pytest.mark.parametrize("num_samples", [2, 4, 16])
def test_between_two_samples_of_a_prompt_are_as_many_requests_as_are_in_flight(
    num_prompts: int, num_samples: int
) -> None:
    prompts = [
        [(f"p{prompt}", sample) for sample in range(num_samples)] for prompt in range(num_prompts)
    ]
    order = in_passes(prompts, IN_FLIGHT)
    one_after_the_other = in_passes(prompts, 1)
    assert sorted(order) == sorted(one_after_the_other)
    assert least_distance(order) >= IN_FLIGHT
    # At a larger distance the cache would forget the prefix.
    assert (
        max(np.diff([place for place, key in enumerate(order) if key[0] == "p0"])) < 2 * IN_FLIGHT
    )
    assert one_after_the_other == [key for samples in prompts for key in samples]
    assert least_distance(one_after_the_other) == 1


def test_prompts_with_fewer_samples_are_left_out_of_later_passes() -> None:
    assert in_passes(["abc", "d", "ef"], 3) == [*"adebfc"]
    assert in_passes(["abc", "d", "ef"], 100) == [*"adebfc"]
    assert in_passes([], 8) == []


def test_scored_are_the_longest_first_and_prompts_of_like_length_take_turns() -> None:
    assert [one.key for one in by_length(RESPONSES, 3)] == [
        ("p1", 0),
        ("p2", 0),
        ("p0", 1),
        ("p1", 1),
        ("p0", 0),
    ]
    lengths = np.random.default_rng(0).integers(4, 1000, (64, 4))
    responses = [
        response(prompt, sample, int(length))
        for prompt, row in enumerate(lengths)
        for sample, length in enumerate(row)
    ]
    order = by_length(responses, IN_FLIGHT)
    assert least_distance([one.key for one in order]) == IN_FLIGHT
    longest = {
        one.prompt_id: max(
            len(other.token_ids) for other in order if other.prompt_id == one.prompt_id
        )
        for one in order
    }
    blocks = [
        [longest[one.prompt_id] for one in order[start : start + 4 * IN_FLIGHT]]
        for start in range(0, len(order), 4 * IN_FLIGHT)
    ]
    assert all(min(block) >= max(following) for block, following in pairwise(blocks))


# ---- as the stages send it ----


class Asked:
    """An engine of no server. Pulls ahead as a stream does, answers in the order of asking, and
    notes of what it was asked.
    """

    def __init__(self, in_flight: int) -> None:
        self.settings = SimpleNamespace(max_in_flight=in_flight)
        self.engines = (self,)
        self.keys: list[Key] = []
        self.open: list[list[Key]] = []  # whenever one is answered

    def model_info(self) -> dict[str, str]:
        return {"weight_version": "0"}

    def generate(
        self, requests: Iterable[SamplingRequest], *_: Any, **__: Any
    ) -> Iterator[Response]:
        ahead: deque[SamplingRequest] = deque()
        for request in requests:
            self.keys.append(request.key)
            ahead.append(request)
            if len(ahead) == 2 * self.settings.max_in_flight:
                self.open.append([other.key for other in ahead])
                yield self._answer(ahead.popleft())
        yield from map(self._answer, ahead)

    def score(self, requests: Iterable[ScoreRequest], *, top_k: int = 0) -> Iterator[TeacherScores]:
        for one in requests:
            self.keys.append(one.key)
            logprobs = np.full(len(one.token_ids), -1, np.float32)
            yield TeacherScores(*one.key, token_hash(one.prompt_ids, one.token_ids), logprobs)

    def _answer(self, request: SamplingRequest) -> Response:
        logprobs = np.full(1, -1, np.float32)
        return Response(
            *request.key,
            request.prompt_ids,
            np.array([request.seed % 500], np.int32),
            logprobs,
            finish_reason="length",
            weight_version="0",
        )


def sample(
    engine: Any, folder: Path, *, prompts: int = 30, samples: int = 4, shard_size: int = 10
) -> list[bytes]:
    """The published shards."""
    asked = [
        Prompt(f"p{index}", ({"role": "user", "content": "?"},), "test", None)
        for index in range(prompts)
    ]
    ids = [np.array([4 + index, 5], np.int32) for index in range(prompts)]
    writer = ArtifactWriter(folder, kind="rollouts", inputs={}, shard_size=shard_size)
    sample_into(
        writer,
        engine,
        asked,
        ids,
        PARAMS,
        samples_per_prompt=samples,
        seed=1,
        purpose="test",
        title="sampling",
    )
    return [path.read_bytes() for path in sorted(folder.glob("*.parquet"))]


def test_a_stage_samples_one_of_every_prompt_of_a_shard_before_the_second_of_any(
    tmp_path: Path,
) -> None:
    engine = Asked(IN_FLIGHT)
    sample(engine, tmp_path, prompts=32, shard_size=4 * 16)
    assert sorted(engine.keys) == sorted(
        (f"p{prompt}", number) for prompt in range(32) for number in range(4)
    )
    assert least_distance(engine.keys) == 16
    assert least_distance(sorted(engine.keys)) == 1
    assert engine.keys[:32] == [
        *((f"p{prompt}", 0) for prompt in range(16)),
        *((f"p{prompt}", 1) for prompt in range(16)),
    ]


def test_no_more_shards_are_in_memory_than_are_in_flight(tmp_path: Path) -> None:
    """What is sampled and not published is lost by a kill: passes over more than a shard would make
    it more.
    """
    engine = Asked(IN_FLIGHT)
    rows = 10
    sample(engine, tmp_path, prompts=200)
    assert len(engine.open) > 700
    for keys in engine.open:
        shards = {(4 * int(prompt[1:]) + number) // rows for prompt, number in keys}
        assert max(shards) - min(shards) <= -(-2 * IN_FLIGHT // rows)


def test_what_is_published_depends_on_no_order_of_asking(fake: FakeServer, tmp_path: Path) -> None:
    published = [
        sample(fake.engine(max_in_flight=number), tmp_path / str(number))
        for number in (1, 3, 8, 64)
    ]
    orders = [
        [body["input_ids"][0] for body in fake.paths("/generate")][start : start + 120]
        for start in range(0, 480, 120)
    ]
    assert orders[0] != orders[3]
    assert len(published[0]) == 12
    assert published[1:] == published[:1] * 3


def score(engine: Any, folder: Path, responses: Sequence[Response]) -> None:
    """The scores are published in the order of the responses."""
    writer = ArtifactWriter(folder / "rollouts", kind="rollouts", inputs={})
    writer.publish_shard(0, cache.to_table(responses))
    scores = ArtifactWriter(folder / "scores", kind="teacher_cache", inputs={})
    score_into(scores, engine, folder / "rollouts", writer.finish(), title="scoring")
    scores.finish()
    assert [response.key for response, _ in cache.read_rows(folder / "scores")] == [
        response.key for response in responses
    ]


@pytest.mark.parametrize(
    ("in_flight", "lengths"), [(1, [22, 6, 14, 11, 5]), (3, [22, 14, 11, 6, 5])]
)
def test_scores_are_asked_for_in_passes(in_flight: int, lengths: list[int], tmp_path: Path) -> None:
    engine = Asked(in_flight)
    score(engine, tmp_path, RESPONSES)
    asked = {
        response.key: len(response.prompt_ids) + len(response.token_ids) for response in RESPONSES
    }
    assert [asked[key] for key in engine.keys] == lengths


def test_a_servers_scores_are_published_in_the_order_of_the_rollouts(
    fake: FakeServer, tmp_path: Path
) -> None:
    engine = fake.engine(max_in_flight=3)
    engine.vocab_size = VOCAB_SIZE
    score(engine, tmp_path, RESPONSES)
    assert sorted(len(body["input_ids"]) for body in fake.paths("/generate")) == [5, 6, 11, 14, 22]


class Packing(MegatronScorer):
    """Of no ranks."""

    def __init__(self) -> None:
        self.keys: list[Key] = []

    score = Asked.score  # type: ignore[assignment]


def test_megatron_core_has_no_prefix_cache_and_packs_by_length(tmp_path: Path) -> None:
    """What it packs together decides the last bits of scores: prompts of like length, each with all
    its samples, whatever a server would like.
    """
    engine = Packing()
    score(engine, tmp_path, RESPONSES)
    assert engine.keys == [("p1", 0), ("p1", 1), ("p2", 0), ("p0", 1), ("p0", 0)]
