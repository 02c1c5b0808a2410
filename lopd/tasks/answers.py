"""Base of tasks whose prompts are read from files: mathematics, plain text, code."""

from __future__ import annotations

from pydantic import Field

from lopd.errors import ConfigError
from lopd.records import Prompt
from lopd.tasks.interface import TaskOptions
from lopd.tasks.verdicts import Verdict, final_part


class FileTask(TaskOptions):
    """A task that makes no prompts. A subclass gives ``judge_answer``; what comes before it is the
    same for all.
    """

    judge_truncated: bool = Field(
        default=False, description="Also judge a response that was cut off; false: it is wrong."
    )

    def generate_prompts(self, num: int, seed: int) -> list[Prompt]:
        """ConfigError: always."""
        remedy = "give prompts.*.file, and prompts.*.format where the file is of a public data set"
        raise ConfigError(f"task {self.name} makes no prompts", where="prompts", remedy=remedy)

    def verify(self, prompt: Prompt, text: str, finish_reason: str) -> bool:
        """See Task."""
        return self.judge(prompt, text, finish_reason).right

    def judge(self, prompt: Prompt, text: str, finish_reason: str) -> Verdict:
        """A response that was cut off, or never left its thinking, is wrong; of others the part
        after the thinking is judged.
        """
        if finish_reason != "stop" and not self.judge_truncated:
            return Verdict(False, "cut off")
        part = final_part(text)
        if part is None:
            return Verdict(False, "never ended its thinking")
        if prompt.answer is None:
            return Verdict(False, "the prompt has no answer")
        return self.judge_answer(prompt, prompt.answer, part)

    def answer_fault(self, prompt: Prompt) -> str:
        """Why the prompt's answer cannot be compared with, or cannot be met; "" where it can."""
        return ""

    def judge_answer(self, prompt: Prompt, gold: str, part: str) -> Verdict:
        """part: the response after its thinking, end tokens removed."""
        raise NotImplementedError
