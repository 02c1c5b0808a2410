"""Loads tokenizers from a Hugging Face folder, offline and without code from the checkpoint.

``transformers`` is imported only when a tokenizer is loaded, because that takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from lopd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What stands for bytes that are no character, and the most bytes that a character has in UTF-8.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
# The files of a fast tokenizer. Without them transformers would look for other forms.
_FILES = ("tokenizer.json", "tokenizer_config.json")


class KnowsItsEnd(Protocol):
    """A tokenizer, as far as its end token is asked for."""

    @property
    def eos_token_id(self) -> Any: ...


class Decodes(Protocol):
    """A tokenizer, as far as texts are asked for."""

    @property
    def decode(self) -> Callable[..., Any]: ...


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint, from its files alone.

    Code that the checkpoint names is not run.

    Raises:
        DataError: A file is missing or damaged.
    """
    folder = Path(folder)
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"this folder has no {' and no '.join(missing)}",
            where=str(folder),
            remedy="give the folder of a Hugging Face checkpoint with a fast tokenizer",
        )
    # Imported here: the import takes seconds, and most commands need no tokenizer.
    from transformers import AutoTokenizer

    try:
        # Both arguments are about trust: nothing is downloaded, and no code of the checkpoint is
        # run.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # Every class is caught: errors of the tokenizers library are plain Exceptions, and
        # transformers passes them on.
        remedy = "repair the files of the tokenizer; lopd does not run code from a checkpoint"
        raise DataError(
            f"the tokenizer cannot be loaded ({_first_line(error)})",
            where=str(folder),
            remedy=remedy,
        ) from error
    return tokenizer


def stop_token_ids(folder: str | Path, tokenizer: KnowsItsEnd) -> tuple[int, ...]:
    """Return the token ids that end a response, in ascending order.

    They are the eos ids of generation_config.json, of config.json and of the tokenizer. All of
    these ids are used, because checkpoints often name the end of a turn in one file and the end of
    a document in another file.

    Raises:
        DataError: None of the three names an end token.
    """
    folder = Path(folder)
    # A set, because the same id usually stands in two of the three places.
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            try:
                eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            except (OSError, ValueError, AttributeError) as error:
                raise DataError(
                    f"cannot be read as a JSON object ({_first_line(error)})",
                    where=str(path),
                    remedy="copy the file again from its source",
                ) from None
            # One id, several, or none.
            found.update(eos if isinstance(eos, list) else [eos] if eos is not None else [])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    # Without one every response would run to its limit.
    if not found:
        remedy = "add eos_token_id to generation_config.json, or eos_token to tokenizer_config.json"
        raise DataError(
            "the folder names no token that ends a response", where=str(folder), remedy=remedy
        )
    return tuple(sorted(found))


def decode(tokenizer: Decodes, token_ids: Sequence[int] | NDArray[Any]) -> str:
    """Return the text of token ids, with special tokens and every space."""
    # The ids may be numpy integers, which some tokenizers refuse.
    text = tokenizer.decode(
        [int(token) for token in token_ids],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    assert isinstance(text, str)
    return text


def token_texts(tokenizer: Decodes, token_ids: Iterable[int]) -> Iterator[str]:
    """Yield the text that each token adds. Joined, the pieces are the text of all tokens.

    A character may consist of several tokens. It is then the text of the last of them, and the
    others have none. A token at the end that is no whole character has the replacement character.
    """
    # The tokens whose text is still to come, and before them those of the last piece: some
    # tokenizers write a token differently at the beginning of a text.
    before: list[int] = []
    open_ids: list[int] = []
    for token in token_ids:
        open_ids.append(token)
        known = decode(tokenizer, before)
        text = decode(tokenizer, before + open_ids)
        # An unfinished character is decoded as this one. A finished one has at most four bytes, so
        # with more tokens it is no longer awaited: the model has sampled bytes that are no text.
        if text.endswith(_REPLACEMENT) and len(open_ids) < _LONGEST_CHARACTER:
            yield ""
            continue
        yield text[len(known) :]
        before = open_ids
        open_ids = []
    # What is left is no whole character.
    if open_ids:
        yield decode(tokenizer, before + open_ids)[len(decode(tokenizer, before)) :]


def response_text(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int] | NDArray[Any],
    finish_reason: str,
) -> str:
    """Return the text of a response as a verifier sees it, without the token that ended it.

    Args:
        tokenizer: The tokenizer of the model that answered.
        token_ids: The sampled ids. If a token ended the response, it is the last of them.
        finish_reason: "stop" if a token ended it, "length" if it was cut off.
    """
    # The end token is cut by its place and not by its text: every model family spells it in another
    # way, and a response may quote it.
    return decode(tokenizer, token_ids[:-1] if finish_reason == "stop" else token_ids)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
