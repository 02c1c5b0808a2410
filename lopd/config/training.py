"""Knobs of all work on Megatron-Core: the ranks, the optimizer, and the stage sft."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lopd.config.base import SPEED_ONLY, Contradiction, FilePath, Section
from lopd.config.lora import LoraSection


class ParallelSection(Section):
    """How a model is spread over ranks. A rank is one process, and on a GPU node one GPU."""

    # ranks = tensor x pipeline x context x data. The data-parallel size is what remains.

    ranks: int = Field(
        default=1,
        ge=1,
        description=(
            "The number of processes: one per GPU, or on a CPU at most one per core. "
            "The other sizes divide it."
        ),
    )

    tensor: int = Field(
        default=1,
        ge=1,
        description="The tensor-parallel size. Above 1, sequence parallelism is on as well.",
    )

    pipeline: int = Field(
        default=1,
        ge=1,
        description="The pipeline-parallel size.",
    )

    context: int = Field(
        default=1,
        ge=1,
        description=(
            "The context-parallel size: so many ranks each compute a part of every sequence. "
            "Above 1 it needs Transformer Engine."
        ),
    )

    # Experts lie on ranks of the tensor and data dimensions, so these two add no ranks.

    expert: int = Field(
        default=1,
        ge=1,
        description="The expert-parallel size.",
    )

    expert_tensor: int = Field(
        default=1,
        ge=1,
        description="The tensor-parallel size inside an expert.",
    )

    # Without it every rank holds the whole state: a copy of the weights and two moments, in
    # float32.
    distributed_optimizer: bool = Field(
        default=True,
        description="Shard the optimizer's state over the data-parallel ranks.",
    )

    # The ranks count over all machines, so more machines do not change a result.
    nodes: int = Field(
        default=1,
        ge=1,
        description=(
            "The number of machines. Each has an equal part of the ranks. "
            "Above 1, lopd launch starts them."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    @property
    def data(self) -> int:
        """The data-parallel size."""
        return self.ranks // (self.tensor * self.pipeline * self.context)


class ForwardSection(Section):
    """Forward passes of a model in Megatron-Core, without training."""

    parallel: ParallelSection = Field(default_factory=ParallelSection)

    # float32 is for tests and for CPUs.
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16",
        description="The number format of weights and activations.",
    )

    # A forward pass keeps nothing for a backward pass, so this decides only memory and speed.
    max_tokens_per_microbatch: int = Field(
        default=16384,
        ge=8,
        description=(
            "The most tokens of a packed microbatch on one data-parallel rank. "
            "The context-parallel ranks share them."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    timeout_s: float = Field(
        default=600,
        gt=0,
        description="The seconds after which a lost or hanging rank ends the stage.",
        json_schema_extra=SPEED_ONLY,
    )

    # Not more by default: two OpenMP threads a rank are slower as soon as cores are shared.
    threads_per_rank: int | None = Field(
        default=None,
        ge=1,
        description="The CPU threads of a rank. If absent, a rank has 1.",
        json_schema_extra=SPEED_ONLY,
    )


class OptimizerSection(Section):
    """AdamW and its learning rate. The defaults follow the paper's distillation."""

    # The learning rate over the steps.

    lr: float = Field(
        default=2e-6,
        gt=0,
        description="The peak learning rate.",
    )

    min_lr: float = Field(
        default=0.0,
        ge=0,
        description="The learning rate at the last step, if the schedule decays.",
    )

    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant",
        description="The shape of the learning rate after the warm-up.",
    )

    # A share and not a number of steps, so that it fits any num_steps.
    warmup: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="The share of the steps in which the learning rate rises linearly from 0.",
    )

    # The update of a parameter.

    beta1: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="The decay of Adam's first moment from step to step.",
    )

    # The paper's value. The usual 0.999 would average over many more steps than a run has.
    beta2: float = Field(
        default=0.98,
        ge=0,
        lt=1,
        description="The decay of Adam's second moment from step to step.",
    )

    eps: float = Field(
        default=1e-8,
        gt=0,
        description="Adam's epsilon, which is added to the root of the second moment.",
    )

    # Norms and biases have few values, and no reason to be small.
    weight_decay: float = Field(
        default=0.1,
        ge=0,
        description="The decoupled weight decay. Norms and biases have none.",
    )

    # The norm is that of the gradient before the clipping, over all ranks.
    clip_grad: float = Field(
        default=1.0,
        ge=0,
        description="The largest norm of the whole gradient. 0 means no limit.",
    )

    # Routers of mixture-of-experts models. A small change there sends tokens to other experts, so
    # they may need a smaller step than the rest of the model.

    router_lr_scale: float = Field(
        default=1.0,
        gt=0,
        description="Multiply the learning rate of the experts' routers by this.",
    )

    freeze_router: bool = Field(
        default=False,
        description=(
            "Do not train the routers' weights. "
            "The choice of experts then changes only with the routers' inputs."
        ),
    )


