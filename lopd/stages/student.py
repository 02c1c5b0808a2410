"""The student's servers as a rank sees them: they take weights, and may share the GPUs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lopd.megatron.ranks import parallel
from lopd.stages.between_steps import StepHook
from lopd.stages.sync import StudentWeights
from lopd.stages.training import SERVER_KEY, StudentAddresses, TrainingJob
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.fleet import fleet_of
from sglang_rollout.servers.shared_gpus import training_settings
from sglang_rollout.weight_sync import Colocation, SeparateMemory
from sglang_rollout.weight_sync.interface import await_servers

if TYPE_CHECKING:
    from lopd.stages.training_rank import Training


class StudentServer(StepHook):
    """The running servers that get the student's weights.

    Every rank has one and calls it together with the other ranks. Rank 0 alone talks to the
    servers. With ``sync.colocate`` the servers and the trainer share the GPUs: the trainer holds
    them at the start and during a step, the servers hold them after ``push``.
    """

    # Weights that were pushed stay in the servers until the GPUs go back. So an evaluation and a
    # refresh before the same step share one sync, and the GPUs go back after both (GpusToTrainer).

    def __init__(self, job: TrainingJob, addresses: StudentAddresses) -> None:
        """Connect to the servers, before the trainer is built.

        The servers hold the weights that the training begins with. Where they share the GPUs they
        give their memory back here, because the trainer needs it.
        """
        self._job = job
        self._weights_file = addresses.weights_file
        # The servers, on rank 0 alone: two ranks must not send at the same time.
        self.engine = _connect(job, addresses) if parallel.rank() == 0 else None
        # The weight version that was pushed last.
        self.version = ""
        self.shares_gpus = job.config.sync.colocate
        self._colocation = self._colocate()
        self._colocation.to_trainer()
        # After how many steps the trainer had the weights that the servers hold; None: no weights.
        self._served_step: int | None = None if self.shares_gpus else 0
        # A server that has given its memory back cannot answer, so only others are asked.
        if self.engine is not None and not self.shares_gpus:
            await_servers(self.engine.engines, job.config.sync.timeout_s)
            self.version = str(self.engine.model_info()["weight_version"])

    def _colocate(self) -> SeparateMemory:
        if not self.shares_gpus:
            return SeparateMemory()
        engines = self.engine.engines if self.engine is not None else ()
        timeout_s = self._job.config.sync.timeout_s
        return Colocation(engines, barrier=parallel.barrier, timeout_s=timeout_s)

    def begin(self, training: Training) -> None:
        """Send this training's weights from now on."""
        # From now on the trainer's memory leaves the GPUs when a server needs them.
        self._colocation.attach_trainer(training.trainer.memory)
        self._weights = StudentWeights(
            training.trainer,
            training.samples,
            self._job.config.sync,
            self.engine,
            folder=self._job.folder / "sync",
            template=self._job.initial,
            weights_file=self._weights_file,
            colocation=self._colocation,
            print_line=self._job.print_line,
        )

    def push(self, step: int, *, again: bool = False) -> None:
        """Send the weights after ``step`` steps as version ``step-N``. Then the servers can answer.

        Args:
            step: How many steps the trainer has done.
            again: Send them even to servers that have had them, because a server has lost them.
        """
        # Two hooks may push before the same step, and the weights have not changed in between.
        if step == self._served_step and not again:
            return
        # The trainer's weights must be on the GPUs, because they are sent from there.
        self._colocation.to_trainer()
        # Every response carries the version, so it tells which weights gave it.
        self.version = f"step-{step}"
        report = self._weights.push(self.version)
        # None on the ranks that only took part in gathering: one rank prints the line.
        if report is not None:
            num_steps = self._job.num_steps
            self._job.print_line(f"step {step}/{num_steps}: weights synced, {report.line()}")
        self._served_step = step

    def free_gpus(self) -> None:
        """Take shared GPUs from the servers and from the trainer, for the teacher."""
        self._colocation.to_nobody()
        self._forget_weights()

    def gpus_to_trainer(self) -> None:
        """Give shared GPUs back to the trainer."""
        self._colocation.to_trainer()
        self._forget_weights()

    def _forget_weights(self) -> None:
        if self.shares_gpus:
            # A server that gives its memory back loses the weights in it.
            self._served_step = None


class GpusToTrainer(StepHook):
    """A hook that gives shared GPUs back to the trainer. Hooks that need the servers run before."""

    def __init__(self, student: StudentServer) -> None:
        self._student = student

    def before_step(self, step: int) -> None:
        self._student.gpus_to_trainer()

    def end(self) -> None:
        self._student.gpus_to_trainer()


def _connect(job: TrainingJob, addresses: StudentAddresses) -> SGLangEngine:
    # The settings that the parent has started them with.
    settings = training_settings(job.config)
    key = os.environ.get(SERVER_KEY, "")
    engines = [
        SGLangEngine(url, key, settings, weights_file=addresses.weights_file)
        for url in addresses.urls
    ]
    return fleet_of(engines)
