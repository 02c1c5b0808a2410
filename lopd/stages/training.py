"""A training as the parent process sees it: it starts the ranks and reads what they publish.

The ranks run the file of their stage: ``python -m lopd.stages.sft JOB.json``, or ``.distill``.
This file imports no Megatron-Core, because the parent needs none.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lopd.artifacts import publish_json, read_manifest, remove_folder
from lopd.config import Config, TrainSection
from lopd.config.secrets import scrubbed
from lopd.errors import DataError
from lopd.megatron.ranks.launch import ANNOUNCEMENT_FILE, run_ranks, threads_of
from lopd.megatron.ranks.nodes import Node, await_announcement, this_node
from lopd.report.console import print_line

if TYPE_CHECKING:
    from sglang_rollout.requests.client import SGLangEngine

# The Hugging Face checkpoint inside the folder of sft, distill and export.
MODEL = "model"
# The adapters alone, as PEFT reads them, beside it.
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
RESULT = "result.json"
JOB = "job.json"
# The environment variable with the servers' key, which never stands in a file or a command line.
SERVER_KEY = "LOPD_SERVER_KEY"

# The two trainings of the method. Each is the name of a section of the configuration, too.
Objective = Literal["sft", "distill"]


@dataclass(frozen=True)
class StudentAddresses:
    """How a rank reaches the servers that the parent started."""

    # One for each server. The key is not here: it comes in the environment (SERVER_KEY).
    urls: tuple[str, ...]
    # Where the parent reads what a restarted server must serve. None where the servers are the
    # user's own, which lopd never restarts.
    weights_file: Path | None

    @classmethod
    def of(cls, engine: SGLangEngine) -> StudentAddresses:
        server = engine.server
        weights_file = None if server is None else server.weights_file.resolve()
        return cls(tuple(one.url for one in engine.engines), weights_file)


@dataclass(frozen=True)
class TrainingJob:
    """One training: its objective, its data, where it starts, and the folder it publishes into."""

    # It also names the file with the loop: lopd/stages/OBJECTIVE.py.
    objective: Objective
    config: Config
    # Where everything of this training is published.
    folder: Path
    # The artifact with the responses. Those of distill have teacher_logprobs.
    data: Path
    # The Hugging Face folder that the training starts from. With init "random" only its
    # architecture is taken.
    initial: Path
    init: Literal["checkpoint", "random"]
    # The length of the training in optimizer steps. The longer SFT of evaluate has another one than
    # its section of the configuration.
    num_steps: int
    # Decides the order of the responses.
    order_seed: int
    # The student's servers; None where the training needs none.
    student: StudentAddresses | None = None

    @property
    def settings(self) -> TrainSection:
        """The section of the configuration, with this job's number of steps."""
        # The learning-rate schedule follows the length of this training.
        section: TrainSection = getattr(self.config, self.objective)
        return section.model_copy(update={"num_steps": self.num_steps})

    @property
    def replays_routing(self) -> bool:
        """Whether routers choose the experts that the responses were sampled with."""
        return self.objective == "distill" and self.config.distill.routing_replay

    @property
    def model(self) -> Path:
        return self.folder / MODEL

    @property
    def adapter(self) -> Path:
        return self.folder / ADAPTER

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def files(self) -> list[Path]:
        """The files of the finished training that its artifact has."""
        folders = [self.model, self.adapter] if self.settings.lora.is_on else [self.model]
        return [path for folder in folders for path in folder.iterdir() if path.is_file()]

    @property
    def result(self) -> Path:
        """JSON with the training's metrics. It is published after the model."""
        return self.folder / RESULT

    @property
    def stage(self) -> str:
        """The name under which metrics are logged."""
        return self.folder.name

    def print_line(self, text: str) -> None:
        """Print a line on a rank. The parent shows it on its screen (``train_on_ranks``)."""
        sys.stdout.write(f"{self.stage} {text}\n")
        # The parent acts on lines, so a line must not wait in a buffer.
        sys.stdout.flush()

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON for the ranks, without secrets that only a server's start needs.

        Those of task.options stay: a rank may need them to judge answers.
        """
        # The ranks start no server and no other machine, so they do not need the secrets in the
        # arguments for that.
        config = self.config.model_dump(mode="json")
        config["sglang"]["extra_args"] = scrubbed(config["sglang"]["extra_args"])
        config["launch"] = scrubbed(config["launch"])
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["config"] = config
        if self.student is not None:
            fields["student"] = dataclasses.asdict(self.student)
        # Paths become text here; from_json makes paths of them again.
        plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))
        return plain

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> TrainingJob:
        # The configuration is validated again: a rank trusts a file no more than the parent does.
        fields = {**raw, "config": Config.model_validate(raw["config"])}
        for name in ("folder", "data", "initial"):
            fields[name] = Path(raw[name])
        if raw["student"] is not None:
            file = raw["student"]["weights_file"]
            weights_file = None if file is None else Path(file)
            fields["student"] = StudentAddresses(tuple(raw["student"]["urls"]), weights_file)
        return cls(**fields)


def require_batch(job: TrainingJob, num_responses: int | None = None) -> None:
    """Refuse a step that is larger than all responses. The parent process asks before it starts.

    Args:
        job: The training.
        num_responses: How many responses it learns from. None means all of its artifact.

    Raises:
        DataError: There are fewer responses than ``batch_size``.
    """
    # Such a step would learn from the same response several times at once, as if it were many.
    if num_responses is None:
        num_responses = read_manifest(job.data).rows
    if job.settings.batch_size > num_responses:
        raise DataError(
            f"{job.objective}.batch_size = {job.settings.batch_size} is more than the "
            f"{num_responses} responses, and a step uses each response at most once",
            where=str(job.data),
            limit=f"<= {num_responses}",
            remedy=f"lower {job.objective}.batch_size, or use more prompts",
        )


def train_on_ranks(
    job: TrainingJob,
    student: SGLangEngine | None = None,
    *,
    serve_requests: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train from the first step, or continue from the newest checkpoint, or read a finished result.

    Args:
        job: What to train. This function sets its ``student``.
        student: The servers that the ranks send their weights to.
        serve_requests: A function that does what the ranks have asked for. It is called after each
            line that a rank prints. If it raises an error, the ranks are stopped.

    Returns:
        num_steps, num_tokens (prompt and response tokens), first_loss, last_loss, weight_syncs.
        A training with refreshes also returns the values of lopd.stages.refresh_requester.

    Raises:
        TrainingError: A rank failed.
    """
    # The result is published last. Where it is, a killed command has finished the training.
    if job.result.exists():
        print_line(f"{job.stage}: continues after its training, which is finished")
    else:
        _start_ranks(job, student, serve_requests)
    # Folders with weights for the servers are of no use after the training.
    remove_folder(job.folder / "sync")
    result: dict[str, Any] = json.loads(job.result.read_text(encoding="utf-8"))
    return result


