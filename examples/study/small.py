"""The arms of examples/run_small_student.sh as arms of the study, under the names small/NAME. Its
own command makes them."""

from __future__ import annotations

from collections.abc import Iterable

from examples.small_student import arms as small_student
from examples.small_student.arms import MAIN
from examples.study.arms import SMALL, SMALL_PREFIX, Arm, Command, Place

# The run that its arms share. It is no model: its models are small/sft and small/distilled.
SHARED = SMALL_PREFIX + MAIN


def is_small(name: str) -> bool:
    return name.startswith(SMALL_PREFIX)


def small_arm(name: str) -> Arm:
    """Return an arm of the small student.

    Args:
        name: "small/main", "small/sft", "small/distilled" and so on.

    Raises:
        KeyError: There is no such arm.
    """
    if name == SHARED:
        # The command of the distilled student makes the rollouts and the scores too.
        models = tuple(SMALL_PREFIX + model for model in ("sft", "distilled"))
        return Arm(name, "the small student's run", SMALL, lambda _: (), after=models, model="")
    own = next((arm for arm in small_student.ARMS if SMALL_PREFIX + arm.name == name), None)
    if own is None:
        raise KeyError(name)

    def commands(place: Place) -> tuple[Command, ...]:
        main = place.of(SHARED)
        made = own.commands(main, place.seed)
        return tuple(("lopd", verb, *overrides) for verb, overrides in made)

    return Arm(
        name=name,
        title=own.title,
        setting=SMALL,
        commands=commands,
        copied=tuple((SHARED, stage) for stage in own.copied),
        after=tuple(SMALL_PREFIX + other for other in own.after),
        model=own.model,
    )


def needed(names: Iterable[str]) -> list[str]:
    """Return the arms that seeds.py must be asked for, in the order in which it makes them.

    Args:
        names: Names of arms of the study. Those of other students are left out.
    """
    wanted = {name.removeprefix(SMALL_PREFIX) for name in names if is_small(name)}
    if MAIN in wanted:
        wanted = (wanted - {MAIN}) | {"distilled"}
    while True:
        before = {other for name in wanted for other in small_student.arm_named(name).after}
        if before <= wanted:
            break
        wanted |= before
    return [arm.name for arm in small_student.ARMS if arm.name in wanted]
