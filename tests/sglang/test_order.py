"""In which order responses are scored: neighbours of like length, samples of a prompt together; what is published keeps its order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lopd import cache
from lopd.artifacts import ArtifactWriter
from lopd.records import Response
from lopd.stages.sampling import by_length, score_into
from tests.sglang.answers import VOCAB_SIZE
from tests.sglang.fake_server import FakeServer


def response(prompt: int, sample: int, length: int) -> Response:
    ids = np.arange(10, 10 + length, dtype=np.int32)
    logprobs = np.full(length, -1, np.float32)
    prompt_ids = np.array([4 + prompt, 5], np.int32)
    return Response(f"p{prompt}", sample, prompt_ids, ids, logprobs, finish_reason="length", weight_version="0")


RESPONSES = [response(0, 0, 3), response(0, 1, 9), response(1, 0, 20), response(1, 1, 4), response(2, 0, 12)]


def test_longest_first_and_the_samples_of_a_prompt_together() -> None:
    assert [one.key for one in by_length(RESPONSES)] == [("p1", 0), ("p1", 1), ("p2", 0), ("p0", 1), ("p0", 0)]


def test_what_is_published_keeps_the_order_of_the_rollouts(fake: FakeServer, tmp_path: Path) -> None:
    writer = ArtifactWriter(tmp_path / "rollouts", kind="rollouts", inputs={})
    writer.publish_shard(0, cache.to_table(RESPONSES))
    rollouts = writer.finish()
    engine = fake.engine(max_in_flight=1)
    engine.vocab_size = VOCAB_SIZE
    scores = ArtifactWriter(tmp_path / "scores", kind="teacher_cache", inputs={})
    score_into(scores, engine, tmp_path / "rollouts", rollouts, title="scoring")
    assert [len(body["input_ids"]) for body in fake.paths("/generate")] == [22, 6, 14, 11, 5]
    assert [one.key for one, _ in cache.read_rows(tmp_path / "scores", scores.finish())] == [one.key for one in RESPONSES]
