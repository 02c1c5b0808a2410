"""Log-probabilities and entropies computed block by block are those of all logits at once, in
values and gradients, on one rank and two; and stay small.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from lopd.megatron.model.logprobs import token_logprobs
from tests.limits import apart, close, within
from tests.megatron.launch import ROOT, run_ranks
from tests.megatron.logprob_cases import (
    LIMIT,
    PADDED_FROM,
    SMALL_BLOCK,
    TRITON_CASES,
    VOCAB,
    VOCABULARIES,
    Case,
    compile_kernel,
    differences,
    on_two_ranks,
)


@pytest.mark.parametrize(
    "block_bytes", [1, SMALL_BLOCK, None], ids=["single rows", "blocks", "all rows kept"]
)
@pytest.mark.parametrize("vocab", [VOCAB, PADDED_FROM])
def test_blocks_give_values_and_gradients_of_all_logits(
    vocab: int, block_bytes: int | None
) -> None:
    case = Case(vocab=vocab)
    within(max(differences(case.blocks(block_bytes=block_bytes), case.dense()).values()), LIMIT)


@pytest.mark.parametrize("fault", ["label", "padding counted", "row", "upstream"])
def test_what_is_wrong_is_noticed(fault: str) -> None:
    case = Case(vocab=PADDED_FROM)
    expected = case.dense()
    if fault == "label":
        case.labels[4] = (case.labels[4] + 1) % PADDED_FROM
    elif fault == "row":
        case.weight[17] *= 1.01
    elif fault == "upstream":
        case.upstream[1] *= 1.01
    found = differences(
        case.blocks(vocab_size=VOCAB if fault == "padding counted" else PADDED_FROM), expected
    )
    apart(max(found.values()), 10 * LIMIT, fault)
    if fault == "upstream":
        within(found["logprobs"], LIMIT)
        apart(min(found["hidden"], found["weight"]), LIMIT, "gradients")


def test_padded_rows_have_no_probability_and_no_gradient() -> None:
    case = Case(vocab=PADDED_FROM)
    case.weight[PADDED_FROM:] *= 1e6  # would win every softmax
    found = case.blocks()
    within(max(differences(found, case.dense()).values()), LIMIT)
    assert not found["weight"][PADDED_FROM:].any()


@pytest.mark.parametrize("block_bytes", [SMALL_BLOCK, None])
def test_a_label_past_the_vocabulary_has_no_probability_and_no_gradient(
    block_bytes: int | None,
) -> None:
    """A teacher's token that the student has no row for, in padding and past it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 8, generator=generator, requires_grad=True)
    weight = torch.randn(PADDED_FROM + 4, 8, generator=generator, requires_grad=True)
    labels = torch.tensor([[1, PADDED_FROM], [2, PADDED_FROM + 99], [3, PADDED_FROM - 1]])

    def values(chosen: torch.Tensor, vocab_size: int | None) -> torch.Tensor:
        return token_logprobs(
            hidden, weight, chosen, vocab_size=vocab_size, block_bytes=block_bytes
        )[0]

    found = values(labels, PADDED_FROM)
    unknown = torch.tensor([[False, True], [False, True], [False, False]])
    assert torch.equal(torch.isneginf(found), unknown)
    gradients = torch.autograd.grad(found.masked_fill(unknown, 0.0).sum(), (hidden, weight))
    known = values(labels, PADDED_FROM)[~unknown].sum()
    for one, other in zip(gradients, torch.autograd.grad(known, (hidden, weight)), strict=True):
        assert torch.equal(one, other)
    # Control: where the rows are part of the vocabulary, they have a probability.
    assert torch.isfinite(values(labels.clamp(max=PADDED_FROM), None)).all()


