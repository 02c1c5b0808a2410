"""Makes the page: gathers the panels, and puts data, styles and scripts into one HTML file.

The data are JSON, compressed with gzip and written once in base64. The browser unpacks them itself
(DecompressionStream), so the page needs neither a server nor a network.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import lopd
from lopd.errors import DataError
from lopd.report.html.checks import checks_of
from lopd.report.html.comparing import comparisons, differing_knobs
from lopd.report.html.curves import charts_of
from lopd.report.html.fresh import fresh_charts, refreshes_of
from lopd.report.html.learning_curve import title_of
from lopd.report.html.overview import overview_of
from lopd.report.html.responses import SETS, answers_of
from lopd.report.html.source import Source
from lopd.report.html.timeline import timeline_of
from lopd.report.html.tokens import QUANTILES
from lopd.report.html.transcripts import (
    Chosen,
    Scanned,
    Texts,
    Vocabulary,
    budgets,
    choose,
    prompt_set,
    scan,
    token_panels,
)

# A file that mail and browsers take. The transcripts are what makes a page large.
MAX_BYTES = 10_000_000
# Tokens of transcripts to begin with. A token takes 1 to 8 bytes of the file, and a browser a
# second for a million of them.
_MAX_TOKENS = 1_500_000
# With fewer tokens of transcripts than this, a page that is too large cannot be made smaller.
_FEW_TOKENS = 1000
# In the order in which the browser must run them.
_SCRIPTS = (
    "page.js",
    "charts.js",
    "curves.js",
    "overview.js",
    "timeline.js",
    "tokens.js",
    "answers.js",
    "transcripts.js",
    "main.js",
)


def gather(
    sources: Sequence[Source],
    *,
    tokenizer: Path | None = None,
    seed: int = 0,
    max_tokens: int = _MAX_TOKENS,
    scans: Sequence[Sequence[Scanned]] | None = None,
) -> dict[str, Any]:
    """Return everything that the page shows, as JSON.

    Args:
        sources: What the report is about.
        tokenizer: A folder with the tokenizer, or None for that of a model of the run.
        seed: For the choice of transcripts where not all fit.
        max_tokens: How many tokens of transcripts the page may have.
        scans: Those of scan_all(), or None to read all responses here.

    Raises:
        LopdError: An artifact is damaged, or the tokenizer cannot be read.
    """
    scans = scan_all(sources) if scans is None else scans
    vocabulary = Vocabulary()
    chosen = _chosen(scans, max_tokens, seed)
    runs = []
    for source, found in zip(sources, scans, strict=True):
        texts = Texts(found[0].answers.folder if found else source.folder, tokenizer)
        sets = []
        for name, prompts in chosen.items():
            of_set = [one for one in found if one.answers.prompt_set == name]
            if of_set:
                sets.append(prompt_set(name, of_set, prompts, texts, vocabulary))
        runs.append({**_panels(source, found, texts), "sets": sets})
    return {
        "version": lopd.__version__,
        "runs": runs,
        "charts": [*charts_of(sources), *fresh_charts(scans)],
        "quantiles": QUANTILES,
        "knobs": differing_knobs(sources),
        "comparisons": comparisons(sources, scans),
        "vocabulary": vocabulary.rows,
    }


def _chosen(scans: Sequence[Sequence[Scanned]], max_tokens: int, seed: int) -> dict[str, Chosen]:
    """Return the prompts of each set that the page holds, the same ones for all sources."""
    by_set: dict[str, list[Scanned]] = {}
    for name in SETS:
        of_set = [one for found in scans for one in found if one.answers.prompt_set == name]
        if of_set:
            by_set[name] = of_set
    costs = [sum(sum(one.tokens.values()) for one in of_set) for of_set in by_set.values()]
    shares = budgets(costs, max_tokens)
    return {
        name: choose(of_set, share, seed)
        for (name, of_set), share in zip(by_set.items(), shares, strict=True)
    }


def _panels(source: Source, scans: Sequence[Scanned], texts: Texts) -> dict[str, Any]:
    """Return all panels of one source but its transcripts."""
    tokens = token_panels(scans, texts)
    return {
        "name": source.name,
        "learning_title": title_of(source),
        "overview": overview_of(source, scans),
        "checks": [asdict(check) for check in checks_of(source, scans, tokens)],
        "timeline": [asdict(span) for span in timeline_of(source)],
        "refreshes": refreshes_of(source),
        "tokens": tokens,
        "has_tokenizer": texts.has_tokenizer,
    }


def scan_all(sources: Sequence[Source]) -> list[list[Scanned]]:
    """Read all responses of all sources once.

    Raises:
        ArtifactError: A shard is damaged.
    """
    return [[scan(answers) for answers in answers_of(source)] for source in sources]


def render(data: dict[str, Any], docs: str) -> bytes:
    """Return the page.

    Args:
        data: What gather() returns.
        docs: The address before the name of a page of docs/; "" if there is none.
    """
    names = ", ".join(run["name"] for run in data["runs"])
    scripts = [_text("vendor", "uPlot.iife.min.js"), *(_text("assets", one) for one in _SCRIPTS)]
    parts = {
        "TITLE": html.escape(f"lopd report: {names}"),
        "HEADING": html.escape(f"Report of {names}"),
        "STYLES": _text("vendor", "uPlot.min.css") + _text("assets", "page.css"),
        # A script ends at the first "</script", also within a string.
        "SCRIPTS": "\n".join(scripts).replace("</script", "<\\/script"),
        "DATA": packed({**data, "docs": docs}),
    }
    page = _text("assets", "page.html")
    for name, content in parts.items():
        page = page.replace(f"<!--{name}-->", content, 1)
    return page.encode()


def packed(data: dict[str, Any]) -> str:
    """Return data as compressed JSON in base64. The same data give the same text."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    # A prompt may hold half of a surrogate pair, which UTF-8 refuses. mtime=0: no time of day.
    raw = text.encode("utf-8", "replace")
    return base64.b64encode(gzip.compress(raw, 9, mtime=0)).decode()


