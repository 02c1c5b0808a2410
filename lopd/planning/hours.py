"""How long each stage takes.

The configuration gives the tokens, formulas give the operations, and assumptions give the rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lopd.config import Config, PromptSet, Sampling, TrainSection
from lopd.megatron.training.flops import active_matrix_weights, training_flops
from lopd.megatron.weights.architecture import Architecture
from lopd.planning.assumptions import Assumptions
from lopd.planning.hardware import Node
from lopd.planning.memory import SIZES, MemoryUse
from lopd.planning.servers import kv_bytes_per_token
from lopd.planning.training import step_time

# Rows of public data sets, by prompts.*.format. They are used if a file is not on this machine and
# num_prompts is not given.
PUBLIC_ROWS = {
    # Sets to train on, as their cards give the number of rows.
    "openthoughts3": 1_200_000,
    "dapo_math_17k": 17_398,
    "epicoder": 380_000,
    "gsm8k": 7_473,
    # Sets to evaluate on.
    "math_500": 500,
    "aime_2024": 30,
    "aime_2025": 30,
    "hmmt_2025": 30,
    "livecodebench": 880,
}


@dataclass(frozen=True, slots=True)
class StageTime:
    """The time that a stage takes, and what it does in that time.

    Attributes:
        seconds: Wall-clock time.
        gpus: The number of GPUs that compute. All GPUs of the node are reserved, even if this is
            fewer.
        tokens: Tokens that are sampled, scored or trained on.
        flops: The number of floating-point operations.
        utilisation: The model's operations divided by the GPUs' peak while it trains (MFU). It is 0
            for a stage that does not train.
        startup_s: The part of ``seconds`` in which servers or ranks start.
    """

    seconds: float
    gpus: int
    tokens: float
    flops: float
    utilisation: float = 0.0
    startup_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """The rate while the stage computes, without its starts."""
        computing = self.seconds - self.startup_s
        return self.tokens / computing if computing > 0 else 0.0

    def __add__(self, other: StageTime) -> StageTime:
        """Return the time of two parts, one after the other."""
        return StageTime(
            self.seconds + other.seconds,
            max(self.gpus, other.gpus),
            self.tokens + other.tokens,
            self.flops + other.flops,
            # A part that does not train has 0, and says nothing about the other one.
            max(self.utilisation, other.utilisation),
            self.startup_s + other.startup_s,
        )


NO_TIME = StageTime(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Amounts:
    """Numbers of prompts, and mean lengths in tokens."""

    sft_prompts: float
    opd_prompts: float
    eval_prompts: float
    demonstration_len: float
    rollout_len: float
    answer_len: float
    prompt_len: float

    @classmethod
    def of(cls, config: Config, assumed: Assumptions) -> Amounts:
        """Return the amounts of a configuration."""
        # A prompt and its response share the context.
        left = config.sglang.context_length - prompt_len(config, assumed)

        # The share is of what a response may have: its own limit, or what the context leaves.
        def mean_len(section: Sampling, share: float) -> float:
            return share * min(section.max_new_tokens, left)

        return cls(
            sft_prompts=num_prompts(config.prompts.sft, assumed),
            opd_prompts=num_prompts(config.prompts.opd, assumed),
            eval_prompts=num_prompts(config.prompts.eval, assumed),
            demonstration_len=mean_len(config.demonstrate, assumed.demonstration_share),
            rollout_len=mean_len(config.rollout, assumed.rollout_share),
            answer_len=mean_len(config.evaluate, assumed.evaluation_share),
            prompt_len=prompt_len(config, assumed),
        )


def prompt_len(config: Config, assumed: Assumptions) -> float:
    """Return the mean tokens of a prompt: what is assumed, and at most half of the context.

    The tiny examples have contexts that are shorter than the assumed prompt, and responses all the
    same.
    """
    return min(assumed.prompt_len, config.sglang.context_length / 2)


def num_prompts(prompts: PromptSet, assumed: Assumptions) -> float:
    """Return the number of prompts of a set. Its file is not read.

    The configuration may give the number. Otherwise it is that of the public data set, or an
    assumption.
    """
    if prompts.num_prompts is not None:
        return float(prompts.num_prompts)
    # A set of a task that generates its prompts has no format.
    return float(PUBLIC_ROWS.get(str(getattr(prompts, "format", "")), assumed.file_prompts))


def sampling_time(
    arch: Architecture,
    parameters: int,
    config: Config,
    server: MemoryUse,
    node: Node,
    assumed: Assumptions,
    *,
    responses: float,
    mean_len: float,
) -> StageTime:
    """Return the time to sample responses.

    Decoding is bound by memory: each step reads once the weights that the batch needs, and its KV
    cache. Of n experts, k of them chosen by each token, a batch needs n (1 - (1 - k/n)^batch).

    Args:
        arch: The shape of the model.
        parameters: Parameters of the whole model.
        config: The configuration.
        server: The memory of a server, which limits the batch.
        node: The machine.
        assumed: Rates and lengths.
        responses: Number of responses.
        mean_len: Mean tokens of a response.
    """
    settings = config.sglang
    # Servers are full until few responses are left. The efficiency has that last part in it.
    # With few responses the servers are never full.
    batch = max(1.0, min(server.figures["concurrency"], responses / server.figures["copies"]))
    touched = _share_of_weights_read(arch, parameters, batch)
    # Bytes that one GPU reads in a step. Tensor ranks read their shares at the same time.
    weights = parameters * SIZES[settings.dtype] / settings.tensor * touched
    # Over its whole life a response is half as long as at its end.
    mean_context = assumed.prompt_len + mean_len / 2
    cache = batch * mean_context * kv_bytes_per_token(arch, settings)
    # 2 operations per weight and token: a multiplication and an addition.
    flops = 2.0 * active_matrix_weights(arch) * batch / settings.tensor
    roofline = max((weights + cache) / node.gpu.bandwidth, flops / node.gpu.flops)
    # Seconds of one decoding step, in which each request of the batch gets one token.
    step_s = roofline / assumed.decode_efficiency
    if settings.deterministic:
        step_s *= assumed.deterministic_slowdown
    # Prompts are read much faster than responses are written, and are not counted.
    tokens = responses * mean_len
    # Each step gives one token to every request of every copy.
    steps = tokens / (batch * server.figures["copies"])
    return StageTime(
        assumed.startup_s + steps * step_s,
        int(server.figures["gpus"]),
        tokens,
        forward_flops(arch, responses, assumed.prompt_len + mean_len),
        startup_s=assumed.startup_s,
    )


def _share_of_weights_read(arch: Architecture, parameters: int, batch: float) -> float:
    """Return the share of the weights that one decoding step of a batch reads."""
    if not arch.num_experts:
        return 1.0
    # An expert of SwiGLU has three matrices: gate, up and down.
    all_experts = (
        3 * arch.hidden_size * arch.moe_ffn_hidden_size * arch.num_experts * arch.num_layers
    )
    # The share of experts that no token of the batch has chosen.
    idle: float = (1 - arch.experts_per_token / arch.num_experts) ** batch
    return 1 - idle * all_experts / parameters


def scoring_time(
    arch: Architecture,
    gpus: int,
    node: Node,
    assumed: Assumptions,
    *,
    responses: float,
    mean_len: float,
) -> StageTime:
    """Return the time of one forward pass over prompts and responses.

    Args:
        arch: The shape of the teacher.
        gpus: Number of GPUs that score.
        node: The machine.
        assumed: Rates and lengths.
        responses: Number of responses.
        mean_len: Mean tokens of a response.
    """
    flops = forward_flops(arch, responses, assumed.prompt_len + mean_len)
    # Experts are many small products, which use less of a GPU than a few large ones.
    utilisation = (
        assumed.moe_prefill_utilisation if arch.num_experts else assumed.prefill_utilisation
    )
    # Scoring is bound by operations, since it reads all tokens of a response at once.
    seconds = assumed.startup_s + flops / (gpus * node.gpu.flops * utilisation)
    return StageTime(seconds, gpus, responses * mean_len, flops, startup_s=assumed.startup_s)


def forward_flops(arch: Architecture, sequences: float, length: float) -> float:
    """Return the operations of a forward pass over sequences of one length in tokens."""
    # A training step has a forward pass, and a backward pass with twice its operations.
    return sequences * training_flops(arch, [round(length)]) / 3


def training_time(
    arch: Architecture,
    settings: TrainSection,
    node: Node,
    assumed: Assumptions,
    *,
    num_steps: float,
    sequence_len: float,
    parameters: int,
) -> StageTime:
    """Return the time of a training. Its tokens are all that it processes.

    Args:
        arch: The shape of the student.
        settings: The settings of the training.
        node: The machine.
        assumed: Rates and utilisations.
        num_steps: Number of steps.
        sequence_len: Mean tokens of a sequence, prompt and response.
        parameters: The trained parameters of the whole model.
    """
    step = step_time(
        arch, settings, node, assumed, sequence_len=sequence_len, parameters=parameters
    )
    # The ranks of all nodes, because steps are made by all of them together.
    ranks = settings.parallel.ranks
    return StageTime(
        assumed.startup_s + num_steps * step.seconds,
        ranks,
        num_steps * settings.batch_size * sequence_len,
        num_steps * step.flops,
        # MFU counts no repeated operations, and the steps alone, without the start.
        step.model_flops / (step.seconds * ranks * node.gpu.flops),
        assumed.startup_s,
    )


def sync_time(
    config: Config, weights: float, away: float, sampled: StageTime, assumed: Assumptions
) -> StageTime:
    """Return the time of the weight syncs of distill, with the evaluation after each.

    Args:
        config: The configuration.
        weights: Bytes of the model as it is served.
        away: Bytes of each GPU that go to the host and back around a sync, if server and trainer
            take turns.
        sampled: The time of one evaluation.
        assumed: Rates.
    """
    # There is one sync before the first step, so that the curve begins with the SFT student.
    count = 1 + config.distill.num_steps // config.distill.sync_every
    # What takes turns moves twice: to the host before the server works, and back after it.
    moved = weights / assumed.sync_rate + 2 * away / assumed.host_link
    # The server is started once, not for every evaluation.
    seconds = moved + sampled.seconds - assumed.startup_s
    return StageTime(count * seconds, sampled.gpus, 0.0, count * sampled.flops)


def baseline_steps(config: Config, distilled_tokens: float, sequence_len: float) -> int:
    """Return the steps of SFT that process as many tokens as distill did.

    evaluate trains such a student: the baseline of equal compute.

    Args:
        config: The configuration.
        distilled_tokens: Tokens that distill processes.
        sequence_len: Mean tokens of a demonstration with its prompt.
    """
    return math.ceil(distilled_tokens / (config.sft.batch_size * sequence_len))
