"""How far the gradient on frozen rollouts is from the one on fresh rollouts, at the same weights.

    python -m examples.study.gradient_gap SEED RUN SFT_MODEL STEP=MODEL [STEP=MODEL ...]

For each model of a training (its weights after STEP updates), it samples a response of the model
to every held-out prompt, and one of the SFT student. The teacher scores both. The trainer then
gives the gradient of the loss on each set (lopd.megatron.training.trainer, lopd.objective): the
frozen one is the SFT student's, the fresh one the model's own. No training has seen these prompts.
RUN/metrics.jsonl gets a line for each model; measured() says what is in it. What is published is
not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.study.arms import HABIT, LIGHTNING
from examples.study.one_rank import only_rank
from lopd import cache
from lopd.artifacts import ArtifactWriter, identify_model, publish_bytes, read_manifest
from lopd.batching import build_microbatch, make_sample, plan_step
from lopd.cache.table import TEACHER_CACHE
from lopd.config import Config, OptimizerSection, load_config
from lopd.records import Manifest, Microbatch, Sample
from lopd.report.metrics import METRICS
from lopd.stages.context import StageContext
from lopd.stages.evaluate_checkpoint import ANSWERS
from lopd.stages.sample_shards import sample_into, sampling_params
from lopd.stages.score_shards import score_into
from lopd.stages.serving import ModelServer
from lopd.stages.training import TrainingJob

# Responses whose own gradients give the root mean square of the bound. Each is a step of its own.
NUM_SINGLE = 64
Vector = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Half:
    """The gradients of the loss on one half of the prompts, [weights]."""

    frozen: Vector
    fresh: Vector


def gap_of(first: Half, second: Half) -> dict[str, float]:
    """Return the lengths of the gradients' expectations and of their difference.

    The squared length of a mean over responses is too large by the noise of the responses. The
    product of two halves with other prompts is not: their noises are independent.

    Returns:
        gap: The length of E[frozen] - E[fresh]; 0 where the estimate of its square is negative.
        gap_squared: That estimate.
        fresh_norm, frozen_norm: The lengths of the two expectations, in the same way.
    """
    difference = float((first.frozen - first.fresh) @ (second.frozen - second.fresh))
    fresh = float(first.fresh @ second.fresh)
    frozen = float(first.frozen @ second.frozen)
    return {
        "gap": float(np.sqrt(max(0.0, difference))),
        "gap_squared": difference,
        "fresh_norm": float(np.sqrt(max(0.0, fresh))),
        "frozen_norm": float(np.sqrt(max(0.0, frozen))),
    }


def pull_of(halves: Sequence[Half], home: Vector) -> float:
    """Return how much more the frozen update leads back to the SFT student than the fresh one.

    Args:
        halves: The gradients. An update is minus the gradient.
        home: The SFT student's weights minus the present ones.

    Returns:
        The difference of the two updates along home. It is positive where the frozen rollouts hold
        the student back.
    """
    length = float(np.linalg.norm(home))
    if length == 0:
        return 0.0
    difference = sum(half.fresh - half.frozen for half in halves) / len(halves)
    return float(difference @ home / length)


def sequence_chi_square(log_weights: Vector) -> float:
    """Return E[w^2] - 1 of whole responses, of log w [responses]."""
    return float(np.exp(2.0 * log_weights).mean() - 1.0)


class Gradients:
    """The trainer with a model's weights, whose updates are too small to change one of them."""

    def __init__(self, job: TrainingJob, model: Path) -> None:
        from lopd.megatron.training.trainer import Trainer
        from lopd.objective import objective_from_config

        # In float32 a weight and 1e-30 add up to the weight. Without a clip the gradients stay.
        optimizer = OptimizerSection(lr=1e-30, weight_decay=0.0, clip_grad=0.0)
        self._max_tokens = job.settings.max_tokens_per_microbatch
        self.trainer = Trainer(
            job.settings.model_copy(update={"optimizer": optimizer}),
            model_dir=model,
            init="checkpoint",
            init_std=job.config.sft.init_std,
            seed=job.config.run.seed,
            objective=objective_from_config(job.config.distill),
            checkpoint_dir=None,
        )

    def weights(self) -> Vector:
        """Return all weights as one vector."""
        return _joined([one.detach() for _, one in self._parameters()])

    def gradient(self, samples: Sequence[Sample]) -> tuple[Vector, dict[str, Any]]:
        """Return the gradient of the loss on these responses, and the metrics of the step."""
        figures = self.trainer.train_step(self._packed(samples)).as_dict()
        return _joined([one.main_grad for _, one in self._parameters()]), figures

    def log_weights(self, samples: Sequence[Sample]) -> Vector:
        """Return log(pi_model / pi_sampling) of each response, [responses], in any order."""
        microbatches = self._packed(samples)
        found: list[float] = []
        for microbatch, logprobs in zip(
            microbatches, self.trainer.logprobs_of(microbatches), strict=True
        ):
            assert microbatch.sampling_logprobs is not None
            terms = logprobs.double().numpy() - microbatch.sampling_logprobs
            terms = np.where(microbatch.loss_mask, terms, 0.0)
            bounds = microbatch.cu_seqlens[: microbatch.num_sequences + 1]
            found += [float(terms[start:end].sum()) for start, end in pairwise(bounds)]
        return np.array(found)

    def _packed(self, samples: Sequence[Sample]) -> list[Microbatch]:
        plan = plan_step([len(sample) for sample in samples], 1, self._max_tokens)
        return [build_microbatch([samples[index] for index in part]) for part in plan[0]]

    def _parameters(self) -> list[tuple[str, Any]]:
        return sorted(self.trainer.module.named_parameters())


