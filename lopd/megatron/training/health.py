"""What a step reports besides its loss.

The metrics say how evenly experts and data ranks are loaded, how much is padding, how many
operations are done per second, and how much memory is used.

Every rank fills in its part of one vector. The trainer adds the vectors of all ranks, together with
its own sums, in one all-reduce. Each rank reads the metrics from the sum.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from lopd.megatron.model.context import num_computed_tokens, part_of
from lopd.megatron.ranks import parallel
from lopd.megatron.training.flops import peak_flops, training_flops
from lopd.megatron.weights.architecture import Architecture
from lopd.records import Microbatch

_GIB = 2**30


class StepHealth:
    """The metrics of one step at a time.

    Call begin(), then the forward passes inside of counting(), then vector(). Add up the vectors of
    all ranks, and call figures() with the sum.
    """

    def __init__(
        self, module: Any, architecture: Architecture, dtype: str, *, frozen: bool = False
    ) -> None:
        """Prepare the counters, and hook the routers of experts if the model has any.

        Args:
            module: This rank's part of the model.
            architecture: The model.
            dtype: The dtype of the weights, as a knob names it.
            frozen: Whether adapters are trained in place of the weights.
        """
        self._arch = architecture
        self._frozen = frozen
        # Of all layers, those of other pipeline stages included, so that the vectors of all ranks
        # have one length.
        self._expert_tokens = torch.zeros(
            architecture.num_layers,
            architecture.num_experts,
            dtype=torch.float64,
            device=parallel.device(),
        )
        # bool [tokens]: which rows of a router's input are tokens of samples. None: do not count.
        self._counted: Tensor | None = None
        cuda = torch.cuda.is_available()
        self._peak = peak_flops(torch.cuda.get_device_name(), dtype) if cuda else None
        # A hook sees the router's choices after any drop, without a change to Megatron-Core.
        for router in module.modules():
            if isinstance(router, TopKRouter):
                router.register_forward_hook(self._count)

    def begin(self) -> None:
        """Set all counters to zero."""
        self._expert_tokens.zero_()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def counting(self, microbatch: Microbatch) -> Iterator[None]:
        """Count the tokens that each expert is given, in the forward passes of a training step.

        Other forward passes, for example of an evaluation, must be outside of this context."""
        # With sequence parallelism the routers of a tensor rank see a part of the tokens.
        rows = np.split(part_of(microbatch).index, parallel.tensor_size())
        is_real = rows[parallel.tensor_rank()] < _num_real(microbatch)
        self._counted = torch.as_tensor(is_real, device=parallel.device())
        try:
            yield
        finally:
            # Recompute runs the routers again in the backward pass. That pass is outside of this
            # block, so no token counts twice.
            self._counted = None

    def _count(self, router: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        if self._counted is not None:
            # output[1] is bool [tokens, experts]: the choices that remain after the capacity
            # factor. The router's numbers of layers begin at 1, and count over all pipeline stages.
            chosen = output[1] & self._counted[:, None]
            self._expert_tokens[router.layer_number - 1] += chosen.sum(dim=0)

    def vector(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """Return this rank's part, float64 [N]. It has the same length on every rank.

        Args:
            microbatches: The microbatches of the step.
        """
        # A sum of vectors can carry single values of every rank: each has a place of its own, which
        # is 0 in the vectors of the others. So the maximum over ranks needs no second collective.
        own = torch.zeros(2 + parallel.world_size(), dtype=torch.float64)
        flops = torch.zeros(parallel.data_size(), dtype=torch.float64)
        # Ranks with the same data rank have the same microbatches, which must count once.
        if parallel.reports_for_data_rank():
            own[0] = sum(_num_real(microbatch) for microbatch in microbatches)
            own[1] = sum(num_computed_tokens(microbatch) for microbatch in microbatches)
            flops[parallel.data_rank()] = sum(
                training_flops(self._arch, _lengths(microbatch), frozen=self._frozen)
                for microbatch in microbatches
            )
        own[2 + parallel.rank()] = peak_memory_bytes()
        device = parallel.device()
        return torch.cat([own.to(device), flops.to(device), self._expert_tokens.flatten()])

    def figures(self, summed: Sequence[float], seconds: float) -> dict[str, float]:
        """Return the metrics of the step.

        - num_processed: tokens of all sequences, prompts included.
        - padding_share: the share of padding in all tokens computed.
        - load_imbalance: the largest work of a data-parallel rank divided by the mean, by
          training_flops. 1 is balanced.
        - model_tflops_per_s: operations of the model (lopd.megatron.training.flops) over all ranks,
          in 10^12 per second.
        - mfu: model_tflops_per_s divided by the peak of all GPUs, if the peak is known.
        - peak_memory_gib: of the rank that used most. On CUDA it is what was allocated in this
          step, on a CPU what the process has held since its start.
        - For a mixture of experts also the metrics of expert_load.

        Args:
            summed: The sum of all ranks' vectors.
            seconds: The wall-clock time of the step.
        """
        num_processed = summed[0]
        num_computed = summed[1]
        world = parallel.world_size()
        data = parallel.data_size()
        # The order of vector(): two counts, memory by rank, operations by data rank, experts.
        memory = summed[2 : 2 + world]
        flops = summed[2 + world : 2 + world + data]
        counts = summed[2 + world + data :]
        # The lower bounds of the divisors act on steps of padding alone, and avoid a division by 0.
        figures = {
            "num_processed": num_processed,
            "padding_share": 1.0 - num_processed / max(num_computed, 1.0),
            "load_imbalance": max(flops) * data / max(sum(flops), 1.0),
            "model_tflops_per_s": sum(flops) / seconds / 1e12,
            "peak_memory_gib": max(memory) / _GIB,
        }
        # All GPUs of a training are taken to be of the kind of this one.
        if self._peak is not None:
            figures["mfu"] = sum(flops) / seconds / (self._peak * world)
        if self._arch.num_experts:
            tokens = torch.tensor(counts, dtype=torch.float64).view(
                self._arch.num_layers, self._arch.num_experts
            )
            figures |= expert_load(tokens, num_processed * self._arch.experts_per_token)
        return figures


def expert_load(tokens: Tensor, num_routed: float) -> dict[str, float]:
    """Return how evenly tokens are spread over experts.

    - expert_entropy_share: the entropy of the distribution over experts, divided by that of an even
      one. 1 is even, 0 means that one expert takes all. It is the mean over layers.
    - expert_entropy_share_min: the same of the worst layer.
    - expert_max_load: the busiest expert's tokens over the mean, of the worst layer. It is at least
      1 and at most the number of experts.
    - expert_dropped_share: the share of the choices that the capacity factor dropped.

    Args:
        tokens: float [layers, experts], the number of tokens that each expert was given.
        num_routed: The number of choices of a layer before any drop.
    """
    # The clamps keep a layer without tokens, and a model with one expert, from dividing by 0.
    # [layers, experts]: the distribution of each layer's tokens.
    shares = tokens / tokens.sum(dim=1, keepdim=True).clamp(min=1.0)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=1) / math.log(max(tokens.shape[1], 2))
    return {
        "expert_entropy_share": entropy.mean().item(),
        "expert_entropy_share_min": entropy.min().item(),
        "expert_max_load": (shares.amax(dim=1) * tokens.shape[1]).max().item(),
        "expert_dropped_share": 1.0 - tokens.sum().item() / max(num_routed * tokens.shape[0], 1.0),
    }


def peak_memory_bytes() -> float:
    """Return the most memory that this rank has used.

    On CUDA it is what was allocated since the last reset. On a CPU it is what the process has held
    since its start.
    """
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    # VmHWM is of this process alone. getrusage starts a child with the peak of its parent.
    with open("/proc/self/status", encoding="ascii") as status:
        kilobytes = next((line.split()[1] for line in status if line.startswith("VmHWM:")), "0")
    return float(kilobytes) * 1024


def _num_real(microbatch: Microbatch) -> int:
    """Return the number of tokens of samples. What follows them is padding."""
    return int(microbatch.cu_seqlens[microbatch.num_sequences])


def _lengths(microbatch: Microbatch) -> list[int]:
    return [int(length) for length in np.diff(microbatch.cu_seqlens)[: microbatch.num_sequences]]
