"""What changes SGLang on a CPU. SGLang calls ``activate`` in each of its processes (entry point
``sglang.srt.plugins``); elsewhere it does nothing.

1. Seeds on a CPU. SGLang honours a request's ``sampling_seed`` only with ``enable_deterministic_inference``, and refuses that with the attention backend
   torch_native: it is added to the list of backends that are allowed.
   Upstream: sglang/srt/server_args.py, DETERMINISTIC_ATTENTION_BACKEND_CHOICES (0.5.22 and later:
   sglang/srt/arg_groups/choices.py).
   Can go: when upstream lists torch_native.
2. That mode then swaps torch's matmul, log_softmax and mean for Triton kernels that need a GPU, so that a row's result does not depend on its batch. On a
   CPU only products of few rows do: those are computed with more rows
   (sglang_rollout.cpu.kernels.with_enough_rows). Upstream: sglang/srt/batch_invariant_ops;
   LogitsProcessor._compute_lm_head. Can go: when upstream has a batch-invariant mode on a CPU.
3. Seeded sampling hashes (seed, position, token id) in a Triton kernel, on a CPU as well: the same 32-bit MurmurHash3 in torch, bit for bit.
   Upstream: sglang/kernels/ops/sampling/murmur_hash.py, used by sglang/srt/layers/sampler.py. Can
   go: when upstream has a CPU form.
4. torch_native attends to one request after the other in Python, two thirds of a decode step of 64 requests: requests of similar length together, four
   times as fast (sglang_rollout.cpu.kernels.decode_attention). Encoder-decoder models and sliding
   windows keep upstream's loop. Upstream: sglang/srt/layers/attention/torch_native_backend.py
   ("TODO: this loop process a sequence per iter"). Can go: when upstream batches it.
5. Weights that come through shared memory (sync.transport = "tensor"): torch maps the sender's memory anew for every bucket, and the page faults cost three
   times what the copy does. The last two mappings are kept, as torch does for CUDA's.
   Upstream: torch/multiprocessing/reductions.py, rebuild_storage_filename. Can go: when torch keeps
   them.
6. Weights that come by broadcast (sync.transport = "distributed") are received where they belong (sglang_rollout.cpu.incoming). Only saves time.
7. ``enable_memory_saver`` (sync.colocate) works without torch_memory_saver, which is CUDA's alone:
what a server gives back is really empty until it takes it again (sglang_rollout.cpu.memory).
Upstream: sglang/srt/utils/torch_memory_saver_adapter.py. Can go: when torch_memory_saver has a CPU
form.

Versions: sglang 0.5.17 to 0.5.23. A place that is no longer as described raises, and the server
does not start.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from typing import Any, cast

import torch

from sglang_rollout.cpu import incoming
from sglang_rollout.cpu.kernels import decode_attention, with_enough_rows
from sglang_rollout.cpu.memory import MemoryOfTags
from sglang_rollout.server_side import load_files, served_weights

OURS = "LOPD_SERVER"  # environment variable: this is a server that lopd started
_MASK = 0xFFFFFFFF
_KEPT_MAPPINGS = 2  # a sender uses two buffers in turns


def on_cpu() -> bool:
    """True in a process of a server that runs on a CPU (SGLang's own switch)."""
    return os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"


def activate() -> None:
    """Apply the changes above; nothing unless the environment says that the server runs on a CPU.
    RuntimeError: upstream has moved.

    In a server that lopd started, on a GPU too, it can then tell fingerprints of its weights
    (sglang_rollout.server_side.served_weights), and leaves no file in /dev/shm
    (sglang_rollout.server_side.load_files).
    """
    global _active
    if _active:
        return
    if on_cpu():
        _allow_deterministic_torch_native()
        _make_batch_invariant()
        _hash_in_torch()
        _batch_decode_attention()
        _keep_shared_memory_mapped()
        incoming.install()
        _give_memory_back()
    if os.environ.get(OURS) == "1":
        served_weights.install()
        load_files.install()
    _active = True


_active = False


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _need(holder: Any, name: str) -> Any:
    if not hasattr(holder, name):
        raise RuntimeError(
            f"sglang_rollout.cpu.plugin: {holder.__name__}.{name} is gone; this SGLang version needs another patch"
        )
    return getattr(holder, name)


def _need_parameters(function: Any, names: tuple[str, ...]) -> None:
    found = tuple(inspect.signature(function).parameters)
    if found != names:
        raise RuntimeError(
            f"sglang_rollout.cpu.plugin: {function.__qualname__} takes {found}, no longer {names}; this SGLang version needs another patch"
        )


def _allow_deterministic_torch_native() -> None:
    try:
        holder = _module("sglang.srt.arg_groups.choices")
    except ModuleNotFoundError:
        holder = _module("sglang.srt.server_args")
    choices = _need(holder, "DETERMINISTIC_ATTENTION_BACKEND_CHOICES")
    if not isinstance(choices, list):
        raise RuntimeError(
            f"sglang_rollout.cpu.plugin: DETERMINISTIC_ATTENTION_BACKEND_CHOICES is a {type(choices).__name__}, no longer a list"
        )
    if "torch_native" not in choices:
        choices.append("torch_native")


def _make_batch_invariant() -> None:
    operators = _module("sglang.srt.batch_invariant_ops")
    processor = _need(_module("sglang.srt.layers.logits_processor"), "LogitsProcessor")
    original = _need(processor, "_compute_lm_head")
    known = ("self", "hidden_states", "lm_head", "embedding_bias")
    _need_parameters(
        original,
        known if len(inspect.signature(original).parameters) == len(known) else (*known, "out"),
    )  # out: from 0.5.23 on
    _need(operators, "enable_batch_invariant_mode")

    def enable_batch_invariant_mode(enable_bmm: bool = True) -> None:
        torch.nn.functional.linear = with_enough_rows(torch.nn.functional.linear)

        def compute_lm_head(
            self: Any,
            hidden_states: torch.Tensor,
            lm_head: Any,
            embedding_bias: torch.Tensor | None = None,
            **out: Any,
        ) -> torch.Tensor:
            if out.get("out") is not None:  # of a captured graph, which a CPU has none of
                return cast(
                    torch.Tensor, original(self, hidden_states, lm_head, embedding_bias, **out)
                )
            return with_enough_rows(lambda x: original(self, x, lm_head, embedding_bias))(
                hidden_states
            )

        processor._compute_lm_head = compute_lm_head

    operators.enable_batch_invariant_mode = enable_batch_invariant_mode


def _hash_in_torch() -> None:
    definition = _module("sglang.kernels.ops.sampling.murmur_hash")
    sampler = _module("sglang.srt.layers.sampler")  # it binds the name when it is imported
    for holder in (definition, sampler):
        _need_parameters(_need(holder, "murmur_hash32"), ("seed", "positions", "col_indices"))
        holder.murmur_hash32 = murmur_hash32


def _batch_decode_attention() -> None:
    backend = _need(
        _module("sglang.srt.layers.attention.torch_native_backend"), "TorchNativeAttnBackend"
    )
    original = _need(backend, "_run_sdpa_forward_decode")
    tensors = (
        "query",
        "output",
        "k_cache",
        "v_cache",
        "req_to_token",
        "req_pool_indices",
        "seq_lens",
        "encoder_lens",
    )
    _need_parameters(
        original,
        (
            "self",
            *tensors,
            "scaling",
            "enable_gqa",
            "causal",
            "is_cross_attn",
            "sliding_window_size",
        ),
    )

    def run_sdpa_forward_decode(
        self: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        **named: Any,
    ) -> torch.Tensor:
        caches = (k_cache, v_cache, req_to_token, req_pool_indices, seq_lens)
        if encoder_lens is not None or named.get("sliding_window_size") is not None:
            return cast(
                torch.Tensor, original(self, query, output, *caches, encoder_lens, scaling, **named)
            )
        return decode_attention(query, output, *caches, scaling)

    backend._run_sdpa_forward_decode = run_sdpa_forward_decode


def _keep_shared_memory_mapped() -> None:
    reductions = _module("torch.multiprocessing.reductions")
    original = _need(reductions, "rebuild_storage_filename")
    kept: dict[Any, Any] = {}  # name of the memory -> its storage, newest last

    def rebuild_storage_filename(
        cls: Any, manager: Any, handle: Any, *rest: Any, **named: Any
    ) -> Any:
        storage = original(
            cls, manager, handle, *rest, **named
        )  # torch gives the same one again while one is alive
        kept.pop(handle, None)
        kept[handle] = storage
        while len(kept) > _KEPT_MAPPINGS:
            del kept[next(iter(kept))]
        return storage

    reductions.rebuild_storage_filename = rebuild_storage_filename


def _give_memory_back() -> None:
    adapter = _need(
        _module("sglang.srt.utils.torch_memory_saver_adapter"), "TorchMemorySaverAdapter"
    )
    _need_parameters(_need(adapter, "create"), ("enable",))
    original, memory = (
        adapter.create,
        MemoryOfTags(),
    )  # one for all adapters of a process, as CUDA's is

    class OnCpu(adapter):  # type: ignore[misc, valid-type]
        enabled = True

        def configure_subprocess(self) -> Any:
            return contextlib.nullcontext()

        disable = configure_subprocess

        def cuda_graph(self, **named: Any) -> Any:
            return contextlib.nullcontext()

        def region(self, tag: str, enable_cpu_backup: bool = False) -> Any:
            if enable_cpu_backup:
                raise RuntimeError(
                    "enable_weights_cpu_backup does not work on a CPU, where memory that was given back has lost its contents"
                )
            return memory.region(tag)

        def pause(self, tag: str) -> None:
            memory.pause(tag)

        def resume(self, tag: str) -> None:
            memory.resume(tag)

    adapter.create = staticmethod(lambda enable: OnCpu() if enable else original(enable))


def murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """MurmurHash3 of the four 32-bit words (low seed, high seed, position, column).

    seed: any integer type [N]; positions [N]; col_indices [M]. Returns uint32 [N, M].
    """
    # uint64 has few operators on a CPU; the low 63 bits are all that a non-negative seed has, and
    # int64 wraps as C does
    seeds = seed.to(torch.int64)[:, None]  # [N, 1]
    words = (
        seeds & _MASK,
        (seeds >> 32) & _MASK,
        positions.to(torch.int64)[:, None] & _MASK,
        col_indices.to(torch.int64)[None, :] & _MASK,
    )
    state = torch.zeros_like(seeds)
    for word in words:
        state = _mix(state, word)
    return _finish(state ^ 16).to(torch.uint32)  # 16 bytes were hashed


def _times(values: torch.Tensor, factor: int) -> torch.Tensor:
    """values * factor modulo 2^32; the halves keep every product below 2^63."""
    low = (values & 0xFFFF) * factor
    high = ((values >> 16) * factor) & 0xFFFF
    return (low + (high << 16)) & _MASK


def _rotate(values: torch.Tensor, bits: int) -> torch.Tensor:
    return ((values << bits) | (values >> (32 - bits))) & _MASK


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = _times(_rotate(_times(word, 0xCC9E2D51), 15), 0x1B873593)
    return (_rotate(state ^ word, 13) * 5 + 0xE6546B64) & _MASK


def _finish(state: torch.Tensor) -> torch.Tensor:
    state = _times(state ^ (state >> 16), 0x85EBCA6B)
    state = _times(state ^ (state >> 13), 0xC2B2AE35)
    return state ^ (state >> 16)
