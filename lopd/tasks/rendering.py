"""Renders prompts as token ids, in batches and on all cores.

The chat template is applied here and nowhere else. A batch gives the same ids as one call for each
prompt, and costs about half: the tokenizer's own threads cut all texts of a batch into tokens. A
question that comes again is rendered once, and what the run has kept is not rendered at all
(lopd.tasks.rendered).
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lopd.errors import DataError
from lopd.records import Ints, Prompt, int32
from lopd.report.console import Bar, progress
from lopd.tasks.rendered import (
    Kept,
    TokenIds,
    fingerprint_of,
    is_written,
    keep,
    key_of,
    read_kept,
)
from lopd.tasks.tokenizer import response_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompts of one call of the tokenizer. More would not be faster, and the bar would move in jumps.
_BATCH = 1024
# From this number of prompts on a bar is shown: fewer take a second or two.
_SHOWN = 20_000
# How many kept prompts are rendered again, to see that they are what this tokenizer says.
_SAMPLE = 64
# The variable by which the tokenizers library decides whether it uses threads.
_PARALLELISM = "TOKENIZERS_PARALLELISM"


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
        One int32 array [P] for each prompt, where P is the number of its tokens. Equal prompts
        share one array.

    Raises:
        DataError: A prompt fills the context, the template refuses it, or it has a character that
            the tokenizer does not know. The message names the prompt.
    """
    renderer = Renderer(tokenizer, thinking=thinking, time=time)
    return renderer.render(prompts, context_length=context_length)


