"""The picture of the learning curve: drawn from what a run has, whatever that is."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lopd.errors import DataError
from lopd.report.html.curves import charts_of
from lopd.report.html.learning_curve import (
    PICTURE,
    draw_learning_curve,
    learning_charts,
    render_learning_curve,
)
from lopd.report.html.source import Source
from lopd.report.metrics import METRICS

TRAIN = [
    {
        "kind": "train",
        "stage": "distill",
        "step": step,
        "loss": 1.0 / step,
        "reverse_kl": 0.3 / step,
    }
    for step in range(1, 17)
]
EVALS = [
    {
        "kind": "eval",
        "stage": "distill",
        "step": step,
        "accuracy": 0.5 + step / 40,
        "num_prompts": 128,
    }
    for step in (0, 8, 16)
]
SUMMARY = {
    "accuracy": {"teacher": 0.98, "base": 0.44, "sft": 0.6, "distilled": 0.97, "num_prompts": 9},
    "reverse_kl": {"base": 0.5, "sft": 0.26, "teacher": 0.0},
}


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def run_of(
    folder: Path, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None = None
) -> Path:
    """A run directory with the files that a learning curve is drawn from."""
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def charts(folder: Path, rows: Sequence[Mapping[str, Any]], summary: dict[str, Any]) -> list[Any]:
    source = Source(run_of(folder, rows), "run", "run", {}, summary, {})
    return learning_charts(charts_of([source]))


def test_curve_is_drawn_from_the_run_directory(tmp_path: Path) -> None:
    rows = TRAIN + EVALS
    before_summary = draw_learning_curve(run_of(tmp_path, rows), title="a loss").read_bytes()
    path = draw_learning_curve(run_of(tmp_path, rows, SUMMARY), title="a loss")
    assert path == tmp_path / PICTURE
    width, height = size_of(path.read_bytes())
    assert width > 3 * height
    assert path.read_bytes() != before_summary  # the baselines are in it


ONE = {"kind": "train", "stage": "distill", "step": 1}


@pytest.mark.parametrize(
    ("rows", "summary"),
    [
        (TRAIN[:1], {}),
        ([{**ONE, "loss": None, "reverse_kl": None}, EVALS[0]], {}),
        (
            [{**ONE, "loss": 0.0, "reverse_kl": 0.0}, {**EVALS[0], "accuracy": 1.0}],
            {"accuracy": {"teacher": 1.0, "distilled": 1.0}, "reverse_kl": {"distilled": 0.0}},
        ),
        ([{**ONE, "loss": -0.5}, {**EVALS[0], "accuracy": 0.0}], {}),
    ],
    ids=["one step", "nothing finite", "no loss, perfect accuracy", "below 0, never right"],
)
@pytest.mark.filterwarnings("error")
def test_a_poor_run_is_drawn_without_a_warning(
    tmp_path: Path, rows: list[Any], summary: dict[str, Any]
) -> None:
    size_of(render_learning_curve(charts(tmp_path, rows, summary), title="poor"))


def test_without_metrics_there_is_no_curve(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"there are no training metrics of the stage distill.*run the stage distill first",
    ):
        draw_learning_curve(tmp_path, title="a loss")


def test_two_reverse_kls_have_two_panels_that_say_what_was_measured(tmp_path: Path) -> None:
    """One is of frozen responses to training prompts, the other of fresh ones to held-out prompts;
    without accuracy its panel is not there.
    """
    found = {one["name"]: one for one in charts(tmp_path, TRAIN + EVALS, SUMMARY)}
    assert [*found] == ["loss", "reverse_kl", "held_out_reverse_kl", "accuracy"]
    assert "training rollouts" in found["reverse_kl"]["title"]
    assert "held-out prompts" in found["held_out_reverse_kl"]["title"]
    # The teacher does not differ from itself, and a logarithmic axis has no 0.
    levels = found["held_out_reverse_kl"]["levels"]
    assert [(one["model"], one["value"]) for one in levels] == [("base", 0.5), ("sft", 0.26)]
    # An estimate that is not above 0 is shown too, on a linear axis.
    below = {"reverse_kl": {"sft": 0.26, "distilled": -0.001}}
    (chart,) = [one for one in charts(tmp_path, TRAIN, below) if one["levels"]]
    assert [one["value"] for one in chart["levels"]] == [0.26, -0.001]
    size_of(render_learning_curve([chart], title="below 0"))
    lengths = {"kind": "eval", "stage": "distill", "step": 0, "response_len": 12.0}
    open_ended = charts(tmp_path, [*TRAIN, lengths], {})
    assert [one["name"] for one in open_ended][2:] == ["response_len"]
    size_of(render_learning_curve(open_ended, title="open-ended"))


def test_the_band_is_the_interval_of_the_metrics(tmp_path: Path) -> None:
    """At 0 of 8 it is not empty, as one standard error would be."""
    bare = [{**row, "accuracy": 0.0, "num_prompts": 8} for row in EVALS]
    banded = [{**row, "accuracy_interval": [0.0, 0.32]} for row in bare]
    found = [charts(tmp_path, TRAIN + rows, {})[-1] for rows in (bare, banded)]
    assert found[1]["series"][0]["high"] == [32.0] * 3
    assert found[1]["series"][0]["n"] == [8] * 3
    pictures = [render_learning_curve([one], title="band") for one in found]
    assert pictures[0] != pictures[1]


def test_every_chart_has_a_title_and_names_its_axes(tmp_path: Path) -> None:
    rows = [{**row, "advantage": -0.1, "advantage_std": 0.2} for row in TRAIN]
    source = Source(run_of(tmp_path, rows + EVALS), "run", "run", {}, SUMMARY, {})
    found = charts_of([source])
    assert all(one["title"] and one["unit"] and one["x_title"] for one in found)
    (advantage,) = [one["series"][0] for one in found if one["name"] == "advantage"]
    assert (advantage["low"][0], advantage["high"][0]) == (-0.3, 0.1)
    assert advantage["band"] == "one standard deviation"
