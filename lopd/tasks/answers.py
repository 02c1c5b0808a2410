"""The bases of tasks whose prompts are read from files: all but register_arithmetic."""

from __future__ import annotations

from pydantic import Field

from lopd.errors import ConfigError
from lopd.records import Prompt
from lopd.tasks.interface import TaskOptions
from lopd.tasks.verdicts import Verdict, final_part


class FilePrompts(TaskOptions):
    """A task that generates no prompts."""

    def generate_prompts(self, num: int, seed: int) -> list[Prompt]:
        """Refuse: this task reads its prompts.

        Raises:
            ConfigError: This task can generate no prompts, so it is always raised.
        """
        # The configuration asks for num_prompts without a file.
        raise ConfigError(
            f"task {self.name} makes no prompts",
            where="prompts",
            remedy="set prompts.*.file, and for a file of a public data set also prompts.*.format",
        )


class FileTask(FilePrompts):
    """A task that generates no prompts and compares a response with the prompt's answer.

    A subclass implements ``judge_answer``. What comes before it is the same for all.
    """

    # Off, because a response without an end would be right by its first attempt at an answer.
    judge_truncated: bool = Field(
        default=False,
        description="Also judge a response that was cut off. If false, such a response is wrong.",
    )

    def verify(self, prompt: Prompt, text: str, finish_reason: str) -> bool:
        """See Verifier."""
        # One rule for both: a verdict and a boolean can never contradict each other.
        return self.judge(prompt, text, finish_reason).right

    def judge(self, prompt: Prompt, text: str, finish_reason: str) -> Verdict:
        """Judge a response by the part after its thinking.

        A response that was cut off is wrong, and so is one that never ended its thinking.
        """
        # The cheap reasons come first: they need no worker and no sandbox.
        if finish_reason != "stop" and not self.judge_truncated:
            return Verdict(False, "cut off")
        part = final_part(text)
        if part is None:
            return Verdict(False, "never ended its thinking")
        if prompt.answer is None:
            return Verdict(False, "the prompt has no answer")
        return self.judge_answer(prompt, prompt.answer, part)

    def answer_fault(self, prompt: Prompt) -> str:
        """Return why the prompt's answer cannot be used, or "" if it can.

        It cannot be used if no response can be compared with it, or if no response can meet it.
        """
        return ""

    def judge_answer(self, prompt: Prompt, gold: str, part: str) -> Verdict:
        """Judge the final part of a response.

        Args:
            prompt: The prompt.
            gold: The prompt's answer.
            part: The response after its thinking, without the token that ended it.
        """
        raise NotImplementedError
