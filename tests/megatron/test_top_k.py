"""The top-K losses in the trainer: loss, gradient and figures are those of dense logits, on one
rank and on two, with logits a block at a time.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lopd.batching import build_microbatch
from lopd.megatron.model import logprobs
from lopd.megatron.ranks import parallel
from lopd.megatron.training.trainer import Trainer
from lopd.objective import Distillation, TopKKL
from lopd.records import Sample, top_k_of
from tests.limits import apart, close, within
from tests.megatron.launch import run_ranks
from tests.megatron.trainer_cases import samples_of, settings_of
from tests.models import VOCAB_SIZE, write_qwen3_moe

K = 6
LIMIT = 1e-4
# Direction and support of each loss.
LOSSES = {
    "reverse": ("reverse", "tail"),
    "forward": ("forward", "tail"),
    "generalised": ("reverse", "generalised"),
}
# The first comes after all other layers, and the second before them.
LAYERS = {
    "lm_head.weight": "output_layer.weight",
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
}


def with_top_k(samples: list[Sample]) -> list[Sample]:
    """A teacher's K likeliest tokens at every place of every sample, of random distributions."""
    rng = np.random.default_rng(3)
    found = []
    for sample in samples:
        logits = 3 * rng.standard_normal((len(sample), VOCAB_SIZE))
        values = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        ids = np.argsort(-values, axis=1)[:, :K]
        found.append(replace(sample, teacher_top=top_k_of(ids, np.take_along_axis(values, ids, 1))))
    return found


def body(model: str, tensor: int) -> dict[str, Any]:
    """Of the first step from the same weights, with each loss: figures, and the gradients of two
    weights (this rank's rows). One microbatch is empty.
    """
    layout = {"tensor": tensor, "expert": tensor}
    settings = settings_of(layout, optimizer={"lr": 1e-12, "weight_decay": 0.0, "clip_grad": 0.0})
    parallel.initialize(settings.parallel, seed=1, timeout_s=500)
    logprobs.BLOCK_BYTES["cpu"] = 40_000  # of 256 or 512 rows some 50 at a time
    samples = with_top_k(samples_of(0, 8))
    microbatches = [
        build_microbatch(samples[:5], 2),
        build_microbatch(samples[5:], 2),
        build_microbatch([], 2),
    ]
    results: dict[str, Any] = {}
    for name, (direction, support) in LOSSES.items():
        objective = Distillation(TopKKL(direction, support))  # type: ignore[arg-type]
        trainer = Trainer(
            settings,
            model_dir=Path(model),
            init="checkpoint",
            init_std=0.02,
            seed=1,
            objective=objective,
            checkpoint_dir=None,
        )
        step = trainer.train_step(microbatches).as_dict()
        parameters = dict(trainer.module.named_parameters())
        gradients = {layer: parameters[place].main_grad.tolist() for layer, place in LAYERS.items()}
        results[name] = {
            "loss": step["loss"],
            "grad_norm": step["grad_norm"],
            "top_k_kl": step["top_k_kl"],
            "tail": step["student_tail"],
            **gradients,
        }
    return results


def reference(model: Path, name: str) -> dict[str, Any]:
    """The same with transformers, all logits, and plain loops."""
    from transformers import AutoModelForCausalLM

    direction, support = LOSSES[name]

    student = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    responses = []
    tails = []
    for sample in with_top_k(samples_of(0, 8)):
        assert sample.teacher_top is not None
        # The shape is [L - 1, V].
        log_q = torch.log_softmax(
            student(torch.as_tensor(sample.token_ids.astype(np.int64))[None])
            .logits[0, :-1]
            .double(),
            -1,
        )
        log_p = torch.as_tensor(sample.teacher_top.logprobs[1:]).double()  # [L - 1, K]
        chosen = log_q.gather(1, torch.as_tensor(sample.teacher_top.ids[1:]).long())
        both = [chosen, log_p]
        if support == "tail":
            both = [
                torch.cat([values, (1 - values.exp().sum(1, keepdim=True)).log()], 1)
                for values in both
            ]
        first, second = both if direction == "reverse" else both[::-1]
        mask = torch.as_tensor(sample.loss_mask[1:])
        # The last two terms cancel over whole distributions, which the tail makes of both.
        terms = first.exp() * (first - second) - first.exp() + second.exp()
        responses.append(terms.sum(1)[mask])
        tails.append(1 - chosen.exp().sum(1)[mask])
    loss = torch.stack([each.mean() for each in responses]).mean()
    loss.backward()
    norm = torch.stack(
        [parameter.grad.norm() for parameter in student.parameters() if parameter.grad is not None]
    ).norm()
    gradients = {name: student.get_parameter(name).grad for name in LAYERS}
    return {
        "loss": loss.item(),
        "grad_norm": norm.item(),
        "top_k_kl": torch.cat(responses).mean().item(),
        "tail": torch.cat(tails).mean().item(),
        **gradients,
    }


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_step_is_that_of_dense_logits(ranks: int, tmp_path: Path) -> None:
    model = write_qwen3_moe(tmp_path / "model")
    found = run_ranks(body, ranks, model=str(model), tensor=ranks)
    expected = {loss: reference(model, loss) for loss in LOSSES}
    for loss in LOSSES:
        want = expected[loss]
        got = [rank[loss] for rank in found]
        for name in ("loss", "grad_norm", "top_k_kl", "tail"):
            close(got[0][name], want[name], rel=LIMIT, name=name)
        for name in LAYERS:
            # The rows of all ranks together.
            gradient = torch.cat([torch.tensor(rank[name], dtype=torch.float64) for rank in got])
            far = {
                other: (
                    (gradient - expected[other][name]).abs().max()
                    / expected[other][name].abs().max()
                ).item()
                for other in LOSSES
            }
            within(far.pop(loss), LIMIT, name)
            apart(min(far.values()), 100 * LIMIT, f"another loss's {name}")
