"""The trackers that people use: TensorBoard, W&B and MLflow, each by its name in report.trackers.

All of them work without a network and get the same keys, ``KIND/NAME`` with the names of
lopd.report.metric_schema. A run has one run in a tracker for each of its trainings.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lopd.artifacts import publish_json
from lopd.errors import ConfigError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD = "tensorboard"
# In the run directory: what W&B writes offline, and the id under which MLflow knows a training.
TRACKERS = "trackers"
# The folder of MLflow's local store in the run directory.
_MLFLOW = "mlflow"
# Limits of MLflow: parameters in one call, and characters of one value.
_MLFLOW_PARAMS = 100
_MLFLOW_CHARS = 6000
# What MLflow refuses in a name.
_MLFLOW_REFUSED = re.compile(r"[^\w\-./ :]", flags=re.ASCII)


@dataclass(frozen=True, slots=True)
class TrackedTraining:
    """What a tracker is told of a training.

    Attributes:
        run_dir: The run directory.
        stage: The name under which the training logs.
        project: The project of W&B and the experiment of MLflow.
        knobs: The flat configuration without secrets.
        first_step: The first step of this process; None where it is not known. Steps from here on
            may have been logged by a process that was killed.
        earlier: The lines of metrics.jsonl that are there already.
    """

    run_dir: Path
    stage: str
    project: str = "lopd"
    knobs: Mapping[str, Any] = field(default_factory=dict)
    first_step: int | None = None
    earlier: Sequence[Mapping[str, Any]] = ()

    @property
    def folder(self) -> Path:
        """Where W&B writes, and where the id of MLflow's run is."""
        return self.run_dir / TRACKERS / self.stage

    @property
    def name(self) -> str:
        return f"{self.run_dir.resolve().name}/{self.stage}"


class Tracker(Protocol):
    """Something that gets metrics."""

    def log(self, kind: str, step: int, figures: Mapping[str, float]) -> None:
        """Keep the metrics of one step. A metric may be NaN or infinite."""
        ...

    def close(self) -> None:
        """Write what is still in memory."""
        ...


