"""What a training learns from: the responses of an artifact as samples, and the objective."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lopd.batching import make_sample
from lopd.cache.columns import (
    ALIGNMENT,
    BASE,
    ENTROPY,
    ROUTED_EXPERTS,
    TAIL,
    TOP_IDS,
    TOP_LOGPROBS,
)
from lopd.cache.reader import CacheReader, ScoredRow
from lopd.cache.teachers import teachers_in
from lopd.cache.verdicts import right_of, rows_that_the_teacher_solves
from lopd.errors import DataError
from lopd.megatron.weights.architecture import read_architecture, router_problems
from lopd.objective import Objective, needs_top_k, objective_from_config, registry
from lopd.records import Response, Sample
from lopd.stages.training import TrainingJob
from sglang_rollout.requests.routed import RouterShape

# How many response tokens are held as samples in memory, at about 25 bytes each. A larger artifact
# stays on the disk and is read by index. lopd.planning.memory counts with the same number.
MEMORY_TOKENS = 2**23
_TOKEN_BYTES = 25
# How many decoded tokens the reader of a larger artifact keeps.
_KEPT_TOKENS = 1 << 20


def load_samples(job: TrainingJob) -> Sequence[Sample]:
    """Return the responses of a job's artifact in the order of its shards.

    A list where they are few. Otherwise they are read from the disk when they are used, and memory
    does not grow with their number.

    Raises:
        DataError: There are no responses, or distill finds no teacher log-probabilities, or the
            student has no row for a token.
        ArtifactError: A shard is damaged, or a response is there twice.
    """
    # The bound counts response tokens. A list is faster: a step reads its batch without decoding.
    samples = CachedSamples(job)
    return samples if samples.num_tokens > _most_tokens(job, MEMORY_TOKENS) else samples.all()


def _most_tokens(job: TrainingJob, without_routing: int) -> int:
    """Return how many tokens are held where so many would be without the experts of each."""
    if not job.replays_routing:
        return without_routing
    arch = read_architecture(job.config.models.student)
    # 16 bits for each expert of each layer. For a model of 48 layers this is most of a sample.
    experts = 2 * arch.num_layers * arch.experts_per_token
    return max(1, without_routing * _TOKEN_BYTES // (_TOKEN_BYTES + experts))


class CachedSamples(Sequence[Sample]):
    """The samples of an artifact by index. See load_samples for the errors."""

    def __init__(self, job: TrainingJob) -> None:
        distill = job.objective == "distill"
        self._with_top = distill and needs_top_k(job.config.distill)
        # Columns that the objective does not look at are not even decoded.
        # The loss mask says what of the alignment a training needs.
        unread = {ENTROPY, ALIGNMENT}
        if not job.replays_routing:
            unread |= {ROUTED_EXPERTS}
        if not self._with_top:
            unread |= {TOP_IDS, TOP_LOGPROBS, TAIL}
        if not (distill and job.config.distill.objective.advantage == "delta"):
            unread |= {BASE}
        self._lock = threading.Lock()
        self._reader = CacheReader(
            job.data,
            kept_tokens=_most_tokens(job, _KEPT_TOKENS),
            without_sampling=distill,
            leave_out=unread,
        )
        columns = self._reader.columns
        self._sampled = "sampling_logprobs" in columns
        # The errors are found here, before the first step, and not when a response is first used.
        if len(self._reader) == 0:
            raise DataError(
                "there are no responses to learn from",
                where=str(job.data),
                remedy="check that prompts.sft and prompts.opd have prompts, then run the stages "
                "again: lopd run CONFIG",
            )
        if distill and "teacher_logprobs" not in columns:
            raise DataError(
                "the responses have no teacher log-probabilities",
                where=str(job.data),
                remedy="run the score stage",
            )
        self._reader.require_unique()
        # The shape of the choices that the student's routers can replay; None: they choose.
        self._router = replayed_router(self._reader, job) if job.replays_routing else None
        # Past the student's rows there is only padding, which would be trained without a sign. The
        # teacher's top-K may have such ids: TopKKL counts them among the other tokens.
        rows = read_architecture(job.config.models.student).vocab_size
        self._reader.require_ids_below(rows, "the student")
        # The weights of each teacher, where the cache has several; a sample has an index into it.
        self._teachers = [*teachers_in(self._reader)] if distill else []
        # Of each row of the cache, whether its answer was right. None: nobody asks.
        verdicts = job.config.distill.verdicts if distill else None
        self._right = None if verdicts is None else right_of(self._reader, verdicts)
        # The rows of the cache that are learnt from.
        self._rows = kept_rows(self._reader, job)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Prompt and response tokens of each sample, [N]."""
        with self._lock:
            return self._reader.lengths[self._rows]

    @property
    def num_tokens(self) -> int:
        """Response tokens of all samples."""
        return self._reader.num_tokens

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return self.fetch(np.arange(len(self))[index])
        return self.fetch([index])[0]

    def fetch(self, indices: Sequence[int] | NDArray[Any]) -> list[Sample]:
        """Return the samples of these indices, in their order. Several threads may call it."""
        # In one go: neighbours lie in the same row group of a shard. The reader is of one thread at
        # a time, and a training reads ahead while it looks at samples for a weight sync.
        chosen = self._rows[np.asarray(indices, dtype=np.int64)]
        with self._lock:
            rows = self._reader.fetch_scored(chosen)
        return [self._sample(*one) for one in zip(chosen.tolist(), rows, strict=True)]

    def all(self) -> list[Sample]:
        """Return all samples, for an artifact that fits into memory."""
        kept = set(self._rows.tolist())
        rows = enumerate(self._reader.scored_rows())
        return [self._sample(index, row) for index, row in rows if index in kept]

    def _require_experts(self, response: Response) -> None:
        """Raise DataError for an expert that the student does not have."""
        assert self._router is not None
        num_experts = self._router.num_experts
        # A shard without the shape of the column has none; the first one has been looked at.
        experts = response.routed_experts
        if experts is None:
            raise DataError(
                f"the shape of the routed experts of response {response.key} is not known",
                where=str(self._reader.folder),
                limit="the key lopd.routed_experts in the metadata of each shard",
                remedy="run the stages from rollout on again",
            )
        # Such a number would index past the student's experts, on a GPU without a message. That a
        # choice has different experts is checked when they are sampled, and in a given cache.
        wrong = experts[(experts < 0) | (experts >= num_experts)]
        if wrong.size:
            raise DataError(
                f"response {response.key} was routed to the expert {int(wrong[0])}",
                where=str(self._reader.folder),
                limit=f"at least 0 and at most {num_experts - 1}: the student has {num_experts}",
                remedy="give a cache of this student's rollouts",
            )

    def _sample(self, index: int, row: ScoredRow) -> Sample:
        response, scores = row
        sample = make_sample(response, scores, with_top=self._with_top)
        if not self._sampled:
            # The reader fills a missing column with NaN. The objective must see that there is none.
            sample = replace(sample, sampling_logprobs=None)
        if self._router is not None:
            self._require_experts(response)
        # Verdicts have the order of the cache's rows, so the index of the row finds its verdict.
        if self._right is not None:
            sample = replace(sample, right=bool(self._right[index]))
        if self._teachers and scores is not None:
            if scores.teacher not in self._teachers:
                raise DataError(
                    f"response {response.key} has the unknown teacher "
                    f"{scores.teacher[:12] or 'none'}",
                    where=str(self._reader.folder),
                    limit="one of the teachers that the manifest names",
                    remedy="merge the caches again with --teacher-column",
                )
            sample = replace(sample, teacher_index=self._teachers.index(scores.teacher))
        return sample


