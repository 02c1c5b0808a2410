"""The picture of the learning curve: drawn from what a run has, whatever that is."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from lopd.errors import DataError
from lopd.report.curve import PANELS, PICTURE, draw_learning_curve, panels_of, render_learning_curve
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


def test_curve_is_drawn_from_the_run_directory(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in TRAIN + EVALS))
    before_summary = draw_learning_curve(tmp_path, title="a loss").read_bytes()
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    path = draw_learning_curve(tmp_path, title="a loss")
    assert path == tmp_path / PICTURE
    width, height = size_of(path.read_bytes())
    assert width > 3 * height
    assert path.read_bytes() != before_summary  # the baselines are in it


@pytest.mark.parametrize(
    ("train", "evals", "summary"),
    [
        (TRAIN[:1], [], {}),
        ([{"step": 1, "loss": None, "reverse_kl": None}], EVALS[:1], {}),
        (
            [{"step": 1, "loss": 0.5, "reverse_kl": 0.0}],
            [{"step": 1, "accuracy": 1.0}],
            {"accuracy": {"teacher": 1.0, "distilled": 1.0}},
        ),
    ],
    ids=["one step", "nothing finite", "zero divergence, perfect accuracy"],
)
@pytest.mark.filterwarnings("error")
def test_a_poor_run_is_drawn_without_a_warning(
    train: list[Any], evals: list[Any], summary: dict[str, Any]
) -> None:
    size_of(render_learning_curve(train, evals, summary, title="poor"))


def test_without_metrics_there_is_no_curve(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"there are no training metrics of the stage distill.*run the stage distill first",
    ):
        draw_learning_curve(tmp_path, title="a loss")


def test_two_reverse_kls_have_two_panels_that_say_what_was_measured() -> None:
    """One is of frozen responses to training prompts, the other of fresh ones to held-out prompts;
    without accuracy its panel is not there.
    """
    assert panels_of(EVALS, SUMMARY) == [
        "loss",
        "training_reverse_kl",
        "held_out_reverse_kl",
        "accuracy",
    ]
    assert "training rollouts" in PANELS["training_reverse_kl"]
    assert "held-out prompts" in PANELS["held_out_reverse_kl"]
    open_ended = [{"step": 0, "response_len": 12.0}]
    assert panels_of(open_ended, {})[2:] == ["response_len"]
    size_of(render_learning_curve(TRAIN, open_ended, {}, title="open-ended"))


def test_the_band_is_the_interval_of_the_metrics() -> None:
    """At 0 of 8 it is not empty, as one standard error would be."""
    bare = [{"step": step, "accuracy": 0.0, "num_prompts": 8} for step in (0, 8)]
    banded = [{**row, "accuracy_interval": [0.0, 0.32]} for row in bare]
    pictures = [render_learning_curve(TRAIN, rows, {}, title="band") for rows in (bare, banded)]
    assert pictures[0] != pictures[1]