@pytest.mark.parametrize("block_bytes", [SMALL_BLOCK, None])
def test_bfloat16_is_computed_in_float32(block_bytes: int | None) -> None:
    """Values as if the same numbers had been given in float32; gradients but for their own
    rounding. Rounded logits would miss the first bound."""
    case = Case(torch.bfloat16)
    found = differences(case.blocks(torch.bfloat16, block_bytes=block_bytes), case.dense())
    within(max(found["logprobs"], found["entropy"]), LIMIT, "values")
    within(max(found["hidden"], found["weight"]), 2**-6, "gradients")  # 2.9e-3 seen
    rounded = differences(case.dense(torch.bfloat16), case.dense())
    apart(rounded["logprobs"], 100 * LIMIT)
    expected = case.dense()
    case.labels = case.labels.roll(1)
    shifted = differences(case.dense(), expected)
    apart(min(shifted["hidden"], shifted["weight"]), 0.3, "gradients for other labels")


def on_gpu(case: Case) -> Case:
    for name in ("hidden", "weight", "labels", "upstream", "upstream_entropy"):
        setattr(case, name, getattr(case, name).cuda())
    return case


# These sizes give several tiles and splits of each kind, none of them full.
LARGE = {"num_tokens": 300, "num_rows": 9_001, "hidden_size": 200, "vocab": 8_990}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "value_limit", "gradient_limit"),
    [(torch.float32, LIMIT, LIMIT), (torch.bfloat16, LIMIT, 2**-6)],
    ids=str,
)
@pytest.mark.parametrize(
    "sizes",
    [{}, {"num_labels": 3, "vocab": PADDED_FROM}, LARGE],
    ids=["one label", "three labels", "large"],
)
@pytest.mark.parametrize("kernel", ["blocks", "triton"])
def test_on_a_gpu(
    kernel: str,
    sizes: dict[str, int],
    dtype: torch.dtype,
    value_limit: float,
    gradient_limit: float,
) -> None:
    """Against the dense form in float64; a second time to the bit."""
    case = on_gpu(Case(dtype, **sizes))
    expected = case.dense()
    for block_bytes in (len(case.hidden) * len(case.weight), None):
        found, again = (
            case.blocks(dtype, block_bytes=block_bytes, kernel=kernel) for _ in range(2)
        )
        measured = differences(found, expected)
        assert max(measured["logprobs"], measured["entropy"]) < value_limit
        assert max(measured["hidden"], measured["weight"]) < gradient_limit
        assert all(torch.equal(found[name], again[name]) for name in found)
    case.labels[4] = (case.labels[4] + 1) % case.vocab
    assert differences(case.blocks(dtype, kernel=kernel), expected)["logprobs"] > 10 * LIMIT


def test_several_tokens_at_each_place() -> None:
    case = Case(num_labels=3)
    within(max(differences(case.blocks(), case.dense()).values()), LIMIT)


def test_entropy_is_not_computed_unasked() -> None:
    case = Case()
    assert token_logprobs(case.hidden, case.weight, case.labels)[1] is None


def test_no_token_carries_a_gradient() -> None:
    case = Case()
    case.upstream.zero_()
    case.upstream_entropy.zero_()
    found = case.blocks()
    assert not found["hidden"].any()
    assert not found["weight"].any()


