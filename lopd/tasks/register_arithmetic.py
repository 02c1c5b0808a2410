"""Register arithmetic: a two-digit register, additions and subtractions from left to right, never
leaving 0..99.

Prompt ``81+06+02+07+03-10=?``; the careful response writes every step between ``<think>`` and
``</think>``, then the two digits of the answer::

    <think>\\n81+06=87\\n87+02=89\\n89+07=96\\n96+03=99\\n99-10=89\\n</think>\\n89<|im_end|>

Sets never overlap: a fixed hash of the problem puts every problem into one of 256 partitions, and a
set with seed s draws from partition s alone. Right or wrong is decided from the text. The written
responses at the end are what the example's small models are made from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lopd.errors import ConfigError
from lopd.records import Prompt
from lopd.tasks.interface import TaskOptions

NUM_PARTITIONS = 256
END = "<|im_end|>"
_CHUNK = 65_536  # problems drawn at a time; fixed, so that a longer set begins with the shorter one
_MAX_PROBLEMS = 10_000_000  # they are held in memory, a few hundred bytes each
_FRUITLESS_CHUNKS = 40  # so many chunks in a row without a new problem: the partition is exhausted
_RIGHT_FORM = re.compile(r"</think>\n([0-9]{2})" + re.escape(END))

Style: TypeAlias = Literal["careful", "skip"]


@dataclass(frozen=True, slots=True)
class Problem:
    """start: the register's first value; steps: (operator, operand) in order."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        """``81+06+02``"""
        return f"{self.start:02d}" + "".join(
            f"{operator}{operand:02d}" for operator, operand in self.steps
        )

    @property
    def answer(self) -> str:
        """The last value of the register, two digits."""
        value = self.start
        for operator, operand in self.steps:
            value = _apply(value, operator, operand)
        return f"{value:02d}"


class RegisterArithmetic(TaskOptions):
    """The task. Without multiplication a problem of K operations has a prompt of 12 + 3K and a
    careful response of 7 + 9K tokens, one per character.
    """

    name: ClassVar[str] = "register_arithmetic"

    num_operations: int = Field(
        default=5, ge=1, le=16, description="Operations of a problem, 1 to 16."
    )
    multiplication: bool = Field(
        default=False, description="Also multiply, by 2 to 9, where the register stays below 100."
    )

    def generate_problems(self, num: int, seed: int) -> list[Problem]:
        """num different problems of the partition ``seed``. ConfigError: seed beyond the
        partitions, or fewer problems than that exist.
        """
        if not 0 <= seed < NUM_PARTITIONS:
            remedy = "choose another seed: each has its own prompts"
            raise ConfigError(
                f"seed {seed} of generated prompts",
                where=f"task {self.name}",
                limit=f"0 to {NUM_PARTITIONS - 1}",
                remedy=remedy,
            )
        problems: dict[Problem, None] = {}
        if num > _MAX_PROBLEMS:
            raise ConfigError(
                f"{num} prompts asked for",
                where=f"task {self.name}",
                limit=f"{_MAX_PROBLEMS:,}",
                remedy="ask for fewer",
            )
        fruitless = 0
        for chunk in self._draw(seed):
            before = len(problems)
            for problem in chunk:
                problems.setdefault(problem)
                if len(problems) == num:
                    return list(problems)
            fruitless = 0 if len(problems) > before else fruitless + 1
            if fruitless == _FRUITLESS_CHUNKS:
                break
        remedy = "ask for fewer prompts, or give task.options.num_operations a larger value"
        raise ConfigError(
            f"{num} prompts asked for, seed {seed} has only {len(problems)}",
            where=f"task {self.name}",
            remedy=remedy,
        )

    def _draw(self, seed: int) -> Iterator[list[Problem]]:
        """Problems of one partition, chunk by chunk, for ever."""
        rng = np.random.default_rng([seed, self.num_operations, int(self.multiplication)])
        while True:
            start, operators, operands = _random_problems(
                rng, _CHUNK, self.num_operations, self.multiplication
            )
            kept = np.flatnonzero(partition(start, operators, operands) == seed)
            rows = zip(
                start[kept].tolist(), operators[kept].tolist(), operands[kept].tolist(), strict=True
            )
            yield [
                Problem(
                    first,
                    tuple((chr(code), operand) for code, operand in zip(codes, row, strict=True)),
                )
                for first, codes, row in rows
            ]

    def generate_prompts(self, num: int, seed: int) -> list[Prompt]:
        """See Task. prompt_id is ``reg-`` and the problem, so it is the same wherever the problem
        occurs.
        """
        return [self.to_prompt(problem) for problem in self.generate_problems(num, seed)]

    def to_prompt(self, problem: Problem) -> Prompt:
        """One user message ``81+06=?``."""
        message = {"role": "user", "content": f"{problem.text}=?"}
        return Prompt(
            prompt_id=f"reg-{problem.text}",
            messages=(message,),
            domain=self.name,
            answer=problem.answer,
        )

    def verify(self, prompt: Prompt, text: str, finish_reason: str) -> bool:
        """Right: a finished response ends with ``</think>``, a line break, the answer's two digits
        and the end token; neither token occurs before.
        """
        if finish_reason != "stop" or text.count("</think>") != 1 or text.count(END) != 1:
            return False
        found = _RIGHT_FORM.search(text)
        return found is not None and found.end() == len(text) and found.group(1) == prompt.answer


