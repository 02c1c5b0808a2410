"""How a server is started on a CPU: arguments of SGLang and environment of its processes."""

from __future__ import annotations

import os
from typing import Any

from lopd.errors import ConfigError

DEFAULT_KV_TOKENS = 32768


def cpu_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """ServerArgs fields that a CPU needs, on top of those given. ConfigError: what only a GPU can
    do.
    """
    if arguments.get("ep_size", 1) > 1:
        raise ConfigError(
            "sglang.expert above 1 on a CPU: SGLang's plain-torch experts are not split",
            where="sglang.expert",
            remedy="set sglang.expert = 1",
        )
    needed: dict[str, Any] = {
        "device": "cpu",
        "attention_backend": "torch_native",  # the only one that is plain torch
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_overlap_schedule": True,  # overlap needs streams
        "sleep_on_idle": True,  # else the scheduler burns most of a core while nobody asks
        # a prompt is never cut where its neighbours happen to fill a batch: results do not depend
        # on them
        "chunked_prefill_size": -1,
        "disable_radix_cache": True,  # for the same reason; small prompts gain nothing from it
    }
    if "max_total_tokens" not in arguments:
        needed["max_total_tokens"] = (
            DEFAULT_KV_TOKENS  # from mem_fraction it would be most of the machine's memory
        )
    return {**arguments, **needed}


def cpu_environment(num_workers: int, interface: str = "lo") -> dict[str, str]:
    """Environment of a server on a CPU. num_workers: its tensor-parallel size. interface: of its
    collectives, weight syncs among them.

    One thread for each worker: with more, torch splits attention by how much there is to do, and a
    response would depend on its neighbours. Small models are not faster with two.
    """
    environment = {
        "SGLANG_USE_CPU_ENGINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": interface,
        # Where NCCL's library is installed, as in the image, SGLang would make a communicator on
        # the CPU and fail. A name that is not there keeps it away.
        "SGLANG_NCCL_SO_PATH": "no-nccl-on-a-cpu",
        "MALLOC_MMAP_THRESHOLD_": str(
            32 * 2**20
        ),  # memory for incoming weights is used again, not given back and faulted in anew for every bucket
        "MALLOC_TRIM_THRESHOLD_": str(2**30),
        # torch.compile of one small sampling function costs 13 s at the first request, and a C++
        # compiler
        "TORCHDYNAMO_DISABLE": "1",
    }
    if (
        num_workers > 1
    ):  # SGLang wants each worker on cores of its own, and finds them only on a machine with as many memory nodes
        cores = sorted(os.sched_getaffinity(0))
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
            str(cores[worker % len(cores)]) for worker in range(num_workers)
        )
    return environment
