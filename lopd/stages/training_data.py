"""What a training learns from: the frozen responses of an artifact as samples, and the objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from lopd.batching import make_sample
from lopd.cache.columns import ENTROPY, TAIL, TOP_IDS, TOP_LOGPROBS
from lopd.cache.reader import CacheReader, ScoredRow
from lopd.errors import DataError
from lopd.objective import Objective, Supervised, needs_top_k, objective_from_config
from lopd.objective.registry import AVAILABLE, TOP_K
from lopd.records import Sample
from lopd.stages.training import TrainingJob

MEMORY_TOKENS = (
    2**23
)  # response tokens that are held as samples, about 25 bytes each; a larger artifact stays on disk and is read by index


def load_samples(job: TrainingJob) -> Sequence[Sample]:
    """The frozen responses in shard order: a list where they are few, else read from disk as they
    are asked for, in memory that does not grow with them.

    DataError: none, or no teacher log-probabilities where distill needs them; ArtifactError:
    damaged, or a response twice.
    """
    samples = CachedSamples(job)
    return samples if samples.num_tokens > MEMORY_TOKENS else samples.all()


class CachedSamples(Sequence[Sample]):
    """Samples of an artifact by index; see load_samples for the errors."""

    def __init__(self, job: TrainingJob) -> None:
        distill = job.objective == "distill"
        self._with_top = distill and needs_top_k(job.config.distill)
        unread = {"routed_experts", ENTROPY} | (
            set() if self._with_top else {TOP_IDS, TOP_LOGPROBS, TAIL}
        )
        self._reader = CacheReader(job.data, without_sampling=distill, leave_out=unread)
        columns = self._reader.columns
        self._sampled = "sampling_logprobs" in columns
        if len(self._reader) == 0:
            raise DataError(
                "no responses to learn from",
                where=str(job.data),
                remedy="check the prompts and run the earlier stages again",
            )
        if distill and "teacher_logprobs" not in columns:
            raise DataError(
                "responses without teacher log-probabilities",
                where=str(job.data),
                remedy="run the score stage",
            )
        self._reader.require_unique()
        self._teachers = [*teachers_in(self._reader)] if distill else []

    @property
    def num_tokens(self) -> int:
        return self._reader.num_tokens

    def __len__(self) -> int:
        return len(self._reader)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [
                self._sample(row) for row in self._reader.fetch_scored(np.arange(len(self))[index])
            ]
        return self._sample(self._reader.fetch_scored([index])[0])

    def all(self) -> list[Sample]:
        return [self._sample(row) for row in self._reader.scored_rows()]

    def _sample(self, row: ScoredRow) -> Sample:
        sample = make_sample(*row, with_top=self._with_top)
        if not self._sampled:
            sample = replace(sample, sampling_logprobs=None)
        if self._teachers and row[1] is not None:
            if row[1].teacher not in self._teachers:
                limit = "one of the teachers that the manifest names"
                raise DataError(
                    f"response {row[0].key}: teacher {row[1].teacher[:12] or 'none'}",
                    where=str(self._reader.folder),
                    limit=limit,
                )
            sample = replace(sample, teacher_index=self._teachers.index(row[1].teacher))
        return sample


def teachers_in(reader: CacheReader) -> dict[str, str]:
    """Weights -> name (its domains, where they are known) of each teacher of a cache that has
    several; empty where it has one.

    DataError: several, and no column that says which response is whose.
    """
    names: dict[str, str] = {}
    for role, identity in reader.manifest.models.items():
        if role.startswith("teacher"):
            name = "other" if role == "teacher" else role.removeprefix("teachers.")
            names[identity.weights] = (
                f"{names[identity.weights]}+{name}" if identity.weights in names else name
            )
    if len(names) > 1 and "teacher" not in reader.columns:
        limit = "a column teacher: each response names its own"
        raise DataError(
            f"{len(names)} teachers",
            where=str(reader.folder),
            limit=limit,
            remedy="merge the caches again with --teacher-column",
        )
    return names if len(names) > 1 else {}


def objective_of(job: TrainingJob) -> Objective:
    """ConfigError: a piece needs what the artifact has not, a top-K say."""
    if job.objective != "distill":
        return Supervised()
    reader = CacheReader(job.data)
    lacking = (
        frozenset() if "sampling_logprobs" in reader.columns else frozenset({"sampling_logprobs"})
    )
    available = (AVAILABLE | TOP_K if "teacher_top_ids" in reader.columns else AVAILABLE) - lacking
    return objective_from_config(job.config.distill, available, tuple(teachers_in(reader).values()))
