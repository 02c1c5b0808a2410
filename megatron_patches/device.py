"""Megatron-Core on a CPU with gloo. Every patch here is skipped where CUDA is available.

The patches change names that Megatron-Core looks up when it calls them. So it does not matter
whether Megatron-Core was imported before.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device as device_context

from megatron_patches.registry import patch, replace, require

_CPU = torch.device("cpu")
_CHECKED = "megatron-core 0.16.1 with torch 2.13.0, 0.18.2 with torch 2.11.0"
_UNTIL = "Megatron-Core asks an accelerator interface (torch.accelerator) instead of torch.cuda"


class NullEvent:
    """A CUDA event on a machine where every operation is done when it returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        # Whether the event has passed.
        return True

    def elapsed_time(self, _: Any) -> float:
        # In milliseconds.
        return 0.0


class NullStream:
    """A CUDA stream on a CPU. All streams are the same one, and there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    # There is only one stream, so all are equal.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, NullStream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: NullEvent | None = None) -> NullEvent:
        return event or NullEvent()


@patch(
    upstream="torch/cuda: current_device, set_device",
    checked=_CHECKED,
    until=_UNTIL,
    without_cuda=True,
)
def cpu_is_current_device() -> None:
    """Megatron-Core makes buffers and parameters on torch.cuda.current_device(). Without CUDA that
    call fails. It now returns the CPU, which is where the tensors belong.
    """
    replace(torch.cuda, "current_device", lambda: _CPU)
    replace(torch.cuda, "set_device", lambda device: None)


@patch(
    upstream="torch/cuda: Stream, Event, stream, current_stream, default_stream, synchronize, nvtx",
    checked=_CHECKED,
    until=_UNTIL,
    without_cuda=True,
)
def no_streams() -> None:
    """The token dispatcher, the gradient buffers and the pipeline schedule order work by streams
    and events, which do not exist without CUDA. On a CPU everything is done in the order of the
    calls. So streams become one stream without effect, and events have always passed.
    """
    null = NullStream()
    replace(torch.cuda, "Stream", NullStream)
    replace(torch.cuda, "Event", NullEvent)
    replace(torch.cuda, "current_stream", lambda device=None: null)
    replace(torch.cuda, "default_stream", lambda device=None: null)
    replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    replace(torch.cuda, "synchronize", lambda device=None: None)
    # A CPU has no cache of freed device memory.
    replace(torch.cuda, "empty_cache", lambda: None)
    # nvtx marks ranges for a profiler, and returns how deep a range is nested.
    replace(torch.cuda.nvtx, "range_push", lambda msg: 0)
    replace(torch.cuda.nvtx, "range_pop", lambda: 0)
    # It keeps memory from being used again by another stream. There is no other stream.
    replace(torch.Tensor, "record_stream", lambda self, stream: None)


@patch(
    upstream="megatron/core/tensor_parallel/random.py:_get_cuda_rng_state, _set_cuda_rng_state;"
    " torch/cuda/random.py",
    checked=_CHECKED,
    until=_UNTIL,
    without_cuda=True,
)
def cpu_random_state() -> None:
    """Let Megatron-Core fork the CPU's random generator where it would fork CUDA's.

    Megatron-Core tracks a random state for each kind of parallel region, and forks the CUDA
    generator for it. Without CUDA there is no such generator. With this patch Megatron-Core warns
    that the CPU state changed ("CPU RNG state changed within GPU RNG context"). Here that is
    intended, so the warning is dropped.
    """
    import megatron.core.tensor_parallel.random as random

    # `parameters` names the arguments of the upstream functions that the replacements have to take.
    require(random, "_get_cuda_rng_state", parameters=("device", "clone", "graph_safe"))
    require(random, "_set_cuda_rng_state", parameters=("new_state", "device", "graph_safe"))

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(new_state: Any, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    replace(random, "_get_cuda_rng_state", get_state)
    replace(random, "_set_cuda_rng_state", set_state)
    # Megatron-Core also calls torch's own functions, for example when it seeds.
    replace(torch.cuda, "get_rng_state", lambda device="cuda": torch.get_rng_state())

    def set_cuda_state(new_state: Any, device: Any = "cuda") -> None:
        torch.set_rng_state(new_state)

    def seed(value: int) -> None:
        # Not torch.manual_seed: that one seeds every device.
        torch.default_generator.manual_seed(value)

    replace(torch.cuda, "set_rng_state", set_cuda_state)
    replace(torch.cuda, "manual_seed", seed)
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _is_cuda(device: Any) -> bool:
    # Upstream writes a device in both forms.
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function that makes the same tensors, on the CPU where it is told "cuda"."""

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


