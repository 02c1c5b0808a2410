"""The next step's responses are read while the present step computes, and are those of today."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd.batching import ResponseOrder, build_microbatch, plan_step
from lopd.cache.reader import CacheReader
from lopd.errors import ArtifactError
from lopd.megatron.ranks import parallel
from lopd.records import Microbatch
from lopd.stages import training_data
from lopd.stages.batches import Batch, Batches
from lopd.stages.training import TrainingJob
from lopd.stages.training_data import CachedSamples, load_samples
from tests.cache.rollouts import publish_cache, some_responses
from tests.cache.test_training_data import job as job_of

STEPS = 6
BATCH = 8
KNOBS = (f"distill.num_steps={STEPS}", f"distill.batch_size={BATCH}")
RANKS = 2


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingJob:
    """A training of two data ranks on a cache that stays on the disk."""
    monkeypatch.setattr(training_data, "MEMORY_TOKENS", 100)
    monkeypatch.setattr(parallel, "data_size", lambda: RANKS)
    monkeypatch.setattr(parallel, "data_rank", lambda: 0)
    publish_cache(tmp_path / "a", some_responses(60))
    made = job_of(tmp_path, tmp_path / "a", *KNOBS)
    return TrainingJob(
        "distill", made.config, made.folder, made.data, made.initial, "checkpoint", STEPS, 17
    )


def readers() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "read-ahead"]


def equal(one: Microbatch, other: Microbatch) -> bool:
    names = ("token_ids", "labels", "loss_mask", "teacher_logprobs", "cu_seqlens")
    return one.keys == other.keys and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in names
    )


def whole_batch(job: TrainingJob, step: int, rank: int) -> list[Microbatch]:
    """The batch of a rank that reads everything at the step itself."""
    samples = load_samples(job)
    indices = ResponseOrder(len(samples), BATCH, seed=17).batch_indices(step)
    chosen = [samples[int(index)] for index in indices]
    plan = plan_step([len(one) for one in chosen], RANKS, job.settings.max_tokens_per_microbatch, 1)
    return [build_microbatch([chosen[index] for index in part]) for part in plan[rank]]


@pytest.mark.parametrize("rank", range(RANKS))
def test_batches_are_those_of_reading_at_the_step(
    job: TrainingJob, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "data_rank", lambda: rank)
    batches = Batches(load_samples(job), job)
    found = [batches.of_step(step) for step in range(STEPS)]
    for step, batch in enumerate(found):
        expected = whole_batch(job, step, rank)
        assert len(batch.microbatches) == len(expected)
        assert all(map(equal, batch.microbatches, expected))
        both = [*expected, *whole_batch(job, step, 1 - rank)]
        # All ranks know the tokens of the whole step.
        assert batch.num_tokens == sum(int(one.cu_seqlens[one.num_sequences]) for one in both)
    # A training that resumes at a step has the batch of that step.
    resumed = Batches(load_samples(job), job)
    resumed.read_ahead(3)
    assert all(map(equal, resumed.of_step(3).microbatches, found[3].microbatches))
    # The control: the batch of another step differs.
    assert not all(map(equal, found[2].microbatches, found[3].microbatches))
    # Whatever was begun ends, and after the last step nothing is begun.
    resumed.of_step(5)
    assert not readers()


def test_a_rank_decodes_its_own_responses_alone(
    job: TrainingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = load_samples(job)
    assert isinstance(samples, CachedSamples)
    decoded: list[int] = []
    real = CacheReader.fetch_scored

    def fetch_scored(self: CacheReader, indices: Sequence[int]) -> Any:
        decoded.extend(int(index) for index in indices)
        return real(self, indices)

    monkeypatch.setattr(CacheReader, "fetch_scored", fetch_scored)
    step: list[set[int]] = []
    for rank in range(RANKS):
        monkeypatch.setattr(parallel, "data_rank", lambda rank=rank: rank)
        decoded.clear()
        batches = Batches(samples, job)
        batches.of_step(STEPS - 1)
        step.append(set(decoded))
        assert len(decoded) == len(step[-1])
    # Each about half, nothing twice, and together the whole step.
    assert not step[0] & step[1]
    assert len(step[0] | step[1]) == BATCH
    assert {*step[0], *step[1]} == set(batches.indices(STEPS - 1))
    # The control: what a rank would decode of the whole batch.
    assert max(map(len, step)) < BATCH


def test_the_next_step_is_read_while_this_one_computes(
    job: TrainingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(load_samples(job), job)
    held = threading.Event()
    began = threading.Event()
    real = Batches._read

    def read(self: Batches, step: int) -> Batch:
        if step == 1:
            began.set()
            assert held.wait(300)
        return real(self, step)

    monkeypatch.setattr(Batches, "_read", read)
    batches.of_step(0)
    # Step 0 has its batch, and step 1 is being read.
    assert began.wait(300)
    assert len(readers()) == 1
    held.set()
    readers()[0].join() if readers() else None
    waited = batches.of_step(1).waited_s
    # The control: a batch that nobody has begun is waited for from its beginning.
    held.clear()
    timer = threading.Timer(0.5, held.set)
    other = Batches(load_samples(job), job)
    timer.start()
    assert other.of_step(1).waited_s > max(0.2, 3 * waited)


def test_an_error_of_reading_is_raised_at_its_step(job: TrainingJob) -> None:
    def until_error() -> tuple[int, str]:
        batches = Batches(load_samples(job), job)
        for step in range(STEPS):
            try:
                batches.of_step(step)
            except ArtifactError as error:
                return step, error.what
        return STEPS, ""

    assert until_error() == (STEPS, "")
    real = CachedSamples.fetch
    second = set(Batches(load_samples(job), job).indices(2))

    def fetch(self: CachedSamples, indices: Any) -> Any:
        if second & {int(index) for index in indices} == {int(index) for index in indices}:
            raise ArtifactError("the file was truncated", where="shard", remedy="make it again")
        return real(self, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CachedSamples, "fetch", fetch)
        # Found while step 1 computes, and raised by step 2.
        assert until_error() == (2, "the file was truncated")
        # What a refresh replaces is not asked for any more, with its error.
        samples = load_samples(job)
        batches = Batches(samples, job)
        batches.of_step(1)
        patch.setattr(CachedSamples, "fetch", real)
        batches.use_refreshed(samples[:BATCH], 2)
        assert batches.of_step(2).num_tokens == sum(len(one) for one in samples[:BATCH])


def test_lengths_come_with_the_check_of_the_ids(job: TrainingJob) -> None:
    samples = load_samples(job)
    assert isinstance(samples, CachedSamples)
    # No second pass over the cache.
    assert samples._reader._lengths is not None
    assert samples.lengths.tolist() == [len(one) for one in samples]
    assert CacheReader(job.data).lengths.tolist() == samples.lengths.tolist()
