"""The report of the README's example in docs/ is whole, small, and says what the README says."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lopd.report.html.page import render

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "report_example.html"
# A row of the README's table: the model, its accuracy and the error behind it.
ROW = re.compile(r"^\| \**([\w ,()]+?)\** \| \**([\d.]+) ± [\d.]+\** \|", re.MULTILINE)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    found = re.search(rb'id="data"[^>]*>([A-Za-z0-9+/=]+)<', PAGE.read_bytes())
    assert found is not None
    return dict(json.loads(gzip.decompress(base64.b64decode(found[1]))))


def test_it_is_small_and_made_by_the_scripts_of_today(data: dict[str, Any]) -> None:
    """docs/example_report.py --again writes it anew without a run."""
    assert PAGE.stat().st_size < 3_000_000
    # Another zlib may pack the same data in another way.
    assert around(PAGE.read_bytes()) == around(render(data, data["docs"]))


def around(page: bytes) -> bytes:
    """A page without its data."""
    without, count = re.subn(rb'(?<=octet-stream">)[A-Za-z0-9+/=]+', b"", page)
    assert count == 1
    return without


def test_the_readme_has_its_accuracies(data: dict[str, Any]) -> None:
    rows = {row["title"]: 100 * row["accuracy"][0] for row in data["runs"][0]["overview"]["models"]}
    told = {name.split(" (")[0]: float(value) for name, value in table()}
    assert told.keys() == rows.keys()
    for name, value in told.items():
        assert value == pytest.approx(rows[name], abs=0.0501), name


def table() -> list[tuple[str, str]]:
    return ROW.findall((ROOT / "README.md").read_text())


def test_the_learning_curve_of_the_readme_is_drawn_by_the_report() -> None:
    mark = b"Software\x00lopd report"
    assert mark in (ROOT / "docs" / "learning_curve.png").read_bytes()
    # The control: a picture of Chromium has no such mark.
    assert mark not in (ROOT / "docs" / "report.png").read_bytes()
    assert "docs/learning_curve.png" in (ROOT / "README.md").read_text()
