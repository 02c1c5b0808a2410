"""Checks, before anything runs, that the prompts' answers can be read and can be met."""

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

# The number of rows that one message names.
_SHOWN = 5
REMEDY = "correct this answer, choose another column with prompts.*.fields, or remove the row"
# The options of the task that judges prompts of a domain, if the user names no task. Tests of code
# may import packages here: whether they can is known only when the run's options are.
_OF_DOMAIN: dict[str, dict[str, Any]] = {"math": {}, "code": {"packages": True}}


@runtime_checkable
class ReadsAnswers(Protocol):
    """A task that can tell whether a prompt's answer can be used."""

    def answer_fault(self, prompt: Prompt) -> str: ...


@dataclass(frozen=True, slots=True)
class Fault:
    """An answer that cannot be used.

    Attributes:
        prompt_id: The prompt.
        where: The file and the number of the row.
        field: The column of the answer, as a path.
        what: Why it cannot be used.
    """

    prompt_id: str
    where: str
    field: str
    what: str

    def line(self) -> str:
        """Return the fault as one line for a message."""
        return f"{self.where}: {self.field}: {self.what}"


def faults_of(task: object, prompts: Sequence[Prompt], counts: ReadCounts) -> Iterator[Fault]:
    """Yield every answer that the task cannot use, in the order of the prompts.

    Several are checked at a time, because math-verify runs in other processes.
    """
    if not isinstance(task, ReadsAnswers):
        return
    # A task without this method accepts every answer: there is nothing to compare with.
    fault_of = task.answer_fault
    # map() keeps the order, so the first fault that is reported is the first of the file.
    with ThreadPoolExecutor(num_cores()) as threads:
        for prompt, what in zip(prompts, threads.map(fault_of, prompts), strict=True):
            if what:
                yield fault(prompt, what, counts)


def fault(prompt: Prompt, what: str, counts: ReadCounts) -> Fault:
    """Return a fault with the place of its row.

    Args:
        prompt: The prompt whose answer cannot be used.
        what: The reason why the answer cannot be used.
        counts: What the reader has recorded of the prompts' rows.
    """
    row = counts.places.get(prompt.prompt_id)
    # A generated prompt has no row, and is named by its id.
    where = row.where if row is not None else prompt.prompt_id
    return Fault(prompt.prompt_id, where, counts.answer_field, what)


def refuse(task: object, prompts: Sequence[Prompt], counts: ReadCounts) -> None:
    """Refuse prompts with an answer that the task cannot use.

    Raises:
        DataError: An answer cannot be used. The error names the first such row and the places of
            the next ones.
    """
    found = list(faults_of(task, prompts, counts))
    if not found:
        return
    # One message for all: the user corrects a data set, and not one row.
    first = found[0]
    named = f"the answer of prompt {first.prompt_id!r} (field {first.field})"
    what = f"{named} cannot be used: {first.what}"
    # All rows are of one file or folder, so the number behind the file's name is enough.
    others = ", ".join(one.where.rpartition(":")[2] for one in found[1:_SHOWN])
    more = f"; there are {len(found)} such rows, the next are {others}" if others else ""
    raise DataError(what + more, where=first.where, remedy=REMEDY)


def task_for(prompt: Prompt, task: Task | None) -> object:
    """Return the task that will judge a prompt.

    It is the task that the user has named, or else the one of the prompt's domain.
    """
    # Of another domain nothing is known, and None accepts every answer.
    if task is not None or prompt.domain not in _OF_DOMAIN:
        return task
    return get_task(prompt.domain, _OF_DOMAIN[prompt.domain])
