"""What ``lopd audit`` shows in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from lopd.report.cache_view import show_line, show_table

# Yellow is for "not enough tokens", which is neither good nor bad.
_VERDICTS = {"consistent": "bold green", "inconsistent": "bold red", "cannot tell": "bold yellow"}
_CURVES = {
    "by_position": "position, from",
    "by_entropy": "entropy, from",
    "by_kind": "kind of the token before",
}


def show_audit(result: Mapping[str, Any], picture: object = None) -> None:
    """Print the verdict, the statistics behind it, and the curves.

    Args:
        result: An audit as JSON, with ``temperature`` and ``top_p``.
        picture: The path of the picture, if there is one.
    """
    verdict = (result["verdict"], _VERDICTS[result["verdict"]])
    figures = f": z = {result['z']:+.2f}, p = {result['p_value']:.2g}"
    Console(highlight=False).print(Text.assemble(verdict, figures))
    mean = f"{result['mean']:+.6f} ± {result['standard_error']:.6f} nats per token"
    size = f"{result['tokens']:,} tokens of {result['responses']:,} responses"
    asked = f"temperature {result['temperature']:g}, top-p {result['top_p']:g}"
    show_line(f"log p + entropy: {mean} over {size}, at {asked}")
    # How much the verdict is worth: a small text can hide a large drift.
    shown = f"a drift of {result['detectable']:.6f} with probability {result['power']:.0%}"
    needed = f"{result['tolerance']:g} needs {result['tokens_needed']:,} tokens"
    show_line(f"so many show {shown}; {needed}")
    # One such token is enough to exclude the teacher, so it is said in a line of its own.
    if result["impossible"]:
        reason = "are outside the nucleus: it cannot have sampled them"
        show_line(f"{result['impossible']:,} tokens {reason}", "red")
    # A curve without points, such as kinds without a tokenizer, is left out.
    for name, title in _CURVES.items():
        rows = [_row(point) for point in result[name]]
        if rows:
            columns = (title, "tokens", "mean", "standard error", "in errors")
            show_table(f"by {title}", columns, rows)
    if picture is not None:
        show_line(f"picture: {picture}")


def _row(point: Mapping[str, Any]) -> tuple[str, ...]:
    error = point["standard_error"]
    # A group of certain tokens has no uncertainty, and its drift is no multiple of it.
    in_errors = f"{point['mean'] / error:+.1f}" if error > 0 else ""
    return (
        point["name"],
        f"{point['tokens']:,}",
        f"{point['mean']:+.6f}",
        f"{error:.6f}",
        in_errors,
    )