def test_frozen_weight_and_frozen_hidden_states() -> None:
    case = Case()
    expected = case.dense()
    hidden = case.hidden.clone().requires_grad_()
    logprobs, entropy = token_logprobs(
        hidden, case.weight, case.labels, entropy=True, block_bytes=SMALL_BLOCK
    )
    ((logprobs * case.upstream) + (entropy * case.upstream_entropy)).sum().backward()
    scale = expected["hidden"].abs().max()
    close(hidden.grad / scale, expected["hidden"] / scale, abs=LIMIT)
    assert token_logprobs(case.hidden, case.weight, case.labels)[0].grad_fn is None


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each of two ranks found, all in one launch; its environment has Triton's interpreter,
    which no other test sees.
    """
    return run_ranks(on_two_ranks, 2, env={"TRITON_INTERPRET": "1"})


def test_two_tensor_ranks_give_the_same(ranks: list[dict[str, Any]]) -> None:
    """With both kernels."""
    for rank in ranks:
        assert len(rank["split rows"]) == len(VOCABULARIES) * 3 * 2
        for name, difference in rank["split rows"].items():
            if name.endswith("not reduced"):
                apart(difference, 100 * LIMIT, name)
            else:
                within(difference, LIMIT, name)


GRADIENT_LIMITS = {
    "bfloat16": 2**-6,  # rounded to bfloat16: 2.9e-3 seen
    "first tile far above": 1e-4,  # logits of 100, whose own rounding is 4e-6
}


@pytest.mark.parametrize("name", TRITON_CASES)
def test_the_triton_kernels_values_and_gradients_are_those_of_all_logits(
    name: str, ranks: list[dict[str, Any]]
) -> None:
    """In Triton's interpreter, on a CPU."""
    found = next(rank["one rank"][name] for rank in ranks if name in rank["one rank"])
    values = {key: found[key] for key in found if key in ("logprobs", "entropy")}
    if name.startswith("control"):
        apart(max(values.values()), 10 * LIMIT, name)
    else:
        within(max(values.values(), default=0.0), LIMIT, f"{name}, values")
        gradient = max(found["hidden"], found["weight"])
        within(gradient, GRADIENT_LIMITS.get(name, LIMIT), f"{name}, gradients")
        assert ("entropy" in found) == (name not in ("without entropy", "no gradient"))
    assert name != "no gradient" or not any(found.values())


@pytest.mark.parametrize("kernel", ["_statistics_kernel", "_gradient_kernel"])
def test_the_triton_kernels_compile_for_an_h100(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the interpreter does not show: the compiler takes them, the tiles fit into its shared
    memory, products are its tensor cores', no sum is atomic.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_kernel(kernel, torch.bfloat16, num_labels=1)
    code = compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024
    assert "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16" in code
    assert not re.search(r"\b(atom|red)\.", code)


def test_memory_is_a_fraction_of_the_dense_form(tmp_path: Path) -> None:
    """The benchmark at a size that takes seconds; docs/benchmarks.md has full size, and times,
    which a crowded machine does not tell.
    """
    file = tmp_path / "figures.json"
    options = [
        "--tokens",
        "1024",
        "--vocab",
        "20480",
        "--hidden",
        "16",
        "--pairs",
        "1",
        "--block-mib",
        "4",
        "--json",
        str(file),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "logprob.py"), *options],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    figures = json.loads(file.read_text())
    assert figures["memory_ratio"] < 1 / 8
    within(figures["difference"], LIMIT)
    # The measure must see the copies that the dense form makes.
    assert figures["dense"]["bytes"] > 2 * 1024 * 20480 * 4


@pytest.mark.parametrize("failing", ["triton", "blocks"])
def test_a_form_that_fails_on_a_gpu_does_not_end_the_benchmark_of_ours(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    specification = importlib.util.spec_from_file_location(
        "benchmark_of_logprobs", ROOT / "benchmarks" / "logprob.py"
    )
    benchmark = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(benchmark)

    def run(form: str) -> dict[str, float]:
        if form == failing:
            raise benchmark.RunFailed(f"{form} failed:\nno driver")
        return dict.fromkeys(
            ("bytes", "seconds", "processor_seconds", "logprobs", "hidden", "weight"), 2.0
        )

    monkeypatch.setattr(benchmark, "in_own_process", run)
    options = Namespace(device="cuda", dtype="bfloat16", tokens=8, vocab=8, hidden=8, pairs=2)
    if failing == "blocks":
        with pytest.raises(benchmark.RunFailed):
            benchmark.compare(options)
        return
    figures = benchmark.compare(options)
    assert "our Triton kernel: failed, no driver" in benchmark.table(figures)
    assert "triton" not in figures
    assert figures["time_ratios"] == [1.0, 1.0]
