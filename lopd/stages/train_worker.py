"""One rank of sft or distill, started by torchrun: ``python -m lopd.stages.train_worker JOB.json``.

Reads like the method: load the frozen responses, then per step, where they are due, a weight sync
with an evaluation and a refresh, which share the weights in the server; one batch, one forward and
one backward, one optimizer step, and every so often a checkpoint to resume from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.artifacts import publish_json
from lopd.megatron.ranks import parallel
from lopd.megatron.ranks.rank_errors import reporting_errors
from lopd.megatron.training.trainer import StepMetrics, Trainer
from lopd.megatron.weights.transfer import save_hf
from lopd.report.console import training_line
from lopd.report.metrics import MetricsLog, read_metrics
from lopd.stages.batches import Batches, Refreshes
from lopd.stages.training import TrainingJob
from lopd.stages.training_data import load_samples, objective_of

if TYPE_CHECKING:
    from lopd.stages.student import StudentServer

_BUCKET_BYTES = 512 * 2**20


def run(job: TrainingJob, servers: Mapping[str, Any] | None) -> None:
    settings, distill = job.settings, job.config.distill
    say = partial(_say, job)
    student = _student_server(job, servers, say) if servers is not None else None
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
    state: dict[str, Any] = trainer.resume(say) or {
        "num_tokens": 0,
        "first_loss": None,
        "last_loss": None,
        "weight_syncs": 0,
    }
    main = parallel.rank() == 0
    metrics = MetricsLog(job.config.run.dir) if main else None
    if metrics is not None:
        metrics.truncate_after(job.stage, trainer.step)
    if student is not None:
        student.learn_from(trainer, samples, metrics)
    evaluated = _evaluated_before(job, main)
    batches = Batches(samples, job)
    refreshes = (
        Refreshes(job, state, student) if student is not None and distill.refresh.is_on else None
    )
    if refreshes is not None and (resumed := refreshes.resume(say)) is not None:
        batches.learn_from(*resumed)
    for step in range(trainer.step, job.num_steps):
        if student is not None and distill.sync_every and step % distill.sync_every == 0:
            if step not in evaluated:
                student.evaluate(step)
            state["weight_syncs"] += step > 0
        if refreshes is not None and refreshes.due:
            batches.learn_from(refreshes(step, say), step)
        if student is not None:
            student.train()
        microbatches, num_tokens = batches(step)
        result = trainer.train_step(microbatches)
        done = step + 1
        if refreshes is not None:
            refreshes.observe(done, result.metrics)
        state["num_tokens"] += num_tokens
        state["first_loss"] = result.loss if state["first_loss"] is None else state["first_loss"]
        state["last_loss"] = result.loss
        if metrics is not None:
            _report(
                job,
                metrics,
                result,
                num_tokens,
                {} if refreshes is None else {"refreshes": len(refreshes.made)},
            )
        if done % settings.checkpoint_every == 0 and done < job.num_steps:
            trainer.save_checkpoint(state)
    trainer.finish_checkpoint()
    if student is not None and distill.sync_every:
        student.evaluate(job.num_steps)
        state["weight_syncs"] += 1
        student.train()
    save_hf(
        trainer.export(bucket_bytes=_BUCKET_BYTES),
        job.model,
        source=job.initial,
        shard_bytes=job.config.export.shard_bytes,
    )
    if main:
        publish_json(job.result, {"num_steps": job.num_steps, **state})
        if metrics is not None:
            metrics.close()
    parallel.barrier()


def _evaluated_before(job: TrainingJob, main: bool) -> set[int]:
    """The steps whose evaluation stands in the metrics: of a command that was killed after it, and
    after a checkpoint of that step. Every rank calls it.
    """
    rows = read_metrics(job.config.run.dir, kind="eval", stage=job.stage) if main else []
    return set(parallel.gather_objects([row["step"] for row in rows])[0])


def _report(
    job: TrainingJob,
    metrics: MetricsLog,
    result: StepMetrics,
    num_tokens: int,
    more: Mapping[str, int],
) -> None:
    figures = {
        **result.as_dict(),
        "processed_tokens": num_tokens,
        "processed_tokens_per_s": num_tokens / max(result.seconds, 1e-9),
        **more,
    }
    metrics.train(job.stage, result.step, figures)
    if result.step % job.settings.log_every == 0 or result.step in (1, job.num_steps):
        sys.stdout.write(training_line(job.stage, result.step, job.num_steps, figures) + "\n")
        sys.stdout.flush()


def _student_server(
    job: TrainingJob, servers: Mapping[str, Any], say: Callable[[str], None]
) -> StudentServer:
    from lopd.stages.student import (
        StudentServer,
    )  # sft has none, and need not import what talks to it

    return StudentServer(job, servers, say)


def _say(job: TrainingJob, text: str) -> None:
    """A line that lopd.stages.training shows on screen."""
    sys.stdout.write(f"{job.stage} {text}\n")
    sys.stdout.flush()


def main(job_file: Path) -> None:
    raw = json.loads(job_file.read_text(encoding="utf-8"))
    servers = raw.pop("servers")
    job = TrainingJob.from_json(raw)
    with reporting_errors():
        parallel.initialize(
            job.settings.parallel, seed=job.config.run.seed, timeout_s=job.settings.timeout_s
        )
        run(job, servers)
        parallel.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
