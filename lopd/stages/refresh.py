"""Refresh: a ~ pi_theta(. | q) anew, scored by the SAME teacher. Between never (Lightning OPD) and
before every step (standard OPD) lies one knob.

The trainer's ranks put their weights into the student's server and ask (lopd.stages.batches); this
process, which owns the servers, samples the next prompts with the student, scores them with the
teacher, and publishes both as a cache of their own: ``refresh-0001/rollouts`` and
``refresh-0001/scores``. The ranks wait for the published scores, in no collective. docs/refresh.md
tells which step learns from what.
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
from lopd.config import Config
from lopd.errors import ArtifactError, EngineError
from lopd.records import Manifest, Prompt
from lopd.stages.context import StageContext
from lopd.stages.refreshed import LOST, REQUEST, ROLLOUTS, SCORES, SECONDS, Refresh
from lopd.stages.sampling import sample_into, sampling_params
from lopd.stages.score import check_teacher, score_responses
from lopd.stages.teacher import serve_teacher
from sglang_rollout.requests.client import OtherWeights

if TYPE_CHECKING:
    from sglang_rollout.requests.client import SGLangEngine


def num_responses(config: Config, step: int, num_sampled: int) -> int:
    """How many responses a refresh before ``step`` makes: no more than the steps left learn from.
    num_sampled: how many the rollout stage made.
    """
    refresh, batch_size = config.distill.refresh, config.distill.batch_size
    wanted = refresh.num_responses or (refresh.every * batch_size if refresh.every else num_sampled)
    return min(wanted, num_sampled, (config.distill.num_steps - step) * batch_size)


def next_prompts(num_prompts: int, step: int, count: int, config: Config) -> list[int]:
    """Indices of the prompts of a refresh before ``step``: those that follow, in one seeded order
    that is gone through again and again.

    With one sample a prompt it is the order in which Lightning OPD first goes through its cache, so
    that step learns from the same prompts there.
    """
    order = epoch_permutation(num_prompts, config.run.seed, 0)
    first = step * config.distill.batch_size // config.rollout.samples_per_prompt
    return [int(order[(first + place) % num_prompts]) for place in range(count)]


class Refresher:
    """Makes what the ranks ask for. attend() is called whenever they have said something; it
    returns when there is nothing (more) to do.
    """

    def __init__(self, context: StageContext, engine: SGLangEngine, student: Path) -> None:
        """engine: serves the student; student: a folder with its tokenizer. ConsistencyError,
        DataError: as the score stage.
        """
        self._context, self._engine, self._student = context, engine, student
        self._scored = context.manifest_of("score")
        self._lineage = check_teacher(context, self._scored)
        self._request = context.folder / REQUEST
        for of_a_killed_command in (
            self._request,
            context.folder / LOST,
        ):  # the server has other weights now
            of_a_killed_command.unlink(missing_ok=True)
        self._kept = contextlib.ExitStack()
        self._teacher: SGLangEngine | None = None  # where it is kept

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.close()

    def attend(self) -> None:
        """EngineError, ArtifactError, DataError: it cannot be done; the ranks would wait for ever,
        so let it end them.
        """
        while self._request.exists():
            asked = json.loads(self._request.read_text(encoding="utf-8"))
            # now: once the scores are published the ranks may ask for the next
            self._request.unlink()
            refresh = Refresh(**asked["refresh"])
            try:
                rollouts = self._sample(refresh, can_send=asked["can_send"])
            except OtherWeights as error:
                if not asked["can_send"]:
                    raise
                self._context.log(f"{error.what}; they are sent again")
                publish_json(self._context.folder / LOST, asked["refresh"])
            else:
                if asked["until"] == SCORES:
                    self._score(refresh, rollouts)

    # ---- the student ------------------------------------------------------------------------------------------------------------------------------

    @cached_property
    def _prompts(self) -> tuple[list[Prompt], list[Any]]:
        return self._context.prompts("opd", self._student)

    def _sample(self, refresh: Refresh, *, can_send: bool) -> Manifest:
        config, folder = self._context.config, refresh.folder(self._context.folder)
        self._set_aside_of_another_step(folder, refresh.step)
        prompts, prompt_ids = self._prompts
        per_prompt = config.rollout.samples_per_prompt
        count = num_responses(config, refresh.step, len(prompts) * per_prompt)
        chosen = next_prompts(len(prompts), refresh.step, -(-count // per_prompt), config)
        writer = self._writer(
            folder / ROLLOUTS,
            "rollouts",
            refresh,
            self._context.parents,
            models={"base_student": self._context.identity("student")},
            sampling=self._context.sampling_record(config.rollout),
            lineage=self._scored.lineage,
            shard_size=config.rollout.shard_size,
        )
        if len(writer.published) * writer.shard_size < len(chosen) * per_prompt:
            self._require_weights(refresh.version, can_send)
        sample_into(
            writer,
            self._engine,
            [prompts[index] for index in chosen],
            [prompt_ids[index] for index in chosen],
            sampling_params(config.rollout, self._context.end_models),
            samples_per_prompt=per_prompt,
            seed=config.run.seed,
            purpose=f"refresh-{refresh.number}",
            title=f"refresh {refresh.number}: rollouts",
            version=refresh.version,
        )
        rollouts = writer.finish(reason=refresh.reason)
        _check_versions(folder / ROLLOUTS, rollouts, refresh.version)
        return rollouts

    def _require_weights(self, version: str, can_send: bool) -> None:
        served = self._engine.model_info()["weight_version"]
        if served != version and can_send:
            raise OtherWeights(f"the server has the weights {served}, where {version} are asked")
        if served != version:
            raise ArtifactError(
                f"responses of the weights {version} are missing, and the server has {served}",
                where=str(self._context.folder),
                remedy="remove the newest checkpoints below distill/checkpoints, from that step on, then run the same command again",
            )

    def _set_aside_of_another_step(self, folder: Path, step: int) -> None:
        """Where a training that is not repeated to the bit went another way after a kill, its
        refresh may have come at another step.
        """
        if (folder / ROLLOUTS / MANIFEST).exists() and (
            found := read_manifest(folder / ROLLOUTS).inputs["refresh.step"]
        ) != step:
            self._context.log(
                f"{folder.name} was made before step {found}, now it is due before step {step}; kept as {folder.name}.step-{found}"
            )
            remove_folder(kept := folder.with_name(f"{folder.name}.step-{found}"))
            folder.rename(kept)

    # ---- the teacher ------------------------------------------------------------------------------------------------------------------------------

    def _score(self, refresh: Refresh, rollouts: Manifest) -> None:
        folder = refresh.folder(self._context.folder)
        parents = {"rollout": rollouts.fingerprint, "score": self._scored.fingerprint}
        about = {
            "models": {"teacher": self._context.identity("teacher")},
            "sampling": rollouts.sampling,
            "lineage": self._lineage,
        }
        writer = self._writer(folder / SCORES, "teacher_cache", refresh, parents, **about)
        asked = time.monotonic()
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
            scoring = time.monotonic() - began
        publish_json(
            folder / SECONDS,
            {"teacher_seconds": time.monotonic() - asked, "scoring_seconds": scoring},
        )

    @contextlib.contextmanager
    def _served_teacher(self) -> Iterator[SGLangEngine]:
        """Time-shared: a server of its own for this refresh alone, or one that lives on beside the
        training.
        """
        teacher = serve_teacher(self._context)
        if self._context.config.distill.refresh.keep_teacher:
            self._teacher = self._teacher or self._kept.enter_context(teacher)
            yield self._teacher
        else:
            with teacher as engine:
                yield engine

    def _writer(
        self, folder: Path, kind: str, refresh: Refresh, parents: Mapping[str, str], **about: Any
    ) -> ArtifactWriter:
        made_from = {
            f"refresh.{name}": getattr(refresh, name) for name in ("number", "step", "version")
        }
        inputs = {**self._context.manifest_of(self._context.stage.name).inputs, **made_from}
        return ArtifactWriter(folder, kind=kind, inputs=inputs, parents=parents, **about)


def _check_versions(folder: Path, rollouts: Manifest, version: str) -> None:
    """EngineError: a response is of other weights, as when a server was started again in between
    and the new ones were nowhere to be found.
    """
    for shard in rollouts.shards:
        found = set(read_shard(folder, shard).column("weight_version").to_pylist())
        if found != {version}:
            what = f"responses of the weights {', '.join(sorted(found - {version}))} among those of {version}"
            raise EngineError(
                what,
                where=str(folder / shard.name),
                remedy=f"remove the folder {folder.parent}, then run the same command again",
            )