class ConversationRenderer:
    """Renders one conversation at a time, with answers in it and with any keys of a message.

    Any thread may use it. A tokenizer of the tokenizers library is one thread's at a time.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        thinking: bool = True,
        time: datetime.datetime | None = None,
    ) -> None:
        """Keep what a rendering needs. The arguments and the error are those of Renderer."""
        self.source = _source_of(tokenizer)
        _require_template(tokenizer, self.source)
        self._tokenizer = tokenizer
        self._named = _named_values(thinking, time)
        self._lock = threading.Lock()

    def answer(self, token_ids: Ints) -> str:
        """Return the text of an answer that ended by itself, without its end token."""
        with self._lock:
            return response_text(self._tokenizer, token_ids, "stop")

    def ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        to_answer: bool,
        tools: Sequence[Any] | None = None,
    ) -> Ints:
        """Return the token ids of a conversation.

        Args:
            messages: The messages, answers included.
            to_answer: Whether the generation prompt follows them.
            tools: The descriptions of tools, for templates that write them into the prompt.

        Raises:
            DataError: The template refuses the messages.
        """
        # A copy: templates may write into messages.
        conversation = [dict(message) for message in messages]
        named = self._named if tools is None else {**self._named, "tools": [*tools]}
        try:
            with self._lock:
                ids: Any = self._tokenizer.apply_chat_template(
                    [conversation],
                    add_generation_prompt=to_answer,
                    tokenize=True,
                    return_dict=False,
                    **named,
                )
        except Exception as error:
            # Every class is caught: see Renderer._batch.
            raise DataError(
                f"the chat template refuses the messages ({error})",
                where=self.source,
                remedy="correct the messages, or use another chat template",
            ) from error
        return int32(ids[0])


class Renderer:
    """Renders the prompts of a set, and remembers the ids of each question."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        thinking: bool,
        time: datetime.datetime | None,
        kept: Kept | None = None,
    ) -> None:
        """Read what is kept, if anything is.

        Args:
            tokenizer: See render.
            thinking: See render.
            time: See render.
            kept: Where the run keeps the rendered prompts of this set.

        Raises:
            DataError: The tokenizer has no chat template.
        """
        self._source = _source_of(tokenizer)
        _require_template(tokenizer, self._source)
        self._tokenizer = tokenizer
        self._named = _named_values(thinking, time)
        self._kept = kept
        self._fingerprint = "" if kept is None else fingerprint_of(tokenizer, thinking, time)
        self._found: TokenIds = {}
        if kept is not None and self._fingerprint:
            self._found = read_kept(kept, self._fingerprint)
        # Nothing that was kept means that there is nothing to check.
        self._is_checked = not self._found
        # The ids of all prompts that were asked for: what will be kept.
        self._used: TokenIds = {}

    def render(self, prompts: Sequence[Prompt], *, context_length: int) -> list[Ints]:
        """Return the token ids of each prompt. See render above for arguments and errors."""
        keys = [key_of(prompt) for prompt in prompts]
        if not self._is_checked:
            self._check_found(prompts, keys)
        # Each question once, in the order in which they come first.
        new: dict[bytes, int] = {}
        for place, key in enumerate(keys):
            if key in self._found:
                self._used[key] = self._found[key]
            # The same question may come in two calls, as in the check of lengths and in the reading
            # itself.
            elif key not in self._used:
                new.setdefault(key, place)
        places = list(new.values())
        with _bar(len(places)) as bar:
            # In batches: the tokenizer's threads need many prompts at once, and the bar must move
            # in between.
            for start in range(0, len(places), _BATCH):
                batch = places[start : start + _BATCH]
                ids = self._batch(prompts, batch, context_length)
                for place, one in zip(batch, ids, strict=True):
                    self._used[keys[place]] = one
                if bar is not None:
                    bar.advance(len(batch))
        rendered = [self._used[key] for key in keys]
        self._refuse_too_long(prompts, rendered, context_length)
        return rendered

    def keep(self) -> None:
        """Keep what was rendered, if anything of it is new.

        Raises:
            ArtifactError: See lopd.tasks.rendered.keep.
        """
        if self._kept is None or not self._fingerprint:
            return
        # A run of fewer prompts keeps the file of all of them: the next one may want them again.
        is_known = self._used.keys() <= self._found.keys()
        # What a check holds in memory is written even if nothing is new: it is not on the disk.
        if not is_known or (self._kept.can_write and not is_written(self._kept)):
            keep(self._kept, self._fingerprint, self._used)

    def _check_found(self, prompts: Sequence[Prompt], keys: Sequence[bytes]) -> None:
        """Render a sample of what is kept again, and forget all of it if one differs."""
        # The ids may have been made by the checks' own tokenizer, which stands in for transformers.
        # A fingerprint cannot say that the two agree.
        self._is_checked = True
        # Spread over the whole set, because sets of several sources differ from part to part.
        known = [place for place, key in enumerate(keys) if key in self._found]
        sample = known[:: max(1, len(known) // _SAMPLE)][:_SAMPLE]
        if not sample:
            return
        try:
            ids = self._ids_of([prompts[place] for place in sample])
        except Exception:
            # The template or the tokenizer refuses a prompt, with whatever error it has. The usual
            # way says which.
            self._found = {}
            return
        pairs = zip(sample, ids, strict=True)
        if not all(np.array_equal(self._found[keys[place]], one) for place, one in pairs):
            self._found = {}

    def _batch(
        self, prompts: Sequence[Prompt], places: Sequence[int], context_length: int
    ) -> list[Ints]:
        """Return the ids of the prompts at these places, and name the one that cannot be rendered.

        Raises:
            DataError: A prompt cannot be rendered, or a prompt before it fills the context.
        """
        try:
            return self._ids_of([prompts[place] for place in places])
        except Exception:
            # Every class is caught: the template's own raise_exception and the tokenizers library
            # raise plain Exceptions. The error of a batch does not say which prompt it is.
            self._name_the_culprit(prompts, places, context_length)
            raise

    def _name_the_culprit(
        self, prompts: Sequence[Prompt], places: Sequence[int], context_length: int
    ) -> None:
        for place in places:
            prompt = prompts[place]
            try:
                self._used[key_of(prompt)] = self._ids_of([prompt])[0]
            except Exception as error:
                # The first mistake is named, and a prompt before this one may be too long.
                before = prompts[:place]
                ids = [self._used[key_of(one)] for one in before]
                self._refuse_too_long(before, ids, context_length)
                raise DataError(
                    f"prompt {prompt.prompt_id!r} cannot be rendered ({error})",
                    where=self._source,
                    remedy="correct or remove this prompt",
                ) from error

    def _ids_of(self, prompts: Sequence[Prompt]) -> list[Ints]:
        # Templates may write into the messages, and those of a prompt must not change.
        conversations = [[dict(message) for message in prompt.messages] for prompt in prompts]
        with _all_cores():
            ids: Any = self._tokenizer.apply_chat_template(
                conversations,
                # The prompt ends where the response begins, with the mark of the assistant's turn.
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **self._named,
            )
        # The type that caches have for token ids. One conversion of all is much faster than many.
        flat = int32(np.fromiter(itertools.chain.from_iterable(ids), np.int64))
        return np.split(flat, np.cumsum([len(one) for one in ids])[:-1])

    def _refuse_too_long(
        self, prompts: Sequence[Prompt], rendered: Sequence[Ints], context_length: int
    ) -> None:
        for prompt, ids in zip(prompts, rendered, strict=True):
            # Equal is too long as well, because the response needs one token at least.
            if len(ids) >= context_length:
                has = f"prompt {prompt.prompt_id!r} has {len(ids)} tokens"
                raise DataError(
                    f"{has}, so no token is left for a response",
                    where=self._source,
                    limit=f"fewer than {context_length} tokens (sglang.context_length)",
                    remedy="shorten or remove this prompt, or raise sglang.context_length",
                )


def _source_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the folder that a tokenizer came from, for messages."""
    return str(getattr(tokenizer, "name_or_path", "") or "tokenizer")


def _require_template(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    # Base models often have none. Without one the prompt would have no marks of roles.
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template",
            where=source,
            remedy="add chat_template.jinja to the folder",
        )


def _named_values(thinking: bool, time: datetime.datetime | None) -> dict[str, Any]:
    """Return the values that a template gets besides the messages."""
    # A name in the call hides the template's own clock.
    clock: dict[str, Any] = {} if time is None else {"strftime_now": time.strftime}
    return {"enable_thinking": thinking, **clock}


@contextlib.contextmanager
def _bar(count: int) -> Iterator[Bar | None]:
    """Show a bar with rate and time left where many prompts are to be rendered."""
    if count < _SHOWN:
        yield None
        return
    # On stderr, because some commands print JSON.
    with progress("rendering prompts", total=count, unit="prompts", on_stderr=True) as bar:
        yield bar


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Let the tokenizer use its threads as long as the block lasts.

    Commands switch them off (lopd.entry), because the library warns and stops where a process is
    forked after they were used. Outside of this block they stay off, also for children.
    """
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before
