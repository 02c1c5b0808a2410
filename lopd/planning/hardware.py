"""GPUs and nodes by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lopd.errors import ConfigError

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """memory: bytes that a program can have (what nvidia-smi shows, not the name's round number).
    flops: dense bfloat16 peak. bandwidth: of memory.

    link: between the GPUs of a node, into one of them: NVLink, or PCIe where there is none.
    """

    name: str
    memory: int
    flops: float  # per second
    bandwidth: float  # bytes per second
    link: float  # bytes per second


# Peaks, bandwidths and links (half of what a data sheet adds up over both directions) from NVIDIA's
# data sheets; memory as nvidia-smi reports it.
GPUS = {
    "h100-80gb": Gpu("h100-80gb", int(79.6 * _GIB), 989.4e12, 3.35e12, 450e9),
    "h100-94gb": Gpu("h100-94gb", int(93.6 * _GIB), 835e12, 3.9e12, 300e9),
    "h200-141gb": Gpu("h200-141gb", int(140.4 * _GIB), 989.4e12, 4.8e12, 450e9),
    "b200-180gb": Gpu("b200-180gb", int(178.4 * _GIB), 2250e12, 8.0e12, 900e9),
    "a100-80gb": Gpu("a100-80gb", int(79.3 * _GIB), 312e12, 2.04e12, 300e9),
    "a100-40gb": Gpu("a100-40gb", int(39.4 * _GIB), 312e12, 1.56e12, 300e9),
    "l40s-48gb": Gpu("l40s-48gb", int(45.0 * _GIB), 362e12, 0.86e12, 32e9),
    "rtx4090-24gb": Gpu("rtx4090-24gb", int(24.0 * _GIB), 165e12, 1.01e12, 32e9),
}


@dataclass(frozen=True, slots=True)
class Node:
    """num_gpus of one kind, with memory and disk of the machine they are in, in bytes."""

    gpu: Gpu
    num_gpus: int
    host_memory: int
    disk: int


def node_of(
    gpu: str, num_gpus: int, *, host_gib: float | None = None, disk_gib: float | None = None
) -> Node:
    """ConfigError: an unknown GPU, with the nearest. host_gib, absent: 256 GiB per GPU (a usual
    8-GPU node has 2 TiB). disk_gib, absent: 3.5 TiB per GPU.
    """
    name = gpu.lower()
    if name not in GPUS:
        nearest = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"unknown GPU {gpu!r:.60}",
            where="--gpu",
            limit=f"one of {', '.join(GPUS)}",
            remedy=f"the nearest is {nearest}",
        )
    host = (256 if host_gib is None else host_gib / num_gpus) * num_gpus * _GIB
    disk = (3584 if disk_gib is None else disk_gib / num_gpus) * num_gpus * _GIB
    return Node(GPUS[name], num_gpus, int(host), int(disk))


def gpu_of_device(device: str) -> Gpu:
    """The GPU that torch or nvidia-smi calls by this name; one that is not in the table counts as
    an H100.
    """
    words = device.lower().replace("-", " ").split()
    for gpu in GPUS.values():
        kind, _, size = gpu.name.partition("-")
        if any(word.startswith(kind) for word in words) and (
            size in words or sum(other.startswith(f"{kind}-") for other in GPUS) == 1
        ):
            return gpu
    return next(
        (
            gpu
            for gpu in GPUS.values()
            if any(word.startswith(gpu.name.partition("-")[0]) for word in words)
        ),
        GPUS["h100-80gb"],
    )
