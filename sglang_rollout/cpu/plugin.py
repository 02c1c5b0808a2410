"""What changes SGLang on a CPU.

SGLang calls ``activate`` in each of its processes (entry point ``sglang.srt.plugins``). Elsewhere
the call does nothing. Each change stands in a function of its own, which says what it changes, why,
where that stands upstream, and when the change can be removed.

Versions: sglang 0.5.17 to 0.5.23. A place that is no longer as described raises RuntimeError, and
the server does not start.
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
from sglang_rollout.cpu.murmur_hash import murmur_hash32
from sglang_rollout.cpu.settings import OURS, on_cpu
from sglang_rollout.server_side import load_files, served_weights

# A sender uses two buffers in turn.
_KEPT_MAPPINGS = 2
_active = False


def activate() -> None:
    """Apply the changes. Nothing happens unless the environment says that the server needs them.

    Raises:
        RuntimeError: A place upstream has moved.
    """
    global _active
    # SGLang calls it once, and launch.main() calls it again to see the error.
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
        _keep_routed_experts()
    # These two are for a GPU as well: a server that lopd started can report fingerprints of its
    # weights, and leaves no file in /dev/shm.
    if os.environ.get(OURS) == "1":
        served_weights.install()
        load_files.install()
    # Last: after an error nothing counts as applied, and the second call meets the error again.
    _active = True


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _moved(what: str) -> RuntimeError:
    return RuntimeError(
        f"sglang_rollout.cpu.plugin: {what}; this SGLang version needs another patch"
    )


def _need(holder: Any, name: str) -> Any:
    if not hasattr(holder, name):
        raise _moved(f"{holder.__name__}.{name} is gone")
    return getattr(holder, name)


def _need_parameters(function: Any, names: tuple[str, ...]) -> None:
    found = tuple(inspect.signature(function).parameters)
    if found != names:
        raise _moved(f"{function.__qualname__} takes {found}, no longer {names}")


def _allow_deterministic_torch_native() -> None:
    """Allow seeds on a CPU."""
    # SGLang honours a request's sampling_seed only with enable_deterministic_inference, and refuses
    # that with the attention backend torch_native. So the backend is added to the allowed ones.
    # Upstream: DETERMINISTIC_ATTENTION_BACKEND_CHOICES in sglang/srt/server_args.py, from 0.5.20 on
    # in sglang/srt/arg_groups/choices.py. Can go: when upstream lists torch_native.
    try:
        holder = _module("sglang.srt.arg_groups.choices")
    except ModuleNotFoundError:
        holder = _module("sglang.srt.server_args")
    choices = _need(holder, "DETERMINISTIC_ATTENTION_BACKEND_CHOICES")
    if not isinstance(choices, list):
        raise _moved(
            f"DETERMINISTIC_ATTENTION_BACKEND_CHOICES is a {type(choices).__name__}, no longer a "
            "list"
        )
    if "torch_native" not in choices:
        choices.append("torch_native")


def _make_batch_invariant() -> None:
    """Replace the batch-invariant mode, which needs a GPU."""
    # The deterministic mode swaps torch's matmul, log_softmax and mean for Triton kernels, so that
    # a row's result does not depend on its batch. On a CPU only products of few rows depend on it.
    # Those are computed with more rows (kernels.with_enough_rows). Upstream:
    # sglang/srt/batch_invariant_ops, and LogitsProcessor._compute_lm_head. Can go: when upstream
    # has a batch-invariant mode on a CPU.
    operators = _module("sglang.srt.batch_invariant_ops")
    processor = _need(_module("sglang.srt.layers.logits_processor"), "LogitsProcessor")
    original = _need(processor, "_compute_lm_head")
    known = ("self", "hidden_states", "lm_head", "embedding_bias")
    # From 0.5.23 on there is one more parameter.
    has_out = len(inspect.signature(original).parameters) != len(known)
    _need_parameters(original, (*known, "out") if has_out else known)
    _need(operators, "enable_batch_invariant_mode")

    def enable_batch_invariant_mode(enable_bmm: bool = True) -> None:
        torch.nn.functional.linear = with_enough_rows(torch.nn.functional.linear)

        # The output layer does not use linear(): it multiplies with the transposed weight.
        def compute_lm_head(
            self: Any,
            hidden_states: torch.Tensor,
            lm_head: Any,
            embedding_bias: torch.Tensor | None = None,
            **out: Any,
        ) -> torch.Tensor:
            # out belongs to captured CUDA graphs, and a CPU has none of them.
            if out.get("out") is not None:
                logits = original(self, hidden_states, lm_head, embedding_bias, **out)
                return cast(torch.Tensor, logits)
            product = with_enough_rows(lambda x: original(self, x, lm_head, embedding_bias))
            return product(hidden_states)

        processor._compute_lm_head = compute_lm_head

    operators.enable_batch_invariant_mode = enable_batch_invariant_mode


def _hash_in_torch() -> None:
    """Replace the hash of seeded sampling, which is a Triton kernel on a CPU as well."""
    # It hashes (seed, position, token id). murmur_hash.py has the same function in torch, bit for
    # bit. Upstream: sglang/kernels/ops/sampling/murmur_hash.py. Since 0.5.23 there is a form for a
    # CPU, in sgl_kernel. Can go: when sglang-kernel has a CPU wheel.
    definition = _module("sglang.kernels.ops.sampling.murmur_hash")
    # The sampler binds the name when it is imported, so both places must change.
    sampler = _module("sglang.srt.layers.sampler")
    for holder in (definition, sampler):
        _need_parameters(_need(holder, "murmur_hash32"), ("seed", "positions", "col_indices"))
        holder.murmur_hash32 = murmur_hash32


def _batch_decode_attention() -> None:
    """Compute the decode attention of requests of similar length together."""
    # torch_native computes one request after the other in a Python loop. That is two thirds of a
    # decode step of 64 requests, and kernels.decode_attention is four times as fast. Upstream:
    # TorchNativeAttnBackend in sglang/srt/layers/attention/torch_native_backend.py, which takes one
    # sequence at a time. Can go: when upstream batches it.
    module = _module("sglang.srt.layers.attention.torch_native_backend")
    backend = _need(module, "TorchNativeAttnBackend")
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
    options = ("scaling", "enable_gqa", "causal", "is_cross_attn", "sliding_window_size")
    _need_parameters(original, ("self", *tensors, *options))

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
        # Encoder-decoder models and sliding windows keep upstream's loop: decode_attention knows
        # neither.
        if encoder_lens is not None or named.get("sliding_window_size") is not None:
            result = original(self, query, output, *caches, encoder_lens, scaling, **named)
            return cast(torch.Tensor, result)
        return decode_attention(query, output, *caches, scaling)

    backend._run_sdpa_forward_decode = run_sdpa_forward_decode


def _keep_shared_memory_mapped() -> None:
    """Keep the last shared memories of a sender mapped."""
    # With sync.transport = "tensor" torch maps the sender's memory anew for every bucket, and the
    # page faults cost three times what the copy does. The last two mappings are kept, as torch
    # does for CUDA's memory. Upstream: rebuild_storage_filename in
    # torch/multiprocessing/reductions.py. Can go: when torch keeps them.
    reductions = _module("torch.multiprocessing.reductions")
    original = _need(reductions, "rebuild_storage_filename")
    # Name of the memory -> its storage. The newest stands last.
    kept: dict[Any, Any] = {}

    def rebuild_storage_filename(
        cls: Any, manager: Any, handle: Any, *rest: Any, **named: Any
    ) -> Any:
        # torch gives the same storage again as long as one of that name is alive.
        storage = original(cls, manager, handle, *rest, **named)
        kept.pop(handle, None)
        kept[handle] = storage
        while len(kept) > _KEPT_MAPPINGS:
            del kept[next(iter(kept))]
        return storage

    reductions.rebuild_storage_filename = rebuild_storage_filename


def _keep_routed_experts() -> None:
    """Make place for the experts that a server is asked for (enable_return_routed_experts)."""
    # The choices of all tokens in the KV cache are kept in pinned memory, which needs a GPU. Those
    # of one pass have a buffer of max_running_requests rows where prompts are not cut into chunks
    # (chunked_prefill_size = -1, as on a CPU), and a pass over prompts has more rows than that.
    # Upstream: sglang/srt/state_capturer/base.py. Can go: when upstream has a form for a CPU.
    module = _module("sglang.srt.state_capturer.base")
    host, device = (_need(module, name) for name in ("BaseHostCache", "BaseDeviceCache"))
    known = ("self", "num_tokens", "num_layers", "topk_size", "name")
    # From 0.5.23 on there is one more parameter.
    has_device = len(inspect.signature(host.__init__).parameters) != len(known)
    _need_parameters(host.__init__, (*known, "device") if has_device else known)
    original = _need(device, "capture")
    _need_parameters(original, ("self", "layer_id", "topk_indices"))

    def init_host(
        self: Any, num_tokens: int, num_layers: int, topk_size: int, name: str, device: str = "cpu"
    ) -> None:
        self.buffer = torch.zeros((num_tokens, num_layers, topk_size), dtype=torch.int32)
        self.num_tokens = num_tokens
        self.num_layers = num_layers
        self.topk_size = topk_size
        self.name = name
        self._log_allocation()

    def capture(self: Any, layer_id: int, topk_indices: torch.Tensor) -> None:
        missing = topk_indices.shape[0] - self.buffer.shape[0]
        if missing > 0:
            # The earlier layers of this pass stand in the rows that are there.
            more = self.buffer.new_zeros((missing, *self.buffer.shape[1:]))
            self.buffer = torch.cat([self.buffer, more])
        original(self, layer_id, topk_indices)

    host.__init__ = init_host
    device.capture = capture


def _give_memory_back() -> None:
    """Make enable_memory_saver (sync.colocate) work without torch_memory_saver."""
    # torch_memory_saver is for CUDA alone. Here what a server gives back is really empty until the
    # server takes it again (memory.py). Upstream: TorchMemorySaverAdapter in
    # sglang/srt/utils/torch_memory_saver_adapter.py. Can go: when torch_memory_saver has a form for
    # a CPU.
    module = _module("sglang.srt.utils.torch_memory_saver_adapter")
    adapter = _need(module, "TorchMemorySaverAdapter")
    _need_parameters(_need(adapter, "create"), ("enable",))
    original = adapter.create
    # One for all adapters of a process, as CUDA's is: weights and cache are made through different
    # adapters, and one call releases both.
    memory = MemoryOfTags()

    class OnCpu(adapter):  # type: ignore[misc, valid-type]
        """SGLang's adapter over MemoryOfTags."""

        enabled = True

        # CUDA's form prepares child processes and captured graphs. A CPU needs neither.
        def configure_subprocess(self) -> Any:
            return contextlib.nullcontext()

        disable = configure_subprocess

        def cuda_graph(self, **named: Any) -> Any:
            return contextlib.nullcontext()

        def region(self, tag: str, enable_cpu_backup: bool = False) -> Any:
            if enable_cpu_backup:
                raise RuntimeError(
                    "enable_weights_cpu_backup does not work on a CPU, where memory that was given "
                    "back has lost its contents"
                )
            return memory.region(tag)

        def pause(self, tag: str) -> None:
            memory.pause(tag)

        def resume(self, tag: str) -> None:
            memory.resume(tag)

    adapter.create = staticmethod(lambda enable: OnCpu() if enable else original(enable))
