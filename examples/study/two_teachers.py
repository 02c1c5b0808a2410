"""Two teachers that differ in their notation, and the arms of claims 2 and 5, which mix them.

second_teacher.py makes both of one model, by one recipe, and the base student is that model.
Teacher A ends a step with ";" one time in five and else with a line break, teacher B four times in
five. The base student does both alike, and skips the steps in most of its answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from examples.study.arms import ROOT, RUNS, Arm, Command, Place, Setting

Teacher = Literal["a", "b"]
CONFIG = ROOT / "examples" / "tiny_moe.toml"
MADE = RUNS / "models"
# What was measured of the teachers, in the run of an SFT student.
MEASURED_MODELS = "teachers.json"
# The model that the teachers and all students begin with.
BASE = MADE / "two_notations" / "sft" / "model"
TEACHERS: dict[Teacher, str] = {"a": "teacher_a", "b": "teacher_b"}
# SFT that moves a student towards its teacher's notation, and leaves much to distil: in one seed,
# 8 steps at three times this rate left nothing. The weaker SFT is to have the distance from teacher
# A that SFT by teacher B has.
SFT_STEPS = 10
WEAK_SFT_STEPS = 5
# Of SFT and of distill.
RATE = "3e-5"
# One rank and one server: two arms are made side by side, one on each core.
ONE_RANK = "parallel={ranks=1,tensor=1,expert=1}"


def teacher_model(teacher: Teacher) -> str:
    """Return the folder of a teacher's model."""
    return str(MADE / TEACHERS[teacher] / "sft" / "model")


def _overrides(seed: int, teacher: Teacher) -> tuple[str, ...]:
    return (
        f"run.seed={seed}",
        f"models.teacher={teacher_model(teacher)}",
        f"models.student={BASE}",
        # Sets of other seeds than those of the written demonstrations and of other settings.
        f"prompts.sft={{num_prompts=512,seed={140 + seed}}}",
        f"prompts.opd={{num_prompts=512,seed={160 + seed}}}",
        f"sft.{ONE_RANK}",
        f"sft.num_steps={SFT_STEPS}",
        f"sft.optimizer.lr={RATE}",
        # The paper's loss needs the sampled token alone, and so does the correction of claim 5.
        "score.top_k=0",
        f"distill.{ONE_RANK}",
        "distill.objective.loss=lightning",
        f"distill.optimizer.lr={RATE}",
        "sglang.replicas=1",
        "distill.sync_every=0",
        "evaluate.enabled=false",
    )


SETTINGS: dict[Teacher, Setting] = {
    "a": Setting("teacher_a", CONFIG, lambda seed: _overrides(seed, "a")),
    "b": Setting("teacher_b", CONFIG, lambda seed: _overrides(seed, "b")),
}


def _demonstrations(place: Place, arm: str) -> str:
    """Return the override that names the demonstrations of an arm's SFT."""
    # Given and not of the run itself: the stages are then reused with another teacher that scores.
    return f"sft.demonstrations={place.of(arm) / 'demonstrate'}"


def _sft(name: str, title: str, teacher: Teacher) -> Arm:
    def commands(place: Place) -> tuple[Command, ...]:
        given = _demonstrations(place, name)
        return (
            ("python", "second_teacher"),
            ("lopd", "demonstrate"),
            ("lopd", "sft", given),
            ("lopd", "rollout", given),
            # Last, because lopd begins no run in a folder that has other files.
            ("python", "second_teacher", str(place.run / MEASURED_MODELS)),
        )

    return Arm(name, title, SETTINGS[teacher], commands, model="sft/model")


SFT_A = _sft("c2_sft_a", "SFT by A", "a")
SFT_B = _sft("c2_sft_b", "SFT by B", "b")
SFT_OF: dict[Teacher, Arm] = {"a": SFT_A, "b": SFT_B}


def _weak_commands(place: Place) -> tuple[Command, ...]:
    weaker = (_demonstrations(place, SFT_A.name), f"sft.num_steps={WEAK_SFT_STEPS}")
    return (("lopd", "sft", *weaker), ("lopd", "rollout", *weaker))


