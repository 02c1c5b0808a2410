"""How a server is started on a CPU: SGLang's arguments and the environment of its processes."""

from __future__ import annotations

import os
from typing import Any

from lopd.errors import ConfigError

# Tokens in the KV cache. From mem_fraction SGLang would take most of the machine's memory.
DEFAULT_KV_TOKENS = 32768
# The environment variable of a server that lopd started.
OURS = "LOPD_SERVER"
_MIB = 2**20


def on_cpu() -> bool:
    """Return whether this is a process of a server on a CPU. SGLang's own switch says so."""
    return os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"


def cpu_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return ServerArgs fields with those that a CPU needs.

    Args:
        arguments: The fields that follow from the configuration.

    Raises:
        ConfigError: The arguments ask for something that only a GPU can do.
    """
    if arguments.get("ep_size", 1) > 1:
        raise ConfigError(
            "sglang.expert is above 1 on a machine without a GPU: SGLang cannot split "
            "experts in plain torch",
            where="sglang.expert",
            remedy="set sglang.expert = 1",
        )
    needed: dict[str, Any] = {
        "device": "cpu",
        # The only attention backend that is plain torch.
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        # The overlap needs CUDA streams.
        "disable_overlap_schedule": True,
        # Otherwise an idle scheduler uses most of a core.
        "sleep_on_idle": True,
        # A prompt is never cut where its neighbours happen to fill a batch. With cuts the result of
        # a request would depend on its neighbours.
        "chunked_prefill_size": -1,
        # For the same reason. Small prompts gain nothing from the cache.
        "disable_radix_cache": True,
    }
    # The user's own number, from sglang.max_total_tokens, is kept.
    if "max_total_tokens" not in arguments:
        needed["max_total_tokens"] = DEFAULT_KV_TOKENS
    return {**arguments, **needed}


def cpu_environment(num_workers: int, interface: str = "lo") -> dict[str, str]:
    """Return the environment variables of a server on a CPU.

    Args:
        num_workers: The tensor-parallel size of the server.
        interface: The network interface of its collectives, weight syncs among them.
    """
    environment = {
        "SGLANG_USE_CPU_ENGINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        # One thread for each worker. With more threads torch splits attention by the amount of
        # work, and a response would depend on its neighbours. Small models are not faster with two.
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": interface,
        # Where NCCL's library is installed, as in the image, SGLang would make a communicator on
        # the CPU and fail. A name that is not there keeps it away.
        "SGLANG_NCCL_SO_PATH": "no-nccl-on-a-cpu",
        # In bytes. Memory of up to 32 MiB for incoming weights then stays with the process and is
        # used again. Otherwise the allocator gives it back to the kernel after every bucket, and
        # each of its pages faults anew at the next.
        "MALLOC_MMAP_THRESHOLD_": str(32 * _MIB),
        "MALLOC_TRIM_THRESHOLD_": str(1024 * _MIB),
        # torch.compile of one small sampling function costs 13 s at the first request, and it needs
        # a C++ compiler.
        "TORCHDYNAMO_DISABLE": "1",
    }
    if num_workers > 1:
        # SGLang wants each worker on cores of its own. It finds them by itself only on a machine
        # with as many memory nodes as workers.
        cores = sorted(os.sched_getaffinity(0))
        bindings = [str(cores[worker % len(cores)]) for worker in range(num_workers)]
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(bindings)
    return environment
