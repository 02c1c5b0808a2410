"""What a verifier says of a response, many at a time; and what all of them read first: the part of
a response that is its answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from lopd.records import Prompt
from lopd.tasks.interface import Task

Judged: TypeAlias = tuple[Prompt, str, str]  # prompt, decoded response, finish_reason
_END_TOKENS = re.compile(r"(?:\s*(?:<\|[a-z_0-9]{1,32}\|>|</s>|<eos>|<end_of_turn>))+\s*\Z")
THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Verdict:
    """right, and why not: one phrase of few kinds ("wrong answer", "no answer", "time limit"), so
    that they can be counted. found: what was compared.
    """

    right: bool
    reason: str = ""
    found: str = ""


RIGHT = Verdict(True)


@runtime_checkable
class Judge(Protocol):
    """A task that says why a response is wrong. Calls may come from several threads at once."""

    def judge(self, prompt: Prompt, text: str, finish_reason: str) -> Verdict: ...


def judge_all(
    task: Task, responses: Iterable[Judged], *, workers: int | None = None
) -> Iterator[Verdict]:
    """The verdict of each response, in order, ``workers`` at a time (None: one per CPU core;
    verifiers wait for processes of their own).
    """
    if not isinstance(task, Judge):
        for prompt, text, finish_reason in responses:
            right = task.verify(prompt, text, finish_reason)
            yield RIGHT if right else Verdict(False, "wrong answer")
        return
    judge = task.judge
    threads = ThreadPoolExecutor(workers or num_cores())
    try:
        yield from threads.map(lambda response: judge(*response), responses)
    finally:
        threads.shutdown(
            cancel_futures=True
        )  # an interrupt waits for the responses in hand, not for all


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def final_part(text: str) -> str | None:
    """What a response says after it has thought, end tokens removed; None where it began to think
    and never ended.

    A template may have put ``<think>`` into the prompt: then the response has the closing tag
    alone.
    """
    _, closed, rest = text.rpartition(THOUGHT)
    if not closed and THINK in text:
        return None
    return _END_TOKENS.sub("", rest[-_TAIL:] if closed else text[-_TAIL:])


# characters: no answer stands further from the end, and what reads it must not be made slow by its
# length
_TAIL = 1_000_000
