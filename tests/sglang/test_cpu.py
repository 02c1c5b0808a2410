"""What makes SGLang run on a CPU: the hash is upstream's, products do not depend on their company,
attention is upstream's, upstream changes are noticed.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from sglang_rollout.cpu import plugin
from sglang_rollout.cpu.kernels import LENGTH_STEP, ROWS, decode_attention, with_enough_rows
from sglang_rollout.cpu.stand_ins import assign_req_to_token_pool_cpu
from tests.limits import close

UPSTREAM_HASH = """
import importlib.util, json, pathlib, sys, torch
root = pathlib.Path(importlib.util.find_spec("sglang").origin).parent
source = root / "kernels/ops/sampling/murmur_hash.py"
spec = importlib.util.spec_from_file_location("murmur_hash", source)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
seeds, positions, columns = json.loads(sys.argv[1])
found = torch.empty((len(seeds), len(columns)), dtype=torch.uint32)
module.murmur_hash32_kernel[(len(seeds), 1)](
    torch.tensor(seeds, dtype=torch.uint64), torch.tensor(positions), torch.tensor(columns), found,
    len(seeds), len(columns), BLOCK_SIZE=1024,
)
print(json.dumps(found.tolist()))
"""


def test_the_hash_is_upstreams_triton_kernel_bit_for_bit() -> None:
    """The kernel itself runs on a CPU in Triton's interpreter.

    Its wrapper is not asked: since SGLang 0.5.23 it wants sgl_kernel where tensors are on a CPU.
    """
    arguments = [
        [0, 1, 17, 2**31 - 1, 2**33 + 5],
        [0, 3, 70, 4095, 11],
        [0, 1, 31, 32, 511, 151_935],
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", UPSTREAM_HASH, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    expected = json.loads(run.stdout)
    seeds, positions, columns = (torch.tensor(values) for values in arguments)
    assert plugin.murmur_hash32(seeds.to(torch.uint64), positions, columns).tolist() == expected
    assert (
        plugin.murmur_hash32((seeds + 1).to(torch.uint64), positions, columns).tolist() != expected
    )


@pytest.mark.parametrize(
    ("inner", "outer"), [(128, 256), (64, 128), (128, 32), (128, 8), (512, 1536), (1024, 64)]
)
def test_a_rows_product_does_not_depend_on_the_number_of_rows(inner: int, outer: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, inner, generator=generator)
    weight = torch.randn(outer, inner, generator=generator)
    linear = with_enough_rows(functional.linear)
    whole = linear(rows, weight)
    for count in (1, 2, 3, 5, 11, ROWS - 1, ROWS, ROWS + 1, 40, 99):
        for start in (0, 100 - count):
            assert torch.equal(
                linear(rows[start : start + count], weight), whole[start : start + count]
            ), (count, start)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in a server: with more, torch splits the keys by how much work there is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def attention_case(lengths: list[int]) -> dict[str, Any]:
    """Caches with NaN where no token of these requests lies: reading there must not show."""
    generator = torch.Generator().manual_seed(1)
    heads = 4
    groups = 2
    size = 16
    row_len = 70
    slots = 1 + torch.randperm(500, generator=generator)[: sum(lengths)]
    keys, values = (torch.full((501, groups, size), float("nan")) for _ in range(2))
    for cache in (keys, values):
        cache[slots] = torch.randn(len(slots), groups, size, generator=generator)
        cache[0] = 0.0  # SGLang's slot for padding
    pool = torch.full((20, row_len), 500, dtype=torch.int32)
    requests = torch.randperm(20, generator=generator)[: len(lengths)]
    for request, part in zip(requests.tolist(), slots.split(lengths), strict=True):
        pool[request, : len(part)] = part.to(torch.int32)
    query = torch.randn(len(lengths), heads, size, generator=generator)
    return {
        "query": query,
        "output": torch.full_like(query, float("nan")),
        "k_cache": keys,
        "v_cache": values,
        "req_to_token": pool,
        "req_pool_indices": requests,
        "seq_lens": torch.tensor(lengths),
    }


LENGTHS = [1, 5, LENGTH_STEP - 1, LENGTH_STEP, LENGTH_STEP + 1, 66, 70]


def test_batched_decode_attention_is_attention() -> None:
    case = attention_case(LENGTHS)
    result = decode_attention(**case, scaling=0.3)
    for index, length in enumerate(LENGTHS):
        slots = case["req_to_token"][case["req_pool_indices"][index], :length].long()
        # The shapes are [L, H, D].
        keys, values = (
            case[name][slots].repeat_interleave(2, dim=1) for name in ("k_cache", "v_cache")
        )
        weights = torch.softmax(torch.einsum("hd,lhd->hl", case["query"][index], keys) * 0.3, -1)
        close(result[index], torch.einsum("hl,lhd->hd", weights, values), rel=1e-5, abs=1e-6)


@pytest.mark.usefixtures("one_thread")
def test_a_requests_attention_does_not_depend_on_the_others() -> None:
    case = attention_case(LENGTHS)
    whole = decode_attention(**case, scaling=None).clone()
    for chosen in ([0], [6], [1, 3], [5, 4, 2]):
        part = {**case, "output": torch.empty(len(chosen), 4, 16)}
        for name in ("query", "req_pool_indices", "seq_lens"):
            part[name] = case[name][chosen]
        assert torch.equal(decode_attention(**part, scaling=None), whole[chosen])


def test_control_attention_to_one_key_more_is_another() -> None:
    case = attention_case([5, 20])
    right = decode_attention(**case, scaling=None).clone()
    case["seq_lens"] = torch.tensor([4, 20])
    assert not torch.allclose(decode_attention(**case, scaling=None)[0], right[0], atol=1e-3)


def test_each_requests_tokens_go_to_its_own_row_of_the_pool() -> None:
    pool = torch.zeros(3, 6, dtype=torch.int32)
    assign_req_to_token_pool_cpu(
        torch.tensor([2, 0]),
        pool,
        torch.tensor([1, 0]),
        torch.tensor([3, 4]),
        torch.tensor([7, 8, 9, 10, 11, 12]),
        6,
    )
    assert pool.tolist() == [[9, 10, 11, 12, 0, 0], [0] * 6, [0, 7, 8, 0, 0, 0]]


def test_the_plugin_does_nothing_unless_the_server_runs_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(plugin, "_module", lambda name: pytest.fail(f"imported {name}"))
    plugin.activate()


@pytest.mark.parametrize(
    ("module", "names", "message"),
    [
        ("sglang.srt.server_args", {}, "DETERMINISTIC_ATTENTION_BACKEND_CHOICES is gone"),
        (
            "sglang.srt.server_args",
            {"DETERMINISTIC_ATTENTION_BACKEND_CHOICES": ("fa3",)},
            "is a tuple, no longer a list",
        ),
        ("sglang.srt.layers.sampler", {}, "murmur_hash32 is gone"),
        ("sglang.srt.layers.sampler", {"murmur_hash32": lambda seed: seed}, "no longer"),
        (
            "sglang.srt.layers.logits_processor",
            {"LogitsProcessor": type("LogitsProcessor", (), {})},
            "_compute_lm_head is gone",
        ),
        ("sglang.srt.batch_invariant_ops", {}, "enable_batch_invariant_mode is gone"),
        ("sglang.srt.layers.attention.torch_native_backend", {}, "TorchNativeAttnBackend is gone"),
        ("torch.multiprocessing.reductions", {}, "rebuild_storage_filename is gone"),
    ],
)
def test_an_upstream_that_has_moved_is_refused(
    monkeypatch: pytest.MonkeyPatch, module: str, names: dict[str, Any], message: str
) -> None:
    def hash32(seed: Any, positions: Any, col_indices: Any) -> None: ...

    class Processor:
        def _compute_lm_head(
            self, hidden_states: Any, lm_head: Any, embedding_bias: Any = None
        ) -> None: ...

    upstream: dict[str, dict[str, Any]] = {
        "sglang.srt.server_args": {"DETERMINISTIC_ATTENTION_BACKEND_CHOICES": []},
        "sglang.srt.batch_invariant_ops": {"enable_batch_invariant_mode": None},
        "sglang.srt.layers.logits_processor": {"LogitsProcessor": Processor},
        "sglang.kernels.ops.sampling.murmur_hash": {"murmur_hash32": hash32},
        "sglang.srt.layers.sampler": {"murmur_hash32": hash32},
        "sglang.srt.layers.attention.torch_native_backend": {
            "TorchNativeAttnBackend": type("TorchNativeAttnBackend", (), {})
        },
        "torch.multiprocessing.reductions": {"rebuild_storage_filename": None},
    }
    if module == "torch.multiprocessing.reductions":  # reached only past the others
        monkeypatch.setattr(plugin, "_batch_decode_attention", lambda: None)

    def imported(name: str) -> SimpleNamespace:
        if name == "sglang.srt.arg_groups.choices":
            raise ModuleNotFoundError(name)
        return SimpleNamespace(__name__=name, **({**upstream, module: names}[name]))

    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.setattr(plugin, "_active", False)
    monkeypatch.setattr(plugin, "_module", imported)
    with pytest.raises(RuntimeError, match=message):
        plugin.activate()


def test_the_last_two_shared_memories_stay_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Storage:
        pass

    reductions = SimpleNamespace(
        __name__="reductions", rebuild_storage_filename=lambda cls, manager, handle, size: Storage()
    )
    monkeypatch.setattr(plugin, "_module", lambda name: reductions)
    plugin._keep_shared_memory_mapped()
    alive = [
        weakref.ref(reductions.rebuild_storage_filename(None, None, handle, 8))
        for handle in (b"one", b"two", b"one", b"three")
    ]
    gc.collect()
    assert [reference() is not None for reference in alive] == [False, False, True, True]


class HostCache:
    """As in SGLang, but for the memory: pinned upstream, which needs a GPU."""

    buffer: torch.Tensor

    def __init__(self, num_tokens: int, num_layers: int, topk_size: int, name: str) -> None:
        raise AssertionError("pinned memory")

    def _log_allocation(self) -> None:
        assert self.buffer.shape == (9, 3, 2)


class LaterHostCache(HostCache):
    """SGLang 0.5.23's."""

    def __init__(
        self, num_tokens: int, num_layers: int, topk_size: int, name: str, device: str
    ) -> None:
        raise AssertionError("pinned memory")


