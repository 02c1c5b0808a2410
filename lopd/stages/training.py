"""Starts the trainer's ranks for sft and distill and reads back what they publish. The ranks
themselves run lopd.stages.train_worker.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lopd.artifacts import publish_json, remove_folder
from lopd.config import Config, TrainSection
from lopd.config.secrets import scrubbed
from lopd.megatron.ranks.launch import ANNOUNCEMENT_FILE, run_ranks, threads_of
from lopd.megatron.ranks.nodes import Node, await_announcement, this_node
from lopd.report.console import say

if TYPE_CHECKING:
    from sglang_rollout.requests.client import SGLangEngine

MODEL = "model"  # the Hugging Face checkpoint inside the folder of sft, distill and export
CHECKPOINTS, RESULT = "checkpoints", "result.json"
SERVER_KEY = (
    "LOPD_SERVER_KEY"  # environment variable: the key never stands in a file or a command line
)


@dataclass(frozen=True)
class TrainingJob:
    """One training: an objective, where it starts, what it learns from, and the folder it publishes
    into.
    """

    objective: Literal["sft", "distill"]
    config: Config
    folder: Path
    data: Path  # artifact with responses, for distill with teacher_logprobs
    initial: Path  # Hugging Face folder
    init: Literal["checkpoint", "random"]
    num_steps: int
    order_seed: int

    @property
    def settings(self) -> TrainSection:
        section: TrainSection = self.config.sft if self.objective == "sft" else self.config.distill
        return section.model_copy(update={"num_steps": self.num_steps})

    @property
    def model(self) -> Path:
        return self.folder / MODEL

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def result(self) -> Path:
        """JSON with the training's figures, published after the model."""
        return self.folder / RESULT

    @property
    def stage(self) -> str:
        """Name under which metrics are logged."""
        return self.folder.name

    def to_json(self) -> dict[str, Any]:
        """For the ranks, which start no server: without the secrets of sglang.extra_args and
        launch.env. Those of task.options may be needed to judge.
        """
        config = self.config.model_dump(mode="json")
        config["sglang"]["extra_args"] = scrubbed(config["sglang"]["extra_args"])
        config["launch"] = scrubbed(config["launch"])
        fields = {
            name: getattr(self, name)
            for name in (
                "objective",
                "folder",
                "data",
                "initial",
                "init",
                "num_steps",
                "order_seed",
            )
        }
        return {
            **{
                name: str(value) if isinstance(value, Path) else value
                for name, value in fields.items()
            },
            "config": config,
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> TrainingJob:
        paths = {name: Path(raw[name]) for name in ("folder", "data", "initial")}
        return cls(**{**raw, **paths, "config": Config.model_validate(raw["config"])})


def servers_json(engine: SGLangEngine) -> dict[str, Any]:
    """How another process reaches an engine's servers: their URLs, and where it says what a
    restarted one must serve (None: they are not ours).
    """
    weights_file = None if engine.server is None else str(engine.server.weights_file.resolve())
    return {"urls": [one.url for one in engine.engines], "weights_file": weights_file}


def train(
    job: TrainingJob,
    *,
    engine: SGLangEngine | None = None,
    attend: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Trains, or goes on from the newest checkpoint, or only reads the result that is already
    published. engine: gets the weights at every sync.

    attend: called whenever the ranks have said something, to do what they may have asked for; what
    it raises ends them. Returns num_steps, num_tokens (prompt and response tokens processed),
    first_loss, last_loss, weight_syncs, and of refreshes what lopd.stages.batches keeps.
    TrainingError: a rank failed.
    """
    if not job.result.exists():
        job_file = job.folder / "job.json"
        publish_json(
            job_file,
            {**job.to_json(), "servers": None if engine is None else servers_json(engine)},
            private=True,
        )
        environment = dict(os.environ)

        def show_own_lines(line: str) -> None:
            if line.startswith(f"{job.stage} "):  # the rest, warnings of libraries, is in the log
                say(line)
            if (
                attend is not None
            ):  # after any line: another rank's half of one may stand before the one that asks
                attend()

        if engine is not None:
            environment[SERVER_KEY] = engine.api_key
        run_ranks(
            "lopd.stages.train_worker",
            [str(job_file)],
            ranks=job.settings.parallel.ranks,
            threads_per_rank=threads_of(job.settings),
            log=job.folder / "train.log",
            timeout_s=job.settings.timeout_s,
            env=environment,
            on_line=show_own_lines,
            node=this_node(job.settings.parallel.nodes),
        )
    remove_folder(job.folder / "sync")
    result: dict[str, Any] = json.loads(job.result.read_text(encoding="utf-8"))
    return result


def follow(
    folder: Path, settings: TrainSection, index: int, count: int, *, done: Callable[[], bool]
) -> int:
    """This machine's part of the trainings in a stage's folder that the first machine drives: its
    ranks, for each training that is announced until done().

    Returns how many were joined. TrainingError: a rank here failed, or the first machine was lost.
    """
    joined, node = 0, Node(index, count)
    while True:
        join = await_announcement(folder / ANNOUNCEMENT_FILE, done=done)
        if join is None:
            return joined
        run_ranks(
            "lopd.stages.train_worker",
            [str(folder / "job.json")],
            ranks=settings.parallel.ranks,
            threads_per_rank=threads_of(settings),
            log=folder / f"train-node{node.index}.log",
            timeout_s=settings.timeout_s,
            node=node,
            join=join,
        )
        joined += 1
