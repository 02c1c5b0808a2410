"""How long the stages take: tokens from the configuration, operations by formula, rates by
assumption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lopd.config import Config, PromptSet, Sampling, TrainSection
from lopd.megatron.training.flops import active_matrix_weights, training_flops
from lopd.megatron.weights.architecture import Architecture
from lopd.planning.assumptions import Assumptions
from lopd.planning.hardware import Node
from lopd.planning.memory import SIZES, MemoryUse, kv_bytes_per_token
from lopd.planning.training import step_time

# Rows of public data sets, by prompts.*.format: used where a file is not there and num_prompts is
# not given.
PUBLIC_ROWS = {
    "openthoughts3": 1_200_000, "dapo_math_17k": 17_398, "epicoder": 380_000, "gsm8k": 7_473, "math_500": 500, "aime_2024": 30, "aime_2025": 30,
    "hmmt_2025": 30, "livecodebench": 880,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """seconds: wall clock. gpus: those that compute; the node is held as a whole. tokens: sampled,
    scored or trained on.

    utilisation: the model's operations over the GPUs' peak while it trains (MFU); 0 of what is no
    training.
    """

    seconds: float
    gpus: int
    tokens: float
    flops: float
    utilisation: float = 0.0

    def __add__(self, other: Work) -> Work:
        flops, used = self.flops + other.flops, max(self.utilisation, other.utilisation)
        return Work(
            self.seconds + other.seconds,
            max(self.gpus, other.gpus),
            self.tokens + other.tokens,
            flops,
            used,
        )


@dataclass(frozen=True, slots=True)
class Amounts:
    """Numbers of prompts and mean lengths of responses, in tokens."""

    sft_prompts: float
    opd_prompts: float
    eval_prompts: float
    demonstration_len: float
    rollout_len: float
    answer_len: float
    prompt_len: float

    @classmethod
    def of(cls, config: Config, assumed: Assumptions) -> Amounts:
        def mean_len(section: Sampling, share: float) -> float:
            return share * min(
                section.max_new_tokens, max(1.0, config.sglang.context_length - assumed.prompt_len)
            )

        return cls(
            sft_prompts=num_prompts(config.prompts.sft, assumed),
            opd_prompts=num_prompts(config.prompts.opd, assumed),
            eval_prompts=num_prompts(config.prompts.eval, assumed),
            demonstration_len=mean_len(config.demonstrate, assumed.demonstration_share),
            rollout_len=mean_len(config.rollout, assumed.rollout_share),
            answer_len=mean_len(config.evaluate, assumed.evaluation_share),
            prompt_len=min(assumed.prompt_len, config.sglang.context_length / 2),
        )


def num_prompts(prompts: PromptSet, assumed: Assumptions) -> float:
    """As the configuration says; else those of the public data set; else an assumption. The file
    itself is not read.
    """
    if prompts.num_prompts is not None:
        return float(prompts.num_prompts)
    return float(PUBLIC_ROWS.get(str(getattr(prompts, "format", "")), assumed.file_prompts))


# ---- engines --------------------------------------------------------------------------------------------------------------------------------------


def sampling_work(
    arch: Architecture,
    parameters: int,
    config: Config,
    server: MemoryUse,
    node: Node,
    assumed: Assumptions,
    *,
    responses: float,
    mean_len: float,
) -> Work:
    """Decoding, bound by memory: at every step the weights that the batch needs and its KV cache
    are read once.

    Of experts, those that at least one of the batch's tokens chose: n (1 - (1 - k/n)^batch).
    """
    settings = config.sglang
    batch = max(1.0, min(server.figures["concurrency"], responses / server.figures["copies"]))
    touched = 1.0
    if arch.num_experts:
        all_experts = (
            3 * arch.hidden_size * arch.moe_ffn_hidden_size * arch.num_experts * arch.num_layers
        )
        idle = (1 - arch.experts_per_token / arch.num_experts) ** batch
        touched = 1 - idle * all_experts / parameters
    read = parameters * SIZES[settings.dtype] / settings.tensor * touched + batch * (
        assumed.prompt_len + mean_len / 2
    ) * kv_bytes_per_token(arch, settings)
    matrices = 2.0 * active_matrix_weights(arch) * batch / settings.tensor
    slower = assumed.deterministic_slowdown if settings.deterministic else 1.0
    step_s = (
        max(read / node.gpu.bandwidth, matrices / node.gpu.flops)
        / assumed.decode_efficiency
        * slower
    )
    tokens = responses * mean_len
    seconds = assumed.startup_s + tokens / (batch * server.figures["copies"]) * step_s
    return Work(
        seconds,
        int(server.figures["gpus"]),
        tokens,
        forward_flops(arch, responses, assumed.prompt_len + mean_len),
    )


def scoring_work(
    arch: Architecture,
    gpus: int,
    node: Node,
    assumed: Assumptions,
    *,
    responses: float,
    mean_len: float,
) -> Work:
    """One forward pass over prompt and response."""
    flops = forward_flops(arch, responses, assumed.prompt_len + mean_len)
    utilisation = (
        assumed.moe_prefill_utilisation if arch.num_experts else assumed.prefill_utilisation
    )
    return Work(
        assumed.startup_s + flops / (gpus * node.gpu.flops * utilisation),
        gpus,
        responses * mean_len,
        flops,
    )


def forward_flops(arch: Architecture, sequences: float, length: float) -> float:
    """A third of a training step's, which counts the backward pass twice."""
    return sequences * training_flops(arch, [round(length)]) / 3


# ---- the trainer ----------------------------------------------------------------------------------------------------------------------------------


def training_work(
    arch: Architecture,
    settings: TrainSection,
    node: Node,
    assumed: Assumptions,
    *,
    num_steps: float,
    sequence_len: float,
    parameters: int,
) -> Work:
    """Steps of lopd.planning.training. Tokens: all that are processed."""
    step = step_time(
        arch, settings, node, assumed, sequence_len=sequence_len, parameters=parameters
    )
    used = step.model_flops / (step.seconds * settings.parallel.ranks * node.gpu.flops)
    tokens = num_steps * settings.batch_size * sequence_len
    return Work(
        assumed.startup_s + num_steps * step.seconds,
        settings.parallel.ranks,
        tokens,
        num_steps * step.flops,
        used,
    )


def sync_work(
    config: Config, weights: float, away: float, sampled: Work, assumed: Assumptions
) -> Work:
    """Weight syncs between the steps of distill, and the evaluation after each. weights: bytes of
    the model as it is served.

    away: bytes of each GPU that go to the host and back around it, where server and trainer take
    turns. sampled: one such evaluation.
    """
    count = 1 + config.distill.num_steps // config.distill.sync_every  # also before the first step
    once = (
        weights / assumed.sync_rate
        + 2 * away / assumed.host_link
        + sampled.seconds
        - assumed.startup_s
    )
    return Work(count * once, sampled.gpus, 0.0, count * sampled.flops)


def baseline_steps(config: Config, distilled_tokens: float, sequence_len: float) -> int:
    """Steps of SFT that process as many tokens as distill did: the equal-compute baseline of
    evaluate.
    """
    return math.ceil(distilled_tokens / (config.sft.batch_size * sequence_len))
