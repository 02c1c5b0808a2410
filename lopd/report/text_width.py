"""How wide plain text on a screen may be."""

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
        break_long_words=False,
        break_on_hyphens=False,
    )