def replayed_router(reader: CacheReader, job: TrainingJob) -> RouterShape:
    """Return the shape of the choices that the student's routers are to replay.

    Raises:
        ConfigError: The student has no experts.
        DataError: The artifact has no choices, or those of routers of another shape.
    """
    student = read_architecture(job.config.models.student)
    for problem in router_problems(student, where="distill.routing_replay"):
        raise problem
    if ROUTED_EXPERTS not in reader.columns:
        raise DataError(
            f"the responses have no column {ROUTED_EXPERTS}",
            where=str(reader.folder),
            limit="the experts that the sampler chose, for distill.routing_replay",
            remedy="set rollout.routed_experts = true and run the stages from rollout on again, or "
            "set distill.routing_replay = false",
        )
    shape = RouterShape(student.num_layers, student.num_experts, student.experts_per_token)
    found = reader.routed_shape
    if found != (shape.num_layers, shape.experts_per_token):
        raise DataError(
            f"the routed experts are of {found[0]} layers with {found[1]} experts per token",
            where=str(reader.folder),
            limit=f"the student's {shape.num_layers} layers with {shape.experts_per_token}",
            remedy="give a cache of this student's rollouts",
        )
    return shape


def kept_rows(reader: CacheReader, job: TrainingJob) -> NDArray[np.int64]:
    """Return the rows of a job's artifact that it learns from: all, or what the teacher solves.

    Raises:
        ArtifactError, DataError: See rows_that_the_teacher_solves.
    """
    distill = job.config.distill
    # SFT learns from all demonstrations. The knob is one of distill.
    if job.objective != "distill" or distill.teacher_verdicts is None:
        return np.arange(len(reader))
    return rows_that_the_teacher_solves(
        reader, distill.teacher_verdicts, distill.teacher_right_share
    )


def distillation_objective(job: TrainingJob) -> Objective:
    """Return the loss of a distillation, from the sections distill and distill.objective.

    Raises:
        ConfigError: The loss needs what the artifact does not have, such as the teacher's top-K.
    """
    # Only the manifest and the columns are looked at. Whether a knob can be used is known from
    # them, before any response is read.
    reader = CacheReader(job.data)
    available = registry.AVAILABLE
    if "teacher_top_ids" in reader.columns:
        available |= registry.TOP_K
    if BASE in reader.columns:
        available |= registry.BASE
    if "sampling_logprobs" not in reader.columns:
        # A cache that was imported from elsewhere may lack them.
        available -= {"sampling_logprobs"}
    if job.config.distill.verdicts is not None:
        available |= registry.VERDICTS
    return objective_from_config(job.config.distill, available, tuple(teachers_in(reader).values()))
