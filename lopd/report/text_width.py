"""How wide plain text on a screen may be, and which characters it may have."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator

# Columns in a file or a pipe, which have no width of their own. It is that of the pages.
_NO_TERMINAL = 100
# Longer lines are hard to read, however wide the terminal is.
_MOST = 120
# Below this every second word would have a line of its own.
_LEAST = 40


def text_width() -> int:
    """Return the columns for text: those of the terminal, or of ``COLUMNS``."""
    columns = shutil.get_terminal_size((_NO_TERMINAL, 24)).columns
    return max(_LEAST, min(_MOST, columns))


def wrapped(text: str, width: int, *, indent: str = "", later: str | None = None) -> Iterator[str]:
    """Yield the lines of a text. No word is broken, since it may be a path or a key to copy.

    Args:
        text: The text. Its own line breaks are not kept.
        width: The columns.
        indent: What the first line begins with.
        later: What the other lines begin with; None: the same.
    """
    yield from textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent if later is None else later,
        # Paths and keys are copied from the screen, so they are never cut.
        break_long_words=False,
        break_on_hyphens=False,
    )


# What a terminal would obey instead of showing it, except for line breaks and tabs, as the visible
# signs of Unicode. U+0080 to U+009F are commands too and have no such sign.
_SIGNS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    127: 0x2421,
    **dict.fromkeys(range(128, 160), 0xFFFD),
}


def printable(text: str) -> str:
    """Return text of a model or a file with a sign in place of each control character.

    A model may sample an escape sequence, which would change the reader's terminal.
    """
    return text.translate(_SIGNS)
