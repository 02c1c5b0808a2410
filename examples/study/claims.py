"""The claims of the study, and all arms that they need."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence

from examples.study import arms as shared
from examples.study.arms import Arm, Claim
from examples.study.small import is_small, small_arm

# Claim 9 is the regime in which the method fails, and claim 10 the warning of it.
NUMBERS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


def load_claims(numbers: Iterable[int] = NUMBERS) -> list[Claim]:
    """Return the claims of these numbers."""
    modules = [importlib.import_module(f"examples.study.claim_{number}") for number in numbers]
    return [module.CLAIM for module in modules]


def arms_of(claims: Sequence[Claim]) -> dict[str, Arm]:
    """Return the arms that claims need, by name: an arm comes after those that it needs.

    Raises:
        ValueError: Two arms have one name, or an arm is named that nobody defines.
    """
    known: dict[str, Arm] = {arm.name: arm for arm in vars(shared).values() if isinstance(arm, Arm)}
    # Also of claims that are not asked for: they may define an arm that others read.
    every = {claim.number: claim for claim in (*load_claims(), *claims)}
    for claim in every.values():
        for arm in claim.arms:
            if known.setdefault(arm.name, arm) is not arm:
                raise ValueError(f"two arms have the name {arm.name}; claim {claim.number} has one")
    found: dict[str, Arm] = {}

    def add(name: str, asked_by: str) -> None:
        if name in found:
            return
        if name not in known and not is_small(name):
            raise ValueError(f"{asked_by} names the arm {name}, which nobody defines")
        arm = known[name] if name in known else small_arm(name)
        for needed in (*(other for other, _ in arm.copied), *arm.after):
            add(needed, f"the arm {name}")
        found[name] = arm

    for claim in claims:
        for name in (*(arm.name for arm in claim.arms), *claim.reads):
            add(name, f"claim {claim.number}")
    return found