@pytest.mark.parametrize("host", [HostCache, LaterHostCache])
def test_the_experts_of_a_pass_have_room(
    monkeypatch: pytest.MonkeyPatch, host: type[HostCache]
) -> None:
    class DeviceCache:
        def __init__(self) -> None:
            self.buffer = torch.zeros(2, 3, 2, dtype=torch.int32)

        def capture(self, layer_id: int, topk_indices: torch.Tensor) -> None:
            self.buffer[: len(topk_indices), layer_id] = topk_indices

    # Patched copies, so that the other case begins anew.
    own = type("BaseHostCache", (host,), {"__init__": host.__init__})
    upstream = SimpleNamespace(__name__="base", BaseHostCache=own, BaseDeviceCache=DeviceCache)
    monkeypatch.setattr(plugin, "_module", lambda name: upstream)
    rows = torch.arange(10).reshape(5, 2)
    with pytest.raises(RuntimeError):  # the control: a pass of 5 tokens, a buffer of 2
        DeviceCache().capture(0, rows)
    plugin._keep_routed_experts()
    arguments = (9, 3, 2, "experts", *(["cpu"] if host is LaterHostCache else []))
    assert own(*arguments).buffer.sum() == 0
    device = DeviceCache()
    device.capture(0, rows[:2])
    device.capture(1, rows)
    assert device.buffer[:2, 0].tolist() == rows[:2].tolist(), "what is there stays"
    assert device.buffer[:, 1].tolist() == rows.tolist()
    monkeypatch.setattr(own, "__init__", lambda self, size: None)
    with pytest.raises(RuntimeError, match="no longer"):
        plugin._keep_routed_experts()
