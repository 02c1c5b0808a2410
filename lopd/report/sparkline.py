"""A curve of one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Eight heights of a character, from the lowest to the highest.
BLOCKS = "▁▂▃▄▅▆▇█"
# For a terminal or a file without these characters.
PLAIN = "_.-=+*#@"


def sparkline(values: Sequence[float], width: int, levels: str = BLOCKS) -> str:
    """Return a curve. The lowest value has the first level and the highest the last.

    Args:
        values: In order. What is not finite is left out.
        width: The most characters. With more values, each character is a mean.
        levels: The characters from low to high.
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    # As many values a character as needed, and the last character has the newest ones.
    size = math.ceil(len(known) / max(1, width))
    first = len(known) % size
    starts = ([0] if first else []) + [*range(first, len(known), size)]
    ends = [*starts[1:], len(known)]
    means = [sum(known[start:end]) / (end - start) for start, end in zip(starts, ends, strict=True)]
    low = min(means)
    span = max(means) - low
    # A flat curve is a low line and not an empty one.
    scale = (len(levels) - 1) / span if span else 0.0
    return "".join(levels[round((mean - low) * scale)] for mean in means)
