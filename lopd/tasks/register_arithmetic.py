"""The task ``register_arithmetic``: additions and subtractions in a register of two digits.

They are computed from left to right, and the register stays between 0 and 99. The prompt is
``81+06+02+07+03-10=?``. The careful response writes every step between ``<think>`` and
``</think>``, then the two digits of the answer::

    <think>\\n81+06=87\\n87+02=89\\n89+07=96\\n96+03=99\\n99-10=89\\n</think>\\n89<|im_end|>

Sets never overlap: a fixed hash puts every problem into one of 256 partitions, and a set with seed
s has problems of partition s only. The text decides whether a response is right. The example's
small models are made from the written responses (lopd.tasks.register_responses).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lopd.errors import ConfigError
from lopd.records import Prompt
from lopd.tasks.interface import TaskOptions

# A partition for each value of a byte of the hash.
NUM_PARTITIONS = 256
END = "<|im_end|>"
# The number of problems that are drawn at a time. It is fixed, so that a longer set begins with the
# shorter one.
_CHUNK = 65_536
# Problems are held in memory, with a few hundred bytes each.
_MAX_PROBLEMS = 10_000_000
# After so many chunks in a row without a new problem the partition is taken to be exhausted.
_FRUITLESS_CHUNKS = 40
# The end of a right response. What comes before "</think>" is free.
_RIGHT_FORM = re.compile(r"</think>\n([0-9]{2})")


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem.

    Attributes:
        start: The first value of the register.
        steps: The operator and operand of each step, in order.
    """

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        """The problem as in the prompt, for example ``81+06+02``."""
        # Always two digits, so that all problems of one size have prompts of the same length.
        steps = [f"{operator}{operand:02d}" for operator, operand in self.steps]
        return f"{self.start:02d}{''.join(steps)}"

    @property
    def answer(self) -> str:
        """The last value of the register, as two digits."""
        value = self.start
        for operator, operand in self.steps:
            value = apply(value, operator, operand)
        return f"{value:02d}"


class RegisterArithmetic(TaskOptions):
    """The task.

    Without multiplication a problem of K operations has a prompt of 12 + 3K tokens and a careful
    response of 7 + 9K tokens. A token is one character.
    """

    name: ClassVar[str] = "register_arithmetic"

    num_operations: int = Field(
        default=5,
        ge=1,
        le=16,
        description="The number of operations of a problem, 1 to 16.",
    )

    multiplication: bool = Field(
        default=False,
        description="Also multiply by 2 to 9, if the register stays below 100.",
    )

    def generate_problems(self, num: int, seed: int) -> list[Problem]:
        """Return different problems.

        Args:
            num: The number of problems.
            seed: The partition, from 0 to NUM_PARTITIONS - 1.

        Raises:
            ConfigError: The seed is beyond the partitions, or there are fewer problems.
        """
        # Two seeds in one partition would share prompts.
        if not 0 <= seed < NUM_PARTITIONS:
            remedy = "choose another seed: each seed has its own prompts"
            raise ConfigError(
                f"seed {seed} of generated prompts is out of range",
                where=f"task {self.name}",
                limit=f"at least 0 and at most {NUM_PARTITIONS - 1}",
                remedy=remedy,
            )
        if num > _MAX_PROBLEMS:
            raise ConfigError(
                f"num_prompts = {num} is too large",
                where=f"task {self.name}",
                limit=f"at most {_MAX_PROBLEMS:,}",
                remedy="lower num_prompts",
            )
        # A dict and not a set, because it keeps the order in which problems were drawn.
        problems: dict[Problem, None] = {}
        fruitless = 0
        for chunk in self._draw(seed):
            before = len(problems)
            for problem in chunk:
                problems.setdefault(problem)
                # In the middle of a chunk, so that a set of any size begins like a larger one.
                if len(problems) == num:
                    return list(problems)
            # By chance a chunk may have nothing new, if only few problems are left.
            fruitless = 0 if len(problems) > before else fruitless + 1
            if fruitless == _FRUITLESS_CHUNKS:
                break
        remedy = "lower num_prompts, or raise task.options.num_operations"
        raise ConfigError(
            f"num_prompts = {num} is too large: seed {seed} has only {len(problems)} prompts",
            where=f"task {self.name}",
            remedy=remedy,
        )

    def _draw(self, seed: int) -> Iterator[list[Problem]]:
        """Yield problems of one partition, chunk by chunk, without end."""
        # All three are part of the seed, because each changes what a draw means.
        rng = np.random.default_rng([seed, self.num_operations, int(self.multiplication)])
        while True:
            start, operators, operands = _random_problems(
                rng, _CHUNK, self.num_operations, self.multiplication
            )
            # About one of 256 problems is in the partition.
            kept = np.flatnonzero(partition(start, operators, operands) == seed)
            starts = start[kept].tolist()
            rows = zip(starts, operators[kept].tolist(), operands[kept].tolist(), strict=True)
            yield [_problem(first, codes, numbers) for first, codes, numbers in rows]

    def generate_prompts(self, num: int, seed: int) -> list[Prompt]:
        """See Task.

        A prompt_id is ``reg-`` and the problem, so the same problem always has the same id.
        """
        return [self.to_prompt(problem) for problem in self.generate_problems(num, seed)]

    def to_prompt(self, problem: Problem) -> Prompt:
        """Return the prompt of a problem: one message of the user, for example ``81+06=?``."""
        # "=?" marks the end of the problem for a model that reads characters.
        message = {"role": "user", "content": f"{problem.text}=?"}
        return Prompt(
            prompt_id=f"reg-{problem.text}",
            messages=(message,),
            domain=self.name,
            answer=problem.answer,
        )

    def verify(self, prompt: Prompt, text: str, finish_reason: str) -> bool:
        """Return whether a response is right.

        A right response ends by itself, with ``</think>``, a line break and the two digits of the
        answer. ``</think>`` occurs once.
        """
        if finish_reason != "stop" or text.count("</think>") != 1:
            return False
        found = _RIGHT_FORM.search(text)
        # search() finds the first place. It must also be the end of the text.
        return found is not None and found.end() == len(text) and found.group(1) == prompt.answer


