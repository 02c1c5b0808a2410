"""Reads or generates prompt sets, and returns prompts with their token ids.

The chat template is applied in lopd.tasks.rendering and nowhere else.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

from lopd.config import PromptSet
from lopd.errors import ConfigError, DataError, LopdError
from lopd.records import Ints, Prompt
from lopd.tasks.gold import refuse
from lopd.tasks.interface import Task, Verifier
from lopd.tasks.own_form import OWN_FORM
from lopd.tasks.readers import ReadCounts, read_candidates
from lopd.tasks.rendered import Kept
from lopd.tasks.rendering import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A context length that no prompt reaches.
_NO_LIMIT = 2**31 - 1

# Returns the reason why a prompt is left out, or "" to keep it.
LeaveOut: TypeAlias = Callable[[Prompt], str]
# Returns for each prompt whether it has too many tokens.
TooLong: TypeAlias = Callable[[Sequence[Prompt]], list[bool]]


def read_prompts(
    prompt_set: PromptSet,
    domain: str | Task,
    *,
    need_answers: bool = False,
    leave_out: LeaveOut | None = None,
    too_long: TooLong | None = None,
    counts: ReadCounts | None = None,
) -> list[Prompt]:
    """Return the prompts of a set, in order.

    Args:
        prompt_set: The set: a file, or a number of prompts that the task generates.
        domain: The task, or the domain of rows that name none.
        need_answers: Refuse a prompt without an answer, or with one that the task cannot use.
            Evaluations need this. A task without a verifier needs no answers in any case.
        leave_out: A function that returns why a prompt is left out, or "". It is called before
            num_prompts counts the prompt.
        too_long: A function that returns for each of many prompts whether it has too many tokens.
            Such prompts are left out as well.
        counts: Records what happened to the rows.

    Raises:
        DataError: The file is missing, empty or not JSON; a field is missing or of the wrong type;
            a prompt id is repeated; or there are fewer prompts than asked for. The message has the
            number of the line.
        ConfigError: The set has neither a file nor a number, or its columns, choice of rows or
            instruction are impossible.
    """
    if prompt_set.file is not None:
        # An empty ReadCounts of the caller must be filled, so "or" would be wrong here.
        counts = counts if counts is not None else ReadCounts()
        # The domain of rows that name none is the task's name.
        name = domain if isinstance(domain, str) else domain.name
        need_answers = need_answers and _verifies(domain)
        prompts = _read_file(prompt_set, name, need_answers, leave_out, too_long, counts)
        # Only an evaluation must verify; rollouts and demonstrations do without answers.
        if need_answers:
            # Only the chosen prompts are checked, because the check may take a worker's time.
            refuse(domain, prompts, counts)
        return prompts
    # Without a task nobody can generate prompts.
    if prompt_set.num_prompts is None or isinstance(domain, str):
        raise ConfigError(
            "a prompt set has neither file nor num_prompts",
            where="prompts",
            remedy="set num_prompts (the task then generates prompts), or set file to a JSONL file",
        )
    # These settings describe a file. Without one they would be ignored in silence.
    if prompt_set.format != "lopd" or prompt_set.fields or prompt_set.where:
        what = (
            f"format {prompt_set.format}, fields or where describe a file, but there is no "
            "file: the task generates the prompts"
        )
        raise ConfigError(
            what,
            where="prompts",
            remedy="set file, or remove format, fields and where",
        )
    return domain.generate_prompts(prompt_set.num_prompts, prompt_set.seed)


def _verifies(domain: str | Task) -> bool:
    """Return whether answers are compared with anything."""
    # A domain by its name says nothing of a verifier, so the caller's wish stands.
    return isinstance(domain, str | Verifier)


def _read_file(
    prompt_set: PromptSet,
    domain: str,
    need_answers: bool,
    leave_out: LeaveOut | None,
    too_long: TooLong | None,
    counts: ReadCounts,
) -> list[Prompt]:
    path = prompt_set.file
    limit = prompt_set.num_prompts
    candidates: Iterable[Prompt] = read_candidates(prompt_set, domain, counts)
    if prompt_set.shuffle_seed is not None:
        # Sorted by a hash of the id: the place of a prompt does not depend on the other prompts, so
        # a larger num_prompts begins with the prompts of a smaller one.
        def shuffle_key(prompt: Prompt) -> bytes:
            text = f"{prompt_set.shuffle_seed}\0{prompt.prompt_id}"
            return hashlib.sha256(text.encode()).digest()

        candidates = sorted(candidates, key=shuffle_key)
    prompts = _choose(iter(candidates), limit, need_answers, leave_out, too_long, counts)
    if not prompts:
        raise DataError(
            "the prompt set is empty" + _left_out(counts), where=str(path), remedy=OWN_FORM
        )
    # Fewer prompts would be another experiment, so they are not accepted in silence.
    if limit is not None and len(prompts) < limit:
        remedy = "lower num_prompts, or remove it to use the whole file"
        raise DataError(
            f"num_prompts is {limit}, but the file has only {len(prompts)} prompts"
            + _left_out(counts),
            where=str(path),
            remedy=remedy,
        )
    return prompts


def _choose(
    candidates: Iterator[Prompt],
    limit: int | None,
    need_answers: bool,
    leave_out: LeaveOut | None,
    too_long: TooLong | None,
    counts: ReadCounts,
) -> list[Prompt]:
    """Return the first ``limit`` candidates that are not left out."""
    prompts: list[Prompt] = []
    # Of many prompts together it is found which are too long. No more are taken than are missing:
    # the rest of the file is not read, because a data set may have millions of rows.
    while limit is None or len(prompts) < limit:
        taken: list[Prompt] = []
        # Each round takes what is still missing, because the former round may have lost some to
        # their length.
        missing = None if limit is None else limit - len(prompts)
        is_last = True
        try:
            for prompt in islice(candidates, missing):
                is_last = False
                if need_answers and prompt.answer is None:
                    raise _no_answer(prompt, counts)
                reason = leave_out(prompt) if leave_out is not None else ""
                if reason:
                    counts.leave_out(reason, prompt.prompt_id)
                else:
                    taken.append(prompt)
        except LopdError:
            # Those before the damaged row come first, as they stand first in the file.
            if too_long is not None:
                too_long(taken)
            raise
        if is_last:
            break
        # Asked after leave_out: rendering is the most expensive of the reasons.
        flags = too_long(taken) if too_long is not None else [False] * len(taken)
        for prompt, is_too_long in zip(taken, flags, strict=True):
            if is_too_long:
                counts.leave_out("too long", prompt.prompt_id)
            else:
                prompts.append(prompt)
    return prompts


def _no_answer(prompt: Prompt, counts: ReadCounts) -> DataError:
    what = f"prompt {prompt.prompt_id!r} has no answer to verify a response with"
    return DataError(
        f"{what} (field {counts.answer_field})",
        where=counts.places[prompt.prompt_id].where,
        remedy="add an answer to this prompt, or remove the row",
    )


def _too_large_limit(limit: int, context_length: int) -> ConfigError:
    return ConfigError(
        f"max_prompt_tokens = {limit} is too large: a response needs tokens too",
        where="prompts",
        limit=f"below sglang.context_length = {context_length}",
        remedy="lower max_prompt_tokens",
    )


def _left_out(counts: ReadCounts) -> str:
    """Return why rows are missing, as an addition to a message."""
    # An empty set is most often the work of one of these reasons.
    told = [f"{number} {reason}" for reason, number in counts.left_out.items()]
    return f" ({counts.rows} rows, of which {', '.join(told)})" if told else ""


def load_prompts(
    prompt_set: PromptSet,
    task: str | Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    need_answers: bool = False,
    leave_out: LeaveOut | None = None,
    counts: ReadCounts | None = None,
    time: datetime.datetime | None = None,
    kept: Kept | None = None,
) -> tuple[list[Prompt], list[Ints]]:
    """Return the prompts of a set, and the token ids of each.

    Prompts with more than max_prompt_tokens tokens are left out.

    Args:
        prompt_set: See read_prompts.
        task: See ``domain`` of read_prompts.
        tokenizer: The tokenizer of the model that will answer.
        context_length: The most tokens of a prompt and its response together.
        need_answers: See read_prompts.
        leave_out: See read_prompts.
        counts: See read_prompts.
        time: See lopd.tasks.rendering.render.
        kept: Where the run keeps the token ids of this set, so that they are not rendered again.

    Returns:
        The prompts, and one int32 array [P] for each, where P is the number of its tokens.

    Raises:
        DataError: See read_prompts and lopd.tasks.rendering.render.
        ConfigError: See read_prompts. Or max_prompt_tokens leaves no space for a response.
    """
    limit = prompt_set.max_prompt_tokens
    if limit is not None and limit >= context_length:
        raise _too_large_limit(limit, context_length)
    renderer = Renderer(tokenizer, thinking=prompt_set.thinking, time=time, kept=kept)

    def too_long(prompts: Sequence[Prompt]) -> list[bool]:
        # No context length here: a prompt that fills it is left out and not refused.
        ids = renderer.render(prompts, context_length=_NO_LIMIT)
        return [limit is not None and len(one) > limit for one in ids]

    prompts = read_prompts(
        prompt_set,
        task,
        need_answers=need_answers,
        leave_out=leave_out,
        # Without a limit of tokens a prompt that is too long is an error, and no reason to leave it
        # out.
        too_long=None if limit is None else too_long,
        counts=counts,
    )
    # None is rendered twice: the renderer remembers them.
    ids = renderer.render(prompts, context_length=context_length)
    renderer.keep()
    return prompts, ids