class TrainSection(Section):
    """What sft and distill share."""

    parallel: ParallelSection = Field(default_factory=ParallelSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    lora: LoraSection = Field(default_factory=LoraSection)

    # How much is learnt.

    # 150 steps of 256 responses are the paper's distillation.
    num_steps: int = Field(
        default=150,
        ge=1,
        description="The number of optimizer steps.",
    )

    batch_size: int = Field(
        default=256,
        ge=1,
        description="The number of responses in a step, over all ranks.",
    )

    # How a step is computed.

    # Here it is not SPEED_ONLY: another packing adds the gradient's terms in another order.
    max_tokens_per_microbatch: int = Field(
        default=16384,
        ge=8,
        description=(
            "The most tokens of a packed microbatch on one data-parallel rank. "
            "The context-parallel ranks share them."
        ),
    )

    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16",
        description="The number format of weights and activations.",
    )

    # Full recompute costs about a third more computation.
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description=(
            "What the backward pass computes again, to save memory. full means whole layers; "
            "selective means the experts or the MLP (on a GPU in bfloat16), else the attention."
        ),
    )

    # 0, because it would add a second aim to the loss.
    moe_aux_loss: float = Field(
        default=0.0,
        ge=0,
        description="The coefficient of the loss that balances the experts' load. 0 means none.",
    )

    # For what lopd has no knob for. A field that lopd sets itself is refused.
    megatron: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Any other field of Megatron-Core's TransformerConfig, OptimizerConfig or "
            "DistributedDataParallelConfig, by its name."
        ),
    )

    # What is kept for a resume.

    # None is written at the last step, where the stage publishes its model.
    checkpoint_every: int = Field(
        default=50,
        ge=1,
        description="The number of steps between two checkpoints. A killed stage resumes there.",
        json_schema_extra=SPEED_ONLY,
    )

    # Two, because the newest one may turn out to be damaged.
    keep_checkpoints: int = Field(
        default=2,
        ge=1,
        description="The number of newest checkpoints that stay on disk.",
        json_schema_extra=SPEED_ONLY,
    )

    # Off, because the copy needs host memory for weights and optimizer state.
    checkpoint_in_background: bool = Field(
        default=False,
        description=(
            "Write a checkpoint from a copy in host memory, while the training continues."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # The ranks as processes.

    timeout_s: float = Field(
        default=600,
        gt=0,
        description="The seconds after which a lost or hanging rank ends the stage.",
        json_schema_extra=SPEED_ONLY,
    )

    threads_per_rank: int | None = Field(
        default=None,
        ge=1,
        description=(
            "The CPU threads of a rank. If absent, a rank has 1, or its share of the machine's "
            "cores if the optimizer is offloaded to the CPU."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # The file of metrics has every step in any case.
    log_every: int = Field(
        default=1,
        ge=1,
        description="The number of steps between two lines on screen.",
        json_schema_extra=SPEED_ONLY,
    )

    @model_validator(mode="after")
    def _fits_adapters(self) -> TrainSection:
        if not self.lora.is_on:
            return self
        # Routers have no adapters, so their rate would change nothing.
        if self.optimizer.router_lr_scale != 1.0:
            raise Contradiction(
                "optimizer.router_lr_scale has no effect with lora.rank, which trains no router",
                limit="exactly 1 with adapters",
                remedy="remove optimizer.router_lr_scale or lora.rank",
            )
        # The adapters would be there, and would silently take no part.
        if self.megatron.get("use_transformer_engine_op_fuser"):
            raise Contradiction(
                "megatron.use_transformer_engine_op_fuser cannot be used with lora.rank: the fused "
                "layers never call the layers that have adapters",
                limit="exactly false with adapters",
                remedy="remove this field or lora.rank",
            )
        return self


class SftSection(TrainSection):
    """The table [sft]: the base model learns from the teacher's demonstrations."""

    # Demonstrations or a student that other programs have made.

    demonstrations: FilePath | None = Field(
        default=None,
        description=(
            "Demonstrations made elsewhere, as an artifact folder. "
            "If absent, those of the stage demonstrate are used."
        ),
    )

    # Whether teacher and demonstrations belong together decides whether OPD converges to the right
    # point.
    declared_teacher: FilePath | None = Field(
        default=None,
        description=(
            "The teacher of demonstrations or of a student made elsewhere. "
            "It is recorded as declared, because it cannot be proven."
        ),
    )

    checkpoint: FilePath | None = Field(
        default=None,
        description=(
            "An SFT student made elsewhere, as a Hugging Face folder. It is used as it is, "
            "without training. Name its teacher in sft.declared_teacher."
        ),
    )

    # The first weights.

    # Random weights are for tests and for the example, where no base model exists.
    init: Literal["checkpoint", "random"] = Field(
        default="checkpoint",
        description=(
            "The first weights: checkpoint means those of models.student; random means random "
            "weights of the shape in its config.json."
        ),
    )

    init_std: float = Field(
        default=0.02,
        gt=0,
        description='The standard deviation of random weights, for sft.init = "random".',
    )
