"""What a Megatron model is measured against in tests of parity: packed sequences, and what
transformers says about them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopd.config import ParallelSection
from lopd.megatron.weights.architecture import Architecture

# The lengths are uneven, some repeat, and one is a single token. Their sum is 96, which divides by
# two tensor ranks.
LENGTHS = [10, 23, 7, 1, 24, 7, 24]
# Of logits, log-probabilities and entropies in float32, where one unit in the last place of a
# number between 8 and 16 is 1e-6. The largest difference seen on any processor is 5.5e-6, the least
# that a wrong model makes 5e-2.
LIMIT = 3e-5


class Case:
    """Packed sequences and what transformers says about them."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        from lopd.megatron.weights.architecture import read_architecture

        self.folder = folder
        self.arch = read_architecture(folder)
        generator = torch.Generator().manual_seed(3)
        # no token 0: transformers gives padding's embedding no gradient
        sequences = [
            torch.randint(1, self.arch.vocab_size, (length,), generator=generator)
            for length in LENGTHS
        ]
        self.tokens = torch.cat(sequences)  # [T]
        self.labels = self.tokens.roll(-1)  # [T]
        self.bounds = torch.tensor(
            [0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32
        )
        # The weights [T] make every token count differently in the gradient.
        self.weight = torch.rand(len(self.tokens), generator=generator)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        # The logits [T, V] come from one sequence at a time.
        self.logits = torch.cat([model(sequence[None]).logits[0] for sequence in sequences])
        self.logprobs = self.logits.log_softmax(-1)[torch.arange(len(self.labels)), self.labels]
        (self.logprobs * self.weight).sum().backward()
        self.gradients = {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        self.logits = self.logits.detach()
        self.logprobs = self.logprobs.detach()
        self.entropy = torch.distributions.Categorical(logits=self.logits).entropy()  # [T]


def load_model(
    case: Case, layout: dict[str, int], arch: Architecture | None = None, **settings: Any
) -> Any:
    from lopd.megatron.model.build import build_model
    from lopd.megatron.ranks import parallel
    from lopd.megatron.weights.transfer import load_hf

    section = ParallelSection(**layout)
    parallel.initialize(section, seed=1, timeout_s=500)
    model = build_model(
        arch or case.arch,
        **{
            "parallel": section,
            "dtype": "float32",
            "recompute": "none",
            "moe_aux_loss": 0.0,
            **settings,
        },
    )
    load_hf(model, arch or case.arch, case.folder)
    return model


def forward_of(model: Any, case: Case, bounds: Tensor | None = None, **wanted: Any) -> Any:
    from lopd.megatron.model.build import forward

    bounds = case.bounds if bounds is None else bounds
    return forward(
        model,
        token_ids=case.tokens,
        cu_seqlens=bounds,
        max_seqlen=int(bounds.diff().max()),
        **wanted,
    )


def difference(model: Any, case: Case, bounds: Tensor | None = None) -> dict[str, float]:
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    logits = gather_from_tensor_model_parallel_region(forward_of(model, case, bounds))[0]
    logprobs, entropy = forward_of(model, case, bounds, labels=case.labels, entropy=True)
    ours = {"logits": logits[:, : case.arch.vocab_size], "logprobs": logprobs, "entropy": entropy}
    return {name: (value - getattr(case, name)).abs().max().item() for name, value in ours.items()}
