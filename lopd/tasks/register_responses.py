"""Written responses to register arithmetic, from which the example's small models are made.

A careful response writes every step. A corrupted one has mistakes, with a mask that keeps a model
from learning them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lopd.tasks.register_arithmetic import END, Problem, apply

Style: TypeAlias = Literal["careful", "skip"]


def write_response(problem: Problem, style: Style) -> str:
    """Return a correct response, with the end token.

    Args:
        problem: The problem to answer.
        style: With "careful", the response has every step. With "skip", it has only the answer. A
            model that learns to skip steps must guess, so its answers are often wrong.
    """
    lines = []
    if style == "careful":
        for value, operator, operand, after in _walk(problem):
            lines.append(f"{value:02d}{operator}{operand:02d}={after:02d}\n")
    return f"<think>\n{''.join(lines)}</think>\n{problem.answer}{END}"


def _walk(problem: Problem) -> Iterator[tuple[int, str, int, int]]:
    """Yield the register before each step, the operator, the operand, and the register after it."""
    value = problem.start
    for operator, operand in problem.steps:
        after = apply(value, operator, operand)
        yield value, operator, operand, after
        value = after


@dataclass(frozen=True, slots=True)
class Corruption:
    """How often a step is written with a mistake.

    Attributes:
        operator: The share of steps with a wrong operator.
        operand: The share of steps with a wrong operand.
        value: The share of steps with a wrong result.
        clean: The share of responses without any mistake.
    """

    operator: float = 0.04
    operand: float = 0.08
    value: float = 0.12
    clean: float = 0.4


def write_corrupted(
    problem: Problem, rng: np.random.Generator, rates: Corruption | None = None
) -> tuple[str, NDArray[np.bool_]]:
    """Return a careful response with mistakes, and its mask.

    After a mistake the response continues consistently with what is written. Its final answer
    repeats the last written value, which may not be the prompt's answer.

    Args:
        problem: The problem to answer.
        rng: The random numbers.
        rates: How often there are mistakes. None means the defaults.

    Returns:
        The text, and a mask, bool [characters]. False marks the wrong characters: a model learns to
        continue after a mistake, but not to make it.
    """
    # Some responses stay right, so that the model also learns what an undisturbed response is.
    rates = rates or Corruption()
    scale = 0.0 if rng.random() < rates.clean else 1.0
    # Each part of the text, and whether the model learns it.
    parts: list[tuple[str, bool]] = [("<think>\n", True)]
    value = problem.start
    for operator, operand in problem.steps:
        parts.append((f"{value:02d}", True))
        flipped = rng.random() < rates.operator * scale
        operator = {"+": "-", "-": "+", "*": "+"}[operator] if flipped else operator
        parts.append((operator, not flipped))
        # From here on the written operand counts, as for a reader of the response.
        operand, digits = _corrupt(operand, rng, rates.operand * scale)
        parts += [*digits, ("=", True)]
        exact = apply(value, operator, operand)
        value, digits = _corrupt(exact % 100, rng, rates.value * scale)
        # After a wrong operator the result may have no two digits. Then nothing right can be
        # written: the value is arbitrary and teaches nothing.
        in_range = 0 <= exact <= 99
        parts += [(digit, learn and in_range) for digit, learn in digits]
        parts.append(("\n", True))
    parts.append((f"</think>\n{value:02d}{END}", True))
    # One value per character, because a character is a token of these models.
    mask = np.repeat([learn for _, learn in parts], [len(text) for text, _ in parts])
    return "".join(text for text, _ in parts), mask


def _corrupt(
    number: int, rng: np.random.Generator, rate: float
) -> tuple[int, list[tuple[str, bool]]]:
    """Change one digit or both, at this rate.

    Returns:
        The number, and its two digits, each with whether it is unchanged.
    """
    tens, units = divmod(number, 10)
    # Bit 0 changes the tens, bit 1 the units.
    which = int(rng.integers(1, 4)) if rng.random() < rate else 0
    # 1 to 9 steps further on the circle of ten digits: never the same digit.
    new_tens = (tens + int(rng.integers(1, 10))) % 10 if which & 1 else tens
    new_units = (units + int(rng.integers(1, 10))) % 10 if which & 2 else units
    digits = [(str(new_tens), new_tens == tens), (str(new_units), new_units == units)]
    return new_tens * 10 + new_units, digits
