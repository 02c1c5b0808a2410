"""The arms of claim 10: settings that test the limit of lopd/cache/recommendation.py. Those that
count were made after it was set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from examples.small_student.arms import MAIN
from examples.study import claim_9
from examples.study.arms import (
    HABIT,
    HABIT_LIGHTNING,
    HABIT_SFT,
    LIGHTNING,
    SMALL,
    SMALL_PREFIX,
    SMALL_RUNS,
    Arm,
    Command,
    Place,
    Setting,
    distilled,
    scored_by,
)
from examples.study.signals import AFTER_SFT, SHORT
from examples.study.two_teachers import BASE, SFT_A, SFT_B, offline, teacher_model
from examples.study.unlearned import RUN
from examples.study.unlearned_at import model_at

Kind = Literal["has a bad habit", "small", "stopped early"]


@dataclass(frozen=True)
class Foretold:
    """A cache, the SFT student that sampled it, and what the sampled token made of it.

    Attributes:
        title: What the page calls it.
        cache: The arm whose run has the scored rollouts.
        sft: The arm of the SFT student.
        sampled: The arm that learnt from the cache by the loss of the sampled token.
        kind: What the base student is, whoever its teacher is.
    """

    title: str
    cache: str
    sft: str
    sampled: str
    kind: Kind


_SMALL_MIN_RATE = "distill.optimizer.min_lr=5e-6"


def _small_after(num_steps: int) -> Arm:
    """Return the small student that is distilled after another number of steps of SFT."""
    sft = f"{SMALL_PREFIX}sft_{num_steps}"
    given = f"sft.num_steps={num_steps}"
    # The rates of the example's arm of this loss.
    loss = (*LIGHTNING, _SMALL_MIN_RATE)

    def commands(place: Place) -> tuple[Command, ...]:
        return (
            ("lopd", "rollout", given),
            ("lopd", "score", given),
            ("lopd", "distill", given, *loss),
        )

    return Arm(
        name=f"c10_small_{num_steps}",
        title=f"a small student after {num_steps} steps of SFT, sampled token",
        setting=SMALL,
        commands=commands,
        copied=((sft, "demonstrate"), (sft, "sft")),
    )


def _pair(
    name: str, title: str, *first: Command, student: Path | None = None, teacher: Path | None = None
) -> tuple[Arm, Arm]:
    """Return the SFT student of a pair of models, and what is distilled from it.

    Args:
        name: The names of the arms begin with it.
        title: What tables call it.
        first: Commands that make the models.
        student: The base student. None is that of the example.
        teacher: The teacher of SFT and of the scores. None is that of the example.
    """
    models = {"student": student, "teacher": teacher}
    given = tuple(f"models.{role}={model}" for role, model in models.items() if model is not None)
    setting = Setting(name, HABIT.config, lambda seed: (*HABIT.overrides(seed), *given))
    return _arms_of(setting, title, *first)


def _arms_of(
    setting: Setting, title: str, *first: Command, after: tuple[str, ...] = (), loss: str = ""
) -> tuple[Arm, Arm]:
    """Return the SFT student of a setting, and what the sampled token makes of it.

    Args:
        setting: The setting. The names of the arms have its name.
        title: What tables call it.
        first: Commands that make its models.
        after: Arms that make its models.
        loss: One more override of the distillation.
    """
    sft = Arm(
        name=f"c10_{setting.name}",
        title=f"SFT student, {title}",
        setting=setting,
        commands=lambda place: (
            *first,
            *(("lopd", verb) for verb in ("demonstrate", "sft", "rollout", "score")),
        ),
        after=after,
        model="sft/model",
    )
    return sft, distilled(
        f"{sft.name}_lightning",
        f"{title}, sampled token",
        *LIGHTNING,
        *((loss,) if loss else ()),
        setting=setting,
        scored=scored_by(sft.name),
    )


def _unlearned_at(step: int) -> tuple[Arm, Arm]:
    """Return the arms of a base student of another checkpoint."""
    first = (("python", "unlearned"), ("python", "unlearned_at", str(step)))
    title = f"a base after {step} steps"
    return _pair(f"early_{step}", title, *first, student=model_at(step))


def _small_by_itself() -> tuple[Arm, Arm]:
    """Return the arms of the small student whose teacher is what the example distilled from it."""
    teacher = f"{SMALL_PREFIX}distilled"

    def overrides(seed: int) -> tuple[str, ...]:
        model = SMALL_RUNS / f"seed-{seed}" / MAIN / "distill" / "model"
        return (*SMALL.overrides(seed), f"models.teacher={model}")

    setting = Setting("small_by_small", SMALL.config, overrides)
    title = "a small student by a small teacher"
    return _arms_of(setting, title, after=(teacher,), loss=_SMALL_MIN_RATE)


SMALL_48 = _small_after(48)
SMALL_192 = _small_after(192)
EARLY_250 = _unlearned_at(250)
EARLY_400 = _unlearned_at(400)
EARLY_550 = _unlearned_at(550)
# Pairs in which a base student has another teacher than before, so that the kind of the student
# does not decide alone. A teacher of the same training is softer, one of another notation sharper.
_UNLEARNED = (("python", "unlearned"), ("python", "unlearned_at", "400"))
_NOTATIONS = (("python", "second_teacher"),)
_LAST = RUN / "sft" / "model"
EARLY_BY_LAST = _pair(
    "early_400_by_600",
    "a base after 400 steps by one after 600",
    *_UNLEARNED,
    student=model_at(400),
    teacher=_LAST,
)
EARLY_BY_EARLY = _pair(
    "early_250_by_400",
    "a base after 250 steps by one after 400",
    *_UNLEARNED,
    ("python", "unlearned_at", "250"),
    student=model_at(250),
    teacher=model_at(400),
)
NOTATIONS_BY_TEACHER = _pair(
    "notations_by_teacher",
    "two notations by the example's teacher",
    *_NOTATIONS,
    student=BASE,
)
HABIT_BY_A = _pair(
    "habit_by_a", "a bad habit by teacher A", *_NOTATIONS, teacher=Path(teacher_model("a"))
)
HABIT_BY_LAST = _pair(
    "habit_by_600", "a bad habit by a base after 600 steps", *_UNLEARNED[:1], teacher=_LAST
)
SMALL_BY_SMALL = _small_by_itself()
# The student that AFTER_SFT distils, which no other claim measures.
SFT_16 = Arm(
    name="c10_sft_16",
    title="SFT student after 16 steps",
    setting=HABIT,
    commands=lambda place: (),
    copied=((AFTER_SFT.name, "demonstrate"), (AFTER_SFT.name, "sft")),
    model="sft/model",
)
_PAIRS: dict[str, tuple[Kind, tuple[Arm, Arm]]] = {
    "training stopped at step 250": ("stopped early", EARLY_250),
    "training stopped at step 400": ("stopped early", EARLY_400),
    "training stopped at step 550": ("stopped early", EARLY_550),
    "step 400, the teacher is step 600": ("stopped early", EARLY_BY_LAST),
    "step 250, the teacher is step 400": ("stopped early", EARLY_BY_EARLY),
    "two notations, the example's teacher": ("has a bad habit", NOTATIONS_BY_TEACHER),
    "a bad habit, teacher A of two notations": ("has a bad habit", HABIT_BY_A),
    "a bad habit, the teacher is step 600": ("has a bad habit", HABIT_BY_LAST),
    "a small student, the teacher is what was distilled from it": ("small", SMALL_BY_SMALL),
}
ARMS = (SFT_16, SMALL_48, SMALL_192, *(arm for _, pair in _PAIRS.values() for arm in pair))
_HABIT: Kind = "has a bad habit"
# The settings in which a base student has another teacher than before.
PAIRS = tuple(title for title in _PAIRS if "teacher" in title)
# Made after the limit was set. These count.
FRESH = (
    *(
        Foretold(
            f"a small student, SFT of {steps} steps",
            arm.name,
            f"{SMALL_PREFIX}sft_{steps}",
            arm.name,
            "small",
        )
        for steps, arm in ((48, SMALL_48), (192, SMALL_192))
    ),
    *(
        Foretold(title, sft.name, sft.name, sampled.name, kind)
        for title, (kind, (sft, sampled)) in _PAIRS.items()
    ),
)
_OWN = offline("a", "a").name
_OTHER = offline("b", "a").name
# Made before the limit was set, for other claims. Nobody took the limit from them, but most of what
# came of them was known, and `lopd distill` had written the shares of their caches into logs.
OLDER = (
    Foretold("a bad habit, SFT of 16 steps", AFTER_SFT.name, SFT_16.name, AFTER_SFT.name, _HABIT),
    Foretold("a bad habit, rollouts of 24 tokens", SHORT.name, HABIT_SFT.name, SHORT.name, _HABIT),
    Foretold("two notations, SFT by A, scored by A", _OWN, SFT_A.name, _OWN, _HABIT),
    Foretold("two notations, SFT by B, scored by A", _OTHER, SFT_B.name, _OTHER, _HABIT),
)
# The settings that the limit was taken from.
SEEN = (
    Foretold("a bad habit", HABIT_SFT.name, HABIT_SFT.name, HABIT_LIGHTNING.name, _HABIT),
    Foretold(
        "a small student, SFT of 96 steps", "small/sft", "small/sft", "small/lightning", "small"
    ),
    Foretold(
        "training stopped at step 500",
        claim_9.SFT.name,
        claim_9.SFT.name,
        claim_9.PLAIN.name,
        "stopped early",
    ),
)
