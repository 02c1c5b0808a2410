"""Writes the page of the study, its pictures and its figures.

study.json has every figure that the page is made from, so that the page can be made again without
the runs:

    python -m examples.study --only page --figures docs/study.json
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.study import recommendation
from examples.study.arms import ROOT, RUNS, SEEDS, SMALL_RUNS, Claim, Verdict
from examples.study.figures import Figures, MissingFigures
from examples.study.small import is_small
from lopd.artifacts import publish_bytes

PAGE = "study.md"
FIGURES = "study.json"
# The controls against self-deception, which the page has first.
_CONTROLS = 8
_HEAD = """\
# The paper's claims, tested with seeds

This page is made from its runs by `bash examples/study/run.sh`. Do not edit it: what is said
besides the figures stands in the files of the claims in `examples/study/`.

```bash
bash examples/study/run.sh                      # 2.5 hours on two cores; goes on after a kill
bash examples/study/run.sh --claims 1 3         # some claims
bash examples/study/run.sh --only page --figures docs/study.json   # this page, without runs
```

Lightning OPD (arXiv 2604.13010) reports single runs of large models. Here its claims, and some of
others, are tested with tiny models of one task (sums of two-digit numbers, solved step by step, in
a vocabulary of 32 tokens), by this project's own stages. A seed decides the demonstrations, the
prompts, every draw and the order of the responses. Models are judged by 500 held-out prompts.
Differences are paired by seed, and intervals are 95% intervals by Student's t over the seeds. They
say how much another seed may change, and nothing about another task or larger models. Where an
interval holds 0, no difference was found; that is not the same as none. "greedy" is the share of
right answers of greedy decoding, "T=1" that of one sampled answer a prompt. The reverse KL is in
nats per token, over the model's own answers at T=1, against its teacher."""
_NOT_RUN = "**not run**"


@dataclass(frozen=True)
class Judged:
    """A claim and what the figures say of it."""

    claim: Claim
    # None where figures are missing.
    verdict: Verdict | None
    # Which figures are missing.
    missing: str


def judge(claims: Sequence[Claim], figures: Figures) -> list[Judged]:
    """Return the verdict of each claim that has its figures."""
    judged: list[Judged] = []
    for claim in claims:
        try:
            judged.append(Judged(claim, claim.judge(figures), ""))
        except MissingFigures as error:
            judged.append(Judged(claim, None, str(error)))
    return judged


def write_page(claims: Sequence[Claim], figures: Figures, seeds: Sequence[int], to: Path) -> None:
    """Write the page, the pictures and the figures.

    Args:
        claims: The claims, in the order of the page.
        figures: What was measured.
        seeds: The seeds that were asked for.
        to: The folder.
    """
    judged = judge(claims, figures)
    for one in judged:
        for plot in one.verdict.plots if one.verdict else ():
            plot.draw(to / plot.file)
    text = "\n\n".join([markdown(judged, seeds), *_recommendation(figures)])
    # After the judgement: the steps that it has asked for are kept as well.
    stored = {"seeds": [*seeds], **figures.as_json()}
    publish_bytes(to / FIGURES, _one_line_an_arm(stored).encode())
    publish_bytes(to / PAGE, (text + "\n").encode())


