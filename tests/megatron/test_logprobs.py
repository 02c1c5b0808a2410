"""Log-probabilities and entropies computed block by block are those of all logits at once, in values and gradients, on one rank and two; and stay small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lopd.megatron.logprobs import token_logprobs
from tests.megatron.launch import ROOT, run_ranks

LIMIT = 1e-5
NUM_TOKENS, HIDDEN, VOCAB = 37, 24, 302
SMALL_BLOCK = NUM_TOKENS * 50 * 4  # seven blocks, the last one shorter
PADDED_FROM = 291  # rows of vocabulary where some are padding; the second of two ranks holds padding then


class Case:
    """Random hidden states, weight, labels and upstream gradients that are zero for every third token."""

    def __init__(self, dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> None:
        generator = torch.Generator().manual_seed(7)
        self.hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=generator).to(dtype)
        self.weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
        self.labels = torch.randint(0, vocab, (NUM_TOKENS,), generator=generator)
        self.upstream = torch.randn(2, NUM_TOKENS, generator=generator)  # of log-probabilities and of entropies
        self.upstream[:, ::3] = 0
        self.vocab = vocab

    def run(self, way: Any, dtype: torch.dtype, part: slice = slice(None)) -> dict[str, Tensor]:
        """Values and gradients of way(hidden, weight) -> (logprobs, entropy), weight being these rows."""
        hidden, weight = (tensor.to(dtype).clone().requires_grad_() for tensor in (self.hidden, self.weight[part]))
        logprobs, entropy = way(hidden, weight)
        (logprobs * self.upstream[0]).sum().add((entropy * self.upstream[1]).sum()).backward()
        return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "hidden": hidden.grad, "weight": weight.grad}

    def dense(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        def way(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            distribution = torch.distributions.Categorical(logits=hidden @ weight[: self.vocab].t())
            return distribution.log_prob(self.labels), distribution.entropy()

        return self.run(way, dtype)

    def blocks(self, dtype: torch.dtype = torch.float32, **settings: Any) -> dict[str, Tensor]:
        settings = {"block_bytes": SMALL_BLOCK, "vocab_size": self.vocab, "entropy": True, **settings}
        return self.run(lambda hidden, weight: token_logprobs(hidden, weight, self.labels, **settings), dtype)


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Largest, relative to the largest entry."""
    return {name: ((ours[name].double() - theirs[name].double()).abs().max() / theirs[name].abs().max()).item() for name in theirs}


@pytest.mark.parametrize("block_bytes", [1, SMALL_BLOCK, None], ids=["single rows", "blocks", "all rows kept"])
@pytest.mark.parametrize("vocab", [VOCAB, PADDED_FROM])
def test_blocks_give_values_and_gradients_of_all_logits(vocab: int, block_bytes: int | None) -> None:
    case = Case(vocab=vocab)
    assert max(differences(case.blocks(block_bytes=block_bytes), case.dense()).values()) < LIMIT


@pytest.mark.parametrize("fault", ["label", "padding counted", "row", "upstream"])
def test_what_is_wrong_is_noticed(fault: str) -> None:
    case = Case(vocab=PADDED_FROM)
    expected = case.dense()
    if fault == "label":
        case.labels[4] = (case.labels[4] + 1) % PADDED_FROM
    elif fault == "row":
        case.weight[17] *= 1.01
    elif fault == "upstream":
        case.upstream[0, 1] *= 1.01
    found = differences(case.blocks(vocab_size=VOCAB if fault == "padding counted" else PADDED_FROM), expected)
    assert max(found.values()) > 10 * LIMIT
    assert fault != "upstream" or found["logprobs"] < LIMIT < min(found["hidden"], found["weight"])


def test_padded_rows_have_no_probability_and_no_gradient() -> None:
    case = Case(vocab=PADDED_FROM)
    case.weight[PADDED_FROM:] *= 1e6  # would win every softmax
    found = case.blocks()
    assert max(differences(found, case.dense()).values()) < LIMIT
    assert not found["weight"][PADDED_FROM:].any()


