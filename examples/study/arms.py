"""What the study's claims are made of: settings, arms and claims. A claim names arms; an arm is one
model of each seed, made by commands of lopd; make.py runs them, measure.py measures the models,
figures.py has what was measured, and page.py writes docs/study.md. What a claim says of its figures
is made of outcomes.py (judgements), wording.py (sentences), tables.py and plots.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from examples.small_student.arms import MAIN

if TYPE_CHECKING:
    from examples.study.figures import Figures

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "examples" / "tiny_models"
RUNS = ROOT / "runs" / "study"
# The runs of examples/run_small_student.sh, which the study continues. Its arms are named
# "small/NAME" here, and "small/main" is the run that they share.
SMALL_RUNS = ROOT / "runs" / "small_student_seeds"
SMALL_PREFIX = "small/"
SEEDS = (2, 3, 4, 5, 6)


@dataclass(frozen=True)
class Setting:
    """A student, a teacher and a configuration that many arms share."""

    name: str
    config: Path
    # Overrides of the configuration, as a function of the seed.
    overrides: Callable[[int], tuple[str, ...]]


def _habit(seed: int) -> tuple[str, ...]:
    one_rank = "parallel={ranks=1,tensor=1,expert=1}"
    return (
        f"run.seed={seed}",
        f"prompts.sft={{num_prompts=512,seed={100 + seed}}}",
        f"prompts.opd={{num_prompts=512,seed={200 + seed}}}",
        # Two arms are made side by side, one on each core.
        f"sft.{one_rank}",
        f"distill.{one_rank}",
        "sglang.replicas=1",
        "distill.sync_every=0",
        "evaluate.enabled=false",
    )


def _small(seed: int) -> tuple[str, ...]:
    # As in examples/small_student/seeds.py.
    return (
        f"run.seed={seed}",
        f"prompts.sft.seed={20 + seed}",
        f"prompts.opd={{num_prompts=2048,seed={40 + seed}}}",
        "distill.sync_every=0",
        "evaluate.enabled=false",
    )


# The student can do the task, and has the bad habit to skip steps. The teacher has its size.
HABIT = Setting("habit", ROOT / "examples" / "tiny_moe.toml", _habit)
# The student has a sixth of the teacher's size, and is sharp where the teacher is not.
SMALL = Setting("small", ROOT / "examples" / "small_student.toml", _small)


@dataclass(frozen=True)
class Place:
    """Where an arm of one seed is made."""

    seed: int
    # The folder of this arm's run.
    run: Path
    # The folder of all arms of this seed.
    folder: Path

    def of(self, arm: str) -> Path:
        """Return the run folder of another arm of this seed."""
        if arm.startswith(SMALL_PREFIX):
            name = arm.removeprefix(SMALL_PREFIX)
            # Two of its models are those of the run that all others share.
            folder = MAIN if name in ("sft", "distilled") else name
            return SMALL_RUNS / f"seed-{self.seed}" / folder
        return self.folder / arm


# ("lopd", VERB, OVERRIDE, ...) runs a verb with the setting's configuration and overrides, and
# run.dir; ("python", MODULE, ARGUMENT, ...) runs a module of this folder.
Command = tuple[str, ...]


@dataclass(frozen=True)
class Arm:
    """One model of each seed."""

    # Also the folder of its run, below that of the seed.
    name: str
    # What tables call it.
    title: str
    setting: Setting
    # What makes it.
    commands: Callable[[Place], tuple[Command, ...]]
    # (arm, stage): finished stages of other arms' runs that its run begins with a copy of.
    copied: tuple[tuple[str, str], ...] = ()
    # Arms that its commands need beside those of copied. What their models cost is part of its
    # costs.
    after: tuple[str, ...] = ()
    # The model to be measured, in the folder of its run; "" where there is none.
    model: str = "distill/model"

    def place(self, seed: int) -> Place:
        """Return where this arm of a seed is made."""
        folder = RUNS / f"seed-{seed}"
        return Place(seed, Place(seed, folder, folder).of(self.name), folder)


@dataclass(frozen=True)
class Plot:
    """A picture for the page."""

    # The file below docs/, without its folder: "study_1.svg".
    file: str
    # What the picture shows, in one sentence.
    caption: str
    # Draws it with matplotlib into a file of this path.
    draw: Callable[[Path], None]


Answer = Literal["holds", "does not hold", "open"]


@dataclass(frozen=True)
class Verdict:
    """What the figures say of a claim."""

    answer: Answer
    # One or two sentences with the figures and their 95% intervals. The page has them first.
    summary: str
    # Markdown: tables and what must be known to read them.
    details: tuple[str, ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True)
class Claim:
    """One claim, the arms that test it, and the judgement of their figures."""

    number: int
    # The claim in one sentence.
    title: str
    # Who states it, with the number of the paper.
    source: str
    # How it was tested, in two or three sentences.
    method: str
    arms: tuple[Arm, ...]
    # Raises MissingFigures (figures.py) where an arm has not been measured.
    judge: Callable[[Figures], Verdict]
    # Other arms' names whose figures the judgement reads.
    reads: tuple[str, ...] = field(default=())


# The run of each seed that most arms of HABIT begin with: SFT, rollouts, and a cache with the
# teacher's log-probability of each token and its 8 likeliest tokens. Its model is the SFT student.
HABIT_SFT = Arm(
    name="habit_sft",
    title="SFT student",
    setting=HABIT,
    commands=lambda place: tuple(
        ("lopd", verb) for verb in ("demonstrate", "sft", "rollout", "score")
    ),
    model="sft/model",
)


def scored_by(arm: str) -> tuple[tuple[str, str], ...]:
    """Return the stages up to the scores of an arm's run, for Arm.copied."""
    return tuple((arm, stage) for stage in ("demonstrate", "sft", "rollout", "score"))


SCORED = scored_by(HABIT_SFT.name)
# The paper's update, with the rate that suits a model of this size.
LIGHTNING = ("distill.objective.loss=lightning", "distill.optimizer.lr=1e-4")


def distilled(
    name: str,
    title: str,
    *overrides: str,
    setting: Setting = HABIT,
    scored: tuple[tuple[str, str], ...] = SCORED,
) -> Arm:
    """Return an arm that only distils, from the stages up to the scores of another arm."""
    return Arm(
        name=name,
        title=title,
        setting=setting,
        commands=lambda place: (("lopd", "distill", *overrides),),
        copied=scored,
    )


def rolled_out_again(name: str, title: str, *overrides: str) -> Arm:
    """Return an arm that distils rollouts of its own from the SFT student with the bad habit."""
    return Arm(
        name=name,
        title=title,
        setting=HABIT,
        commands=lambda place: (
            ("lopd", "rollout", *overrides),
            ("lopd", "score", *overrides),
            ("lopd", "distill", *LIGHTNING, *overrides),
        ),
        copied=SCORED[:2],
    )


# What other arms are compared with.
HABIT_LIGHTNING = distilled("habit_lightning", "Lightning OPD (sampled token)", *LIGHTNING)
HABIT_TOP_K = distilled("habit_top_k", "top-8 reverse KL", "distill.optimizer.lr=1e-4")
