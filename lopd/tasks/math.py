r"""Mathematics: the last ``\boxed{...}`` of a response, or its last ``Answer:`` line, equals the prompt's answer, by math-verify.

math-verify runs in worker processes with a hard limit: an answer like 9^9^9^9 costs that limit and is wrong. docs/tasks.md tells what counts as equal.
"""

from __future__ import annotations

import re
from typing import ClassVar

from pydantic import Field

from lopd.records import Prompt
from lopd.tasks.answers import FileTask
from lopd.tasks.verdicts import Verdict, answer_line, last_box
from lopd.tasks.workers import WorkerDiedError, WorkerTimeoutError, pool

_WORKER = "lopd.tasks.math_worker"
_INTEGER = re.compile(r"[+-]?[0-9]{1,300}")


class Math(FileTask):
    """The task ``math``."""

    name: ClassVar[str] = "math"

    limit_s: float = Field(default=3.0, gt=0, le=600, strict=False, description="CPU seconds one comparison may take; five times as many of the clock.")
    memory_mb: int = Field(default=2048, ge=512, description="Memory of a worker.")
    max_answer_chars: int = Field(default=2000, ge=1, description="A longer answer is wrong without being looked at.")
    answer_line: bool = Field(default=True, description="Where no box is, take what follows Answer: in the last line that begins so.")

    def judge_answer(self, prompt: Prompt, gold: str, part: str) -> Verdict:
        """See FileTask."""
        found = last_box(part)
        if found is None and self.answer_line and "\\boxed" not in part:
            found = answer_line(part)
        if not found:
            return Verdict(False, "no answer")
        if len(found) > self.max_answer_chars:
            return Verdict(False, "answer too long", f"{found[:60]}... ({len(found)} characters)")
        return self.compare(gold, found)

    def compare(self, gold: str, found: str) -> Verdict:
        """Whether an answer equals the right one. Equal text and whole numbers are compared at once, the rest by a worker."""
        expected, given = _bare(gold), _bare(found)
        if expected and expected == given:
            return Verdict(True, found=found)
        if _INTEGER.fullmatch(expected) and _INTEGER.fullmatch(given):
            return Verdict(True, found=found) if int(expected) == int(given) else Verdict(False, "wrong answer", found)
        try:
            answer = pool(_WORKER, self.limit_s, self.memory_mb).ask({"gold": _both_signs(expected), "answer": _both_signs(given)})
        except WorkerTimeoutError:
            return Verdict(False, "time limit", found)
        except WorkerDiedError:
            return Verdict(False, "verifier died", found)
        if answer.get("failed") == "gold":
            return Verdict(False, "the prompt's answer cannot be parsed", found)
        if "failed" in answer:
            return Verdict(False, "answer cannot be parsed" if answer["failed"] == "parse" else str(answer["failed"]), found)
        return Verdict(True, found=found) if answer["right"] else Verdict(False, "wrong answer", found)


def _bare(answer: str) -> str:
    """Without the dollars around it, a full stop at its end and white space at both."""
    text = answer.strip()
    while len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    return text.rstrip(".").strip()


def _both_signs(answer: str) -> str:
    r"""``1 \pm x`` as the two values that it stands for, which math-verify does not know."""
    if "\\pm" not in answer:
        return answer
    upper, lower = answer.replace("\\pm", "+").replace("\\mp", "-"), answer.replace("\\pm", "-").replace("\\mp", "+")
    return f"{upper}, {lower}"
