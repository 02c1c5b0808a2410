"""What SFT and distillation share on a rank. Their loops are in lopd.stages.sft and .distill."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lopd.artifacts import publish_json
from lopd.config import result_keys
from lopd.config.secrets import scrubbed
from lopd.megatron.ranks import parallel
from lopd.megatron.ranks.rank_errors import reporting_errors
from lopd.megatron.training.step_metrics import StepMetrics
from lopd.megatron.training.trainer import Trainer
from lopd.megatron.weights.transfer import save_hf
from lopd.objective import Objective
from lopd.records import Sample
from lopd.report.console import training_line
from lopd.report.metrics import MetricsLog
from lopd.stages.adapter_folder import save_adapter
from lopd.stages.batches import Batch, Batches
from lopd.stages.training import TrainingJob

# How many bytes of weights a rank gathers at a time to write the model.
_BUCKET_BYTES = 512 * 2**20


def run_rank(train: Callable[[TrainingJob], None]) -> None:
    """Run the loop of sft or distill as one of the ranks that lopd.stages.training starts."""
    # The only argument of the program is the job file.
    raw = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    job = TrainingJob.from_json(raw)
    # An error outside of this block would reach the parent as a traceback and not as one line.
    with reporting_errors():
        seed = job.config.run.seed
        parallel.initialize(job.settings.parallel, seed=seed, timeout_s=job.settings.timeout_s)
        train(job)
        # After an error the process ends at once instead: the other ranks join no collective then.
        parallel.shutdown()


class Training:
    """The trainer of a job, its running metrics, its batches, and what it publishes.

    Every rank has one. All ranks call its methods together.
    """

    def __init__(
        self,
        job: TrainingJob,
        samples: Sequence[Sample],
        objective: Objective,
        *,
        entropy: bool = False,
    ) -> None:
        """Build the trainer and continue from the newest checkpoint.

        Args:
            job: What to train.
            samples: The responses to learn from.
            objective: The loss.
            entropy: Whether the objective gets the student's entropy at every token.
        """
        self.job = job
        # The responses that the training starts with. A refresh replaces those in the batches.
        self.samples = samples
        self.trainer = Trainer(
            job.settings,
            model_dir=job.initial,
            init=job.init,
            init_std=job.config.sft.init_std,
            seed=job.config.run.seed,
            objective=objective,
            entropy=entropy,
            routing_replay=job.replays_routing,
            checkpoint_dir=job.checkpoints,
        )
        # The running metrics. A checkpoint keeps them beside the weights, so a training that was
        # killed ends with the metrics of one that was not. Hooks add keys of their own.
        self.state: dict[str, Any] = self.trainer.resume(job.print_line) or {
            "num_tokens": 0,
            "first_loss": None,
            "last_loss": None,
            "weight_syncs": 0,
        }
        # Checkpoints are counted by steps that are done, and lines by the step that comes next.
        if parallel.rank() == 0 and self.trainer.step > 0:
            done = self.trainer.step
            job.print_line(
                f"continues at step {done + 1}/{job.num_steps}, from the checkpoint of step {done}"
            )
        # One process writes the metrics, because a line must not be written twice.
        self.metrics = _metrics_log(job) if parallel.rank() == 0 else None
        if self.metrics is not None:
            # A killed command may have logged steps after its newest checkpoint. They are trained
            # again now and must not be in the log twice.
            self.metrics.truncate_after(job.stage, self.trainer.step)
        self.batches = Batches(samples, job)
        # The first batch is read while the hooks begin, which may wait for servers.
        if self.trainer.step < job.num_steps:
            self.batches.read_ahead(self.trainer.step)

    def remaining_steps(self) -> range:
        """Return the steps that are still to do, counted from 0."""
        return range(self.trainer.step, self.job.num_steps)

    def record(
        self, result: StepMetrics, batch: Batch, hook_figures: Mapping[str, int] | None = None
    ) -> None:
        """Add a step to the running metrics and to the metrics file.

        Args:
            result: What the trainer returned for the step.
            batch: What the step learnt from.
            hook_figures: More figures for the step's line of the metrics.
        """
        # These metrics are of all ranks together, so every rank keeps the same state.
        self.state["num_tokens"] += batch.num_tokens
        if self.state["first_loss"] is None:
            self.state["first_loss"] = result.loss
        self.state["last_loss"] = result.loss
        if self.metrics is None:
            return
        figures = {
            **result.as_dict(),
            "processed_tokens": batch.num_tokens,
            "processed_tokens_per_s": batch.num_tokens / max(result.seconds, 1e-9),
            "data_wait_share": batch.waited_s / max(batch.waited_s + result.seconds, 1e-9),
            **(hook_figures or {}),
        }
        # Every step is in the metrics, and only some are on the screen.
        job = self.job
        self.metrics.train(job.stage, result.step, figures)
        if result.step % job.settings.log_every == 0 or result.step in (1, job.num_steps):
            # The parent shows every line that begins with the stage's name, as this one does.
            sys.stdout.write(training_line(job.stage, result.step, job.num_steps, figures) + "\n")
            sys.stdout.flush()

    def save_checkpoint_if_needed(self) -> None:
        """Save a checkpoint every ``checkpoint_every`` steps."""
        done = self.trainer.step
        # After the last step the model itself is published, so a checkpoint would be of no use.
        if done % self.job.settings.checkpoint_every == 0 and done < self.job.num_steps:
            self.trainer.save_checkpoint(self.state)

    def publish_model(self) -> None:
        """Write the trained model as a Hugging Face folder, and then the result of the training.

        Adapters are part of the model's weights there, and are written alone besides.
        """
        job = self.job
        # All ranks gather the weights, bucket by bucket. Rank 0 alone writes the files.
        save_hf(
            self.trainer.export(bucket_bytes=_BUCKET_BYTES),
            job.model,
            source=job.initial,
            shard_bytes=job.config.export.shard_bytes,
        )
        if job.settings.lora.is_on:
            save_adapter(
                self.trainer.export_adapters(),
                job.adapter,
                lora=job.settings.lora,
                base=job.initial,
            )
        if self.metrics is not None:
            # The result comes last. Where this file is, the model beside it is whole.
            publish_json(job.result, {"num_steps": job.num_steps, **self.state})
            self.metrics.close()
        # No rank leaves the process group while rank 0 still writes.
        parallel.barrier()


def _metrics_log(job: TrainingJob) -> MetricsLog:
    """Return the log of a training, with the trackers of its configuration."""
    config = job.config
    # What decides results, as config.json of the run has it. A tracker may show it to others.
    sections = [name for name in type(config).model_fields if name != "run"]
    knobs = result_keys(config, [*sections, "run.seed"])
    return MetricsLog(
        config.run.dir,
        trackers=config.report.trackers,
        project=config.report.project,
        knobs=json.loads(json.dumps(scrubbed(knobs), default=str)),
    )
