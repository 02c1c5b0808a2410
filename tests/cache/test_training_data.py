"""What training reads from a cache: the same samples from memory and from disk, no response twice,
and of the optional columns only what the loss needs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lopd import cache
from lopd.artifacts import ArtifactWriter
from lopd.batching import build_microbatch
from lopd.config import Config, load_config
from lopd.errors import ArtifactError, ConfigError, DataError
from lopd.objective import Distillation, TokenBatch
from lopd.records import Microbatch, Sample
from lopd.stages import training_data
from lopd.stages.training import TrainingJob
from lopd.stages.training_data import CachedSamples, distillation_objective, load_samples
from tests.cache.rollouts import END, VOCABULARY, full_scores, publish_cache, some_responses
from tests.stand_ins import write_project

TOP_K = "distill.objective.loss=top_k_reverse_kl"


def job(tmp_path: Path, data: Path, *overrides: str) -> TrainingJob:
    if not (tmp_path / "project").exists():
        (tmp_path / "project").mkdir()
        write_project(tmp_path / "project")
    config: Config = load_config(tmp_path / "project" / "config.toml", [*overrides])
    return TrainingJob("distill", config, data, data, data, "checkpoint", 1, 0)


def with_top_k(folder: Path, count: int = 20) -> Path:
    writer = ArtifactWriter(folder, kind="teacher_cache", inputs={})
    writer.publish_shard(0, cache.to_table(*full_scores(some_responses(count))))
    writer.finish(vocab_size=VOCABULARY, end_token_ids=[END])
    return folder


def assert_equal(one: Sample, other: Sample) -> None:
    assert (one.key, one.truncated, one.teacher_index) == (
        other.key,
        other.truncated,
        other.teacher_index,
    )
    for name in ("token_ids", "loss_mask", "sampling_logprobs", "teacher_logprobs"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (one.teacher_top is None) == (other.teacher_top is None)


def test_from_disk_as_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_cache(tmp_path / "a", some_responses(60))
    held = load_samples(job(tmp_path, tmp_path / "a"))
    monkeypatch.setattr(training_data, "MEMORY_TOKENS", 100)
    read = load_samples(job(tmp_path, tmp_path / "a"))
    assert isinstance(held, list)
    assert isinstance(read, CachedSamples)
    assert len(read) == len(held) == 60
    for index in (59, 3, 17, -1, 0):
        assert_equal(read[index], held[index])
    for one, other in zip(read[10:40:3], held[10:40:3], strict=True):
        assert_equal(one, other)
    with pytest.raises(IndexError):
        read[60]


@pytest.mark.parametrize("memory", [100, 10**6])
def test_a_response_twice_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    monkeypatch.setattr(training_data, "MEMORY_TOKENS", memory)
    responses = some_responses(40)
    publish_cache(tmp_path / "a", [*responses, responses[7]])
    with pytest.raises(ArtifactError, match=r"response \('p7', 0\) occurs twice"):
        load_samples(job(tmp_path, tmp_path / "a"))


def test_what_is_no_cache(tmp_path: Path) -> None:
    cache.write_responses(tmp_path / "a", some_responses(3), kind="rollouts", inputs={})
    with pytest.raises(DataError, match="have no teacher log-probabilities"):
        load_samples(job(tmp_path, tmp_path / "a"))
    cache.write_responses(tmp_path / "b", [], kind="rollouts", inputs={})
    with pytest.raises(DataError, match="no responses to learn from"):
        load_samples(job(tmp_path, tmp_path / "b"))


def packed(tmp_path: Path, data: Path, *overrides: str) -> Microbatch:
    return build_microbatch(load_samples(job(tmp_path, data, *overrides))[:5], 8)


def test_the_top_k_goes_where_a_loss_asks_for_it(tmp_path: Path) -> None:
    data = with_top_k(tmp_path / "a")
    assert packed(tmp_path, data).teacher_top is None
    microbatch = packed(tmp_path, data, TOP_K)
    assert microbatch.teacher_top is not None
    assert isinstance(distillation_objective(job(tmp_path, data, TOP_K)), Distillation)
    scores = {score.key: score for score in full_scores(some_responses(20))[1]}
    for row, key in enumerate(microbatch.keys):
        start, stop = microbatch.cu_seqlens[row : row + 2]
        top = microbatch.teacher_top
        own = scores[key].top
        assert own is not None
        length = len(own.ids)
        where = slice(stop - 1 - length, stop - 1)  # positions whose labels are the response
        assert microbatch.loss_mask[where].all()
        np.testing.assert_array_equal(top.ids[where], own.ids)
        np.testing.assert_array_equal(top.logprobs[where], own.logprobs)
        np.testing.assert_array_equal(top.tail_logprob[where], own.tail_logprob)
        assert not top.ids[start : stop - 1 - length].any()
        assert not np.array_equal(top.ids[stop - length : stop], own.ids), "control: unshifted"
    assert TokenBatch.from_microbatch(microbatch).teacher_top_logprobs is not None


def test_a_loss_that_needs_what_the_cache_has_not(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(10))
    with pytest.raises(
        ConfigError,
        match=(
            "needs teacher_top_logprobs: the cache has none; "
            r"with score\.top_k = 16, for example"
        ),
    ):
        distillation_objective(job(tmp_path, tmp_path / "a", TOP_K))
