"""The bytes of each token of a tokenizer, and text as token ids without special tokens.

Two kinds of tokenizers have tokens for every byte. A byte-level BPE (Qwen, Llama 3, SmolLM) writes
each byte as one printable letter. A tokenizer of SentencePiece's kind (Llama 2, Mistral, Gemma)
writes a space as ``▁`` and a byte that is part of no token as ``<0xE5>``. The tokens of other
tokenizers are their own text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lopd.errors import DataError
from lopd.tasks.tokenizer import load_tokenizer

# A byte as SentencePiece's kind writes it, and its space.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
# Models whose tokens can be brought back to bytes. WordPiece is none: its tokens do not say where
# a space was.
_MODELS = ("BPE", "Unigram", "WordLevel")


def byte_level_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level BPE stands for."""
    # Printable bytes stand for themselves. The others follow from code point 256 on, in order.
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


class TokenBytes:
    """A tokenizer as a map from tokens to bytes and from text to tokens.

    Attributes:
        special: The text of each special token by its id. A special token is no text: no text is
            ever encoded as one here.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the tokenizer of a Hugging Face folder.

        Raises:
            DataError: The tokenizer cannot be read, or its tokens say nothing about bytes.
        """
        from tokenizers import Tokenizer

        loaded = load_tokenizer(folder)
        # transformers' own rules for a family are part of this one.
        text: str = loaded.backend_tokenizer.to_str()
        about: dict[str, Any] = json.loads(text)
        kind = about["model"].get("type")
        if kind not in _MODELS:
            raise DataError(
                f"the tokenizer is of the kind {kind}, whose tokens are not pieces of the text",
                where=str(folder),
                limit=f"one of {', '.join(_MODELS)}",
                remedy="use models whose tokenizers are byte-level or of SentencePiece's kind",
            )
        self._has_byte_tokens = bool(about["model"].get("byte_fallback"))
        self._tokenizer: Any = Tokenizer.from_str(text)
        # A response may hold the text "<|im_end|>". It must not become the token of that name.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {number: token.content for number, token in added.items() if token.special}
        self._added = {number: token.content for number, token in added.items()}
        # Tokenizers name the byte-level form, or the sign for a space, in one of these three parts.
        parts = [about.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
        rules = json.dumps(parts, ensure_ascii=False)
        self._letters: Mapping[str, int] = byte_level_letters() if "ByteLevel" in rules else {}
        # A token of SentencePiece's kind writes a space so. Others may mean this very letter.
        self._space = _SPACE if _SPACE in rules and not self._letters else " "
        # SentencePiece's kind may put a space before a text, which decoding takes away again.
        self.adds_space = self._space == _SPACE and self._begins_with_space()
        # Responses repeat the same tokens. The size is about that of a whole vocabulary.
        self._piece = functools.lru_cache(maxsize=2**17)(self._bytes_of)

    def _begins_with_space(self) -> bool:
        ids = self._tokenizer.encode("a", add_special_tokens=False).ids
        first = self._tokenizer.id_to_token(ids[0]) if ids else None
        return first is not None and first.startswith(_SPACE)

    def pieces(self, token_ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token. A special token, and an id without a token, has none."""
        return [self._piece(int(token)) for token in token_ids]

    def _bytes_of(self, token: int) -> bytes:
        if token in self.special:
            return b""
        # An added token stands for its own text, also in a byte-level tokenizer.
        if token in self._added:
            return str(self._added[token]).encode()
        text: str | None = self._tokenizer.id_to_token(token)
        # The embedding may have more rows than the tokenizer has tokens.
        if text is None:
            return b""
        if self._letters:
            return bytes(self._letters[letter] for letter in text if letter in self._letters)
        of_byte = _BYTE_TOKEN.fullmatch(text)
        if of_byte is not None and self._has_byte_tokens:
            return bytes.fromhex(of_byte[1])
        return text.replace(self._space, " ").encode()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, none of which is a special token.

        Raises:
            DataError: The tokenizer has no token for a part of the text.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:
            # The tokenizers library raises plain Exceptions, and nothing more special.
            if type(error) is not Exception:
                raise
            raise DataError(
                f"the tokenizer cannot encode {text[:60]!r} ({error})",
                remedy="use a tokenizer that knows every byte",
            ) from None
        return ids

    def encoded(self, text: str) -> tuple[list[int], list[bytes]]:
        """Return the token ids of a text, and the bytes of each without an added first space."""
        ids = self.encode(text)
        pieces = self.pieces(ids)
        # The first tokens are enough to count the spaces at the beginning.
        joined = b"".join(pieces[:8])
        # Only the space that the tokenizer itself has put there is taken away.
        if self.adds_space and _spaces(joined) == _spaces(text.encode()) + 1:
            pieces[0] = pieces[0][1:]
        return ids, pieces

    def find_special(self, text: str) -> int | None:
        """Return the id of the special token with this text, or None."""
        return next((number for number, name in self.special.items() if name == text), None)


def _spaces(text: bytes) -> int:
    """Return how many spaces a text begins with."""
    return len(text) - len(text.lstrip(b" "))
