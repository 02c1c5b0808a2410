"""Defines the verdict of a verifier, and judges many responses at a time.

It also finds the part of a response that all verifiers read first: what follows the thinking.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from lopd.records import Prompt
from lopd.tasks.interface import Verifier

# The prompt, the decoded response and its finish_reason.
Judged: TypeAlias = tuple[Prompt, str, str]
THINK = "<think>"
THOUGHT = "</think>"
# The number of last characters that are read. No answer is further from the end, and the length of
# a response must not make its readers slow.
_TAIL = 1_000_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a response is right.

    Attributes:
        right: True if it is right.
        reason: Why it is wrong, as one of few phrases ("wrong answer", "no answer", "time limit"),
            so that they can be counted.
        found: The answer that was found in the response.
        expected: The prompt's own answer, in verdicts that were read from disk; "" otherwise.
    """

    right: bool
    reason: str = ""
    found: str = ""
    expected: str = ""


RIGHT = Verdict(True)


@runtime_checkable
class Judge(Protocol):
    """A task that says why a response is wrong. Several threads may call it at once."""

    def judge(self, prompt: Prompt, text: str, finish_reason: str) -> Verdict: ...


def judge_all(
    task: Verifier, responses: Iterable[Judged], *, workers: int | None = None
) -> Iterator[Verdict]:
    """Yield the verdict of each response, in order.

    Args:
        task: The task.
        responses: The responses to judge.
        workers: The number of responses that are judged at a time. None means one per CPU core.
            Threads are enough, because verifiers wait for other processes.
    """
    # A task with ``verify`` alone makes no promise about threads.
    if not isinstance(task, Judge):
        for prompt, text, finish_reason in responses:
            right = task.verify(prompt, text, finish_reason)
            # Such a task gives no reason, so all wrong responses have the same one.
            yield RIGHT if right else Verdict(False, "wrong answer")
        return
    judge = task.judge
    threads = ThreadPoolExecutor(workers or num_cores())
    try:
        yield from threads.map(lambda response: judge(*response), responses)
    finally:
        # After an interrupt only the responses that are being judged are waited for.
        threads.shutdown(cancel_futures=True)


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    # cpu_count() would give those of the machine, also inside a container or a Slurm job.
    return len(os.sched_getaffinity(0))


def final_part(text: str) -> str | None:
    """Return what a response says after its thinking.

    Args:
        text: The response, without the token that ended it (lopd.tasks.tokenizer.response_text).

    Returns:
        None if the response began to think and never ended it. A chat template may have put
        ``<think>`` into the prompt; then the response has only the closing tag.
    """
    _, closed, rest = text.rpartition(THOUGHT)
    if not closed and THINK in text:
        return None
    return rest[-_TAIL:] if closed else text[-_TAIL:]
