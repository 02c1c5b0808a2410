"""The task ``math``: the answer of a response equals the prompt's answer.

The answer is the last box of the response, or its last ``Answer:`` line. Two answers are equal if
math-verify says so and the stricter rules beside it agree (lopd.tasks.math_exact,
lopd.tasks.math_text). math-verify runs in worker processes with a hard limit: an answer like
9^9^9^9 costs that limit and is wrong. docs/tasks.md tells what is equal.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import Field

from lopd.records import Prompt
from lopd.tasks.answer_text import answer_line, has_braced_box, last_box
from lopd.tasks.answers import FileTask
from lopd.tasks.math_text import bare, readable, same_case, unboxed
from lopd.tasks.values import list_in
from lopd.tasks.verdicts import Verdict
from lopd.tasks.workers import WorkerDiedError, WorkerTimeoutError, pool

_WORKER = "lopd.tasks.math_worker"
_UNREADABLE = "the prompt's answer cannot be parsed"
# 300 digits: Python refuses to convert more than 4,300, and no answer is so long.
_INTEGER = re.compile(r"[+-]?[0-9]{1,300}")


class Math(FileTask):
    """The task ``math``: answers in LaTeX or as plain numbers."""

    name: ClassVar[str] = "math"

    # The limit is for answers such as 9^9^9^9, which no computer evaluates.
    limit_s: float = Field(
        default=3.0,
        gt=0,
        le=600,
        strict=False,
        description=(
            "The CPU seconds of one comparison. It may take five times as many seconds of the "
            "clock."
        ),
    )

    # Per worker, and there is one worker per CPU core.
    memory_mb: int = Field(
        default=2048,
        ge=512,
        description="The memory of a worker process, in MB.",
    )

    max_answer_chars: int = Field(
        default=2000,
        ge=1,
        description="An answer with more characters is wrong. It is not compared.",
    )

    # Many models write no box unless the prompt asks for one.
    answer_line: bool = Field(
        default=True,
        description=(
            "If a response has no box, its answer is what follows Answer: in the last line that "
            "begins so."
        ),
    )

    def judge_answer(self, prompt: Prompt, gold: str, part: str) -> Verdict:
        """See FileTask."""
        # A box that stays open means that the response broke off: then no line is searched.
        found = last_box(part)
        if found is None and self.answer_line and not has_braced_box(part):
            found = answer_line(part)
        if not found:
            return Verdict(False, "no answer")
        # A long answer is a text, and would only cost the worker's limit.
        if len(found) > self.max_answer_chars:
            return Verdict(False, "answer too long", f"{found[:60]}... ({len(found)} characters)")
        return self.compare(gold, found)

    def compare(self, gold: str, found: str) -> Verdict:
        """Return whether an answer equals the right one.

        Equal text and whole numbers are compared at once. Everything else goes to a worker.

        Args:
            gold: The prompt's answer.
            found: The response's answer.
        """
        wrong = Verdict(False, "wrong answer", found)
        gold, several = _one_gold(gold)
        # The prompt's fault, and not the response's: the two reasons are counted apart.
        if several or len(gold) > self.max_answer_chars:
            return Verdict(False, _UNREADABLE, found)
        # Most right answers end here, without a worker.
        if bare(gold) and bare(gold) == bare(found):
            return Verdict(True, found=found)
        expected = readable(gold)
        given = readable(found)
        if expected is None:
            return Verdict(False, _UNREADABLE, found)
        if given is None:
            return Verdict(False, "answer cannot be parsed", found)
        # "007" is 7, and "+5" is 5.
        if _INTEGER.fullmatch(expected) and _INTEGER.fullmatch(given):
            return Verdict(True, found=found) if int(expected) == int(given) else wrong
        # A worker that ends or hangs costs this one answer. The pool starts another.
        try:
            answer = self._ask({"gold": _both_signs(expected), "answer": _both_signs(given)})
        except WorkerTimeoutError:
            return Verdict(False, "time limit", found)
        except WorkerDiedError:
            return Verdict(False, "verifier died", found)
        # The worker says which side it could not read.
        failed = answer.get("failed")
        if failed == "gold":
            return Verdict(False, _UNREADABLE, found)
        if failed is not None:
            reason = "answer cannot be parsed" if failed == "parse" else str(failed)
            return Verdict(False, reason, found)
        # math-verify ignores the case of letters, which is too kind for variables.
        right = answer["right"] and same_case(expected, given)
        return Verdict(True, found=found) if right else wrong

    def answer_fault(self, prompt: Prompt) -> str:
        """See FileTask."""
        gold, several = _one_gold(prompt.answer or "")
        if several:
            return f"it is a list of {several} answers, and it is not said if all are asked for"
        if not bare(gold):
            return "it is empty"
        # The same bound that an answer has: what is not compared can never be right.
        if len(gold) > self.max_answer_chars:
            return f"it has {len(gold)} characters, and max_answer_chars is {self.max_answer_chars}"
        expected = readable(gold)
        if expected is None:
            return f"digits stand side by side in {gold!r:.60} and form no number"
        # Whole numbers are never given to a worker, so nothing can go wrong with them.
        if _INTEGER.fullmatch(expected):
            return ""
        # The worker reads the answer under the same limits as in a comparison. If it cannot, then
        # no response could ever be right.
        try:
            answer = self._ask({"gold": _both_signs(expected), "answer": "", "gold_only": True})
        except WorkerTimeoutError:
            return f"math-verify reads it for more than limit_s, {self.limit_s:g} s"
        except WorkerDiedError:
            return f"math-verify needs more than memory_mb, {self.memory_mb} MB, for it"
        return "" if "failed" not in answer else f"math-verify cannot parse {gold!r:.60}"

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        return pool(_WORKER, self.limit_s, self.memory_mb).ask(job)


def _one_gold(gold: str) -> tuple[str, int]:
    """Return the prompt's answer without a list or a box around it.

    Returns:
        The answer, and 0. For a list of several answers: the text as it is, and their number.
    """
    # Some data sets write the answer as a JSON list of one.
    listed = list_in(gold)
    if listed is not None and len(listed) != 1:
        return gold, len(listed)
    return unboxed(listed[0] if listed else gold), 0


def _both_signs(answer: str) -> str:
    r"""Return ``1 \pm x`` as the two values that it stands for.

    math-verify does not know the sign.
    """
    if "\\pm" not in answer:
        return answer
    upper = answer.replace("\\pm", "+").replace("\\mp", "-")
    lower = answer.replace("\\pm", "-").replace("\\mp", "+")
    # Two answers with a comma between them are a set for math-verify.
    return f"{upper}, {lower}"
