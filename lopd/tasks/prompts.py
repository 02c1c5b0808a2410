"""Reads or generates prompt sets, and renders prompts as token ids.

The chat template is applied in ``render`` and nowhere else.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from lopd.config import PromptSet
from lopd.errors import ConfigError, DataError
from lopd.records import Ints, Prompt, int32
from lopd.tasks.gold import refuse
from lopd.tasks.interface import Task, Verifier
from lopd.tasks.own_form import OWN_FORM
from lopd.tasks.readers import ReadCounts, read_candidates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A context length that no prompt reaches.
_NO_LIMIT = 2**31 - 1

# Returns the reason why a prompt is left out, or "" to keep it.
LeaveOut: TypeAlias = Callable[[Prompt], str]


def read_prompts(
    prompt_set: PromptSet,
    domain: str | Task,
    *,
    need_answers: bool = False,
    leave_out: LeaveOut | None = None,
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
        prompts = _read_file(prompt_set, name, need_answers, leave_out, counts)
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
    prompts: list[Prompt] = []
    for prompt in candidates:
        if need_answers and prompt.answer is None:
            where = counts.places[prompt.prompt_id].where
            what = f"prompt {prompt.prompt_id!r} has no answer to verify a response with"
            what += f" (field {counts.answer_field})"
            raise DataError(
                what, where=where, remedy="add an answer to this prompt, or remove the row"
            )
        reason = leave_out(prompt) if leave_out is not None else ""
        if reason:
            counts.leave_out(reason, prompt.prompt_id)
            continue
        prompts.append(prompt)
        # The rest of the file is not read: a data set may have millions of rows.
        if len(prompts) == limit:
            break
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
        time: See render.

    Returns:
        The prompts, and one int32 array [P] for each, where P is the number of its tokens.

    Raises:
        DataError: See read_prompts and render.
        ConfigError: See read_prompts. Or max_prompt_tokens leaves no space for a response.
    """
    limit = prompt_set.max_prompt_tokens
    thinking = prompt_set.thinking
    if limit is not None and limit >= context_length:
        raise ConfigError(
            f"max_prompt_tokens = {limit} is too large: a response needs tokens too",
            where="prompts",
            limit=f"below sglang.context_length = {context_length}",
            remedy="lower max_prompt_tokens",
        )
    # Without a limit of tokens a prompt that is too long is an error, and no reason to leave it
    # out.
    if prompt_set.file is None or limit is None:
        prompts = read_prompts(
            prompt_set, task, need_answers=need_answers, leave_out=leave_out, counts=counts
        )
        ids = render(
            prompts, tokenizer, context_length=context_length, thinking=thinking, time=time
        )
        return prompts, ids

    # Each prompt is rendered while the file is read, because num_prompts counts only prompts that
    # are short enough. The token ids are kept, so that none is rendered twice.
    kept: dict[str, Ints] = {}

    def too_long(prompt: Prompt) -> str:
        reason = leave_out(prompt) if leave_out is not None else ""
        if reason:
            return reason
        # No context length here: render would refuse the prompt, but it is to be left out.
        (rendered,) = render(
            [prompt], tokenizer, context_length=_NO_LIMIT, thinking=thinking, time=time
        )
        if len(rendered) > limit:
            return "too long"
        kept[prompt.prompt_id] = rendered
        return ""

    prompts = read_prompts(
        prompt_set, task, need_answers=need_answers, leave_out=too_long, counts=counts
    )
    return prompts, [kept[prompt.prompt_id] for prompt in prompts]


def render(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    thinking: bool = True,
    time: datetime.datetime | None = None,
) -> list[Ints]:
    """Return the token ids of each prompt, with the chat template and the generation prompt.

    Args:
        prompts: The prompts.
        tokenizer: The tokenizer of the model that will answer.
        context_length: The most tokens of a prompt and its response together.
        thinking: The value of ``enable_thinking`` for templates that know it (Qwen3). Others ignore
            it.
        time: The time that a template gets if it asks for the current time. None means the current
            time.

    Returns:
        One int32 array [P] for each prompt, where P is the number of its tokens.

    Raises:
        DataError: A prompt fills the context, the template refuses it, or it has a character that
            the tokenizer does not know. The message names the prompt.
    """
    # For messages: the folder that the tokenizer came from.
    source = str(getattr(tokenizer, "name_or_path", "") or "tokenizer")
    # Base models often have none. Without one the prompt would have no marks of roles.
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template",
            where=source,
            remedy="add chat_template.jinja to the folder",
        )
    # A name in the call hides the template's own clock.
    clock: dict[str, Any] = {} if time is None else {"strftime_now": time.strftime}
    rendered: list[Ints] = []
    for prompt in prompts:
        try:
            # Templates may write into the messages, and those of a prompt must not change.
            messages = [dict(message) for message in prompt.messages]
            ids: Any = tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                enable_thinking=thinking,
                **clock,
            )
        except Exception as error:
            # Every class is caught: the template's own raise_exception and the tokenizers library
            # raise plain Exceptions.
            raise DataError(
                f"prompt {prompt.prompt_id!r} cannot be rendered ({error})",
                where=source,
                remedy="correct or remove this prompt",
            ) from error
        # Equal is too long as well, because the response needs one token at least.
        if len(ids) >= context_length:
            has = f"prompt {prompt.prompt_id!r} has {len(ids)} tokens"
            raise DataError(
                f"{has}, so no token is left for a response",
                where=source,
                limit=f"fewer than {context_length} tokens (sglang.context_length)",
                remedy="shorten or remove this prompt, or raise sglang.context_length",
            )
        # The type that caches have for token ids.
        rendered.append(int32(ids))
    return rendered
