"""What every part of the run has in common: its arguments, and where things are."""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def arguments(description: str | None, *, form: bool = False) -> argparse.Namespace:
    """out: the JSON file. dry_run: a tiny size on a CPU. variant: which of a part's runs."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--dry-run", action="store_true", help="a tiny size on a CPU")
    parser.add_argument("--variant", default="", help="which of the part's runs")
    parser.add_argument("--form", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.out and not (form and options.form):
        parser.error("--out is missing: the JSON file to write")
    return options


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
