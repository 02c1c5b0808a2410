"""The arms of claim 10: settings whose caches nobody had seen when the limit of
lopd/cache/recommendation.py was set."""

from __future__ import annotations

from dataclasses import dataclass

from examples.study import claim_9
from examples.study.arms import (
    HABIT,
    HABIT_LIGHTNING,
    HABIT_SFT,
    LIGHTNING,
    SMALL,
    SMALL_PREFIX,
    Arm,
    Command,
    Place,
    Setting,
    distilled,
)
from examples.study.signals import AFTER_SFT, SHORT
from examples.study.two_teachers import SFT_A, SFT_B, offline
from examples.study.unlearned_at import model_at


@dataclass(frozen=True)
class Foretold:
    """A cache, the SFT student that sampled it, and what the sampled token made of it.

    Attributes:
        title: What the page calls it.
        cache: The arm whose run has the scored rollouts.
        sft: The arm of the SFT student.
        sampled: The arm that learnt from the cache by the loss of the sampled token.
    """

    title: str
    cache: str
    sft: str
    sampled: str


def _small_after(num_steps: int) -> Arm:
    """Return the small student that is distilled after another number of steps of SFT."""
    sft = f"{SMALL_PREFIX}sft_{num_steps}"
    given = f"sft.num_steps={num_steps}"
    # The rates of the example's arm of this loss.
    loss = (*LIGHTNING, "distill.optimizer.min_lr=5e-6")

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


def _unlearned_at(step: int) -> tuple[Arm, Arm]:
    """Return the SFT student of a base of another checkpoint, and what is distilled from it."""
    setting = Setting(
        f"unlearned_{step}",
        HABIT.config,
        lambda seed: (*HABIT.overrides(seed), f"models.student={model_at(step)}"),
    )
    sft = Arm(
        name=f"c10_early_{step}",
        title=f"SFT student of a base after {step} steps",
        setting=setting,
        commands=lambda place: (
            ("python", "unlearned"),
            ("python", "unlearned_at", str(step)),
            *(("lopd", verb) for verb in ("demonstrate", "sft", "rollout", "score")),
        ),
        model="sft/model",
    )
    scored = tuple((sft.name, stage) for stage in ("demonstrate", "sft", "rollout", "score"))
    return sft, distilled(
        f"c10_early_{step}_lightning",
        f"a base after {step} steps, sampled token",
        *LIGHTNING,
        setting=setting,
        scored=scored,
    )


SMALL_48 = _small_after(48)
SMALL_192 = _small_after(192)
EARLY_250 = _unlearned_at(250)
EARLY_400 = _unlearned_at(400)
# Added when the caches of the others had been looked at, and before any outcome: in all of them the
# former rule says the same as this one.
EARLY_550 = _unlearned_at(550)
# The student that AFTER_SFT distils, which no other claim measures.
SFT_16 = Arm(
    name="c10_sft_16",
    title="SFT student after 16 steps",
    setting=HABIT,
    commands=lambda place: (),
    copied=((AFTER_SFT.name, "demonstrate"), (AFTER_SFT.name, "sft")),
    model="sft/model",
)
ARMS = (SFT_16, SMALL_48, SMALL_192, *EARLY_250, *EARLY_400, *EARLY_550)
_OWN = offline("a", "a").name
_OTHER = offline("b", "a").name
FRESH = (
    Foretold("a bad habit, SFT of 16 steps", AFTER_SFT.name, SFT_16.name, AFTER_SFT.name),
    Foretold("a bad habit, rollouts of 24 tokens", SHORT.name, HABIT_SFT.name, SHORT.name),
    Foretold("two notations, SFT by A, scored by A", _OWN, SFT_A.name, _OWN),
    Foretold("two notations, SFT by B, scored by A", _OTHER, SFT_B.name, _OTHER),
    Foretold(
        "a small student, SFT of 48 steps",
        SMALL_48.name,
        f"{SMALL_PREFIX}sft_48",
        SMALL_48.name,
    ),
    Foretold(
        "a small student, SFT of 192 steps",
        SMALL_192.name,
        f"{SMALL_PREFIX}sft_192",
        SMALL_192.name,
    ),
    Foretold(
        "training stopped at step 250", EARLY_250[0].name, EARLY_250[0].name, EARLY_250[1].name
    ),
    Foretold(
        "training stopped at step 400", EARLY_400[0].name, EARLY_400[0].name, EARLY_400[1].name
    ),
    Foretold(
        "training stopped at step 550", EARLY_550[0].name, EARLY_550[0].name, EARLY_550[1].name
    ),
)
# The settings that the limit was taken from. They are shown, and not counted.
SEEN = (
    Foretold("a bad habit", HABIT_SFT.name, HABIT_SFT.name, HABIT_LIGHTNING.name),
    Foretold("a small student, SFT of 96 steps", "small/sft", "small/sft", "small/lightning"),
    Foretold(
        "training stopped at step 500",
        claim_9.SFT.name,
        claim_9.SFT.name,
        claim_9.PLAIN.name,
    ),
)
