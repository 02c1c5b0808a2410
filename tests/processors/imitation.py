"""Which instructions torch, oneDNN and MKL take, chosen by their environment variables.

MKL obeys only on an Intel processor; on others it has code of its own for them. So that the
figures of Intel's users are seen on any machine, MKL is told there by two preloaded functions that
the processor is Intel's. Where no C compiler is at hand, that is left out and told.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
INTEL_TO_MKL = """
int mkl_serv_intel_cpu_true(void) { return 1; }
int mkl_serv_intel_cpu(void) { return 1; }
"""


@dataclass(frozen=True)
class Processor:
    """What a processor must have (names of /proc/cpuinfo), and what the libraries are told."""

    flags: tuple[str, ...]
    settings: Mapping[str, str]


def _told(aten: str, onednn: str, mkl: str) -> dict[str, str]:
    return {
        "ATEN_CPU_CAPABILITY": aten,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
    }


PROCESSORS = {
    "sse": Processor(("sse4_2",), _told("default", "SSE41", "SSE4_2")),
    "avx2": Processor(("avx2", "fma"), _told("avx2", "AVX2", "AVX2")),
    "avx512": Processor(
        ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
        _told("avx512", "AVX512_CORE", "AVX512"),
    ),
    "own": Processor((), {}),  # as without any of these
}


def lacking(processor: Processor) -> str:
    """The flags that this machine's processor lacks, or nothing."""
    flags = _field("flags").split()
    return " ".join(flag for flag in processor.flags if flag not in flags)


def environment_of(processor: Processor, scratch: Path) -> dict[str, str]:
    """Environment variables that make the libraries compute as on this processor."""
    if not processor.settings or _field("vendor_id") == "GenuineIntel":
        return dict(processor.settings)
    compiler = shutil.which("cc")
    if compiler is None:
        print("no C compiler: MKL takes the instructions of this machine's processor", flush=True)
        return dict(processor.settings)
    library = scratch / "intel_to_mkl.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-o", str(library), "-"]
    subprocess.run(command, input=INTEL_TO_MKL, text=True, check=True)
    return {**processor.settings, "LD_PRELOAD": str(library)}


def _field(name: str) -> str:
    """Of the first processor in /proc/cpuinfo."""
    if not CPU_INFO.exists():
        return ""
    for line in CPU_INFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