@patch(
    upstream="torch: tensor, zeros, ones, empty, empty_like, arange; Tensor.cuda, Module.cuda."
    " Written as device='cuda' in schedules.py, clip_grads.py, optimizer.py, token_dispatcher.py",
    checked=_CHECKED,
    until=_UNTIL,
    without_cuda=True,
)
def literal_cuda_is_cpu() -> None:
    """Schedules, gradient clipping and the optimizers make tensors with the literal device='cuda',
    and move tensors with .cuda(). Without CUDA both fail. Both now mean the CPU.
    """
    # ``with torch.device(...)`` looks functions up in a set that it makes at its first use. The set
    # must hold torch's own functions, because ours call them. If it were made after the change it
    # would hold ours, and the context would be ignored. A model of transformers that is built under
    # "meta" would then keep uninitialised buffers.
    require(device_context, "_device_constructors", parameters=())()
    for name in ("tensor", "zeros", "ones", "empty", "empty_like", "arange"):
        replace(torch, name, _on_cpu(getattr(torch, name)))
    # Every tensor is on the CPU already, so .cuda() returns the tensor itself.
    replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    replace(torch.nn.Module, "cuda", lambda self, device=None: self)


@patch(
    upstream="megatron/core/optimizer/optimizer.py, distrib_optimizer.py, clip_grads.py:"
    " param.type() == 'torch.cuda.FloatTensor'",
    checked=_CHECKED,
    until=_UNTIL,
    without_cuda=True,
)
def type_names_say_cuda() -> None:
    """The optimizers sort parameters by the name of their tensor type, and accept CUDA names only.
    A parameter on a CPU would be refused. If Megatron-Core asks, a CPU tensor now gives the CUDA
    name of its type. Everybody else gets the true name.
    """
    original = require(torch.Tensor, "type")

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        # With an argument type() converts the tensor, and the answer is no name.
        if not isinstance(answer, str) or "cuda" in answer:
            return answer
        # The module of the caller. Other libraries must not see a name that is not true.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("megatron.core."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    replace(torch.Tensor, "type", type_name)


@patch(
    upstream="megatron/core/jit.py:jit_fuser (torch.compile)",
    checked=_CHECKED,
    until="never on a CPU without a compiler",
    without_cuda=True,
)
def no_compilation() -> None:
    """Megatron-Core decorates small fused functions with torch.compile when it is imported. On a
    CPU that needs a C++ compiler and takes minutes, and nothing becomes faster. The functions now
    run as they are written.
    """
    import torch._dynamo

    require(torch._dynamo.config, "disable")
    torch._dynamo.config.disable = True


@patch(
    upstream="megatron/core/transformer/moe/moe_utils.py:maybe_move_tensor_to_cpu"
    " (used in token_dispatcher.py)",
    checked=_CHECKED,
    until=_UNTIL,
    without_cuda=True,
)
def split_sizes_from_cpu_tensors() -> None:
    """The all-to-all dispatcher turns its split sizes into a numpy array only if they come from a
    GPU. A CPU tensor reaches all_to_all_single as it is, and is refused there. CPU tensors are now
    turned into arrays too.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    original = require(
        moe_utils, "maybe_move_tensor_to_cpu", parameters=("tensor", "as_numpy", "record_stream")
    )
    require(token_dispatcher, "maybe_move_tensor_to_cpu")

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Everything else is upstream's own case.
        if torch.is_tensor(tensor) and as_numpy and not tensor.is_cuda:
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    # token_dispatcher imported the function by name, so it has a reference of its own.
    for module in (moe_utils, token_dispatcher):
        replace(module, "maybe_move_tensor_to_cpu", move)


@patch(
    upstream="megatron/core/tensor_parallel/mappings.py:_gather_along_first_dim",
    checked=_CHECKED,
    until="gloo gathers uneven sizes",
    without_cuda=True,
)
def gather_uneven_over_gloo() -> None:
    """With expert_tensor > 1 the all-to-all dispatcher gathers tensors of different sizes. NCCL's
    all_gather takes them, gloo's takes equal sizes only. The tensors are now padded to the largest
    size, gathered, and cut.
    """
    import megatron.core.tensor_parallel.mappings as mappings

    original = require(
        mappings,
        "_gather_along_first_dim",
        parameters=("input_", "group", "output_split_sizes", "use_global_buffer"),
    )

    def gather(
        input_: torch.Tensor,
        group: Any,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        # Without sizes all ranks have the same one, and upstream's own way works.
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        # Every rank knows all sizes, so all of them pad to the same one.
        padded = input_.new_zeros((max(output_split_sizes), *input_.shape[1:]))
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        pairs = zip(parts, output_split_sizes, strict=True)
        return torch.cat([part[:size] for part, size in pairs])

    replace(mappings, "_gather_along_first_dim", gather)
