"""What a step tells besides its loss: how evenly experts and data ranks are loaded, padding,
operations per second, memory.

Every rank fills in its part of one vector, the trainer adds the vectors of all ranks (with its own
sums, in one all-reduce), and each rank reads the figures.
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
    """Figures of one step at a time: begin(), forward passes inside of counting(), then vector()
    here and figures() of the sum over all ranks.
    """

    def __init__(self, module: Any, architecture: Architecture, dtype: str) -> None:
        """module: this rank's part of the model. Hooks its routers, if it has any."""
        self._arch = architecture
        self._expert_tokens = torch.zeros(
            architecture.num_layers,
            architecture.num_experts,
            dtype=torch.float64,
            device=parallel.device(),
        )
        self._counted: Tensor | None = (
            # bool [tokens], rows of a router's input that are tokens of samples; None: do not count
            None
        )
        cuda = torch.cuda.is_available()
        self._peak = peak_flops(torch.cuda.get_device_name(), dtype) if cuda else None
        for router in module.modules():
            if isinstance(router, TopKRouter):
                router.register_forward_hook(self._count)

    def begin(self) -> None:
        self._expert_tokens.zero_()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def counting(self, microbatch: Microbatch) -> Iterator[None]:
        """Around a forward pass that belongs to the step; what recompute repeats in the backward
        pass is outside and not counted twice.
        """
        rows = np.split(
            part_of(microbatch).index, parallel.tensor_size()
        )  # with sequence parallelism a tensor rank's routers see a part of the tokens
        self._counted = torch.as_tensor(
            rows[parallel.tensor_rank()] < _num_real(microbatch), device=parallel.device()
        )
        try:
            yield
        finally:
            self._counted = None

    def _count(self, router: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        if self._counted is not None:
            chosen = (
                output[1] & self._counted[:, None]
            )  # output[1]: bool [tokens, experts], after any drops
            self._expert_tokens[router.layer_number - 1] += chosen.sum(dim=0)

    def vector(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """This rank's part, float64 [N], of the same length on every rank; to be added over all
        ranks.
        """
        own = torch.zeros(2 + parallel.world_size(), dtype=torch.float64)
        flops = torch.zeros(parallel.data_size(), dtype=torch.float64)
        if parallel.reports_for_data_rank():
            own[0] = sum(_num_real(microbatch) for microbatch in microbatches)
            own[1] = sum(num_computed_tokens(microbatch) for microbatch in microbatches)
            flops[parallel.data_rank()] = sum(
                training_flops(self._arch, _lengths(microbatch)) for microbatch in microbatches
            )
        own[2 + parallel.rank()] = peak_memory_bytes()
        return torch.cat(
            [own.to(parallel.device()), flops.to(parallel.device()), self._expert_tokens.flatten()]
        )

    def figures(self, summed: Sequence[float], seconds: float) -> dict[str, float]:
        """From the sum of all ranks' vectors:

        num_processed: tokens of all sequences, prompts included. padding_share: of all tokens
        computed. load_imbalance: the most work of a data rank over the mean (1: even; work by
        training_flops). model_tflops_per_s: of the model (lopd.megatron.training.flops) over all
        ranks, in 10^12. mfu: that over the peak of all GPUs, where the peak is known.
        peak_memory_gib: of the rank that used most: on CUDA what was allocated in this step, on a
        CPU what the process has held since its start. Of mixture-of-experts models also those of
        expert_load.
        """
        num_processed, num_computed = summed[0], summed[1]
        world, data = parallel.world_size(), parallel.data_size()
        memory, flops, counts = (
            summed[2 : 2 + world],
            summed[2 + world : 2 + world + data],
            summed[2 + world + data :],
        )
        found = {
            "num_processed": num_processed,
            "padding_share": 1.0 - num_processed / max(num_computed, 1.0),
            "load_imbalance": max(flops) * data / max(sum(flops), 1.0),
            "model_tflops_per_s": sum(flops) / seconds / 1e12,
            "peak_memory_gib": max(memory) / _GIB,
        }
        if self._peak is not None:
            found["mfu"] = sum(flops) / seconds / (self._peak * world)
        if self._arch.num_experts:
            tokens = torch.tensor(counts, dtype=torch.float64).view(
                self._arch.num_layers, self._arch.num_experts
            )
            found |= expert_load(tokens, num_processed * self._arch.experts_per_token)
        return found


def expert_load(tokens: Tensor, num_routed: float) -> dict[str, float]:
    """How evenly tokens are spread over experts. tokens float [layers, experts]: what each expert
    was given. num_routed: choices of a layer before any drop.

    expert_entropy_share: entropy of the distribution over experts by that of an even one (1: even,
    0: one expert takes all), mean over layers; expert_entropy_share_min: of the worst layer.
    expert_max_load: the busiest expert's tokens over the mean, of the worst layer (1 to the number
    of experts). expert_dropped_share: of the choices, those that the capacity factor dropped.
    """
    shares = tokens / tokens.sum(dim=1, keepdim=True).clamp(min=1.0)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=1) / math.log(max(tokens.shape[1], 2))
    return {
        "expert_entropy_share": entropy.mean().item(),
        "expert_entropy_share_min": entropy.min().item(),
        "expert_max_load": (shares.amax(dim=1) * tokens.shape[1]).max().item(),
        "expert_dropped_share": 1.0 - tokens.sum().item() / max(num_routed * tokens.shape[0], 1.0),
    }


def peak_memory_bytes() -> float:
    """On CUDA: most memory allocated since the last reset. On a CPU: most that this process has
    held (not its parent, as getrusage might say).
    """
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    with open("/proc/self/status", encoding="ascii") as status:
        kilobytes = next((line.split()[1] for line in status if line.startswith("VmHWM:")), "0")
    return float(kilobytes) * 1024


def _num_real(microbatch: Microbatch) -> int:
    """Tokens of samples; what follows them is padding."""
    return int(microbatch.cu_seqlens[microbatch.num_sequences])


def _lengths(microbatch: Microbatch) -> list[int]:
    return [int(length) for length in np.diff(microbatch.cu_seqlens)[: microbatch.num_sequences]]
