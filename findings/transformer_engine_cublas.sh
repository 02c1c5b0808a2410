#!/usr/bin/env bash
# Transformer Engine's wheel for CUDA 13 needs a function that the first cuBLAS releases of CUDA 13
# do not have, the one that torch 2.11 pins (13.1.0.3) among them. The wheel's metadata ask for no
# cuBLAS, so pip installs the pair without a word, and the import ends with an undefined symbol.
# The libraries are only read here, so no GPU is needed. Size: 1.8 GB on disk.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformer_engine_cu13==2.16.1 nvidia-cublas==13.1.0.3 \
    pyelftools==0.33
cd "$folder"
"$folder/venv/bin/python" -I - <<'PYTHON'
import sys
import sysconfig
from importlib.metadata import requires, version
from pathlib import Path

from elftools.elf.elffile import ELFFile


def symbols(path):
    """The names that a library lacks, and those that it has."""
    lacking = set()
    having = set()
    with path.open("rb") as file:
        for symbol in ELFFile(file).get_section_by_name(".dynsym").iter_symbols():
            (lacking if symbol["st_shndx"] == "SHN_UNDEF" else having).add(symbol.name)
    return lacking, having


packages = Path(sysconfig.get_paths()["purelib"])
engine = next(packages.glob("transformer_engine/**/libtransformer_engine.so"))
needed = {name for name in symbols(engine)[0] if name.startswith("cublas")}
offered = set()
for library in packages.glob("nvidia/**/libcublas*.so.13"):
    offered |= symbols(library)[1]
missing = sorted(needed - offered)
named = [line for line in requires("transformer_engine_cu13") or [] if "cublas" in line]
print("transformer_engine_cu13", version("transformer_engine_cu13"))
print("nvidia-cublas", version("nvidia-cublas"), "; cuBLAS in the wheel's requirements:", named)
print(f"{len(needed)} functions of cuBLAS needed, {len(offered & needed)} of them offered")
print("expected: a wheel for CUDA 13 works with every cuBLAS of CUDA 13, or names the oldest")
print("seen: missing", missing)
if missing != ["cublasLtGroupedMatrixLayoutInit_internal"] or named:
    sys.exit("no longer so")
PYTHON
