"""The task ``plain``: a response is right if it is an answer of the prompt, letter by letter."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from lopd.records import Prompt
from lopd.tasks.answer_text import answer_line, last_box
from lopd.tasks.answers import FileTask
from lopd.tasks.values import list_in
from lopd.tasks.verdicts import Verdict


class Plain(FileTask):
    """The task ``plain``.

    With ``alternatives`` a prompt's answer may hold several right answers, one per line.
    """

    name: ClassVar[str] = "plain"

    answer_in: Literal["whole", "last_line", "answer_line", "box"] = Field(
        default="whole",
        description=(
            "The place of the answer. whole: everything after the thinking; last_line: the last "
            "line that is not empty; answer_line: what follows Answer:; box: the last box."
        ),
    )

    ignore_case: bool = Field(
        default=False,
        description="Capital letters and small letters are the same.",
    )

    alternatives: bool = Field(
        default=False,
        description="Each line of a prompt's answer is one right answer.",
    )

    def judge_answer(self, prompt: Prompt, gold: str, part: str) -> Verdict:
        """See FileTask.

        White space at both ends does not count. Inside, any amount of it is one space.
        """
        found = self._find(part)
        if not found:
            return Verdict(False, "no answer")
        # An empty line among the alternatives would accept an empty answer.
        accepted = {self._plain(one) for one in self._golds(gold)} - {""}
        # With "whole" the answer may be a long text, and verdicts are kept in files.
        shown = found if len(found) <= 200 else f"{found[:200]}..."
        if self._plain(found) in accepted:
            return Verdict(True, found=shown)
        return Verdict(False, "wrong answer", shown)

    def answer_fault(self, prompt: Prompt) -> str:
        """See FileTask."""
        golds = self._golds(prompt.answer or "")
        if not any(self._plain(one) for one in golds):
            return "it is empty"
        # A list does not say whether all of its answers are asked for, or any of them.
        listed = list_in(prompt.answer or "")
        if listed is not None and len(listed) > 1 and not self.alternatives:
            number = len(listed)
            return f"it is a list of {number} answers, and task.options.alternatives is not set"
        return ""

    def _golds(self, gold: str) -> list[str]:
        """Return each right answer: the lines of the text, or the members of a list."""
        # A list of one answer is that answer in any case.
        listed = list_in(gold)
        if listed is not None and (self.alternatives or len(listed) == 1):
            return listed
        return gold.splitlines() if self.alternatives else [gold]

    def _find(self, part: str) -> str | None:
        if self.answer_in == "box":
            return last_box(part)
        if self.answer_in == "answer_line":
            return answer_line(part)
        # White space at the end is part of most responses.
        whole = part.strip()
        if self.answer_in == "whole":
            return whole
        return whole.splitlines()[-1].strip() if whole else None

    def _plain(self, text: str) -> str:
        # Line breaks and tabs are white space too.
        one = " ".join(text.split())
        # casefold() and not lower(): it also knows letters such as the German sharp s.
        return one.casefold() if self.ignore_case else one
