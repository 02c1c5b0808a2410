"""Trackers get every metric, also after a resume, and their failure ends no training."""

from __future__ import annotations

import importlib
import json
import math
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lopd.artifacts import publish_json
from lopd.config import config_from
from lopd.errors import ConfigError
from lopd.report import trackers
from lopd.report.metrics import MetricsLog, bring_back, read_metrics, set_aside
from lopd.report.trackers import TrackedTraining, missing_package


def write(folder: Path, name: str, first: int, last: int, *, resumed: bool = False) -> None:
    """Log steps first..last as a trainer does; resumed from a checkpoint before ``first``."""
    log = MetricsLog(folder, trackers=[name], project="a project", knobs={"run.seed": 17})
    if resumed:
        log.truncate_after("distill", first - 1)
    for step in range(first, last + 1):
        log.train("distill", step, {"loss": 1 / step, "grad_norm": math.inf, "note": "text"})
    log.eval("distill", last, {"avg@4": 0.5, "accuracy_interval": [0.1, 0.9]})
    log.close()


class Recorded:
    """A tracker that keeps what it is given, and fails from a step on."""

    def __init__(self, fails_at: int = 10**9) -> None:
        self.rows: list[tuple[str, int, dict[str, float]]] = []
        self.fails_at = fails_at
        self.closed = False

    def log(self, kind: str, step: int, figures: Mapping[str, float]) -> None:
        if step >= self.fails_at:
            raise RuntimeError("no more room\nat the makers of the tracker")
        self.rows.append((kind, step, dict(figures)))

    def close(self) -> None:
        self.closed = True


def installed(patch: pytest.MonkeyPatch, open_one: Callable[[TrackedTraining], Any]) -> None:
    """Let a tracker of a test stand in for W&B."""
    patch.setattr("lopd.report.metrics.missing_package", lambda name: None)
    patch.setattr("lopd.report.metrics.open_tracker", lambda name, training: open_one(training))


def test_a_failing_tracker_ends_no_training_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = Recorded(fails_at=3)
    installed(monkeypatch, lambda training: recorded)
    write(tmp_path, "wandb", 1, 5)
    assert [step for _, step, _ in recorded.rows] == [1, 2]
    assert recorded.rows[0][2].keys() == {"loss", "grad_norm"}
    assert len(read_metrics(tmp_path, kind="train")) == 5
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("distill WARNING: the tracker wandb has failed (no more room)")
    assert not recorded.closed
    sound = Recorded()
    installed(monkeypatch, lambda training: sound)
    write(tmp_path, "wandb", 1, 5)
    assert len(sound.rows) == 6
    assert sound.closed
    assert capsys.readouterr().out == ""


def test_a_tracker_that_cannot_be_opened_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(training: TrackedTraining) -> Any:
        raise ConnectionError("no route to the server")

    installed(monkeypatch, refuse)
    write(tmp_path, "mlflow", 1, 3)
    assert len(read_metrics(tmp_path, kind="train")) == 3
    assert capsys.readouterr().out.count("no route to the server") == 1


def test_tensorboard_is_written_unless_it_is_left_out(tmp_path: Path) -> None:
    MetricsLog(tmp_path).train("sft", 1, {"loss": 1.0})
    assert [*(tmp_path / "tensorboard/sft").iterdir()]
    MetricsLog(tmp_path, trackers=[]).train("distill", 1, {"loss": 1.0})
    assert not (tmp_path / "tensorboard/distill").exists()