def _start_ranks(
    job: TrainingJob, student: SGLangEngine | None, serve_requests: Callable[[], None]
) -> None:
    # The servers are started before the ranks, so only here is it known where they listen.
    environment = dict(os.environ)
    if student is not None:
        job = dataclasses.replace(job, student=StudentAddresses.of(student))
        environment[SERVER_KEY] = student.api_key
    job_file = job.folder / JOB
    publish_json(job_file, job.to_json(), private=True)

    def on_line(line: str) -> None:
        # Other lines are warnings of libraries. They are in the log.
        if line.startswith(f"{job.stage} "):
            print_line(line)
        # After any line: half a line of another rank may stand before the one that asks.
        serve_requests()

    # Returns when all ranks have ended. No rank is restarted: after an error the same command goes
    # on from the newest checkpoint.
    run_ranks(
        f"lopd.stages.{job.objective}",
        [str(job_file)],
        ranks=job.settings.parallel.ranks,
        threads_per_rank=threads_of(job.settings),
        log=job.folder / "train.log",
        timeout_s=job.settings.timeout_s,
        env=environment,
        on_line=on_line,
        node=this_node(job.settings.parallel.nodes),
    )


def follow_trainings(
    folder: Path,
    objective: Objective,
    settings: TrainSection,
    *,
    index: int,
    count: int,
    is_done: Callable[[], bool],
) -> int:
    """Run this machine's ranks of every training that the first machine starts in a folder.

    Args:
        folder: The folder of the trainings.
        objective: Names the loop that the ranks run.
        settings: The training's section of the configuration.
        index: The number of this machine. The first machine has 0, so it is at least 1 here.
        count: How many machines there are.
        is_done: Whether the first machine has finished the stage.

    Returns:
        How many trainings this machine took part in.

    Raises:
        TrainingError: A rank on this machine failed, or the first machine was lost.
    """
    joined = 0
    node = Node(index, count)
    while True:
        # The first machine announces an address for each training, also after a restart.
        join = await_announcement(folder / ANNOUNCEMENT_FILE, done=is_done)
        # The first machine has ended the stage, so no training will come any more.
        if join is None:
            return joined
        # The first machine has written the job into the shared folder before it announced itself.
        run_ranks(
            f"lopd.stages.{objective}",
            [str(folder / JOB)],
            ranks=settings.parallel.ranks,
            threads_per_rank=threads_of(settings),
            log=folder / f"train-node{node.index}.log",
            timeout_s=settings.timeout_s,
            node=node,
            join=join,
        )
        joined += 1
