"""The loss that was used is the one that the learning curve and the model card name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lopd import pipeline
from lopd.config import load_config
from lopd.config.distill import LOSS_TITLES
from lopd.objective.registry import LOSSES
from lopd.report.html import learning_curve
from tests.stand_ins import StandIns, write_project


def test_each_loss_has_words() -> None:
    assert LOSS_TITLES.keys() == LOSSES.keys()


@pytest.mark.parametrize(
    ("loss", "words", "others"),
    [
        ("lightning", "Lightning OPD", "top-K"),
        ("top_k_reverse_kl", "the top-K reverse KL", "by Lightning OPD"),
    ],
)
def test_curve_and_card_name_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, words: str, others: str
) -> None:
    titles: list[str] = []

    def render(*parts: Any, title: str) -> bytes:
        titles.append(title)
        return b""

    monkeypatch.setattr(learning_curve, "render_learning_curve", render)
    StandIns().install(monkeypatch)
    top_k = [] if loss == "lightning" else ["score.top_k=2"]
    project = write_project(tmp_path)
    pipeline.run(load_config(project, [f"distill.objective.loss={loss}", *top_k]))
    assert set(titles) == {f"Distillation by {words}"}
    card = (tmp_path / "run/export/model/README.md").read_text()
    assert f"Distilled by {words} (" in card
    assert others not in card
    assert ("lightning-opd" in card) == (loss == "lightning")
