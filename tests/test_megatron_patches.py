"""Each patch says what it is and stops when upstream changed; packed attention equals attention one
sequence at a time.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import types
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_patches
from megatron_patches.attention import MAX_PADDING, PaddedGroups, packed_attention
from megatron_patches.registry import UpstreamChanged, replace, require
from tests.limits import apart, close


def _alone(code: str) -> dict[str, Any]:
    """Run code in a process of its own, since patches stay installed; the last line it prints is
    JSON.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_patch_says_what_why_where_and_until_when() -> None:
    patches = megatron_patches.listing()
    assert len({patch.name for patch in patches}) == len(patches) >= 11
    for patch in patches:
        assert len(patch.why.split()) > 15, patch.name
        assert patch.upstream
        assert patch.until
        assert "0.16.1" in patch.checked
        assert patch.below is not None or "0.18.2" in patch.checked, patch.name


def test_patches_are_chosen_by_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch of what later versions no longer have is left out there, and only there."""
    bounded = [patch for patch in megatron_patches.listing() if patch.below is not None]
    assert [patch.name for patch in bounded] == ["writers_are_threads"]
    needed = {}
    for version in ("0.16.1", "0.17.1", "0.18.0", "0.18.2"):
        monkeypatch.setattr(metadata, "version", lambda package, version=version: version)
        needed[version] = megatron_patches.is_needed(bounded[0])
    assert needed == {"0.16.1": True, "0.17.1": True, "0.18.0": False, "0.18.2": False}


_TWICE = """
import json, torch, megatron_patches
factory = torch.zeros
megatron_patches.apply()
import megatron.core.transformer.moe.token_dispatcher as dispatcher
watched = lambda: [
    torch.zeros,
    torch.Tensor.type,
    torch.cuda.current_device,
    dispatcher.maybe_move_tensor_to_cpu,
]
once = watched()
megatron_patches.apply()
first = torch.ones(2)
with torch.device("meta"):
    inside = [str(make(2).device) for make in (torch.zeros, torch.ones, torch.empty, torch.tensor)]
print(json.dumps({
    "inside": inside,
    "changed": torch.zeros is not factory,
    "same": all(a is b for a, b in zip(once, watched(), strict=True)),
    "device": str(torch.zeros(2, device="cuda").device),
    "type": first.type(),
    "random": torch.equal(torch.cuda.get_rng_state(), torch.get_rng_state()),
}))
"""


def test_applying_twice_changes_nothing_more() -> None:
    found = _alone(_TWICE)
    assert found.pop("inside") == ["meta"] * 4, (
        "with torch.device(...) no longer reaches the functions that were replaced"
    )
    assert found == {
        "changed": True,
        "same": True,
        "device": "cpu",
        "type": "torch.FloatTensor",
        "random": True,
    }


_WITH_CUDA = """
import json, torch, megatron_patches
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: (9, 0)
before = [torch.zeros, torch.cuda.current_device, torch.Tensor.cuda]
megatron_patches.apply()
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
load = DistributedOptimizer.load_state_dict
print(json.dumps({
    "device": [torch.zeros, torch.cuda.current_device, torch.Tensor.cuda] == before,
    "fault": load.__module__,
    "file": load.__code__.co_filename.rsplit("/", 2)[-2],
}))
"""


def test_with_cuda_only_upstream_faults_are_patched() -> None:
    result = _alone(_WITH_CUDA)
    assert result["device"]
    assert result["file"] == "megatron_patches"


_UPSTREAM_CHANGED = """
import json, megatron_patches
import megatron.core.transformer.moe.moe_utils as moe_utils
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
def attempt(owner, name, value):
    original = getattr(owner, name)
    delattr(owner, name) if value is None else setattr(owner, name, value)
    try:
        megatron_patches.apply()
        message = ""
    except RuntimeError as error:
        message = str(error)
    setattr(owner, name, original)
    return message