class TensorBoardTracker:
    """Event files in ``tensorboard/STAGE``. TensorBoard shows each stage as a run of its own."""

    def __init__(self, training: TrackedTraining) -> None:
        # This import takes seconds, and most commands write no metric.
        from torch.utils.tensorboard import SummaryWriter

        # Event files cannot be cut. TensorBoard hides what is in older files from this step on.
        self._writer: SummaryWriter = SummaryWriter(
            str(training.run_dir / TENSORBOARD / training.stage), purge_step=training.first_step
        )

    def log(self, kind: str, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        # So that a kill loses no metric that is in metrics.jsonl.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A run of W&B. It is written below ``trackers/STAGE`` unless WANDB_MODE says otherwise."""

    def __init__(self, training: TrackedTraining) -> None:
        # W&B would report its own errors to its makers, over the network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        training.folder.mkdir(parents=True, exist_ok=True)
        continued = f"continues at step {training.first_step}" if training.earlier else None
        self._teardown = wandb.teardown
        self._run = wandb.init(
            project=training.project,
            group=training.run_dir.resolve().name,
            name=training.name,
            dir=str(training.folder),
            # Offline unless the user wants it otherwise: a node of a cluster may have no network.
            mode=os.environ.get("WANDB_MODE", "offline"),
            notes=continued,
            config=dict(training.knobs),
            # The lines of a rank belong to the trainer, and W&B would read them all.
            settings=wandb.Settings(console="off", silent=True),
        )
        # W&B drops what is logged under a step of its own that is not above the last one, and only
        # warns. With our step as a metric, steps may come again and nothing is dropped.
        for kind in ("train", "eval"):
            self._run.define_metric(f"{kind}/step")
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")
        # A process that was killed has lost what W&B had in memory, and two offline runs of one id
        # would be written over each other. So the run of each process begins with all that came
        # before it, and the newest run of the group is whole.
        for row in training.earlier:
            self.log(row["kind"], row["step"], numbers_of(row))

    def log(self, kind: str, step: int, figures: Mapping[str, float]) -> None:
        named = {f"{kind}/{name}": value for name, value in finite(figures).items()}
        self._run.log({**named, f"{kind}/step": step})

    def close(self) -> None:
        self._run.finish()
        # Only the end of W&B's own process writes the last points into the file.
        self._teardown()


class MlflowTracker:
    """A run of MLflow, in ``mlflow/mlflow.db`` unless MLFLOW_TRACKING_URI says otherwise."""

    def __init__(self, training: TrackedTraining) -> None:
        # MLflow would report how it is used to its makers, over the network.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        store = (training.run_dir / _MLFLOW).resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        # Else MLflow would make a folder for artifacts wherever the command was started.
        artifacts = None if uri else (store / "artifacts").as_uri()
        if not uri:
            store.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{store}/mlflow.db"
        # The client and not the fluent functions of mlflow, which keep one active run for a whole
        # process.
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(training.project)
        experiment = (
            found.experiment_id
            if found is not None
            else self._client.create_experiment(training.project, artifact_location=artifacts)
        )
        self._run_id = _kept_id(training, lambda: self._create(training, experiment))
        # A training that goes on was ended as failed or is still said to run.
        self._client.update_run(self._run_id, status="RUNNING")
        known = self._client.get_metric_history(self._run_id, "train/loss")
        last = max((point.step for point in known), default=-1)
        # A kill may have come between the line of metrics.jsonl and MLflow. An evaluation comes
        # after the step of its number.
        for row in training.earlier:
            if row["step"] > last or (row["kind"] == "eval" and row["step"] == last):
                self.log(row["kind"], row["step"], numbers_of(row))

    def _create(self, training: TrackedTraining, experiment: str) -> str:
        from mlflow.entities import Param

        run = self._client.create_run(experiment, run_name=training.name)
        run_id: str = run.info.run_id
        params = [
            Param(_mlflow_name(name), str(value)[:_MLFLOW_CHARS])
            for name, value in training.knobs.items()
        ]
        # MLflow refuses a longer value, and more parameters in one call.
        for start in range(0, len(params), _MLFLOW_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + _MLFLOW_PARAMS])
        return run_id

    def log(self, kind: str, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        # MLflow keeps times in milliseconds.
        now = int(time.time() * 1000)
        # MLflow would write an infinity as the largest float, which is another metric.
        metrics = [
            Metric(_mlflow_name(f"{kind}/{name}"), value, now, step)
            for name, value in finite(figures).items()
        ]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


# By the name in report.trackers. Each needs the package of this name.
_KINDS: dict[str, Callable[[TrackedTraining], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}


def open_tracker(name: str, training: TrackedTraining) -> Tracker:
    """Return a tracker that is ready for metrics.

    Raises:
        ConfigError: Its package is not installed.
        Exception: The tracker fails by itself: every package has classes of its own.
    """
    problem = missing_package(name)
    if problem is not None:
        raise problem
    return _KINDS[name](training)


def missing_package(name: str) -> ConfigError | None:
    """Return the error of a tracker whose package is not installed; None where it is."""
    spec = importlib.util.find_spec(name)
    # A folder of this name in the working directory, such as W&B makes, is no package: it has no
    # file of its own.
    if spec is not None and spec.origin is not None:
        return None
    return ConfigError(
        f"report.trackers names {name}, and the package {name} is not installed",
        where=f"report.trackers {name}",
        remedy=f"pip install {name}, or leave {name} out of report.trackers",
    )


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a line of metrics.jsonl that a tracker can hold.

    A metric that is not known is None, and an interval is a list. No tracker holds them.
    """
    about = ("kind", "stage", "step")
    return {
        name: value
        for name, value in row.items()
        if name not in about and isinstance(value, int | float)
    }


def finite(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that are finite numbers. metrics.jsonl has null for the others."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _mlflow_name(name: str) -> str:
    """Return a name that MLflow takes, for example avg_at_4 for avg@4."""
    return _MLFLOW_REFUSED.sub("_", name.replace("@", "_at_"))


def _kept_id(training: TrackedTraining, make: Callable[[], str]) -> str:
    """Return the id under which MLflow knows a training. The first process makes it."""
    # A stage that is superseded takes the file along, so its successor is a new run.
    path = training.folder / "mlflow.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        made = make()
        publish_json(path, {"id": made})
        return made