def make_page(
    sources: Sequence[Source], *, docs: str, tokenizer: Path | None = None, seed: int = 0
) -> tuple[bytes, dict[str, Any]]:
    """Return a page below MAX_BYTES, and the data that it shows.

    Raises:
        LopdError: See gather(); or the page is too large even with few transcripts.
    """
    scans = scan_all(sources)
    # Where all transcripts fit, fewer of them are tried at once if the page is too large.
    needed = sum(sum(one.tokens.values()) for found in scans for one in found)
    max_tokens = min(_MAX_TOKENS, needed)
    while True:
        data = gather(sources, tokenizer=tokenizer, seed=seed, max_tokens=max_tokens, scans=scans)
        page = render(data, docs)
        if len(page) < MAX_BYTES:
            return page, data
        if max_tokens < _FEW_TOKENS:
            break
        # In proportion, and a little less: a page has more than transcripts.
        max_tokens = round(max_tokens * min(0.9, 0.9 * MAX_BYTES / len(page)))
    raise DataError(
        f"the page has {len(page):,} bytes even without transcripts",
        where=", ".join(source.name for source in sources),
        limit=f"at most {MAX_BYTES:,} bytes",
        remedy="give fewer runs",
    )


def docs_beside(out: Path) -> str:
    """Return the address of docs/ as seen from a page in a checkout of lopd, or ""."""
    root = Path(lopd.__file__).resolve().parents[1]
    folder = root / "docs"
    # A page outside of the checkout would lose its links as soon as either of them is moved.
    if not (folder / "understand.md").is_file() or not out.resolve().is_relative_to(root):
        return ""
    # Relative, so that a page names no folder of this machine and moves with the checkout.
    return Path(os.path.relpath(folder, out.resolve().parent)).as_posix()


def _text(folder: str, name: str) -> str:
    return resources.files("lopd.report.html").joinpath(folder, name).read_text(encoding="utf-8")