@pytest.mark.parametrize("block_bytes", [SMALL_BLOCK, None])
def test_bfloat16_is_computed_in_float32(block_bytes: int | None) -> None:
    """Values as if the same numbers had been given in float32; gradients but for their own rounding, 2 ** -8. Rounded logits would miss the first bound."""
    case = Case(torch.bfloat16)
    found = differences(case.blocks(torch.bfloat16, block_bytes=block_bytes), case.dense())
    assert max(found["logprobs"], found["entropy"]) < LIMIT
    assert max(found["hidden"], found["weight"]) < 2**-8
    rounded = differences(case.dense(torch.bfloat16), case.dense())
    assert rounded["logprobs"] > 100 * LIMIT


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "value_limit", "gradient_limit"), [(torch.float32, LIMIT, LIMIT), (torch.bfloat16, LIMIT, 2**-6)], ids=str)
def test_on_a_gpu(dtype: torch.dtype, value_limit: float, gradient_limit: float) -> None:
    case = Case(dtype)
    expected = case.dense()
    for name in ("hidden", "weight", "labels", "upstream"):
        setattr(case, name, getattr(case, name).cuda())
    for block_bytes in (SMALL_BLOCK, None):
        found = {name: tensor.cpu() for name, tensor in case.blocks(dtype, block_bytes=block_bytes).items()}
        measured = differences(found, expected)
        assert max(measured["logprobs"], measured["entropy"]) < value_limit
        assert max(measured["hidden"], measured["weight"]) < gradient_limit


def test_several_tokens_at_each_place() -> None:
    case = Case()
    labels = torch.stack([case.labels, case.labels.flip(0), case.labels.roll(5)], dim=1)  # [T, 3]
    upstream = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for way in (lambda h, w: token_logprobs(h, w, labels, block_bytes=SMALL_BLOCK)[0], lambda h, w: (h @ w.t()).log_softmax(1).gather(1, labels)):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        logprobs = way(hidden, weight)
        (logprobs * upstream).sum().backward()
        results.append({"logprobs": logprobs.detach(), "hidden": hidden.grad, "weight": weight.grad})
    assert max(differences(*results).values()) < LIMIT


def test_entropy_is_not_computed_unasked() -> None:
    case = Case()
    assert token_logprobs(case.hidden, case.weight, case.labels)[1] is None


def test_no_token_carries_a_gradient() -> None:
    case = Case()
    case.upstream.zero_()
    found = case.blocks()
    assert not found["hidden"].any()
    assert not found["weight"].any()


def test_frozen_weight_and_frozen_hidden_states() -> None:
    case = Case()
    expected = case.dense()
    hidden = case.hidden.clone().requires_grad_()
    logprobs, entropy = token_logprobs(hidden, case.weight, case.labels, entropy=True, block_bytes=SMALL_BLOCK)
    ((logprobs * case.upstream[0]) + (entropy * case.upstream[1])).sum().backward()
    assert ((hidden.grad - expected["hidden"]).abs().max() / expected["hidden"].abs().max()).item() < LIMIT
    assert token_logprobs(case.hidden, case.weight, case.labels)[0].grad_fn is None


VOCABULARIES = {"all rows": VOCAB, "second rank has padding only": 150}


def _on_two_ranks() -> dict[str, float]:
    """Each rank holds half of the rows; the gradient of the hidden states is summed as Megatron's gathering would."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    part = slice(dist.get_rank() * VOCAB // 2, (dist.get_rank() + 1) * VOCAB // 2)
    results = {}
    for rows, vocab in VOCABULARIES.items():
        case = Case(vocab=vocab)
        expected = case.dense()
        expected["weight"] = expected["weight"][part]
        for name, block_bytes in (("blocks", SMALL_BLOCK), ("kept", None)):
            for group in (dist.group.WORLD, None):
                settings: dict[str, Any] = {"group": group, "block_bytes": block_bytes, "vocab_size": vocab if group else None}
                found = case.run(partial(token_logprobs, labels=case.labels, entropy=True, **settings), torch.float32, part)
                dist.all_reduce(found["hidden"])
                results[f"{rows}, {name}{'' if group else ', not reduced'}"] = max(differences(found, expected).values())
    dist.destroy_process_group()
    return results


def test_two_tensor_ranks_give_the_same() -> None:
    for rank in run_ranks(_on_two_ranks, 2):
        assert len(rank) == 8
        for name, difference in rank.items():
            assert (difference > 100 * LIMIT) == name.endswith("not reduced"), (name, difference)


def test_memory_is_a_fraction_of_the_dense_form(tmp_path: Path) -> None:
    """The benchmark at a size that takes seconds; docs/benchmarks.md has full size, and times, which a crowded machine does not tell."""
    file = tmp_path / "figures.json"
    options = ["--tokens", "1024", "--vocab", "20480", "--hidden", "16", "--pairs", "1", "--block-mib", "4", "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "logprob.py"), *options], check=True, env=environment, stdout=subprocess.DEVNULL)
    figures = json.loads(file.read_text())
    assert figures["memory_ratio"] < 1 / 8
    assert figures["difference"] < LIMIT
    assert figures["dense"]["bytes"] > 2 * 1024 * 20480 * 4  # the measure sees the dense form's copies
