"""The parent's side of a refresh: the student samples anew, and the same teacher scores.

a ~ pi_theta(. | q), then log pi_T(a_t | s_t). Lightning OPD never refreshes, standard OPD refreshes
before every step; one knob lies between them. docs/refresh.md says which step learns from what.

The trainer's ranks send their weights to the student's servers and publish a request
(lopd.stages.refresh_requester). This process owns the servers. It samples the next prompts with the
student, scores them with the teacher, and publishes both as a cache of their own:
``refresh-0001/rollouts`` and ``refresh-0001/scores``. The ranks wait for the published scores.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lopd.artifacts import (
    MANIFEST,
    ArtifactWriter,
    publish_json,
    read_manifest,
    read_shard,
    remove_folder,
)
from lopd.batching.order import epoch_permutation
from lopd.config import Config, RolloutSection
from lopd.errors import ArtifactError, EngineError
from lopd.records import Manifest, Prompt
from lopd.stages.context import StageContext
from lopd.stages.refresh_record import (
    LOST,
    REQUEST,
    ROLLOUTS,
    SCORES,
    SECONDS,
    RefreshRecord,
)
from lopd.stages.sample_shards import sample_into, sampling_params
from lopd.stages.score import check_teacher, complete_cache, score_responses
from lopd.stages.teacher import serve_teacher
from lopd.stages.truncation import truncation_figures
from lopd.stages.vocabulary import num_shared_ids
from sglang_rollout.requests.client import OtherWeights

if TYPE_CHECKING:
    from sglang_rollout.requests.client import SGLangEngine


class RefreshService:
    """Makes the refreshes that the ranks request. Use it as a context manager."""

    def __init__(self, context: StageContext, engine: SGLangEngine, student: Path) -> None:
        """Check the teacher, and forget what a killed command has left.

        Raises:
            ConsistencyError, DataError: For the same reasons as in the score stage.
        """
        # The distill stage.
        self._context = context
        # The servers of the student. They have the weights that the ranks sent last.
        self._engine = engine
        # A folder with the student's tokenizer.
        self._student = student
        # The teacher is checked before the training starts, and not at the first refresh, which may
        # come after hours.
        self._scored = context.manifest_of("score")
        self._lineage = check_teacher(context, self._scored)
        self._request = context.folder / REQUEST
        # The servers have other weights now than when a killed command asked for a refresh.
        for leftover in (self._request, context.folder / LOST):
            leftover.unlink(missing_ok=True)
        # Closed with this service: whatever ends the training ends the teacher as well.
        self._kept = contextlib.ExitStack()
        # The teacher's server, where distill.refresh.keep_teacher lets it run on.
        self._teacher: SGLangEngine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.close()

    def serve_requests(self) -> None:
        """Make what the ranks have requested, and return when there is no request left.

        Raises:
            EngineError, ArtifactError, DataError: The refresh cannot be made. The ranks would wait
                for ever, so they must be ended.
        """
        # One request at a time. Nothing else runs in this process meanwhile; the ranks' heartbeats
        # and lines wait in files and pipes.
        while self._request.exists():
            request = json.loads(self._request.read_text(encoding="utf-8"))
            # Removed before the work: once the scores are published the ranks may ask again.
            self._request.unlink()
            refresh = RefreshRecord(**request["refresh"])
            try:
                rollouts = self._sample(refresh, can_send=request["can_send"])
            except OtherWeights as error:
                if not request["can_send"]:
                    raise
                # Shards that are published stay. They are of this version, so the next request goes
                # on.
                self._context.log(f"{error.what}; they are sent again")
                publish_json(self._context.folder / LOST, request["refresh"])
            else:
                if request["until"] == SCORES:
                    self._score(refresh, rollouts)

    # Loaded at the first refresh, because there may be none.
    @cached_property
    def _prompts(self) -> tuple[list[Prompt], list[Any]]:
        return self._context.prompts("opd")

    def _sample(self, refresh: RefreshRecord, *, can_send: bool) -> Manifest:
        """Publish the student's responses to the next prompts."""
        config = self._context.config
        folder = refresh.folder(self._context.folder)
        self._set_aside_of_another_step(folder, refresh.step)
        # More responses than wanted may come: each prompt gets samples_per_prompt of them.
        prompts, prompt_ids = self._prompts
        per_prompt = config.rollout.samples_per_prompt
        count = num_responses(config, refresh.step, len(prompts) * per_prompt)
        chosen = next_prompts(len(prompts), refresh.step, -(-count // per_prompt), config)
        section = rollout_of(config, refresh.number)
        # The lineage of the SFT student holds for the present student as well: it comes from the
        # same demonstrations, so the same teacher is consistent.
        writer = self._writer(
            folder / ROLLOUTS,
            "rollouts",
            refresh,
            self._context.parents,
            models={"base_student": self._context.identity("student")},
            sampling=self._context.sampling_record(section),
            lineage=self._scored.lineage,
            shard_size=config.rollout.shard_size,
        )
        # Where a killed command has published all shards, no server has to have these weights.
        if len(writer.published) * writer.shard_size < len(chosen) * per_prompt:
            self._require_weights(refresh.version, can_send)
        sample_into(
            writer,
            self._engine,
            [prompts[index] for index in chosen],
            [prompt_ids[index] for index in chosen],
            sampling_params(section, self._context.end_models),
            samples_per_prompt=per_prompt,
            seed=config.run.seed,
            purpose=f"refresh-{refresh.number}",
            title=f"refresh {refresh.number}: rollouts",
            version=refresh.version,
            num_ids=num_shared_ids(config),
        )
        # The reason is an extra figure. The inputs of a manifest say what decides the content.
        cut = truncation_figures(
            self._context,
            folder / ROLLOUTS,
            "rollout",
            is_wanted=section.max_new_tokens < config.rollout.max_new_tokens,
        )
        rollouts = writer.finish(reason=refresh.reason, **cut)
        _check_versions(folder / ROLLOUTS, rollouts, refresh.version)
        return rollouts

    def _require_weights(self, version: str, can_send: bool) -> None:
        """Raise an error where the server has other weights than the request names."""
        served = self._engine.model_info()["weight_version"]
        # A response of other weights would be off-policy without a sign of it, so this is checked
        # before the first request and for every response (sample_into).
        if served == version:
            return
        if can_send:
            # The ranks are told to send the weights again.
            raise OtherWeights(f"the server has the weights {served}, but {version} are needed")
        raise ArtifactError(
            f"responses sampled with the weights {version} are missing, but the server "
            f"now has the weights {served}",
            where=str(self._context.folder),
            remedy=f"delete the checkpoints of {version} and of all later steps in the folder "
            "distill/checkpoints, then run the same command again",
        )

    def _set_aside_of_another_step(self, folder: Path, step: int) -> None:
        """Rename a refresh with this number that was made before another step."""
        # Where a training is not repeated to the bit after a kill, its drift differs, and so may
        # the step of a refresh.
        if not (folder / ROLLOUTS / MANIFEST).exists():
            return
        found = read_manifest(folder / ROLLOUTS).inputs["refresh.step"]
        if found == step:
            return
        kept = folder.with_name(f"{folder.name}.step-{found}")
        self._context.log(
            f"{folder.name} was made before step {found}, and is needed before step {step} now; "
            f"the former one is kept as {kept.name}"
        )
        remove_folder(kept)
        folder.rename(kept)

    def _score(self, refresh: RefreshRecord, rollouts: Manifest) -> None:
        """Publish the teacher's log-probabilities of the responses."""
        folder = refresh.folder(self._context.folder)
        # A cache like the score stage's, with the same checks and the same columns, so that the
        # ranks read it in the same way.
        writer = self._writer(
            folder / SCORES,
            "teacher_cache",
            refresh,
            {"rollout": rollouts.fingerprint, "score": self._scored.fingerprint},
            models={"teacher": self._context.identity("teacher")},
            sampling=rollouts.sampling,
            lineage=self._lineage,
        )
        # A kill in the middle of scoring keeps the published shards. The next command scores the
        # rest, and starts no teacher where nothing is left.
        asked = time.monotonic()
        scoring_seconds = 0.0
        if writer.missing(len(rollouts.shards)):
            with self._served_teacher() as teacher:
                began = time.monotonic()
                score_responses(
                    self._context,
                    writer,
                    teacher,
                    folder / ROLLOUTS,
                    rollouts,
                    title=f"refresh {refresh.number}: teacher log-probabilities",
                )
                scoring_seconds = time.monotonic() - began
        # The first figure includes the start and the end of the teacher's server.
        seconds = {
            "teacher_seconds": time.monotonic() - asked,
            "scoring_seconds": scoring_seconds,
        }
        publish_json(folder / SECONDS, seconds)
        # Last: the ranks take shared GPUs back once they see complete scores (sync.colocate), and
        # a teacher's server that still lives would hold their memory.
        complete_cache(self._context, writer, rollouts)

    @contextlib.contextmanager
    def _served_teacher(self) -> Iterator[SGLangEngine]:
        """Serve the teacher for this refresh alone, or let it run on beside the training."""
        # For each refresh alone by default: there may be no memory for the teacher beside the
        # trainer and the student.
        teacher = serve_teacher(self._context)
        if self._context.config.distill.refresh.keep_teacher:
            # Started at the first refresh, not before: a bound of the drift may never be passed.
            if self._teacher is None:
                self._teacher = self._kept.enter_context(teacher)
            yield self._teacher
        else:
            with teacher as engine:
                yield engine

    def _writer(
        self,
        folder: Path,
        kind: str,
        refresh: RefreshRecord,
        parents: Mapping[str, str],
        **about: Any,
    ) -> ArtifactWriter:
        # A refresh depends on all that the distill stage depends on, and on its own step.
        made_from = {
            f"refresh.{name}": getattr(refresh, name) for name in ("number", "step", "version")
        }
        inputs = {**self._context.manifest_of(self._context.stage.name).inputs, **made_from}
        return ArtifactWriter(folder, kind=kind, inputs=inputs, parents=parents, **about)


def num_responses(config: Config, step: int, num_sampled: int) -> int:
    """Return how many responses a refresh before ``step`` makes.

    Args:
        config: The configuration.
        step: The first step that learns from them, counted from 0.
        num_sampled: How many responses the rollout stage has made.
    """
    # With an interval as many as its steps use. With a bound of the drift nobody knows how long
    # they must last, so there are as many as in the cache.
    refresh = config.distill.refresh
    batch_size = config.distill.batch_size
    wanted = refresh.num_responses or (refresh.every * batch_size if refresh.every else num_sampled)
    # More than the steps left can use would be wasted, and more than the rollout stage has made
    # would go through the prompts a second time.
    return min(wanted, num_sampled, (config.distill.num_steps - step) * batch_size)


def rollout_of(config: Config, number: int) -> RolloutSection:
    """Return how a refresh samples.

    Args:
        config: The configuration.
        number: The number of the refresh, from 1.
    """
    horizons = config.distill.refresh.horizons
    if not horizons:
        return config.rollout
    # The number alone decides, so a killed refresh goes on with the same limit.
    longest = horizons[min(number, len(horizons)) - 1]
    return config.rollout.model_copy(update={"max_new_tokens": longest})


def next_prompts(num_prompts: int, step: int, count: int, config: Config) -> list[int]:
    """Return the indices of the prompts of a refresh before ``step``.

    They follow each other in one seeded order, which is gone through again and again. With one
    sample a prompt it is the order in which Lightning OPD first goes through its cache. So the step
    learns from the same prompts as it would there.

    Args:
        num_prompts: The size of the prompt set.
        step: The first step that learns from the refresh, counted from 0.
        count: How many prompts are wanted.
        config: The configuration.
    """
    # The place of a prompt follows from the step alone. So a refresh that comes earlier or later
    # than in another run skips no prompt and repeats none.
    order = epoch_permutation(num_prompts, config.run.seed, 0)
    first = step * config.distill.batch_size // config.rollout.samples_per_prompt
    return [int(order[(first + place) % num_prompts]) for place in range(count)]


def _check_versions(folder: Path, rollouts: Manifest, version: str) -> None:
    """Raise EngineError where a response is of other weights.

    A server that was started again in the middle has the weights of its start, if its newest
    weights are in no folder.
    """
    for shard in rollouts.shards:
        found = set(read_shard(folder, shard).column("weight_version").to_pylist())
        if found != {version}:
            others = ", ".join(sorted(found - {version}))
            raise EngineError(
                f"the shard has responses sampled with the weights {others}, but all must "
                f"come from {version}",
                where=str(folder / shard.name),
                remedy=f"remove the folder {folder.parent}, then run the same command again",
            )
