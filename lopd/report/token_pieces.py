"""The text of a response in pieces of whole characters, each with the figure of its tokens.

A character may be spelt by several tokens, whose places in the text overlap. So text is never cut
by tokens. Tokens are grouped until they make whole characters, and a group has one figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that one or more tokens make together.

    Attributes:
        text: Whole characters.
        first: The place of its first token in the response.
        num_tokens: How many tokens it has. 0 only for what is left of a damaged character.
        value: The sum of its tokens' figures, or None where the response has none. Log-ratios add
            up: the sum is the log-ratio of the piece.
    """

    text: str
    first: int
    num_tokens: int
    value: float | None


def pieces_of(
    texts: Iterable[str], values: Sequence[float] | NDArray[Any] | None, num_tokens: int
) -> list[Piece]:
    """Group the tokens of a response.

    Args:
        texts: The text that each token adds, "" for a token that ends inside of a character; one
            more where the last token does (lopd.tasks.tokenizer.token_texts).
        values: One figure of each token, or None.
        num_tokens: How many tokens there are.
    """
    found: list[Piece] = []
    first = 0
    for index, text in enumerate(texts):
        # What comes after the last token belongs to the tokens that are still open.
        after = min(index + 1, num_tokens)
        if text:
            found.append(_piece(text, first, after, values))
            first = after
    if first < num_tokens:
        # Tokens without any text of their own, as some special ones are.
        found.append(_piece("", first, num_tokens, values))
    return found


def _piece(
    text: str, first: int, after: int, values: Sequence[float] | NDArray[Any] | None
) -> Piece:
    value = None if values is None else float(sum(values[first:after]))
    return Piece(text, first, after - first, value)
