"""The models that examples/small_student/seeds.py compares, and the commands that make each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "small_student.toml"
MODELS = ROOT / "examples" / "tiny_models"
TEACHER = MODELS / "teacher"
# The run of a seed that all other arms begin with.
MAIN = "main"
# The prompts of seed n: these numbers plus n are the seeds of its prompt sets.
SFT_PROMPTS = 20
OPD_PROMPTS = 40
NUM_ROLLOUTS = 2048

# A verb of lopd and the overrides that follow CONFIG, for the run folder of a seed's main run.
Command = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Arm:
    """One model of each seed."""

    name: str
    # What the table calls it.
    title: str
    # The folder of its run, beside that of the main run.
    run: str
    # The model in that folder.
    model: str
    # Stages of the main run that its run begins with a copy of.
    copied: tuple[str, ...]
    # What makes it, as a function of the main run's folder and the seed.
    commands: Callable[[Path, int], tuple[Command, ...]]
    # Arms whose commands it needs too. Their costs are part of its costs.
    after: tuple[str, ...] = ()


# SFT goes on for as many responses as distill learns from, with 10 steps of warm-up as before.
_AS_SFT = ("sft.num_steps=256", "sft.optimizer.warmup=0.039")
_AS_DISTILL = (
    "sft.num_steps=64",
    "sft.batch_size=256",
    "sft.optimizer.lr=1e-3",
    "sft.optimizer.min_lr=5e-5",
    "sft.optimizer.warmup=0.156",
)


def _longer_sft(name: str, title: str, *recipe: str) -> Arm:
    """Return SFT that goes on from the SFT student on the same demonstrations."""
    return Arm(
        name=name,
        title=title,
        run=name,
        model="sft/model",
        copied=(),
        commands=lambda main, seed: (
            (
                "sft",
                (
                    f"models.student={main / 'sft' / 'model'}",
                    f"sft.demonstrations={main / 'demonstrate'}",
                    # With the same seed it would begin with the responses that SFT began with.
                    f"run.seed={100 + seed}",
                    *recipe,
                ),
            ),
        ),
        after=("sft",),
    )


def _fresh_sft(main: Path, seed: int) -> tuple[Command, ...]:
    """Return the commands of SFT on the teacher's own answers to the prompts of the rollouts."""
    overrides = (
        f"models.student={main / 'sft' / 'model'}",
        f"prompts.sft={{num_prompts={NUM_ROLLOUTS}, seed={OPD_PROMPTS + seed}}}",
        *_AS_DISTILL,
    )
    return (("demonstrate", overrides), ("sft", overrides))


def _on_demonstrations(main: Path, seed: int) -> tuple[Command, ...]:
    """Return the commands of distilling on states of the teacher's own responses."""
    answered = main.parent / "teacher_rollouts"
    by_teacher = (
        f"run.dir={answered}",
        f"models.student={TEACHER}",
        # The teacher takes the place of the SFT student, so its responses become the rollouts.
        f"sft.checkpoint={TEACHER}",
        f"sft.declared_teacher={TEACHER}",
        # A given student has no demonstrations that a baseline could continue with.
        "evaluate.equal_compute_baseline=false",
    )
    return (
        *((verb, by_teacher) for verb in ("sft", "rollout", "score")),
        (
            "distill",
            (f"distill.cache={answered / 'score'}", "distill.allow_foreign_cache=true"),
        ),
    )


def _of_length(num_steps: int) -> Arm:
    return Arm(
        name=f"sft_{num_steps}",
        title=f"SFT, {num_steps} steps",
        run=f"sft_{num_steps}",
        model="sft/model",
        copied=("demonstrate",),
        commands=lambda main, seed: (("sft", (f"sft.num_steps={num_steps}",)),),
        after=("sft",),
    )


def _other_loss(name: str, title: str, *overrides: str) -> Arm:
    return Arm(
        name=name,
        title=title,
        run=name,
        model="distill/model",
        # The same rollouts and the same scores.
        copied=("demonstrate", "sft", "rollout", "score"),
        commands=lambda main, seed: (("distill", overrides),),
        after=("distilled",),
    )


# The paper's loss needs a lower rate here: at 1e-3 it does more harm still.
_SAMPLED = (
    "distill.objective.loss=lightning",
    "distill.optimizer.lr=1e-4",
    "distill.optimizer.min_lr=5e-6",
)

# In the order in which they are made: the later ones are the first to be left out.
ARMS: tuple[Arm, ...] = (
    Arm(
        name="sft",
        title="SFT student (96 steps)",
        run=MAIN,
        model="sft/model",
        copied=(),
        commands=lambda main, seed: (("demonstrate", ()), ("sft", ())),
    ),
    Arm(
        name="distilled",
        title="distilled: top-8 reverse KL on frozen rollouts",
        run=MAIN,
        model="distill/model",
        copied=(),
        commands=lambda main, seed: (("run", ()),),
        after=("sft",),
    ),
    _longer_sft("sft_longer", "SFT gone on: 256 steps x 64, as before", *_AS_SFT),
    _other_loss("lightning", "sampled token (the paper's loss), lr 1e-4", *_SAMPLED),
    _longer_sft(
        "sft_longer_as_distill",
        "SFT gone on: 64 steps x 256, batch and rate of distill",
        *_AS_DISTILL,
    ),
    Arm(
        name="sft_fresh",
        title="SFT gone on, on 2,048 fresh demonstrations: 64 steps x 256",
        run="sft_fresh",
        model="sft/model",
        copied=(),
        commands=_fresh_sft,
        after=("sft",),
    ),
    _of_length(48),
    _of_length(192),
    _other_loss(
        "lightning_cap",
        "sampled token, importance_cap = 1",
        *_SAMPLED,
        "distill.objective.importance_cap=1",
    ),
    _other_loss(
        "forward_kl",
        "top-8 forward KL on frozen rollouts",
        "distill.objective.loss=top_k_forward_kl",
    ),
    Arm(
        name="on_demonstrations",
        title="top-8 reverse KL on 2,048 responses of the teacher",
        run="on_demonstrations",
        model="distill/model",
        copied=("demonstrate", "sft"),
        commands=_on_demonstrations,
        after=("sft",),
    ),
)
# SFT on the 512 demonstrations. The best of these is the best SFT checkpoint.
SFT_ONLY = ("sft_48", "sft", "sft_192", "sft_longer", "sft_longer_as_distill")


def arm_named(name: str) -> Arm:
    return next(arm for arm in ARMS if arm.name == name)