def _problem(start: int, codes: list[int], operands: list[int]) -> Problem:
    pairs = zip(codes, operands, strict=True)
    return Problem(start, tuple((chr(code), operand) for code, operand in pairs))


def apply(value: int, operator: str, operand: int) -> int:
    """Return the register after one step."""
    if operator == "+":
        return value + operand
    if operator == "-":
        return value - operand
    return value * operand


def _random_problems(
    rng: np.random.Generator, num: int, num_operations: int, multiplication: bool
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Draw problems.

    Plus and minus have equal chance. Then an operand is drawn among those allowed.

    Args:
        rng: The random numbers.
        num: The number N of problems.
        num_operations: The number K of operations of a problem.
        multiplication: Whether there are products.

    Returns:
        The first values, int64 [N]; the operators as character codes, int64 [N, K]; the operands,
        int64 [N, K].
    """
    plus = ord("+")
    minus = ord("-")
    times = ord("*")
    # All problems at once, step by step. The order of the draws decides the sets: another order
    # would give other prompts for every seed.
    start = rng.integers(0, 100, num)
    value = start.copy()
    operators = np.empty((num, num_operations), dtype=np.int64)
    operands = np.empty((num, num_operations), dtype=np.int64)
    for step in range(num_operations):
        # Drawn for all problems, also for those whose operator changes below: the number of draws
        # must not depend on values.
        operator = np.where(rng.random(num) < 0.5, plus, minus)
        if multiplication:
            # About a third of the steps. Up to 49 the product with 2 has two digits.
            possible = (value >= 1) & (value <= 49)
            operator = np.where(possible & (rng.random(num) < 0.34), times, operator)
        # At the ends of the range only one of plus and minus has an operand.
        no_sum = (operator == plus) & (value == 99)
        no_difference = (operator == minus) & (value == 0)
        operator = np.where(no_sum, minus, np.where(no_difference, plus, operator))
        is_sum = operator == plus
        is_difference = operator == minus
        # The operands that keep the register between 0 and 99, both ends included.
        low = np.where(operator == times, 2, 1)
        largest_factor = np.minimum(99 // np.maximum(value, 1), 9)
        high = np.where(is_sum, 99 - value, np.where(is_difference, value, largest_factor))
        operand = low + np.floor(rng.random(num) * (high - low + 1)).astype(np.int64)
        difference_or_product = np.where(is_difference, value - operand, value * operand)
        value = np.where(is_sum, value + operand, difference_or_product)
        operators[:, step] = operator
        operands[:, step] = operand
    # The bounds above must have kept it, or an answer would not have two digits.
    assert value.min() >= 0, "the register left its range"
    assert value.max() <= 99, "the register left its range"
    return start, operators, operands


def partition(
    start: NDArray[Any], operators: NDArray[Any], operands: NDArray[Any]
) -> NDArray[np.uint8]:
    """Return the partition of each problem, 0 to 255.

    It is a fixed hash: a polynomial of the operations, then the last steps of splitmix64. It must
    never change, or the sets of all seeds would change.

    Args:
        start: First values, [N].
        operators: Character codes, [N, K].
        operands: [N, K].

    Returns:
        uint8 [N].
    """
    # Plus 1: with 0 the first product would be 0 for every constant. Sums and products wrap at
    # 2^64.
    hashed = start.astype(np.uint64) + np.uint64(1)
    for step in range(operators.shape[1]):
        # An operand is below 128, so operation and operand make one different number each.
        operation = (operators[:, step] * 128 + operands[:, step]).astype(np.uint64)
        hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + operation
    hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    # The highest byte, because it depends on all bits below it.
    return (hashed >> np.uint64(56)).astype(np.uint8)
