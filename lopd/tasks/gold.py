"""Can the answers of prompts be read, and can a response meet them? Asked before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lopd.errors import DataError
from lopd.records import Prompt
from lopd.tasks.interface import Task, get_task
from lopd.tasks.readers import ReadCounts
from lopd.tasks.verdicts import num_cores

_SHOWN = 5  # rows that one message names
REMEDY = "mend this answer, choose another column with prompts.*.fields, or leave the row out"
# of prompts that name their domain, where nobody says which task will judge them
_OF_DOMAIN: dict[str, dict[str, Any]] = {"math": {}, "code": {"packages": True}}


@runtime_checkable
class ReadsAnswers(Protocol):
    """A task that can tell whether a prompt's answer is of use."""

    def answer_fault(self, prompt: Prompt) -> str: ...


@dataclass(frozen=True, slots=True)
class Fault:
    """An answer that is of no use. where: file and row number. field: the column, as a path."""

    prompt_id: str
    where: str
    field: str
    what: str

    def line(self) -> str:
        return f"{self.where}: {self.field}: {self.what}"


def faults_of(task: object, prompts: Sequence[Prompt], counts: ReadCounts) -> Iterator[Fault]:
    """Every prompt whose answer the task cannot compare with, in order; several at a time."""
    if not isinstance(task, ReadsAnswers):
        return
    fault_of = task.answer_fault
    with ThreadPoolExecutor(num_cores()) as threads:
        for prompt, what in zip(prompts, threads.map(fault_of, prompts), strict=True):
            if what:
                yield fault(prompt, what, counts)


def fault(prompt: Prompt, what: str, counts: ReadCounts) -> Fault:
    row = counts.places.get(prompt.prompt_id)
    where = row.where if row is not None else prompt.prompt_id
    return Fault(prompt.prompt_id, where, counts.answer_field, what)


def refuse(task: object, prompts: Sequence[Prompt], counts: ReadCounts) -> None:
    """DataError: names the first row whose answer is of no use, and the places of the next ones."""
    found = list(faults_of(task, prompts, counts))
    if not found:
        return
    first = found[0]
    named = f"the answer of prompt {first.prompt_id!r} (field {first.field})"
    what = f"{named} cannot be used: {first.what}"
    others = ", ".join(one.where.rpartition(":")[2] for one in found[1:_SHOWN])
    more = f"; {len(found)} such rows, next {others}" if others else ""
    raise DataError(what + more, where=first.where, remedy=REMEDY)


def task_for(prompt: Prompt, task: Task | None) -> object:
    """Who will judge the prompt: the task that was named, or that of the prompt's domain."""
    if task is not None or prompt.domain not in _OF_DOMAIN:
        return task
    return get_task(prompt.domain, _OF_DOMAIN[prompt.domain])