SFT_WEAK = Arm(
    name="c2_sft_weak",
    title=f"SFT by A, {WEAK_SFT_STEPS} of {SFT_STEPS} steps",
    setting=SETTINGS["a"],
    commands=_weak_commands,
    after=(SFT_A.name,),
    model="sft/model",
)


def _foreign(sft: Teacher, opd: Teacher) -> tuple[str, ...]:
    return () if sft == opd else ("score.allow_foreign_teacher=true",)


def _cell_name(sft: Teacher, opd: Teacher, online: bool = False) -> str:
    return f"c2_{sft}{opd}{'_online' if online else ''}"


def offline(sft: Teacher, opd: Teacher) -> Arm:
    """Return the arm that distils SFT by one teacher from frozen rollouts, scored by a teacher."""

    def commands(place: Place) -> tuple[Command, ...]:
        given = (_demonstrations(place, SFT_OF[sft].name), *_foreign(sft, opd))
        return (("lopd", "score", *given), ("lopd", "distill", *given))

    return Arm(
        name=_cell_name(sft, opd),
        title=f"SFT by {sft.upper()}, Lightning OPD by {opd.upper()}",
        setting=SETTINGS[opd],
        commands=commands,
        copied=_stages(SFT_OF[sft], "sft", "rollout"),
        after=(SFT_OF[sft].name,),
    )


def online(sft: Teacher, opd: Teacher) -> Arm:
    """Return the arm that distils from fresh rollouts at each step: standard OPD."""

    def commands(place: Place) -> tuple[Command, ...]:
        given = (_demonstrations(place, SFT_OF[sft].name), *_foreign(sft, opd))
        fresh = "distill.refresh={every=1,keep_teacher=true}"
        return (("lopd", "distill", *given, fresh),)

    cell = _cell_name(sft, opd)
    return Arm(
        name=_cell_name(sft, opd, online=True),
        title=f"SFT by {sft.upper()}, standard OPD by {opd.upper()}",
        setting=SETTINGS[opd],
        commands=commands,
        copied=(*_stages(SFT_OF[sft], "sft", "rollout"), (cell, "score")),
        after=(SFT_OF[sft].name,),
    )


def _stages(arm: Arm, *stages: str) -> tuple[tuple[str, str], ...]:
    return tuple((arm.name, stage) for stage in stages)


def _weak_cell(place: Place) -> tuple[Command, ...]:
    weaker = (_demonstrations(place, SFT_A.name), f"sft.num_steps={WEAK_SFT_STEPS}")
    return (("lopd", "score", *weaker), ("lopd", "distill", *weaker))


WEAK = Arm(
    name="c2_weak",
    title="weaker SFT by A, Lightning OPD by A",
    setting=SETTINGS["a"],
    commands=_weak_cell,
    copied=_stages(SFT_WEAK, "sft", "rollout"),
    after=(SFT_A.name,),
)


def corrected(name: str, sft: Teacher, opd: Teacher) -> Arm:
    """Return the arm that distils from the scores of offline(sft, opd), corrected for style."""
    cell = _cell_name(sft, opd)

    def commands(place: Place) -> tuple[Command, ...]:
        cache = place.run / "corrected"
        given = _demonstrations(place, SFT_OF[sft].name)
        return (
            ("python", "corrected_cache", str(place.of(cell) / "score"), str(cache)),
            ("lopd", "distill", given, f"distill.cache={cache}"),
        )

    return Arm(
        name=name,
        title=f"SFT by {sft.upper()}, Lightning OPD 2.0 by {opd.upper()}",
        setting=SETTINGS[opd],
        commands=commands,
        copied=_stages(SFT_OF[sft], "sft"),
        after=(cell, SFT_OF[sft].name),
    )


PAIRS: tuple[tuple[Teacher, Teacher], ...] = (("a", "a"), ("a", "b"), ("b", "a"), ("b", "b"))
_Make = Callable[[Teacher, Teacher], Arm]


def _grid(make: _Make) -> dict[str, Arm]:
    return {f"{sft}{opd}": make(sft, opd) for sft, opd in PAIRS}


# By the two letters of SFT teacher and OPD teacher.
OFFLINE = _grid(offline)
ONLINE = _grid(online)