def _joined(tensors: Sequence[Any]) -> Vector:
    return np.concatenate([one.double().flatten().numpy() for one in tensors])


def measured(
    gradients: Gradients, frozen: Sequence[Sample], fresh: Sequence[Sample], sft: Vector
) -> dict[str, float]:
    """Return the figures of one model.

    Args:
        gradients: The trainer with the model.
        frozen: The SFT student's responses, scored by the teacher.
        fresh: The model's own responses to the same prompts in the same order, scored too.
        sft: The SFT student's weights.

    Returns:
        The figures of gap_of() and pull_of(). chi_square, of tokens, and sequence_chi_square, of
        whole responses. rms_gradient: the root mean square of the length of one response's
        gradient. bound: rms_gradient times the root of sequence_chi_square, which bounds gap.
    """
    assert len(frozen) == len(fresh), "one response of each to every prompt"
    middle = len(frozen) // 2
    halves = [
        Half(gradients.gradient(frozen[part])[0], gradients.gradient(fresh[part])[0])
        for part in (slice(0, middle), slice(middle, 2 * middle))
    ]
    _, of_frozen = gradients.gradient(frozen)
    single = [gradients.gradient([sample])[1]["grad_norm"] for sample in frozen[:NUM_SINGLE]]
    rms = float(np.sqrt(np.mean(np.square(single))))
    chi_square = sequence_chi_square(gradients.log_weights(frozen))
    return {
        **gap_of(*halves),
        "pull": pull_of(halves, sft - gradients.weights()),
        "chi_square": of_frozen["chi_square"],
        "effective_sample_share": of_frozen["effective_sample_share"],
        "sequence_chi_square": chi_square,
        "rms_gradient": rms,
        "bound": rms * float(np.sqrt(max(0.0, chi_square))),
    }


