"""What summary.json warns of."""

from __future__ import annotations

from typing import Any

import pytest

from lopd.report.console import show_summary
from lopd.summary import warnings_of_drift, warnings_of_harm


def summary_of(accuracy: float, reverse_kl: float) -> dict[str, Any]:
    """A summary whose SFT student has an accuracy of 0.50 and a reverse KL of 0.20."""
    errors = {"sft": 0.03, "distilled": 0.04}
    return {
        "accuracy": {"sft": 0.50, "distilled": accuracy},
        "accuracy_standard_error": errors,
        "reverse_kl": {"sft": 0.20, "distilled": reverse_kl},
        "reverse_kl_standard_error": {name: error / 10 for name, error in errors.items()},
        "evaluation": {"temperature": 0.6, "top_p": 0.95},
    }


@pytest.mark.parametrize(
    ("accuracy", "reverse_kl", "metrics"),
    [
        # The error of the difference is 0.05, and 0.005 for the reverse KL.
        (0.39, 0.20, ["accuracy"]),
        (0.41, 0.209, []),
        (0.60, 0.211, ["the reverse KL"]),
        (0.30, 0.30, ["accuracy", "the reverse KL"]),
        (0.90, 0.01, []),
    ],
)
def test_a_student_that_got_worse_is_told_of(
    accuracy: float, reverse_kl: float, metrics: list[str]
) -> None:
    found = warnings_of_harm(summary_of(accuracy, reverse_kl))
    assert len(found) == len(metrics)
    for line, metric in zip(found, metrics, strict=True):
        assert line.startswith(f"WARNING: distill: {metric} got worse than that of the SFT student")
        assert "lower distill.optimizer.lr" in line


def test_a_student_that_left_its_rollouts_is_told_of() -> None:
    def steps(*shares: float | None) -> list[dict[str, Any]]:
        return [{"effective_sample_share": share} for share in shares]

    (line,) = warnings_of_drift(steps(1.0, 0.4, 0.4, 0.4, 0.44))
    assert line.startswith("WARNING: distill: effective_sample_share of the last steps is 0.41")
    assert line.index("distill.optimizer.lr") < line.index("distill.refresh")
    # The controls: it was low and has come back, and no step has the figure.
    assert warnings_of_drift(steps(0.1, 0.1, 0.6, 0.6, 0.6, 0.6)) == []
    assert warnings_of_drift(steps(None)) == warnings_of_drift([]) == []


def test_a_run_without_both_models_has_nothing_to_compare() -> None:
    assert warnings_of_harm({"accuracy": {"distilled": 0.1}, "reverse_kl": {"sft": 0.1}}) == []


def test_the_table_says_how_answers_were_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    show_summary(summary_of(0.6, 0.1))
    assert "accuracy at temperature 0.6, top-p 0.95" in capsys.readouterr().out
