"""The trainer on Megatron-Core.

Each microbatch takes one forward and one backward pass. Each step takes one division by the global
number of items, and one update.

    parallel.initialize(settings.parallel, seed=17, timeout_s=settings.timeout_s)
    trainer = Trainer(settings, model_dir=..., init="checkpoint", init_std=0.02, seed=17,
                      objective=..., checkpoint_dir=...)
    state = trainer.resume() or {}
    for step in range(trainer.step, settings.num_steps):
        # Every data rank gives the same number of microbatches.
        metrics = trainer.train_step(microbatches_of(step))

Gradients are sums over tokens or responses (``calculate_per_token_loss``). They are divided once,
by the count over all microbatches and ranks. So neither the packing nor the layout changes them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from lopd.config import TrainSection
from lopd.megatron.checkpoints.checkpoint import Checkpoints, Trained
from lopd.megatron.model import engine
from lopd.megatron.model.build import build_model, init_random
from lopd.megatron.model.inference import forward_microbatch, score_microbatches
from lopd.megatron.model.lora import add_adapters
from lopd.megatron.model.overrides import read_overrides
from lopd.megatron.model.transformer_config import DTYPES
from lopd.megatron.ranks import parallel
from lopd.megatron.training.balancing import balancing_coefficient
from lopd.megatron.training.health import StepHealth
from lopd.megatron.training.not_finite import has_bad_gradient, loss_suspects, not_finite_error
from lopd.megatron.training.offload import DeviceMemory
from lopd.megatron.training.optimizer import Optimizer
from lopd.megatron.training.reduction import StepSums, require_equal_counts
from lopd.megatron.training.step_metrics import StepMetrics
from lopd.megatron.training.wrapping import wrap_for_training
from lopd.megatron.weights.architecture import read_architecture
from lopd.megatron.weights.transfer import export_adapters, export_hf, load_hf
from lopd.objective import Objective, TokenBatch, reduce_metrics
from lopd.records import Microbatch

# The size of an exported bucket of weights: large enough that the cost of a transfer's start does
# not count, small enough to fit beside a training.
BUCKET_BYTES = 512 * 2**20


class Trainer:
    """One model in training. Every method is collective: all ranks call it together."""

    def __init__(
        self,
        settings: TrainSection,
        *,
        model_dir: Path,
        init: Literal["checkpoint", "random"],
        init_std: float,
        seed: int,
        objective: Objective,
        checkpoint_dir: Path | None,
        num_steps: int | None = None,
        entropy: bool = False,
        routing_replay: bool = False,
    ) -> None:
        """Build the model and its optimizer. Call parallel.initialize(settings.parallel) first.

        Args:
            settings: The [sft] or [distill] section.
            model_dir: A Hugging Face folder. With init "random" only its config.json is read.
            init: Where the first weights come from.
            init_std: The standard deviation of random weights.
            seed: The seed of random weights and of new adapters.
            objective: The loss.
            checkpoint_dir: The folder of the checkpoints. None saves and resumes nothing.
            num_steps: The length of the training, for the learning rate. None takes that of the
                settings.
            entropy: Whether the objective gets the student's entropy of every token
                (TokenBatch.student_entropy), without gradient.
            routing_replay: Whether routers replay the choices of microbatches that have them.

        Raises:
            LopdError: The model cannot be read.
            ConfigError: The layout does not divide the model, or Megatron-Core refuses a field.
        """
        self.settings = settings
        self.objective = objective
        self._entropy = entropy
        self.architecture = read_architecture(model_dir)
        # Before the model is built: a field that does not exist is an error at once.
        overrides = read_overrides(settings.megatron)
        self.module = build_model(
            self.architecture,
            parallel=settings.parallel,
            dtype=settings.dtype,
            recompute=settings.recompute,
            moe_aux_loss=settings.moe_aux_loss,
            routing_replay=routing_replay,
            overrides=overrides.transformer,
        )
        # The weights come before the optimizer, which copies them as float32 when it is made.
        if init == "random":
            init_random(self.module, self.architecture, std=init_std, seed=seed)
        else:
            load_hf(self.module, self.architecture, model_dir)
        if settings.lora.is_on:
            add_adapters(self.module, self.architecture, settings.lora, seed=seed)
        distributed = settings.parallel.distributed_optimizer
        self.model = wrap_for_training(
            self.module,
            distributed=distributed,
            freeze_router=settings.optimizer.freeze_router,
            overrides=overrides.distributed,
        )
        self.optimizer = Optimizer(
            settings.optimizer,
            self.model,
            num_steps=num_steps or settings.num_steps,
            dtype=DTYPES[settings.dtype],
            distributed=distributed,
            overrides=overrides.optimizer,
        )
        # A server on the same device may have this memory between two steps.
        self.memory = DeviceMemory(self.model, self.optimizer.megatron)
        self._health = StepHealth(
            self.module, self.architecture, settings.dtype, frozen=settings.lora.is_on
        )
        self._sums = StepSums()
        self._config = self.module.config
        # Megatron-Core calls it after the last backward pass of a step. It adds up gradients over
        # ranks and divides them by the global number of items.
        self._config.finalize_model_grads_func = finalize_model_grads
        # With overlap_grad_reduce, gradients are reduced after the last microbatch. Without this
        # line they would be reduced after each one.
        self._config.no_sync_func = self.model.no_sync
        # The number of updates made.
        self.step = 0
        self._checkpoints = None if checkpoint_dir is None else self._checkpoints_in(checkpoint_dir)

    def _checkpoints_in(self, folder: Path) -> Checkpoints:
        settings = self.settings
        uses_engine = engine.uses_engine(settings.dtype)
        # What decides the form of a checkpoint's tensors. A difference is told to the user when a
        # training resumes.
        layout = {
            **settings.parallel.model_dump(),
            "dtype": settings.dtype,
            "layers": "transformer_engine" if uses_engine else "local",
            "lora": settings.lora.describe(),
        }
        return Checkpoints(
            folder,
            keep=settings.keep_checkpoints,
            layout=layout,
            background=settings.checkpoint_in_background,
        )

    def train_step(self, microbatches: Sequence[Microbatch]) -> StepMetrics:
        """Make one optimizer step.

        Args:
            microbatches: The microbatches of this data rank. Ranks with the same data_rank give the
                same ones. Every data rank gives the same number.

        Returns:
            The metrics of the step.

        Raises:
            TrainingError: The numbers of microbatches differ, or the loss or the gradient norm is
                not finite. Nothing was updated.
            DataError: No token carries loss.
        """
        start = time.perf_counter()
        # Memory that was given to a server has no content. A kernel that reads it ends the process.
        self.memory.require()
        if self._checkpoints is not None:
            # Publishing is collective. Here all ranks are at the same place.
            self._checkpoints.publish_written()
        # Before any pass: ranks with unequal numbers would wait for each other until the timeout.
        require_equal_counts(len(microbatches), step=self.step + 1)
        # Scoring leaves the model in evaluation mode. The call goes through every module.
        if not self.module.training:
            self.model.train()
        self._health.begin()
        # The passes add to the buffer of the gradients, so it must be zero. The optimizer's own
        # gradients, of its float32 weights, are released: the passes need the memory.
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        # Before the forward pass, in which the routers use the coefficient.
        self._scale_balancing_loss(microbatches)
        outputs = self._forward_backward(microbatches)

        # The gradients are now those of the whole step: finalize_model_grads has summed and divided
        # them. The loss is still this rank's sum, and is divided by the same global count.
        sums, health = self._sums.reduce(outputs, self._health.vector(microbatches))
        # reduce_metrics refuses a step without items. The bound avoids a division by 0 before that.
        loss = sums.pop("loss") / max(sums.pop("num_items"), 1.0)
        metrics = reduce_metrics(sums)

        # Both checks look at global values, so all ranks raise together. A rank that raised alone
        # would leave the others in a collective. They come before the update: a nan in Adam's
        # moments stays there, and no later step recovers from it. The loss comes first, because it
        # tells which microbatch was at fault; the gradients are those of all microbatches.
        self._require_finite_loss(loss, outputs, microbatches)
        grad_norm = self.optimizer.grad_norm()
        self._require_finite_norm(grad_norm, microbatches)

        # The rate is a function of the step's number, read before the number rises.
        learning_rate = self.optimizer.learning_rate(self.step)
        self.optimizer.update(self.step)
        self.step += 1

        seconds = time.perf_counter() - start
        figures = self._health.figures(health, seconds)
        num_processed = figures.pop("num_processed")
        return StepMetrics(
            step=self.step,
            loss=loss,
            grad_norm=grad_norm,
            lr=learning_rate,
            num_tokens=int(sums["num_tokens"]),
            seconds=seconds,
            tokens_per_s=num_processed / seconds,
            metrics=metrics | figures,
        )

    def _forward_backward(self, microbatches: Sequence[Microbatch]) -> list[dict[str, Tensor]]:
        """Run all passes of a step and return the sums of each microbatch.

        The sums are there on the last pipeline stage; elsewhere the list is empty.
        """
        outputs: list[dict[str, Tensor]] = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter(microbatches),
            model=[self.model],
            num_microbatches=len(microbatches),
            # Megatron-Core asks for the length but does not use it here: with variable lengths the
            # pipeline stages tell each other the length of each microbatch.
            seq_length=len(microbatches[0].token_ids),
            micro_batch_size=1,
            forward_only=False,
        )
        return outputs

    def _forward_step(self, microbatches: Iterator[Microbatch], model: Any) -> tuple[Tensor, Any]:
        """Run one forward pass: Megatron-Core's forward_step_func.

        Returns the output of the stage, and the function that makes the loss of the last stage's
        output.
        """
        microbatch = next(microbatches)
        with self._health.counting(microbatch):
            output, entropy = forward_microbatch(model, microbatch, entropy=self._entropy)
        # The loss function is bound to its microbatch: Megatron-Core gives it the output alone.
        return output, partial(self._loss, microbatch, entropy)

    def _loss(
        self, microbatch: Microbatch, entropy: Tensor | None, logprobs: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Compute the loss of one microbatch: Megatron-Core's loss function.

        Returns the sum of losses, the number of items, and the sums for the metrics (float64).
        """
        # The entropy is a figure, and no part of the loss. So it has no gradient.
        batch = replace(
            TokenBatch.from_microbatch(microbatch, parallel.device()),
            student_entropy=None if entropy is None else entropy.detach(),
        )
        if microbatch.teacher_top is not None:
            # The model gave [T, 1 + K]: first the label, then the teacher's K tokens.
            batch = replace(batch, student_top_logprobs=logprobs[:, 1:])
            logprobs = logprobs[:, 0]
        result = self.objective(logprobs, batch)
        sums = {
            "loss": result.loss_sum.detach().double(),
            "num_items": result.num_items.double(),
            **result.metric_sums,
        }
        # Every context rank has all log-probabilities and the same loss, but the gradients of its
        # own part alone. finalize_model_grads adds up the items of all context ranks, so only the
        # first of them counts items.
        num_items = result.num_items * (parallel.context_rank() == 0)
        return result.loss_sum, num_items, sums

    def _scale_balancing_loss(self, microbatches: Sequence[Microbatch]) -> None:
        # The routers read the coefficient from the config at every forward pass.
        coefficient = self.settings.moe_aux_loss
        if coefficient != 0 and self.architecture.num_experts:
            self._config.moe_aux_loss_coeff = balancing_coefficient(
                coefficient, self.objective, microbatches
            )

    def _require_finite_loss(
        self,
        loss: float,
        outputs: Sequence[Mapping[str, Tensor]],
        microbatches: Sequence[Microbatch],
    ) -> None:
        if not math.isfinite(loss):
            suspects = loss_suspects(outputs, microbatches)
            raise not_finite_error(
                f"loss is {loss}",
                is_here=bool(suspects),
                suspects=suspects,
                step=self.step + 1,
                checkpoints=self._checkpoints,
            )

    def _require_finite_norm(self, grad_norm: float, microbatches: Sequence[Microbatch]) -> None:
        if not math.isfinite(grad_norm):
            raise not_finite_error(
                f"gradient norm is {grad_norm}",
                is_here=has_bad_gradient(self.model),
                suspects=microbatches,
                step=self.step + 1,
                checkpoints=self._checkpoints,
            )

    def logprobs(self, microbatch: Microbatch) -> Tensor:
        """Return the log-probability of every label of a microbatch, float32 [T].

        This runs a forward pass and no backward pass. All pipeline ranks of a data-parallel rank
        get the result.
        """
        return self.logprobs_of([microbatch])[0]

    def logprobs_of(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """Return logprobs of several microbatches, which follow each other through the pipeline.

        Every data rank must give the same number.
        """
        # A forward pass needs the weights alone. The optimizer's memory may be with a server.
        self.memory.require_weights()
        return [logprobs for logprobs, _ in score_microbatches(self.model, microbatches)]

    def export(self, *, bucket_bytes: int = BUCKET_BYTES) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield the weights under their Hugging Face names, bucket by bucket, adapters included.

        See lopd.megatron.weights.transfer.export_hf.
        """
        self.memory.require_weights()
        lora = self.settings.lora
        return export_hf(self.module, self.architecture, bucket_bytes=bucket_bytes, lora=lora)

    def export_adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the adapters under PEFT's names. See lopd.megatron.weights.transfer."""
        self.memory.require_weights()
        return export_adapters(self.module, self.architecture, self.settings.lora)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Publish a checkpoint of this step.

        With settings.checkpoint_in_background it returns once the state is copied. A later step,
        the next save, or finish_checkpoint publishes the checkpoint.

        Args:
            state: The caller's state: anything that JSON can hold.

        Raises:
            ArtifactError: The checkpoint cannot be written.
            TrainingError: The checkpoint cannot be written.
        """
        assert self._checkpoints is not None, "the trainer has no checkpoint_dir"
        self._checkpoints.save(self.step, self._trained(), state)

    def finish_checkpoint(self) -> None:
        """Wait for a checkpoint that is written in the background, and make it the newest one."""
        if self._checkpoints is not None:
            self._checkpoints.finish()

    def resume(self, note: Callable[[str], None] | None = None) -> dict[str, Any] | None:
        """Continue from the newest undamaged checkpoint, of this layout or another.

        Args:
            note: A function that is called on rank 0 with a line, if a damaged checkpoint was
                skipped or the layout is another one. With None, the line is written to stderr.

        Returns:
            The caller's state, or None if there is no checkpoint.

        Raises:
            TrainingError: The checkpoint does not fit or cannot be read, or all are damaged.
        """
        if self._checkpoints is None:
            return None
        newest = self._checkpoints.load_newest(self._trained(), note or _write_to_stderr)
        if newest is None:
            return None
        self.step, state = newest
        # Adam's bias correction depends on it. The checkpoint keeps it as its step alone.
        self.optimizer.set_num_updates(self.step)
        return state

    def _trained(self) -> Trained:
        """Return what a checkpoint holds, with everything on the device."""
        self.memory.require()
        # Before the first update the optimizer has no moments. Megatron-Core can neither save nor
        # load state that is not there.
        self.optimizer.create_state()
        return Trained(self.module, self.architecture, self.optimizer.megatron, self.settings.lora)


def _write_to_stderr(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
