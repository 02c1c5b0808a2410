#!/usr/bin/env bash
# Triton's interpreter adds bfloat16 numbers as the 16-bit integers they are stored in.
# TRITON_INTERPRET=1 is how a kernel is tested without a GPU. A bfloat16 kernel that is right
# fails such a test, and none of its own lines is at fault. Size: 0.8 GB on disk.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq triton==3.6.0 numpy==2.4.6
cd "$folder"

# Triton reads a kernel's source from its file.
cat >kernel.py <<'PYTHON'
import os

os.environ["TRITON_INTERPRET"] = "1"

import importlib.metadata
import sys

import numpy as np
import triton
import triton.language as tl


class Memory:
    """An array with the few members of a tensor that the interpreter asks for."""

    device = "cpu"

    def __init__(self, array, dtype):
        self.array = array
        self.dtype = dtype

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, other):
        self.array[...] = other.array

    def new_empty(self, size, device):
        return Memory(np.empty(size, self.array.dtype), self.dtype)

    def set_(self, storage, offset, size, stride):
        self.array = storage.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return (1,)


@triton.jit
def add(first, second, result, count: tl.constexpr):
    places = tl.arange(0, count)
    tl.store(result + places, tl.load(first + places) + tl.load(second + places))


def pack(values, dtype):
    numbers = np.array(values, np.float32)
    if dtype == "bfloat16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return numbers.astype(dtype)


def unpack(array, dtype):
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


FIRST = [1.0, 2.0, 0.5, 4.0]
SECOND = [1.0, 4.0, 0.25, -8.0]
print("triton", importlib.metadata.version("triton"), "numpy", np.__version__)
print(f"{FIRST} + {SECOND}, each number exact in every format")
sums = {}
for dtype in ("float32", "float16", "bfloat16"):
    first = pack(FIRST, dtype)
    second = pack(SECOND, dtype)
    result = pack([0.0] * 4, dtype)
    memories = [Memory(array, dtype) for array in (first, second, result)]
    add[(1,)](*memories, 4)
    sums[dtype] = unpack(result, dtype)
    integers = first + second
    print(f"{dtype:9} gives {sums[dtype].tolist()}")
print("expected: the same four sums in all three formats")
print("seen: bfloat16 gives the numbers whose bits are the sum of the operands' bits")
right = np.array([2.0, 6.0, 0.75, -4.0], np.float32)
if not (sums["float32"] == right).all() or not (sums["float16"] == right).all():
    sys.exit("no longer so: the other formats are wrong as well")
if (sums["bfloat16"] == right).any():
    sys.exit("no longer so: bfloat16 is added as numbers")
if not (unpack(integers, "bfloat16") == sums["bfloat16"]).all():
    sys.exit("no longer so: bfloat16 is wrong in another way")
PYTHON
"$folder/venv/bin/python" -I kernel.py