def _one_line_an_arm(stored: Mapping[str, Any]) -> str:
    """Return the figures as JSON in which a changed arm is a changed line."""
    parts = [f' "seeds": {json.dumps(stored["seeds"])}']
    for name in ("values", "steps", "files"):
        lines = [
            f"  {json.dumps(arm)}: {json.dumps(of, sort_keys=True)}"
            for arm, of in sorted(stored[name].items())
        ]
        parts.append(f' "{name}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read_figures(file: Path) -> tuple[Figures, list[int]]:
    """Return the figures that write_page() has written, and their seeds."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    return Figures.from_json(stored), [int(seed) for seed in stored["seeds"]]


def markdown(judged: Sequence[Judged], seeds: Sequence[int]) -> str:
    """Return the page."""
    parts = [_HEAD]
    named = ", ".join(map(str, seeds))
    absent = [seed for seed in SEEDS if seed not in seeds]
    without = f" Not yet in these figures: {', '.join(map(str, absent))}." if absent else ""
    parts.append(f"The seeds that were asked for: {named}.{without}")
    parts += _controls(judged)
    parts.append("## All verdicts")
    parts.append(_table(judged))
    parts += [_section(one) for one in judged]
    return "\n\n".join(parts)


def _controls(judged: Sequence[Judged]) -> list[str]:
    """Return what comes before everything else: how the controls have done."""
    found = [one for one in judged if one.claim.number == _CONTROLS]
    heading = "## First: does the teacher matter?"
    if not found or found[0].verdict is None:
        reason = found[0].missing if found else "this page is made of other claims"
        text = (
            f"The controls without a teacher's knowledge (claim {_CONTROLS}) were {_NOT_RUN} "
            f"({reason}). Until they are, a gain on this page does not prove that the teacher "
            "taught it."
        )
        return [heading, _filled(text)]
    (one,) = found
    assert one.verdict is not None
    return [heading, _filled(one.verdict.summary + f" See [claim {_CONTROLS}](#{_anchor(one)}).")]


def _table(judged: Sequence[Judged]) -> str:
    lines = ["| | claim | verdict | what the figures say |", "|---:|---|---|---|"]
    for one in judged:
        answer = _NOT_RUN if one.verdict is None else f"**{one.verdict.answer}**"
        # The rest stands in the claim's own section.
        summary = one.missing if one.verdict is None else _first_sentence(one.verdict.summary)
        title = f"[{_cell(one.claim.title)}](#{_anchor(one)})"
        lines.append(f"| {one.claim.number} | {title} | {answer} | {_cell(summary)} |")
    return "\n".join(lines)


def _first_sentence(text: str) -> str:
    # A point within a figure has no space behind it.
    return re.split(r"(?<=\.) +(?=[A-Z])", text, maxsplit=1)[0]


def _cell(text: str) -> str:
    # A bar would begin another cell, and a line break another row.
    return " ".join(text.replace("|", "\\|").split())


def _anchor(one: Judged) -> str:
    return f"claim-{one.claim.number}"


def _section(one: Judged) -> str:
    claim = one.claim
    # The number alone, so that the anchor stays the same when a title changes.
    parts = [f"## Claim {claim.number}", _filled(f"*{claim.title}*")]
    parts.append(_filled(f"Stated by: {claim.source}"))
    if one.verdict is None:
        parts.append(_filled(f"Verdict: {_NOT_RUN} ({one.missing})."))
    else:
        parts.append(_filled(f"Verdict: **{one.verdict.answer}**. {one.verdict.summary}"))
    parts.append(_filled(f"How it was tested: {claim.method}"))
    if one.verdict is not None:
        parts += [_wrapped(detail) for detail in one.verdict.details]
        for plot in one.verdict.plots:
            parts.append(f"![{_cell(plot.caption)}]({plot.file})")
            parts.append(_filled(f"*{plot.caption}*"))
    parts.append(_folders(claim))
    return "\n\n".join(parts)


def _recommendation(figures: Figures) -> list[str]:
    """Return how often the recommendation from a cache alone was right; nothing without caches."""
    try:
        parts = recommendation.section(figures)
    except MissingFigures:
        return []
    return [_wrapped(part) for part in parts]


def _folders(claim: Claim) -> str:
    """Return where the raw runs lie, after the command."""
    names = [*(arm.name for arm in claim.arms), *claim.reads]
    folders: dict[Path, list[str]] = {}
    for name in dict.fromkeys(names):
        runs = SMALL_RUNS if is_small(name) else RUNS
        folders.setdefault(runs, []).append(f"`{name.rpartition('/')[2]}`")
    lines = [
        f"in `{runs.relative_to(ROOT)}/seed-N/`: {', '.join(of)}" for runs, of in folders.items()
    ]
    return _filled(f"Raw runs: {'; '.join(lines)}." if lines else "It has no runs of its own.")


def _wrapped(markdown: str) -> str:
    """Return Markdown whose paragraphs have lines of the right length. Tables stay as they are."""
    blocks: list[str] = []
    for block in markdown.split("\n\n"):
        if block.startswith("- "):
            block = "\n".join(_filled(item, indent="  ") for item in block.split("\n"))
        elif not block.startswith(("#", "|", "!", "```")):
            block = _filled(block)
        blocks.append(block)
    return "\n\n".join(blocks)


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()),
        100,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
