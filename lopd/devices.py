"""The GPUs of this machine, without importing torch.

An import of torch takes two seconds of processor time, and ``lopd check`` and ``lopd doctor`` ask
nothing else of it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import runpy
from pathlib import Path

# The library of NVIDIA's driver. It comes with the driver and not with torch.
_DRIVER = "libcuda.so.1"


def torch_cuda() -> str | None:
    """Return the CUDA version that the installed torch was built with; None if with none."""
    # find_spec does not import a package that has no package above it.
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    # A generated file of a few assignments, which torch itself reads its version from.
    version = Path(spec.origin).with_name("version.py")
    found = runpy.run_path(str(version)).get("cuda") if version.is_file() else None
    return str(found) if found is not None else None


@functools.cache
def num_gpus() -> int:
    """Return how many GPUs torch can use in this process: those of CUDA_VISIBLE_DEVICES."""
    # torch without CUDA uses no GPU, whatever the machine has.
    if torch_cuda() is None:
        return 0
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    # The two calls that torch.cuda.device_count() comes down to. 0 means that a call succeeded.
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
