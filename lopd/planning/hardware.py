"""GPUs and nodes by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lopd.errors import ConfigError

_GIB = 2**30
# What a usual machine with 8 GPUs has: 2 TiB of memory, and 28 TiB of local disk.
_HOST_GIB_PER_GPU = 256
_DISK_GIB_PER_GPU = 3584


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: The name that ``lopd plan --gpu`` takes.
        memory: Bytes that a program can have. This is what nvidia-smi shows, not the round number
            of the name.
        flops: Peak of dense bfloat16 products, in operations per second.
        bandwidth: Bytes per second between the GPU and its memory.
        link: Bytes per second that come into this GPU from the others of its node. The link is
            NVLink, or PCIe for GPUs without NVLink.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float


# Peaks, bandwidths and links are from NVIDIA's data sheets. The peak is that without sparsity. The
# link is half of the data sheet's figure, which adds up both directions. The memory is what
# nvidia-smi reports.
#
#                        name            memory                flops     bandwidth  link
GPUS = {
    "h100-80gb":    Gpu("h100-80gb",    int(79.6 * _GIB),     989.4e12, 3.35e12,   450e9),
    "h100-94gb":    Gpu("h100-94gb",    int(93.6 * _GIB),     835e12,   3.9e12,    300e9),
    "h200-141gb":   Gpu("h200-141gb",   int(140.4 * _GIB),    989.4e12, 4.8e12,    450e9),
    "b200-180gb":   Gpu("b200-180gb",   int(178.4 * _GIB),    2250e12,  8.0e12,    900e9),
    "a100-80gb":    Gpu("a100-80gb",    int(79.3 * _GIB),     312e12,   2.04e12,   300e9),
    "a100-40gb":    Gpu("a100-40gb",    int(39.4 * _GIB),     312e12,   1.56e12,   300e9),
    "l40s-48gb":    Gpu("l40s-48gb",    int(45.0 * _GIB),     362e12,   0.86e12,   32e9),
    "rtx4090-24gb": Gpu("rtx4090-24gb", int(24.0 * _GIB),     165e12,   1.01e12,   32e9),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Node:
    """A machine with GPUs of one kind.

    Attributes:
        gpu: The kind of GPU.
        num_gpus: How many of them the machine has.
        host_memory: Bytes of the machine's memory.
        disk: Bytes of the disk for the run.
    """

    gpu: Gpu
    num_gpus: int
    host_memory: int
    disk: int


def node_of(
    gpu: str, num_gpus: int, *, host_gib: float | None = None, disk_gib: float | None = None
) -> Node:
    """Return a node by the name of its GPUs.

    Args:
        gpu: A name of GPUS. Upper and lower case are the same.
        num_gpus: Number of GPUs.
        host_gib: Memory of the machine in GiB. None takes 256 GiB per GPU.
        disk_gib: Disk in GiB. None takes 3.5 TiB per GPU.

    Raises:
        ConfigError: The GPU is unknown. The error names the nearest one.
    """
    # The table has lower case. Users write H100-80GB too.
    name = gpu.lower()
    # A GPU that is missing here can be added with five numbers of its data sheet.
    if name not in GPUS:
        nearest = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"unknown GPU {gpu!r:.60}",
            where="--gpu",
            limit=f"one of {', '.join(GPUS)}",
            remedy=f"the nearest known GPU is {nearest}",
        )
    # Both defaults grow with the GPUs, because a node with fewer GPUs is usually a smaller machine,
    # or a part of one.
    if host_gib is None:
        host_gib = _HOST_GIB_PER_GPU * num_gpus
    if disk_gib is None:
        disk_gib = _DISK_GIB_PER_GPU * num_gpus
    return Node(GPUS[name], num_gpus, int(host_gib * _GIB), int(disk_gib * _GIB))


def gpu_of_device(device: str) -> Gpu:
    """Return the GPU that torch or nvidia-smi calls by a name such as NVIDIA H100 80GB HBM3.

    A GPU that is not in the table counts as an H100 with 80 GB.
    """
    # Words, not parts of words: "A100-SXM4-80GB" has the words a100, sxm4 and 80gb.
    words = device.lower().replace("-", " ").split()
    same_kind = [
        gpu
        for gpu in GPUS.values()
        if any(word.startswith(gpu.name.partition("-")[0]) for word in words)
    ]
    # Some names have the size (NVIDIA A100-SXM4-40GB), others do not (NVIDIA H200). Without it the
    # first of a kind is taken.
    for gpu in same_kind:
        kind, _, size = gpu.name.partition("-")
        is_only_one = sum(other.startswith(f"{kind}-") for other in GPUS) == 1
        if size in words or is_only_one:
            return gpu
    return same_kind[0] if same_kind else GPUS["h100-80gb"]
