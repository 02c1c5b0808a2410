"""A model whose routers are close to ties, a sampler that resolves these ties in its own way, and
what ranks compute of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lopd.batching import build_microbatch, make_sample
from lopd.records import Int16s, Microbatch, Response, float32, int32
from tests.models import VOCAB_SIZE, write_qwen3_moe

# Uneven, and a prompt of one token; in all 97 tokens, which do not divide by two tensor ranks.
LENGTHS = ((5, 20), (1, 30), (12, 9), (3, 17))


def write_near_ties(folder: Path, *, noise: float = 1e-7) -> Path:
    """A Qwen3-MoE whose routers give every expert the same logit, but for rounding."""
    write_qwen3_moe(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(4)
    for name, weight in tensors.items():
        if name.endswith("mlp.gate.weight"):
            factors = 1 + noise * torch.randn(weight.shape, generator=generator)
            tensors[name] = (weight[:1] * factors).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


class Sampler:
    """transformers in float64, as a sampler that says which experts it has chosen."""

    def __init__(self, folder: Path) -> None:
        from transformers import Qwen3MoeForCausalLM

        self.model = Qwen3MoeForCausalLM.from_pretrained(
            folder,
            dtype=torch.float64,
            attn_implementation="eager",
            # The grouped product of experts has no float64.
            experts_implementation="eager",
        ).eval()
        self._chosen: list[torch.Tensor] = []
        for layer in self.model.model.layers:
            # The router returns logits, weights and the chosen experts [L, k].
            layer.mlp.gate.register_forward_hook(
                lambda module, inputs, output: self._chosen.append(output[2])
            )

    def logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        """The log-probability of each token but the first [L - 1]."""
        self._chosen.clear()
        logits = self.model(ids[None]).logits[0, :-1]
        return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]

    def responses(self) -> list[Response]:
        """Random tokens as if sampled, with what the sampler says of them."""
        rng = np.random.default_rng(3)
        responses = []
        for number, (prompt_len, length) in enumerate(LENGTHS):
            ids = rng.integers(4, VOCAB_SIZE, prompt_len + length)
            with torch.no_grad():
                logprobs = self.logprobs(torch.as_tensor(ids))
            response = Response(
                f"p{number}",
                0,
                int32(ids[:prompt_len]),
                int32(ids[prompt_len:]),
                float32(logprobs[prompt_len - 1 :].numpy()),
                "length",
                "0",
            )
            responses.append(replace(response, routed_experts=self.routed(response)))
        return responses

    @torch.no_grad()
    def routed(self, response: Response) -> Int16s:
        """The experts that it chooses at every position of a response but the last."""
        ids = np.concatenate([response.prompt_ids, response.token_ids]).astype(np.int64)
        self.logprobs(torch.as_tensor(ids))
        # [L, layers, k]
        return torch.stack(self._chosen, 1).numpy()[:-1].astype(np.int16)


def microbatch_of(responses: list[Response], *, with_routing: bool = True) -> Microbatch:
    samples = [make_sample(response) for response in responses]
    packed = build_microbatch(samples, 2)
    return packed if with_routing else without_routing(packed)


def without_routing(microbatch: Microbatch) -> Microbatch:
    return replace(microbatch, routed_experts=None)


def save(path: Path, responses: list[Response]) -> str:
    """As a cache, which ranks can read."""
    from lopd import cache

    cache.write_responses(path, responses, kind="rollouts", inputs={})
    return str(path)


def differences(
    folder: str, data: str, layout: dict[str, int], recompute: str = "none"
) -> dict[str, float]:
    """Of this layout's log-probabilities from the sampler's: with replay, without a record, and
    with replay once more.
    """
    from lopd import cache
    from lopd.config import ParallelSection
    from lopd.megatron.model.build import build_model
    from lopd.megatron.model.inference import score_microbatches
    from lopd.megatron.ranks import parallel
    from lopd.megatron.weights.architecture import read_architecture
    from lopd.megatron.weights.transfer import load_hf

    section = ParallelSection(**layout)
    parallel.initialize(section, seed=1, timeout_s=500)
    arch = read_architecture(folder)
    model = build_model(
        arch,
        parallel=section,
        dtype="float32",
        recompute=recompute,
        moe_aux_loss=0.0,
        routing_replay=True,
    )
    load_hf(model, arch, Path(folder))
    responses = [response for response, _ in cache.read_rows(Path(data))]
    microbatch = microbatch_of(responses)
    assert microbatch.sampling_logprobs is not None

    def worst(one: Microbatch) -> float:
        logprobs = score_microbatches(model, [one])[0][0].cpu().numpy()
        apart = np.abs(logprobs - one.sampling_logprobs)[one.loss_mask]
        return float(apart.max())

    return {
        "replay": worst(microbatch),
        "none": worst(without_routing(microbatch)),
        "again": worst(microbatch),
    }


def gradients(
    folder: str, data: str, *, with_routing: bool, recompute: str = "none"
) -> dict[str, Any]:
    """Of the sum of log-probabilities of all responses: the routers' gradients by layer."""
    from megatron.core.transformer.moe.router import TopKRouter

    from lopd import cache
    from lopd.config import ParallelSection
    from lopd.megatron.model.build import build_model
    from lopd.megatron.model.inference import forward_microbatch
    from lopd.megatron.ranks import parallel
    from lopd.megatron.weights.architecture import read_architecture
    from lopd.megatron.weights.transfer import load_hf

    section = ParallelSection(ranks=1)
    parallel.initialize(section, seed=1, timeout_s=500)
    arch = read_architecture(folder)
    model = build_model(
        arch,
        parallel=section,
        dtype="float32",
        recompute=recompute,
        moe_aux_loss=0.0,
        routing_replay=True,
    )
    load_hf(model, arch, Path(folder))
    responses = [response for response, _ in cache.read_rows(Path(data))]
    microbatch = microbatch_of(responses, with_routing=with_routing)
    logprobs, _ = forward_microbatch(model, microbatch)
    mask = torch.as_tensor(microbatch.loss_mask)
    logprobs[mask].sum().backward()
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    return {
        str(router.layer_number): router.weight.grad.tolist()
        for router in routers
        if router.weight.grad is not None
    }
