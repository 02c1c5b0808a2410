"""The reverse KL between two weight syncs: what it is a mean of, and when a rise is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lopd.config import load_config
from lopd.report.metrics import MetricsLog, read_metrics
from lopd.stages import training_rank
from lopd.stages.held_out import HeldOutEvaluation
from lopd.stages.training_kl import TRAINING_REVERSE_KL, mean_between, rise_of, rises_of

ROOT = Path(__file__).resolve().parents[2]


def syncs(values: Sequence[float | None]) -> list[dict[str, Any]]:
    return [{"step": 4 * n, TRAINING_REVERSE_KL: value} for n, value in enumerate(values)]


def test_the_mean_is_of_the_steps_since_the_last_sync() -> None:
    train = [{"step": step, "reverse_kl": float(step)} for step in range(1, 9)]
    assert mean_between(train, 4, 8) == 6.5
    assert mean_between(train, 0, 0) is None
    # A cache that was imported without sampling log-probabilities gives no figure.
    assert mean_between([{"step": 1, "reverse_kl": None}], 0, 1) is None


@pytest.mark.parametrize(
    ("values", "is_told"),
    [
        ([None, 0.10, 0.11, 0.12, 0.13], True),
        ([None, 0.10, 0.20, 0.30], False),
        ([0.10, 0.09, 0.12, 0.13], False),
        ([0.100, 0.101, 0.102, 0.103], False),
        ([0.13, 0.12, 0.11, 0.10], False),
    ],
    ids=["three rises", "two rises", "a fall between", "less than a quarter", "it falls"],
)
def test_a_rise_is_told_after_three(values: list[float | None], is_told: bool) -> None:
    text = rise_of(syncs(values))
    assert ("rose at 3 weight syncs in a row" in text) is is_told
    assert rises_of(syncs(values)) == ([text] if is_told else [])


def test_a_former_rise_stays_in_the_manifest() -> None:
    evals = syncs([0.1, 0.2, 0.3, 0.4, 0.2, 0.1])
    assert rise_of(evals) == ""
    assert "from 0.1 (step 0) to 0.4 (step 12)" in rises_of(evals)[0]


def test_a_sync_reports_it_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line says what its figures were measured on; the fourth sync has risen three times."""
    log = MetricsLog(tmp_path)
    lines: list[str] = []
    job: Any = SimpleNamespace(
        stage="distill",
        num_steps=8,
        print_line=lines.append,
        config=SimpleNamespace(
            run=SimpleNamespace(dir=tmp_path), distill=SimpleNamespace(sync_every=2)
        ),
    )
    hook = HeldOutEvaluation(job, SimpleNamespace(engine=None))  # type: ignore[arg-type]
    hook._metrics = log
    # It writes the transcripts of answers that it has sampled, and here it samples none.
    hook._answers = None
    figures = {"accuracy": 0.5, "num_prompts": 8, "response_len": 3.0, "truncated_share": 0.0}
    hook._report("step 0/8", 0, figures)
    for step in range(1, 9):
        log.train("distill", step, {"loss": 1.0, "reverse_kl": step / 100})
        if step % 2 == 0:
            hook._report(f"step {step}/8", step, figures)
    log.close()
    found = [row.get(TRAINING_REVERSE_KL) for row in read_metrics(tmp_path, kind="eval")]
    assert found == [None, *(pytest.approx(value) for value in (0.015, 0.035, 0.055, 0.075))]
    assert lines[0] == "step 0/8: synced weights, accuracy 0.500 on 8 prompts"
    assert lines[1].endswith("reverse KL 0.0150 on the training rollouts of the last 2 steps")
    assert [line for line in lines if "WARNING" in line] == lines[-1:]


def test_a_resumed_training_says_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 tells it, and only if there was a checkpoint."""
    lines: list[str] = []
    settings = SimpleNamespace(batch_size=1)
    job: Any = SimpleNamespace(
        stage="distill", num_steps=16, order_seed=0, settings=settings, initial=None, init="random",
        config=SimpleNamespace(
            run=SimpleNamespace(dir=tmp_path, seed=1), sft=SimpleNamespace(init_std=0.02)
        ),
        checkpoints=None, print_line=lines.append, replays_routing=False,
    )  # fmt: skip
    monkeypatch.setattr(training_rank.parallel, "rank", lambda: 0)
    monkeypatch.setattr(training_rank, "_metrics_log", lambda job: MetricsLog(tmp_path))
    for step in (0, 4):
        trainer = SimpleNamespace(step=step, resume=lambda note: {})
        monkeypatch.setattr(training_rank, "Trainer", lambda *_, of=trainer, **__: of)
        training_rank.Training(job, cast(Any, ["a sample"]), cast(Any, None))
    assert lines == ["continues at step 5/16, from the checkpoint of step 4"]


def test_trackers_get_the_knobs_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(
        ROOT / "examples/tiny_moe.toml",
        [
            f"run.dir={tmp_path}",
            "report.trackers=[]",
            "report.project=mine",
            'sglang.extra_args={api_key="hidden from all"}',
        ],
    )
    log = training_rank._metrics_log(cast(Any, SimpleNamespace(config=config)))
    assert log._names == ()
    assert log._project == "mine"
    assert log._knobs["distill.num_steps"] == 16
    assert "hidden from all" in str(config.model_dump())
    assert "hidden from all" not in str(log._knobs)
