"""metrics.jsonl and TensorBoard: whole lines only, and none twice after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lopd.errors import ArtifactError
from lopd.report.metrics import METRICS, MetricsLog, read_metrics


@pytest.fixture(autouse=True)
def first_files_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads event files by their names, which end with a count of the process: the
    tenth one of a second would come before the ninth. A resumed run is a new process.
    """
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def train(
    folder: Path,
    first: int,
    last: int,
    *,
    truncate: int | None = None,
    stage: str = "distill",
    loss: float = 1.0,
) -> None:
    """Steps first..last as a trainer logs them, resumed from a checkpoint at ``truncate``."""
    log = MetricsLog(folder)
    if truncate is not None:
        log.truncate_after(stage, truncate)
    for step in range(first, last + 1):
        log.train(stage, step, {"loss": loss})
        if step % 2 == 0:
            log.eval(stage, step, {"accuracy": 0.5})
    log.close()


def steps(folder: Path, **wanted: str) -> list[int]:
    return [row["step"] for row in read_metrics(folder, **wanted)]


def scalars(folder: Path, stage: str, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a tag as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard" / stage))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_lines_have_kind_stage_step_and_figures(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.train("sft", 1, {"loss": 2.0, "grad_norm": float("nan")})
    log.eval("sft", 1, {"accuracy": 0.5, "note": "held out"})
    log.close()
    assert [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()] == [
        {"kind": "train", "stage": "sft", "step": 1, "loss": 2.0, "grad_norm": None},
        {"kind": "eval", "stage": "sft", "step": 1, "accuracy": 0.5, "note": "held out"},
    ]
    assert scalars(tmp_path, "sft", "train/loss") == [(1, 2.0)]
    assert scalars(tmp_path, "sft", "eval/accuracy") == [(1, 0.5)]


def test_resumed_run_doubles_no_line_and_leaves_other_stages_alone(tmp_path: Path) -> None:
    train(tmp_path, 1, 3, stage="sft")
    train(tmp_path, 1, 5)
    # The run was killed after step 5, and its last checkpoint is of step 2.
    train(tmp_path, 3, 6, truncate=2, loss=9.0)
    assert steps(tmp_path, kind="train", stage="distill") == [1, 2, 3, 4, 5, 6]
    assert steps(tmp_path, kind="eval", stage="distill") == [2, 4, 6]
    assert steps(tmp_path, kind="train", stage="sft") == [1, 2, 3]
    assert [row["loss"] for row in read_metrics(tmp_path, kind="train", stage="distill")] == [
        1.0,
        1.0,
        9.0,
        9.0,
        9.0,
        9.0,
    ]
    assert scalars(tmp_path, "distill", "train/loss") == [
        (1, 1.0),
        (2, 1.0),
        (3, 9.0),
        (4, 9.0),
        (5, 9.0),
        (6, 9.0),
    ]


def test_without_truncation_lines_would_double(tmp_path: Path) -> None:
    train(tmp_path, 1, 5)
    train(tmp_path, 3, 6)
    assert steps(tmp_path, kind="train") == [1, 2, 3, 4, 5, 3, 4, 5, 6]
    assert len(scalars(tmp_path, "distill", "train/loss")) == 9


def test_a_start_from_nothing_drops_the_evaluation_at_step_0_too(tmp_path: Path) -> None:
    for _ in range(2):
        log = MetricsLog(tmp_path)
        log.truncate_after("distill", 0)
        log.eval("distill", 0, {"accuracy": 0.5})
        log.train("distill", 1, {"loss": 1.0})
        log.close()
    assert steps(tmp_path) == [0, 1]
    assert scalars(tmp_path, "distill", "eval/accuracy") == [(0, 0.5)]


def test_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    train(tmp_path, 1, 1)
    with (tmp_path / METRICS).open("a") as handle:
        handle.write('{"kind": "train", "stage": "distill", "st')
    assert steps(tmp_path) == [1]
    train(tmp_path, 2, 3)
    assert steps(tmp_path, kind="train") == [1, 2, 3]


def test_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"kind": "train", "stage": "sft", "step": 1}\n[]\n')
    with pytest.raises(ArtifactError, match=r"metrics.jsonl:2: this is not a line of metrics"):
        read_metrics(tmp_path)
    assert read_metrics(tmp_path / "absent") == []


def test_two_logs_of_one_run_can_be_open_when_one_truncates(tmp_path: Path) -> None:
    """A log holds no handle of metrics.jsonl, so lines written after the file was replaced are not
    lost.
    """
    first = MetricsLog(tmp_path)
    second = MetricsLog(tmp_path)
    first.train("sft", 1, {"loss": 1.0})
    second.train("distill", 1, {"loss": 1.0})
    MetricsLog(tmp_path).truncate_after("distill", 0)
    first.train("sft", 2, {"loss": 1.0})
    rows: list[Any] = read_metrics(tmp_path)
    first.close()
    second.close()
    assert [(row["stage"], row["step"]) for row in rows] == [("sft", 1), ("sft", 2)]