def _random_problems(
    rng: np.random.Generator, num: int, num_operations: int, multiplication: bool
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """start i64[N], operators as character codes i64[N, K], operands i64[N, K]: plus or minus with
    equal chance, then an operand among those allowed.
    """
    plus, minus, times = ord("+"), ord("-"), ord("*")
    start = rng.integers(0, 100, num)
    value = start.copy()
    operators = np.empty((num, num_operations), dtype=np.int64)
    operands = np.empty((num, num_operations), dtype=np.int64)
    for step in range(num_operations):
        operator = np.where(rng.random(num) < 0.5, plus, minus)
        if multiplication:
            operator = np.where(
                (value >= 1) & (value <= 49) & (rng.random(num) < 0.34), times, operator
            )
        operator = np.where(
            (operator == plus) & (value == 99),
            minus,
            np.where((operator == minus) & (value == 0), plus, operator),
        )
        low = np.where(operator == times, 2, 1)
        high = np.where(
            operator == plus,
            99 - value,
            np.where(operator == minus, value, np.minimum(99 // np.maximum(value, 1), 9)),
        )
        operand = low + np.floor(rng.random(num) * (high - low + 1)).astype(np.int64)
        value = np.where(
            operator == plus,
            value + operand,
            np.where(operator == minus, value - operand, value * operand),
        )
        operators[:, step], operands[:, step] = operator, operand
    assert value.min() >= 0, "the register left its range"
    assert value.max() <= 99, "the register left its range"
    return start, operators, operands


def partition(
    start: NDArray[Any], operators: NDArray[Any], operands: NDArray[Any]
) -> NDArray[np.uint8]:
    """The partition 0..255 of each problem, u8[N]; start [N], operators and operands [N, K]. A
    fixed hash (polynomial, then the finaliser of splitmix64).
    """
    hashed = start.astype(np.uint64) + np.uint64(1)
    for step in range(operators.shape[1]):
        hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + (
            operators[:, step] * 128 + operands[:, step]
        ).astype(np.uint64)
    hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (hashed >> np.uint64(56)).astype(np.uint8)


def _apply(value: int, operator: str, operand: int) -> int:
    return (
        value + operand
        if operator == "+"
        else value - operand
        if operator == "-"
        else value * operand
    )


def write_response(problem: Problem, style: Style) -> str:
    """A right response, end token included. careful: every step; skip: no step, the answer at once
    (a habit that a model which cannot guess gets wrong).
    """
    lines = (
        []
        if style == "skip"
        else [
            f"{value:02d}{operator}{operand:02d}={after:02d}\n"
            for value, operator, operand, after in _walk(problem)
        ]
    )
    return "<think>\n" + "".join(lines) + f"</think>\n{problem.answer}{END}"


def _walk(problem: Problem) -> Iterator[tuple[int, str, int, int]]:
    value = problem.start
    for operator, operand in problem.steps:
        after = _apply(value, operator, operand)
        yield value, operator, operand, after
        value = after


@dataclass(frozen=True, slots=True)
class Corruption:
    """How often a step is written wrongly: its operator, its operand, its value. clean: share of
    responses without any error.
    """

    operator: float = 0.04
    operand: float = 0.08
    value: float = 0.12
    clean: float = 0.4


def write_corrupted(
    problem: Problem, rng: np.random.Generator, rates: Corruption | None = None
) -> tuple[str, NDArray[np.bool_]]:
    """A careful response with errors in it that goes on consistently with what is written, and its
    mask bool[characters].

    False marks the characters that are wrong where they stand: a model learns to go on from such a
    prefix, not to make the error. The final answer repeats the last value written, which may not be
    the prompt's answer.
    """
    rates = rates or Corruption()
    scale = 0.0 if rng.random() < rates.clean else 1.0
    pieces: list[tuple[str, bool]] = [("<think>\n", True)]
    value = problem.start
    for operator, operand in problem.steps:
        pieces.append((f"{value:02d}", True))
        flipped = rng.random() < rates.operator * scale
        operator = {"+": "-", "-": "+", "*": "+"}[operator] if flipped else operator
        pieces.append((operator, not flipped))
        operand, digits = _corrupt(operand, rng, rates.operand * scale)
        pieces += [*digits, ("=", True)]
        exact = _apply(value, operator, operand)
        value, digits = _corrupt(exact % 100, rng, rates.value * scale)
        in_range = (
            0 <= exact <= 99
        )  # else nothing right can be written: the value is arbitrary and teaches nothing
        pieces += [*((digit, learn and in_range) for digit, learn in digits), ("\n", True)]
    pieces.append((f"</think>\n{value:02d}{END}", True))
    mask = np.repeat([learn for _, learn in pieces], [len(text) for text, _ in pieces])
    return "".join(text for text, _ in pieces), mask


def _corrupt(
    number: int, rng: np.random.Generator, rate: float
) -> tuple[int, list[tuple[str, bool]]]:
    """The number with one digit or both changed, at this rate; and its two digits, each with
    whether it is unchanged.
    """
    tens, units = divmod(number, 10)
    which = int(rng.integers(1, 4)) if rng.random() < rate else 0  # bit 0: tens, bit 1: units
    new_tens = (tens + int(rng.integers(1, 10))) % 10 if which & 1 else tens
    new_units = (units + int(rng.integers(1, 10))) % 10 if which & 2 else units
    return new_tens * 10 + new_units, [
        (str(new_tens), new_tens == tens),
        (str(new_units), new_units == units),
    ]