print(json.dumps({
    "missing": attempt(moe_utils, "maybe_move_tensor_to_cpu", None),
    "signature": attempt(moe_utils, "maybe_move_tensor_to_cpu", lambda tensor, device: tensor),
    "source": attempt(DistributedOptimizer, "load_state_dict", json.JSONEncoder.encode),
    "restored": attempt(json, "dumps", json.dumps),
}))
"""


def test_a_changed_upstream_stops_with_patch_and_versions() -> None:
    messages = _alone(_UPSTREAM_CHANGED)
    for fault, patch, reason in (
        ("missing", "split_sizes_from_cpu_tensors", "does not exist"),
        ("signature", "split_sizes_from_cpu_tensors", "takes (tensor, device)"),
        ("source", "own_step_tensors", "takes (self, o)"),
    ):
        assert patch in messages[fault]
        assert reason in messages[fault]
        assert f"installed: megatron-core {metadata.version('megatron-core')}" in messages[fault]
    assert messages["restored"] == ""


def test_requirements_on_upstream() -> None:
    module = types.SimpleNamespace(__name__="module", function=lambda first, second, third: None)
    assert require(module, "function", parameters=("first", "second")) is module.function
    for wrong in (("second",), ("first", "third"), ("first", "second", "third", "fourth")):
        with pytest.raises(UpstreamChanged, match="takes"):
            require(module, "function", parameters=wrong)
    with pytest.raises(UpstreamChanged, match="does not exist"):
        replace(module, "functions", lambda: None)
    assert require(json, "dumps", source="JSONEncoder") is json.dumps
    with pytest.raises(UpstreamChanged, match="no longer contains"):
        require(json, "dumps", source="a fault that was mended")


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, bounds: list[int], scale: float
) -> Tensor:
    parts = []
    for start, end in itertools.pairwise(bounds):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        scores = (q @ k.repeat_interleave(q.shape[0] // k.shape[0], 0).transpose(1, 2)) * scale
        scores = scores.masked_fill(
            torch.ones(end - start, end - start).triu(1).bool(), float("-inf")
        )
        parts.append(
            (scores.softmax(-1) @ v.repeat_interleave(q.shape[0] // v.shape[0], 0)).transpose(0, 1)
        )
    return torch.cat(parts)


def _tensors(num_tokens: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    tensors = [
        torch.randn(num_tokens, heads, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    ]
    return tensors, torch.randn(num_tokens, 4, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "lengths",
    [[3, 3, 3], [5], [1, 1], [7, 1], [10, 23, 7, 1, 24, 7, 24], [100, 1, 50, 49, 40, 39, 2, 2]],
    ids=str,
)
def test_packed_attention_equals_attention_one_sequence_at_a_time(lengths: list[int]) -> None:
    """Outputs and gradients, in float64; with other bounds the same rows give something else."""
    bounds = [0, *itertools.accumulate(lengths)]
    tensors, weight = _tensors(bounds[-1])
    ours = packed_attention(*tensors, PaddedGroups.of(bounds, torch.device("cpu")), scale=0.3)
    expected = _one_by_one(*tensors, bounds, 0.3)
    close(ours, expected, abs=1e-12)
    for gradient, wanted in zip(
        torch.autograd.grad(ours, tensors, weight),
        torch.autograd.grad(expected, tensors, weight),
        strict=True,
    ):
        close(gradient, wanted, abs=1e-12)
    if len(lengths) > 1:
        merged = packed_attention(
            *tensors, PaddedGroups.of([0, bounds[-1]], torch.device("cpu")), scale=0.3
        )
        apart((merged - expected).abs().max(), 0.01)


def test_a_sequence_does_not_see_another() -> None:
    """Not even through padding: infinite keys and values in one sequence leave the others finite
    and unchanged.
    """
    lengths = [6, 5, 9, 8]
    bounds = [0, *itertools.accumulate(lengths)]
    tensors, _ = _tensors(bounds[-1])
    plan = PaddedGroups.of(bounds, torch.device("cpu"))
    before = packed_attention(*tensors, plan, scale=0.3)
    with torch.no_grad():
        for tensor in tensors[1:]:
            tensor[6:11] = float("inf")
    after = packed_attention(*tensors, plan, scale=0.3)
    others = torch.tensor([*range(6), *range(11, bounds[-1])])
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[6:11], before[6:11])


def test_padding_is_bounded_and_no_token_is_lost() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 200, (300,), generator=generator).tolist()
    bounds = [0, *itertools.accumulate(lengths)]
    plan = PaddedGroups.of(bounds, torch.device("cpu"))
    assert plan.padded is not None
    assert plan.packed is not None
    assert (
        len(plan.padded)
        == sum(count * length for count, length in plan.groups)
        <= (1 + MAX_PADDING) * bounds[-1]
    )
    assert torch.equal(plan.padded[plan.packed], torch.arange(bounds[-1]))
    assert (plan.padded == bounds[-1]).sum() == len(plan.padded) - bounds[-1]
    assert len(plan.groups) < 30  # 300 calls without grouping


def test_norm_is_tagged_for_sequence_parallelism() -> None:
    """Upstream's own norm still refuses it; when it no longer does, ours can go."""
    result = _alone("""
import json, types, megatron_patches
megatron_patches.apply()
import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron_patches.norm import SequenceParallelRMSNorm
config = types.SimpleNamespace(
    sequence_parallel=True,
    params_dtype=torch.bfloat16,
    layernorm_zero_centered_gamma=False,
    persist_layer_norm=False,
    memory_efficient_layer_norm=False,
    normalization="RMSNorm",
)
try:
    WrappedTorchNorm(config, 8)
    refused = False
except AssertionError as error:
    refused = "sequence parallel" in str(error)
weight = SequenceParallelRMSNorm(config, 8).weight
config.sequence_parallel = False
off = SequenceParallelRMSNorm(config, 8).weight.sequence_parallel
print(json.dumps({
    "refused": refused,
    "tag": weight.sequence_parallel,
    "dtype": str(weight.dtype),
    "off": off,
}))
""")
    assert result == {"refused": True, "tag": True, "dtype": "torch.bfloat16", "off": False}