def test_a_package_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert missing_package("tensorboard") is None
    name = "lopd_no_such_tracker"
    with pytest.raises(ConfigError, match=f"{name} is not installed.*pip install {name}"):
        MetricsLog(tmp_path, trackers=[name])
    # W&B makes a folder of its name in the working directory, which Python takes for a package.
    (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.import_module(name)
    assert missing_package(name) is not None
    del sys.modules[name]


def test_an_unknown_tracker_is_refused_with_the_choice() -> None:
    table = {
        "run": {"dir": "."},
        "models": {"teacher": ".", "student": "."},
        "task": {"name": "math"},
        "prompts": {name: {"num_prompts": 1} for name in ("sft", "opd", "eval")},
        "report": {"trackers": ["comet"]},
    }
    with pytest.raises(ConfigError, match=r"report\.trackers.*'tensorboard', 'wandb' or 'mlflow'"):
        config_from(table, [], where="a test", base=Path("lopd.toml"))


def test_names_that_mlflow_refuses_are_changed() -> None:
    assert trackers._mlflow_name("eval/avg@4") == "eval/avg_at_4"
    assert trackers._mlflow_name("train/advantage/maths#1") == "train/advantage/maths_1"
    assert trackers._mlflow_name("train/reverse_kl") == "train/reverse_kl"
    assert trackers.finite({"a": math.nan, "b": math.inf, "c": 1}) == {"c": 1}


def test_a_superseded_stage_takes_its_ids_along(tmp_path: Path) -> None:
    ids = tmp_path / "trackers/distill/mlflow.json"
    publish_json(ids, {"id": "first"})
    publish_json(tmp_path / "trackers/sft/mlflow.json", {"id": "other"})
    set_aside(tmp_path, {"distill"}, tmp_path / "distill")
    assert not ids.exists()
    assert (tmp_path / "trackers/sft/mlflow.json").exists()
    bring_back(tmp_path, tmp_path / "distill")
    assert json.loads(ids.read_text()) == {"id": "first"}


# ---- the real packages -------------------------------------------------------------------------


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a file of W&B: those of LevelDB's log, in blocks of 32 KiB, after 7 bytes."""
    place = 7
    record = b""
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        # 1 is a whole record, 4 the last part of one.
        if kind in (1, 4):
            yield record
            record = b""


def _wandb_history(run: Path) -> list[dict[str, float]]:
    """The rows of a run that W&B has written offline."""
    from wandb.proto import wandb_internal_pb2

    (file,) = run.glob("run-*.wandb")
    rows = []
    for data in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
            )
    return rows


@pytest.mark.skipif(missing_package("wandb") is not None, reason="wandb is not installed")
def test_wandb_loses_no_step_of_a_resumed_run(tmp_path: Path) -> None:
    run = tmp_path / "a_run"
    write(run, "wandb", 1, 5)
    # Killed after step 5, with its last checkpoint at step 2.
    write(run, "wandb", 3, 6, resumed=True)
    runs = sorted((run / "trackers/distill/wandb").glob("offline-run-*"))
    rows = [_wandb_history(one) for one in runs]
    steps = [[row["train/step"] for row in part if "train/step" in row] for part in rows]
    # The newest run is whole.
    assert steps == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]]
    assert rows[0][0]["train/loss"] == 1.0
    assert "train/grad_norm" not in rows[0][0], "an infinity is no figure"
    assert rows[1][-1]["eval/avg@4"] == 0.5


@pytest.mark.skipif(missing_package("wandb") is not None, reason="wandb is not installed")
def test_with_wandbs_own_step_points_would_be_lost(tmp_path: Path) -> None:
    """The control: what our own step is for."""
    import wandb

    log = wandb.init(
        dir=str(tmp_path),
        mode="offline",
        settings=wandb.Settings(console="off", silent=True),
    )
    for step in (1, 2, 3, 2, 3, 4):
        log.log({"loss": 1.0}, step=step)
    log.finish()
    wandb.teardown()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [row["_step"] for row in _wandb_history(run)] == [1, 2, 3, 4]


@pytest.mark.skipif(missing_package("wandb") is not None, reason="wandb is not installed")
def test_what_wandb_loses_in_a_kill_is_in_the_next_run(tmp_path: Path) -> None:
    run = tmp_path / "a_run"
    code = f"""
import os, pathlib, signal
from lopd.report.metrics import MetricsLog
log = MetricsLog(pathlib.Path({str(run)!r}), trackers=["wandb"])
for step in range(1, 6):
    log.train("distill", step, {{"loss": 1 / step}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL
    # The checkpoint is of step 4.
    write(run, "wandb", 5, 6, resumed=True)
    first, second = sorted((run / "trackers/distill/wandb").glob("offline-run-*"))
    assert [row["train/step"] for row in _wandb_history(second) if "train/step" in row] == [
        *range(1, 7)
    ]
    # The control: the killed process has lost points.
    assert len(_wandb_history(first)) < 5


@pytest.mark.skipif(missing_package("mlflow") is not None, reason="mlflow is not installed")
def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    run = tmp_path / "a_run"
    write(run, "mlflow", 1, 3)
    # A kill between a line of the metrics and MLflow, after the checkpoint of that step.
    write(run, "tensorboard", 4, 4)
    write(run, "mlflow", 5, 6, resumed=True)
    client = MlflowClient(tracking_uri=f"sqlite:///{run}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("a project")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "a_run/distill"
    assert found.info.status == "FINISHED"
    assert found.data.params == {"run.seed": "17"}
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert {point.step for point in history} == {1, 2, 3, 4, 5, 6}
    assert all(point.value == 1 / point.step for point in history)
    assert found.data.metrics["eval/avg_at_4"] == 0.5
    assert "train/grad_norm" not in found.data.metrics, "MLflow would say 1.8e308"
    assert [path.name for path in tmp_path.iterdir()] == ["a_run"], "nothing beside the run"
