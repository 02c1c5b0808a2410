"""The student's servers as the trainer's ranks see them: weights in, held-out prompts answered, and
whose turn it is where they share the GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.errors import EngineError
from lopd.megatron.ranks import parallel
from lopd.megatron.ranks.first_rank import by_first_rank
from lopd.stages.batches import MOST_SENDS
from lopd.stages.sync import StudentWeights, SyncEvaluation
from lopd.stages.training import SERVER_KEY, TrainingJob
from sglang_rollout.requests.client import OtherWeights, SGLangEngine
from sglang_rollout.requests.fleet import fleet_of
from sglang_rollout.servers.shared_gpus import training_settings
from sglang_rollout.weight_sync import Colocation, SeparateMemory
from sglang_rollout.weight_sync.interface import await_servers

if TYPE_CHECKING:
    from lopd.megatron.training.trainer import Trainer
    from lopd.records import Sample
    from lopd.report.metrics import MetricsLog


class StudentServer:
    """The running servers that get the student's weights. Every rank has one and calls it together;
    rank 0's alone talks to the servers.

    With sync.colocate they and the trainer take turns with the GPUs. It is the trainer's from the
    start and after train, the servers' after push and evaluate: who needs the same weights next
    finds them there.
    """

    def __init__(
        self, job: TrainingJob, servers: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        """Before the trainer is built, which needs the GPUs. They serve the weights that the
        training begins with. servers: of servers_json. say: a line on screen.
        """
        self._job, self._weights_file, self._say = job, servers["weights_file"], say
        settings, key = training_settings(job.config), os.environ.get(SERVER_KEY, "")
        file = None if self._weights_file is None else Path(self._weights_file)
        self._engine = (
            fleet_of(
                [SGLangEngine(url, key, settings, weights_file=file) for url in servers["urls"]]
            )
            if parallel.rank() == 0
            else None
        )
        self.shares = job.config.sync.colocate
        self._turns = SeparateMemory()
        if self.shares:
            engines = self._engine.engines if self._engine is not None else ()
            self._turns = Colocation(
                engines, barrier=parallel.barrier, timeout_s=job.config.sync.timeout_s
            )
        self._turns.to_trainer()
        self._served: int | None = (
            None if self.shares else 0
        )  # the weights that they have, by steps
        self._version = ""
        if self._engine is not None and not self.shares:
            await_servers(self._engine.engines, job.config.sync.timeout_s)
            self._version = str(self._engine.model_info()["weight_version"])

    def learn_from(
        self, trainer: Trainer, samples: Sequence[Sample], metrics: MetricsLog | None
    ) -> None:
        """Whose weights they get. samples: some are scored where syncs are verified by scores.
        metrics: of rank 0.
        """
        self._turns.attach_trainer(trainer.memory)
        sync, folder, template = self._job.config.sync, self._job.folder / "sync", self._job.initial
        self._weights = StudentWeights(
            trainer,
            samples,
            sync,
            self._engine,
            folder=folder,
            template=template,
            weights_file=self._weights_file,
            turns=self._turns,
            say=self._say,
        )
        self._metrics = metrics
        self._evaluation = (
            SyncEvaluation(self._job.config, template, self._engine)
            if self._engine is not None
            else None
        )

    def push(self, step: int, *, again: bool = False) -> None:
        """Puts the weights after so many steps into it, as version ``step-N``, unless it has them;
        again: because a server has lost them. It then answers.
        """
        if step == self._served and not again:
            return
        self._turns.to_trainer()
        self._version = f"step-{step}"
        report = self._weights.push(self._version)
        if report is not None:
            self._say(f"step {step}/{self._job.num_steps}: weights synced, {report.line()}")
        self._served = step

    def evaluate(self, step: int) -> None:
        """Answers to held-out prompts by the weights after so many steps, which it gets where it
        has others. EngineError: it loses them again and again.
        """
        for attempt in range(MOST_SENDS):
            self.push(step, again=attempt > 0)
            figures, lost = by_first_rank(self._evaluated)
            if not lost:
                break
            if self._metrics is not None:
                self._say(f"step {step}/{self._job.num_steps}: {lost}; the weights are sent again")
        else:
            raise EngineError(
                f"the student's server lost its weights {MOST_SENDS} times: {lost}",
                where=f"step {step}",
                remedy="read its log",
            )
        if self._metrics is not None and figures is not None:
            self._metrics.eval(self._job.stage, step, figures)
            accuracy, count = figures["accuracy"], figures["num_prompts"]
            self._say(
                f"step {step}/{self._job.num_steps}: synced weights, accuracy {accuracy:.3f} on {count} prompts"
            )

    def _evaluated(self) -> tuple[dict[str, Any] | None, str]:
        """Rank 0's figures, or what other weights answered."""
        if self._evaluation is None:
            return None, ""
        try:
            return self._evaluation.run(self._version), ""
        except OtherWeights as error:
            return None, error.what

    def leave(self) -> None:
        """Sharing GPUs: neither it nor the trainer holds them, for the teacher."""
        self._turns.to_nobody()
        self._forget()

    def train(self) -> None:
        """Sharing GPUs: they are the trainer's again."""
        self._turns.to_trainer()
        self._forget()

    def _forget(self) -> None:
        if self.shares:  # memory that was given back has lost its contents
            self._served = None
