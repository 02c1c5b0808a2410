"""What a run has found: a table for the screen, and the one of docs/gpu_results.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import ROOT
from benchmarks.gpu.sheet import DONE, shown

from lopd.errors import ArtifactError

PAGE = ROOT / "docs/gpu_results.md"
BEGIN = "<!-- written by benchmarks/gpu/run.sh --report: begin -->"
END = "<!-- end -->"
LONGEST = 90  # characters of a reason on the screen


def read(folder: Path) -> list[dict[str, Any]]:
    """The parts' sheets, in their order."""
    files = sorted(file for file in folder.glob("[0-9]-*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def table(folder: Path) -> str:
    """A line for every figure and for everything that is missing."""
    lines = []
    for sheet in read(folder):
        dry = ", dry run on a CPU" if sheet["dry_run"] else ""
        lines.append(f"{sheet['part']}: {sheet['status']}{dry} ({sheet.get('seconds', 0):.0f} s)")
        for name, what in rows(sheet):
            lines.append(f"    {name:<44} {what[:LONGEST]}")
    return "\n".join(lines)


def rows(sheet: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and content of every line of a sheet."""
    for name, figures in sheet["figures"].items():
        yield name, ", ".join(f"{key} {shown(value)}" for key, value in figures.items())
    yield from sheet["needs"].items()
    if sheet["status"] != DONE:
        yield sheet["status"], sheet.get("reason", "it did not end")


def markdown(sheets: list[dict[str, Any]]) -> str:
    """The page's table. ArtifactError: there is no figure of a GPU."""
    if not sheets:
        raise ArtifactError("no figures are here", remedy="run benchmarks/gpu/run.sh on a GPU")
    for sheet in sheets:
        if sheet["dry_run"]:
            what = f"the figures of {sheet['part']!r} are those of a dry run on a CPU"
            remedy = "run benchmarks/gpu/run.sh without --dry-run on a GPU"
            raise ArtifactError(what, remedy=remedy)
    here = next((one["machine"] for one in sheets if one.get("machine", {}).get("gpu")), None)
    if here is None:
        raise ArtifactError("no part has seen a GPU", remedy="run it on a machine with one")
    lines = [f"{here['gpus']} x {here['gpu']}; {versions(sheets)}.", ""]
    lines.append("| part | what | figures |")
    lines.append("|---|---|---|")
    for sheet in sheets:
        for name, what in rows(sheet):
            cells = [sheet["part"], name, what]
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def versions(sheets: list[dict[str, Any]]) -> str:
    """Of every package that a part has had; parts can differ (SGLang needs a transformers of its
    own)."""
    found: dict[str, list[str]] = {}
    for sheet in sheets:
        for name, version in sheet.get("machine", {}).get("versions", {}).items():
            known = found.setdefault(name, [])
            if version not in known:
                known.append(version)
    return ", ".join(f"{name} {' and '.join(known)}" for name, known in found.items())


def write_page(folder: Path, page: Path = PAGE) -> None:
    """Puts the table between the page's two marks. ArtifactError: the page has none."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ArtifactError(f"the marks {BEGIN} and {END} are missing", where=str(page))
    found = f"{before}{BEGIN}\n{markdown(read(folder))}\n{END}{after}"
    page.write_text(found, encoding="utf-8")
