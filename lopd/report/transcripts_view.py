"""Answers to the same prompts side by side, tokens coloured by log pi_T - log pi_S."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lopd.report.cache_view import colour, legend
from lopd.report.console import MODEL_TITLES
from lopd.report.text_width import printable
from lopd.report.token_pieces import Piece

# Columns below which responses stand below each other.
_NARROW = 100
# How many pieces a response names in words, so that it can be read without colours.
_NAMED = 3
# What would be shown as 0.00 nats is not named.
_LEAST_NAMED = 0.005


@dataclass(frozen=True, slots=True)
class Transcript:
    """One response.

    Attributes:
        model: "teacher", "sft", "distilled" and so on, or the name of a folder.
        pieces: Its text. The values are log pi_T - log pi_S in nats, where the teacher has scored
            these tokens.
        num_tokens: Its length.
        finish_reason: "length" where it was cut off.
        right: The verdict, or None where nothing has judged it.
        about: Why it is wrong, and what was found in it.
        disagreement: The mean of abs(log pi_T - log pi_S) over tokens, in nats; None where the
            teacher has not scored them.
        earlier_title: The title of a model that has been made again since; "" for a present one.
    """

    model: str
    pieces: Sequence[Piece]
    num_tokens: int
    finish_reason: str
    right: bool | None
    about: str
    disagreement: float | None
    earlier_title: str = ""

    @property
    def title(self) -> str:
        return self.earlier_title or MODEL_TITLES.get(self.model, self.model)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The responses of several models to one prompt."""

    prompt_id: str
    sample_index: int
    prompt: str
    transcripts: Sequence[Transcript]

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_id": self.prompt_id,
            "sample_index": self.sample_index,
            "prompt": self.prompt,
            "responses": [
                {
                    "model": one.model,
                    "title": one.title,
                    "is_earlier": bool(one.earlier_title),
                    "response": "".join(piece.text for piece in one.pieces),
                    "num_tokens": one.num_tokens,
                    "finish_reason": one.finish_reason,
                    "right": one.right,
                    "about": one.about,
                    "disagreement": one.disagreement,
                    "pieces": [
                        {
                            "text": piece.text,
                            "first": piece.first,
                            "num_tokens": piece.num_tokens,
                            "advantage": piece.value,
                        }
                        for piece in one.pieces
                    ],
                }
                for one in self.transcripts
            ],
        }


def show_comparisons(comparisons: Sequence[Comparison], console: Console) -> None:
    """Print comparisons: side by side where there is room, else below each other."""
    scored = [one.disagreement is not None for each in comparisons for one in each.transcripts]
    # The legend explains colours, so it stands there only if there are any.
    if any(scored):
        console.print(legend(), soft_wrap=True)
    for each in comparisons:
        name = f"{each.prompt_id}/{each.sample_index}"
        console.print(Text(f"\n{printable(name)}", style="bold"), soft_wrap=True)
        console.print(Text(printable(each.prompt), style="dim"))
        if console.width >= _NARROW and len(each.transcripts) > 1:
            # Equal widths, so that the same place of two responses is easy to compare.
            table = Table(expand=True, show_lines=True)
            for one in each.transcripts:
                table.add_column(_heading(one), ratio=1, overflow="fold")
            table.add_row(*map(_body, each.transcripts))
            console.print(table)
        else:
            for one in each.transcripts:
                console.print(_heading(one))
                console.print(_body(one))
    if not any(scored):
        console.print(Text("(the teacher has scored none of these responses: no colours)"))


def _heading(one: Transcript) -> Text:
    # Three cases: a task without a verifier judges nothing, which is not the same as wrong.
    verdict = {None: "not judged", True: "right", False: "wrong"}[one.right]
    style = {None: "", True: "bold green", False: "bold red"}[one.right]
    about = f" ({printable(one.about)})" if one.about else ""
    cut = ", cut off" if one.finish_reason == "length" else ""
    heading = Text.assemble(
        (one.title, "bold"), ": ", (verdict, style), f"{about}, {one.num_tokens} tokens{cut}"
    )
    if one.disagreement is not None:
        heading.append(f", {one.disagreement:.3f} nats a token")
    return heading


def _body(one: Transcript) -> Text:
    body = Text()
    for piece in one.pieces:
        body.append(printable(piece.text), style="" if piece.value is None else colour(piece.value))
    # In words too: colours are lost in a pipe, and not everybody sees them.
    valued = [(piece.value or 0.0, piece) for piece in one.pieces if piece.value is not None]
    valued = [pair for pair in valued if abs(pair[0]) >= _LEAST_NAMED]
    # Both signs count: what the teacher would rather not say is as telling as what it misses.
    largest = sorted(valued, key=lambda pair: -abs(pair[0]))[:_NAMED]
    if largest:
        named = ", ".join(f"{piece.text!r} {value:+.2f}" for value, piece in largest)
        body.append(f"\nlargest: {named}", style="dim")
    return body