def sample_and_score(config: Config, models: dict[str, Path], teacher: Path) -> None:
    """Publish run.dir/NAME/{rollouts,scores} of each model, with one server for all of them."""
    context = StageContext(config, dataclasses.replace(ANSWERS, name="servers"))
    context.folder.mkdir(parents=True, exist_ok=True)
    prompts, prompt_ids = context.prompts("eval")
    params = sampling_params(config.rollout, [config.models.student, teacher])
    about = {"run.seed": config.run.seed, "prompts": config.prompts.eval.model_dump(mode="json")}
    rollouts: dict[str, Manifest] = {}
    with ModelServer(context) as server:
        for name, model in models.items():
            identity = identify_model(model)
            writer = ArtifactWriter(
                config.run.dir / name / "rollouts",
                kind="rollouts",
                inputs={**about, "model": identity.weights},
                models={"student": identity},
                sampling=context.sampling_record(config.rollout),
                shard_size=4096,
            )
            if writer.missing(1):
                sample_into(
                    writer,
                    server.use(model, version=name),
                    prompts,
                    prompt_ids,
                    params,
                    samples_per_prompt=1,
                    seed=config.run.seed,
                    # Draws of its own: errors of the frozen and the fresh gradient are independent.
                    purpose=f"gap {name}",
                    title=f"rollouts {name}",
                )
            rollouts[name] = writer.finish()
        for name in models:
            writer = ArtifactWriter(
                config.run.dir / name / "scores",
                kind=TEACHER_CACHE,
                inputs={"teacher": identify_model(teacher).weights},
                parents={"rollouts": rollouts[name].fingerprint},
                models={"teacher": identify_model(teacher), **rollouts[name].models},
                sampling=rollouts[name].sampling,
            )
            missing = writer.missing(len(rollouts[name].shards))
            score_into(
                writer,
                server.use(teacher, version="teacher") if missing else None,
                config.run.dir / name / "rollouts",
                rollouts[name],
                title=f"scores {name}",
            )
            writer.finish()


def samples_of(folder: Path) -> list[Sample]:
    """Return the scored responses of a folder, in the order of its prompts."""
    rows = cache.read_rows(folder, read_manifest(folder))
    return [make_sample(response, teacher) for response, teacher in rows]


def job_with(config: Config, run: Path, initial: Path) -> TrainingJob:
    """Return a distillation that is never run. It says how its gradients are made."""
    return TrainingJob(
        objective="distill",
        config=config,
        folder=run,
        data=run,
        initial=initial,
        init="checkpoint",
        num_steps=config.distill.num_steps,
        order_seed=config.run.seed,
    )


@dataclasses.dataclass(frozen=True)
class Order:
    """What a command is asked for, here and in gradient_control.py."""

    config: Config
    sft: Path
    # By the number of updates.
    models: dict[int, Path]

    @property
    def run(self) -> Path:
        return self.config.run.dir


def read_order(description: str | None) -> Order:
    """Return what the command line asks for: SEED RUN SFT_MODEL STEP=MODEL [STEP=MODEL ...]"""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seed", type=int)
    parser.add_argument("run", type=Path)
    parser.add_argument("sft", type=Path)
    parser.add_argument("models", nargs="+", metavar="STEP=MODEL")
    options = parser.parse_args()
    overrides = (*HABIT.overrides(options.seed), *LIGHTNING, f"run.dir={options.run.resolve()}")
    models = {
        int(step): Path(model) for step, model in (one.split("=", 1) for one in options.models)
    }
    return Order(load_config(HABIT.config, list(overrides)), options.sft, models)


def main() -> None:
    order = read_order(__doc__)
    run = order.run
    named = {"sft": order.sft, **{f"step-{step}": model for step, model in order.models.items()}}
    sample_and_score(order.config, named, order.config.models.teacher)
    job = job_with(order.config, run, order.sft)
    frozen = samples_of(run / "sft" / "scores")
    lines: list[str] = []
    with only_rank(job):
        sft = Gradients(job, order.sft).weights()
        for step, model in order.models.items():
            fresh = samples_of(run / f"step-{step}" / "scores")
            figures = measured(Gradients(job, model), frozen, fresh, sft)
            lines.append(json.dumps({"kind": "train", "stage": "distill", "step": step, **figures}))
    # The form of a training's metrics, so that what reads those reads these.
    publish_bytes(run / METRICS, ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main()
