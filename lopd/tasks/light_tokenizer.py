"""Tokenizers for checks: what transformers would answer, without importing it.

An import of transformers' tokenizers takes four seconds of processor time, most of it torch. The
checks only count tokens and render chat templates. The libraries below transformers do both alone:
``tokenizers`` reads tokenizer.json, and ``jinja2`` renders the template.

What a model samples or learns is rendered by transformers (lopd.tasks.tokenizer). A folder whose
form is not an ordinary one is read by transformers here too.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.errors import DataError
from lopd.tasks.chat_template import template_text
from lopd.tasks.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# The classes of tokenizer_config.json for which transformers takes tokenizer.json as it is. Other
# classes change it, for example by a space before the text.
_PLAIN_CLASSES = frozenset(
    {
        "PreTrainedTokenizerFast",
        "TokenizersBackend",
        "Qwen2Tokenizer",
        "Qwen2TokenizerFast",
        "GPT2Tokenizer",
        "GPT2TokenizerFast",
    }
)
# The files that decide how a text is cut into tokens and how messages become a text.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# The special tokens that a template finds under their names.
_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class LightTokenizer:
    """What the checks ask of a tokenizer, with the names and arguments of transformers."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, special: Mapping[str, str], template: str
    ) -> None:
        """Keep the parts of a tokenizer.

        Args:
            folder: The model's folder, for messages.
            tokenizer: The tokens and how text is cut into them.
            special: The special tokens by their names.
            template: The chat template, or "".
        """
        self.name_or_path = str(folder)
        self.chat_template = template
        # stop_token_ids asks every tokenizer for its end token, also one that names none.
        self.eos_token_id: int | None = None
        if "eos_token" in special:
            self.eos_token_id = tokenizer.token_to_id(special["eos_token"])
        self.unk_token_id: int | None = None
        if "unk_token" in special:
            self.unk_token_id = tokenizer.token_to_id(special["unk_token"])
        self._tokenizer = tokenizer
        self._special = dict(special)
        # A template is compiled once, and rendered for each prompt.
        self._compiled = _environment().from_string(template)

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def apply_chat_template(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        *,
        add_generation_prompt: bool,
        tokenize: bool,
        return_dict: bool,
        **named: Any,
    ) -> list[list[int]]:
        """Return the token ids of each conversation under the chat template."""
        # transformers has these arguments and would return text or a dictionary for other values.
        assert tokenize, "the checks ask for token ids"
        assert not return_dict, "the checks ask for token ids alone"
        # Templates ask for these two by name, and transformers defines them even where there are
        # none.
        values = {"tools": None, "documents": None, **self._special, **named}
        texts = [
            self._compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **values
            )
            for messages in conversations
        ]
        # Without the places of the tokens in the text, which nobody asks for.
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """Return the id of a token, or None if the vocabulary does not have it."""
        found = self._tokenizer.token_to_id(token)
        return self.unk_token_id if found is None else int(found)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        """Return the text of token ids, with special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))


def light_tokenizer(folder: Path) -> LightTokenizer | PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder for checks.

    Raises:
        DataError: See load_tokenizer.
    """
    # transformers says best what is wrong with a folder, so that every failure ends there.
    return _read(folder, _stamp(folder)) or load_tokenizer(folder)


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what the files of a tokenizer are known by: name, size and time of change."""
    found = []
    for name in FILES:
        # Not every tokenizer has all of these files.
        with contextlib.suppress(OSError):
            state = (folder / name).stat()
            found.append((name, state.st_size, state.st_mtime_ns))
    return tuple(found)


# Several checks ask for one tokenizer, and a large one takes half a second to read.
@functools.lru_cache(maxsize=8)
def _read(folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> LightTokenizer | None:
    """Return the tokenizer of a folder of ordinary form, or None."""
    del stamp  # It is part of the key of the cache: a changed file is read again.
    from jinja2 import TemplateError
    from tokenizers import Tokenizer

    try:
        about = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        # auto_map names code of the checkpoint.
        if about.get("tokenizer_class") not in _PLAIN_CLASSES or "auto_map" in about:
            return None
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        special = _special_tokens(folder, about)
        _add_tokens(tokenizer, about, special)
        return LightTokenizer(folder, tokenizer, special, template_text(folder))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, DataError, TemplateError):
        return None
    except Exception as error:
        # The tokenizers library raises plain Exceptions, and nothing more special.
        if type(error) is not Exception:
            raise
        return None


def _special_tokens(folder: Path, about: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens by name. tokenizer_config.json wins over the older file."""
    # Older folders name their special tokens in a file of its own. Newer ones have them in one
    # file.
    older = folder / "special_tokens_map.json"
    tables: list[Mapping[str, Any]] = [about]
    if older.is_file():
        tables.insert(0, json.loads(older.read_text(encoding="utf-8")))
    found: dict[str, str] = {}
    for table in tables:
        for name in _SPECIAL:
            token = table.get(name)
            # A token is its text, or a table with the text and how it is matched.
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                found[name] = text
    return found


def _add_tokens(tokenizer: Tokenizer, about: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Add the tokens that tokenizer_config.json has and tokenizer.json does not add.

    An added token is found in text as a whole. A token that is only in the vocabulary is not.
    """
    from tokenizers import AddedToken

    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    # Their order decides their ids.
    named = sorted(about.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    tokenizer.add_tokens(
        [AddedToken(**table) for _, table in named if table["content"] not in added]
    )
    added |= {table["content"] for _, table in named}
    tokenizer.add_special_tokens([text for text in special.values() if text not in added])


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that chat templates are written for.

    A template is text from elsewhere, so it is rendered in jinja2's sandbox.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **named: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **named)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # jinja2's own tojson escapes the signs of HTML.
    environment.filters["tojson"] = to_json
    # These two names are transformers' own. Published templates use both.
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
