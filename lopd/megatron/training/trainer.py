"""The trainer on Megatron-Core: per microbatch one forward and one backward pass, per step one
division by the global number of items and one update.

    parallel.initialize(settings.parallel, seed=17, timeout_s=settings.timeout_s)
    trainer = Trainer(settings, model_dir=..., init="checkpoint", init_std=0.02, seed=17,
    objective=..., checkpoint_dir=...)
    state = trainer.resume() or {}
    for step in range(trainer.step, settings.num_steps):
        metrics = trainer.train_step(microbatches_of(step))       # the same number on every data rank

Gradients are sums over tokens or responses (``calculate_per_token_loss``) and are divided once, by
the count over all microbatches and ranks, so neither packing nor layout changes them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from lopd.config import TrainSection
from lopd.errors import TrainingError
from lopd.megatron.checkpoints.checkpoint import Checkpoints, Trained
from lopd.megatron.model import engine
from lopd.megatron.model.build import build_model, init_random
from lopd.megatron.model.context import num_computed_tokens
from lopd.megatron.model.inference import forward_microbatch, score_microbatches
from lopd.megatron.model.overrides import build, read_overrides
from lopd.megatron.model.transformer_config import DTYPES
from lopd.megatron.ranks import parallel
from lopd.megatron.training.health import StepHealth
from lopd.megatron.training.offload import DeviceMemory
from lopd.megatron.training.optimizer import Optimizer
from lopd.megatron.weights.architecture import read_architecture
from lopd.megatron.weights.transfer import export_hf, load_hf
from lopd.objective import LossOutput, Objective, TokenBatch, reduce_metrics
from lopd.records import Microbatch

BUCKET_BYTES = 512 * 2**20
NAMED_RESPONSES = 8  # in the message of a step that is not finite


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step, the same on every rank. step: updates done, this one included.
    num_tokens: tokens that carry loss. seconds: wall clock.

    tokens_per_s: tokens of all sequences, prompts included, over all ranks. metrics: what the
    objective reports (lopd.objective.reduce_metrics).
    """

    step: int
    loss: float
    grad_norm: float  # before clipping
    lr: float
    num_tokens: int
    seconds: float
    tokens_per_s: float
    metrics: Mapping[str, float]

    def as_dict(self) -> dict[str, float]:
        """Flat, for a line of JSON."""
        own = asdict(self)
        return {**own.pop("metrics"), **own}


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
    ) -> None:
        """After parallel.initialize(settings.parallel). num_steps: length of the training, for the
        learning rate; absent: settings.num_steps.

        entropy: give the objective the student's entropy of every token
        (TokenBatch.student_entropy), without gradient. model_dir: Hugging Face folder; with init
        "random" only its config.json is read. checkpoint_dir: None where nothing is to be saved or
        resumed. LopdError: the model cannot be read; ConfigError: the layout does not divide it.
        """
        self.settings, self.objective, self._entropy = settings, objective, entropy
        self.architecture = read_architecture(model_dir)
        overrides = read_overrides(settings.megatron)
        self.module = build_model(
            self.architecture,
            parallel=settings.parallel,
            dtype=settings.dtype,
            recompute=settings.recompute,
            moe_aux_loss=settings.moe_aux_loss,
            overrides=overrides.transformer,
        )
        if init == "random":
            init_random(self.module, self.architecture, std=init_std, seed=seed)
        else:
            load_hf(self.module, self.architecture, model_dir)
        _mark_experts(self.module)
        if settings.optimizer.freeze_router:
            _freeze_routers(self.module)
        distributed = settings.parallel.distributed_optimizer
        overlap = (
            torch.cuda.is_available() and parallel.data_context_size() > 1
        )  # on a CPU there is no second queue of work to overlap with
        self.model = DistributedDataParallel(
            self.module.config,
            ddp_config(distributed, overrides.distributed, overlap=overlap),
            self.module,
        )
        self.optimizer = Optimizer(
            settings.optimizer,
            self.model,
            num_steps=num_steps or settings.num_steps,
            dtype=DTYPES[settings.dtype],
            distributed=distributed,
            overrides=overrides.optimizer,
        )
        self.memory = DeviceMemory(
            self.model, self.optimizer.megatron
        )  # a server on the same device takes turns with it
        self._health = StepHealth(self.module, self.architecture, settings.dtype)
        self._config = self.module.config
        self._config.finalize_model_grads_func = finalize_model_grads
        # with overlap_grad_reduce: gradients are reduced after the last microbatch, not after each
        self._config.no_sync_func = self.model.no_sync
        self.step = 0  # optimizer steps done
        self._metric_names: list[str] = []
        layout = {
            **settings.parallel.model_dump(),
            "dtype": settings.dtype,
            "layers": "transformer_engine" if engine.uses_engine(settings.dtype) else "local",
        }
        self._checkpoints: Checkpoints | None = None
        if checkpoint_dir is not None:
            background = settings.checkpoint_in_background
            self._checkpoints = Checkpoints(
                checkpoint_dir, keep=settings.keep_checkpoints, layout=layout, background=background
            )

    # ---- one step ---------------------------------------------------------------------------------------------------------------------------------

    def train_step(self, microbatches: Sequence[Microbatch]) -> StepMetrics:
        """One optimizer step on this data rank's microbatches; ranks with the same data_rank give
        the same ones, and every data rank the same number.

        TrainingError: the numbers differ, or loss or gradient norm is not finite; then nothing was
        updated. DataError: no token carries loss.
        """
        start = time.perf_counter()
        self.memory.require()
        if self._checkpoints is not None:
            self._checkpoints.publish_written()
        self._check_count(len(microbatches))
        self.model.train()
        self._health.begin()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._scale_balancing_loss(microbatches)
        outputs = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter(microbatches),
            model=[self.model],
            num_microbatches=len(microbatches),
            seq_length=len(
                microbatches[0].token_ids
            ),  # ignored: stages tell each other the length of each microbatch
            micro_batch_size=1,
            forward_only=False,
        )
        sums, health = self._reduce(outputs, self._health.vector(microbatches))
        loss = sums.pop("loss") / max(sums.pop("num_items"), 1.0)
        metrics = reduce_metrics(sums)
        if not math.isfinite(loss):
            bad = [not math.isfinite(output["loss"].item()) for output in outputs]
            suspects = (
                [microbatch for microbatch, is_bad in zip(microbatches, bad, strict=True) if is_bad]
                if bad
                else []
            )
            raise self._not_finite(f"loss is {loss}", any(bad), suspects)
        grad_norm = self.optimizer.grad_norm()
        if not math.isfinite(grad_norm):
            raise self._not_finite(
                f"gradient norm is {grad_norm}", self._has_bad_gradient(), microbatches
            )
        learning_rate = self.optimizer.learning_rate(self.step)
        self.optimizer.update(self.step)
        self.step += 1
        seconds = time.perf_counter() - start
        figures = self._health.figures(health, seconds)
        num_processed = figures.pop("num_processed")
        metrics |= figures
        return StepMetrics(
            self.step,
            loss,
            grad_norm,
            learning_rate,
            int(sums["num_tokens"]),
            seconds,
            num_processed / seconds,
            metrics,
        )

    def _forward_step(self, microbatches: Iterator[Microbatch], model: Any) -> tuple[Tensor, Any]:
        """Megatron's forward_step_func: the stage's output, and the function that makes the loss of
        the last stage's.
        """
        microbatch = next(microbatches)
        with self._health.counting(microbatch):
            output, entropy = forward_microbatch(model, microbatch, entropy=self._entropy)
        return output, partial(self._loss, microbatch, entropy)

    def _loss(
        self, microbatch: Microbatch, entropy: Tensor | None, logprobs: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Megatron's loss function: sum of losses, number of items, and what is summed for the
        metrics (float64).

        Every context rank has all log-probabilities and the same loss, but gradients of its own
        part alone; so only the first of them counts the items.
        """
        batch = replace(
            TokenBatch.from_microbatch(microbatch, parallel.device()),
            student_entropy=None if entropy is None else entropy.detach(),
        )
        if microbatch.teacher_top is not None:
            batch, logprobs = replace(batch, student_top_logprobs=logprobs[:, 1:]), logprobs[:, 0]
        result: LossOutput = self.objective(logprobs, batch)
        sums = {
            "loss": result.loss_sum.detach().double(),
            "num_items": result.num_items.double(),
            **result.metric_sums,
        }
        return result.loss_sum, result.num_items * (parallel.context_rank() == 0), sums

    def _check_count(self, count: int) -> None:
        """Ranks with unequal numbers would wait for each other until the timeout."""
        if parallel.data_size() > 1:
            bounds = torch.tensor([count, -count], device=parallel.device())
            dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=parallel.data_group())
            if bounds[0] != -bounds[1]:
                what = f"data ranks have between {-bounds[1].item()} and {bounds[0].item()} microbatches; rank {parallel.rank()} has {count}"
                raise TrainingError(
                    what, where=f"step {self.step + 1}", limit="the same number on every data rank"
                )
        if count == 0:
            raise TrainingError("no microbatches", where=f"step {self.step + 1}")

    def _reduce(
        self, outputs: Sequence[Mapping[str, Tensor]], health: Tensor
    ) -> tuple[dict[str, float], list[float]]:
        """Sums over microbatches and data ranks, and of every rank's health vector, on every rank:
        one all-reduce.

        To the former one rank of each data rank contributes.
        """
        if not self._metric_names:
            names = [[*outputs[0]] if outputs else None]
            if parallel.pipeline_size() > 1:
                dist.broadcast_object_list(
                    names, src=parallel.last_stage_rank(), group=parallel.pipeline_group()
                )
            assert names[0] is not None
            self._metric_names = names[0]
        num_metrics = len(self._metric_names)
        total = torch.cat(
            [torch.zeros(num_metrics, dtype=torch.float64, device=parallel.device()), health]
        )
        if parallel.reports_for_data_rank():
            for output in outputs:
                assert [*output] == self._metric_names, (
                    "an objective reports the same metrics for every microbatch"
                )
                total[:num_metrics] += torch.stack([*output.values()])
        dist.all_reduce(total)
        summed = total.tolist()
        return dict(zip(self._metric_names, summed[:num_metrics], strict=True)), summed[
            num_metrics:
        ]

    def _scale_balancing_loss(self, microbatches: Sequence[Microbatch]) -> None:
        """Makes the experts' load-balancing loss a mean over the step's microbatches, weighted by
        their tokens, whatever the layout and the objective.

        Megatron's router multiplies the loss of a microbatch by the tokens on its rank, a share of
        the microbatch for each tensor and context rank, and at the end everything is divided by the
        number of items, which may be responses. The first would change the coefficient by 1 / (tp
        cp), the second by tokens per item.
        """
        if self.settings.moe_aux_loss == 0 or not self.architecture.num_experts:
            return
        counts = torch.zeros(2, dtype=torch.float64, device=parallel.device())
        for microbatch in microbatches:
            batch = TokenBatch.from_microbatch(microbatch, parallel.device())
            batch = replace(batch, student_top_logprobs=batch.teacher_top_logprobs)
            # How many items there are depends on masks alone; any log-probabilities will do.
            counts[0] += self.objective(
                torch.zeros(len(microbatch.token_ids), device=parallel.device()), batch
            ).num_items
            counts[1] += num_computed_tokens(microbatch)
        dist.all_reduce(counts, group=parallel.data_group())
        shares = parallel.tensor_size() * parallel.context_size()
        self._config.moe_aux_loss_coeff = (
            self.settings.moe_aux_loss * shares * (counts[0] / counts[1]).item()
        )

    def _not_finite(self, what: str, here: bool, suspects: Sequence[Microbatch]) -> TrainingError:
        """Collective, on the way out: names the ranks where it came from, the responses of their
        suspect microbatches, and the checkpoint to go on from.
        """
        own = (
            [
                f"{prompt_id}/{sample_index}"
                for microbatch in suspects
                for prompt_id, sample_index in microbatch.keys
            ]
            if here
            else []
        )
        found: list[tuple[bool, list[str]]] = [(here, own)] * parallel.world_size()
        dist.all_gather_object(found, (here, own))
        ranks = ", ".join(str(rank) for rank, (bad, _) in enumerate(found) if bad) or "unknown"
        responses = [
            *dict.fromkeys(name for _, names in found for name in names)
        ]  # tensor ranks name the same ones
        more = (
            f" and {len(responses) - NAMED_RESPONSES} more"
            if len(responses) > NAMED_RESPONSES
            else ""
        )
        learned = (
            f", learning from the responses {', '.join(responses[:NAMED_RESPONSES])}{more}"
            if responses
            else ""
        )
        newest = None
        if self._checkpoints is not None:
            self._checkpoints.finish()
            newest = self._checkpoints.newest()
        return TrainingError(
            f"{what}, on rank {ranks}{learned}; the weights were not updated",
            where=f"step {self.step + 1}",
            remedy=f"lower the learning rate or look at the data; the last good checkpoint is {newest if newest is not None else 'the initial model'}",
        )

    def _has_bad_gradient(self) -> bool:
        return any(
            not torch.isfinite(parameter.main_grad).all()
            for parameter in self.model.parameters()
            if parameter.requires_grad
        )

    # ---- without training -------------------------------------------------------------------------------------------------------------------------

    def logprobs(self, microbatch: Microbatch) -> Tensor:
        """Log-probability of every label, float32 [T], by a forward pass alone; on every rank of a
        data rank's pipeline.
        """
        return self.logprobs_of([microbatch])[0]

    def logprobs_of(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """The same of several microbatches, which follow each other through the pipeline. Every
        data rank must give the same number.
        """
        self.memory.require_weights()
        return [logprobs for logprobs, _ in score_microbatches(self.model, microbatches)]

    def export(self, *, bucket_bytes: int = BUCKET_BYTES) -> Iterator[list[tuple[str, Tensor]]]:
        """The weights under their Hugging Face names, bucket by bucket; see
        lopd.megatron.weights.transfer.export_hf.
        """
        self.memory.require_weights()
        return export_hf(self.module, self.architecture, bucket_bytes=bucket_bytes)

    # ---- checkpoints ------------------------------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Publishes a checkpoint of this step with the caller's state (anything JSON can hold).
        ArtifactError, TrainingError: it cannot be written.

        With settings.checkpoint_in_background it returns once the state is copied; a later step,
        the next save or finish_checkpoint publishes it.
        """
        assert self._checkpoints is not None, "the trainer has no checkpoint_dir"
        self._checkpoints.save(self.step, self._trained(), state)

    def finish_checkpoint(self) -> None:
        """Waits for a checkpoint that is being written in the background and publishes it."""
        if self._checkpoints is not None:
            self._checkpoints.finish()

    def resume(self, note: Callable[[str], None] | None = None) -> dict[str, Any] | None:
        """Goes on from the newest undamaged checkpoint, of this layout or another, and returns the
        caller's state; None: there is none.

        note: told on rank 0, in a line, that a damaged checkpoint was passed over or the layout is
        another; absent: stderr. TrainingError: it does not fit or cannot be read, or all are
        damaged.
        """
        if self._checkpoints is None:
            return None
        found = self._checkpoints.load_newest(self._trained(), note or _to_stderr)
        if found is None:
            return None
        self.step, state = found
        self.optimizer.set_num_updates(self.step)
        return state

    def _trained(self) -> Trained:
        self.memory.require()
        self.optimizer.create_state()
        return Trained(self.module, self.architecture, self.optimizer.megatron)


def ddp_config(
    distributed: bool, overrides: Mapping[str, Any], *, overlap: bool = False
) -> DistributedDataParallelConfig:
    """Gradients are added up in float32, unless the overrides say otherwise. overlap: those of
    layers that are done are exchanged between data ranks while the backward pass goes on.
    ConfigError where Megatron-Core refuses it.
    """
    ours = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": distributed,
        "overlap_grad_reduce": overlap,
    }
    return build(DistributedDataParallelConfig, {**ours, **overrides})


def _freeze_routers(module: Any) -> None:
    """Before gradient buffers are laid out, which then have no room for them."""
    for name, parameter in module.named_parameters():
        if name.endswith(".router.weight"):
            parameter.requires_grad_(False)


def _mark_experts(module: Any) -> None:
    """Tells Megatron-Core what an expert's weights are, in every layout and with every layer.

    allreduce: Its gradient is summed over the ranks that hold the same expert. Megatron gives
    experts this mark only where expert > 1. With expert = expert_tensor = 1 and tensor > 1 each
    tensor rank holds all experts and sees its own part of the tokens; unmarked, no gradient would
    cross tensor ranks, and their experts would drift apart.

    tensor_model_parallel: It counts in the gradient norm on every rank, because the norm of experts
    is summed over ranks that hold different ones. Transformer Engine since 2.13 leaves grouped
    weights unmarked where expert > 1, and Megatron counts an unmarked weight on the first tensor
    rank alone: with four tensor ranks three quarters of the experts would be left out.
    """
    for name, parameter in module.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False
            parameter.tensor_model_parallel = True


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
