"""One rank of sft or distill, started by torchrun: ``python -m lopd.stages.train_worker JOB.json``.

Reads like the method: load the frozen responses, then per step a refresh where it is due, one batch, one forward and one backward, one optimizer step; every so
often a weight sync with an evaluation, and a checkpoint to resume from.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lopd.artifacts import publish_json
from lopd.errors import EngineError
from lopd.megatron import parallel
from lopd.megatron.launch import reporting_errors
from lopd.megatron.trainer import StepMetrics, Trainer
from lopd.megatron.weights import save_hf
from lopd.records import Sample
from lopd.report.console import training_line
from lopd.report.metrics import MetricsLog
from lopd.stages.batches import MOST_SENDS, Batches, Refreshes
from lopd.stages.sync import StudentWeights, SyncEvaluation
from lopd.stages.training import SERVER_KEY, TrainingJob
from lopd.stages.training_data import load_samples, objective_of
from sglang_rollout.client import OtherWeights, SGLangEngine
from sglang_rollout.fleet import fleet_of
from sglang_rollout.shared_gpus import training_settings
from sglang_rollout.weight_sync import Apart, Colocation

_BUCKET_BYTES = 512 * 2**20


def run(job: TrainingJob, servers: Mapping[str, Any] | None) -> None:
    settings, distill = job.settings, job.config.distill
    student = StudentServer(job, servers) if servers is not None else None
    samples = load_samples(job)
    trainer = Trainer(
        settings,
        model_dir=job.initial,
        init=job.init,
        init_std=job.config.sft.init_std,
        seed=job.config.run.seed,
        objective=objective_of(job),
        entropy=job.objective == "distill" and distill.student_entropy,
        checkpoint_dir=job.checkpoints,
    )
    say = partial(_say, job)
    state: dict[str, Any] = trainer.resume(say) or {"num_tokens": 0, "first_loss": None, "last_loss": None, "weight_syncs": 0}
    main = parallel.rank() == 0
    metrics = MetricsLog(job.config.run.dir) if main else None
    if metrics is not None:
        metrics.truncate_after(job.stage, trainer.step)
    if student is not None:
        student.learn_from(trainer, samples, metrics)
    if student is not None and distill.sync_every and trainer.step == 0:
        student.evaluate(0)
    batches = Batches(samples, job)
    refreshes = Refreshes(job, state, student) if student is not None and distill.refresh.is_on else None
    if refreshes is not None and (resumed := refreshes.resume(say)) is not None:
        batches.learn_from(*resumed)
    for step in range(trainer.step, job.num_steps):
        if refreshes is not None and refreshes.due:
            batches.learn_from(refreshes(step, say), step)
        microbatches, num_tokens = batches(step)
        result = trainer.train_step(microbatches)
        done = step + 1
        if refreshes is not None:
            refreshes.observe(done, result.metrics)
        state["num_tokens"] += num_tokens
        state["first_loss"] = result.loss if state["first_loss"] is None else state["first_loss"]
        state["last_loss"] = result.loss
        if metrics is not None:
            _report(job, metrics, result, num_tokens, {} if refreshes is None else {"refreshes": len(refreshes.made)})
        if student is not None and distill.sync_every and (done % distill.sync_every == 0 or done == job.num_steps):
            student.evaluate(done)
            state["weight_syncs"] += 1
        if done % settings.checkpoint_every == 0 and done < job.num_steps:
            trainer.save_checkpoint(state)
    trainer.finish_checkpoint()
    save_hf(trainer.export(bucket_bytes=_BUCKET_BYTES), job.model, source=job.initial, shard_bytes=job.config.export.shard_bytes)
    if main:
        publish_json(job.result, {"num_steps": job.num_steps, **state})
        if metrics is not None:
            metrics.close()
    parallel.barrier()


def _report(job: TrainingJob, metrics: MetricsLog, result: StepMetrics, num_tokens: int, more: Mapping[str, int]) -> None:
    figures = {**result.as_dict(), "processed_tokens": num_tokens, "processed_tokens_per_s": num_tokens / max(result.seconds, 1e-9), **more}
    metrics.train(job.stage, result.step, figures)
    if result.step % job.settings.log_every == 0 or result.step in (1, job.num_steps):
        sys.stdout.write(training_line(job.stage, result.step, job.num_steps, figures) + "\n")
        sys.stdout.flush()


def _say(job: TrainingJob, text: str) -> None:
    """A line that lopd.stages.training shows on screen."""
    sys.stdout.write(f"{job.stage} {text}\n")
    sys.stdout.flush()


class StudentServer:
    """The running servers that get the student's weights. Every rank has one and calls it together; rank 0's alone talks to the servers.

    With sync.colocate they and the trainer take turns with the GPUs. It is the trainer's from the start, and after every method but push and leave.
    """

    def __init__(self, job: TrainingJob, servers: Mapping[str, Any]) -> None:
        """Before the trainer is built, which needs the GPUs. They serve the weights that the training begins with. servers: of servers_json."""
        self._job, self._weights_file = job, servers["weights_file"]
        settings, key = training_settings(job.config), os.environ.get(SERVER_KEY, "")
        self._engine = fleet_of([SGLangEngine(url, key, settings) for url in servers["urls"]]) if parallel.rank() == 0 else None
        self.shares = job.config.sync.colocate
        self._turns = Apart()
        if self.shares:
            engines = self._engine.engines if self._engine is not None else ()
            self._turns = Colocation(engines, barrier=parallel.barrier, timeout_s=job.config.sync.timeout_s)
        self._turns.to_trainer()
        self._served: int | None = None if self.shares else 0  # the weights that they have, by steps
        self._version = "" if self._engine is None or self.shares else str(self._engine.model_info()["weight_version"])

    def learn_from(self, trainer: Trainer, samples: Sequence[Sample], metrics: MetricsLog | None) -> None:
        """Whose weights they get. samples: some are scored where syncs are verified by scores. metrics: of rank 0."""
        self._turns.admit(trainer.memory)
        sync, folder, template = self._job.config.sync, self._job.folder / "sync", self._job.initial
        self._weights = StudentWeights(
            trainer, samples, sync, self._engine, folder=folder, template=template, weights_file=self._weights_file, turns=self._turns
        )
        self._metrics = metrics
        self._evaluation = SyncEvaluation(self._job.config, template, self._engine) if self._engine is not None else None

    def push(self, step: int, *, again: bool = False) -> None:
        """Puts the weights after so many steps into it, as version ``step-N``, unless it has them; again: because a server has lost them. It then answers."""
        if step == self._served and not again:
            return
        self._turns.to_trainer()
        self._version = f"step-{step}"
        report = self._weights.push(self._version)
        if report is not None:
            _say(self._job, f"step {step}/{self._job.num_steps}: weights synced, {report.line()}")
        self._served = step

    def evaluate(self, step: int) -> None:
        """Answers to held-out prompts by the weights after so many steps, which it gets where it has others. EngineError: it loses them again and again."""
        for attempt in range(MOST_SENDS):
            self.push(step, again=attempt > 0)
            figures, lost = self._evaluated()
            lost = parallel.gather_objects(lost)[0]
            if not lost:
                break
            if self._metrics is not None:
                _say(self._job, f"step {step}/{self._job.num_steps}: {lost}; the weights are sent again")
        else:
            raise EngineError(f"the student's server lost its weights {MOST_SENDS} times: {lost}", where=f"step {step}", remedy="read its log")
        if self._metrics is not None and figures is not None:
            self._metrics.eval(self._job.stage, step, figures)
            accuracy, count = figures["accuracy"], figures["num_prompts"]
            _say(self._job, f"step {step}/{self._job.num_steps}: synced weights, accuracy {accuracy:.3f} on {count} prompts")
        self.train()

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


def main(job_file: Path) -> None:
    raw = json.loads(job_file.read_text(encoding="utf-8"))
    servers = raw.pop("servers")
    job = TrainingJob.from_json(raw)
    with reporting_errors():
        parallel.initialize(job.settings.parallel, seed=job.config.run.seed, timeout_s=job.settings.timeout_s)
        run(job, servers)
        parallel.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
