"""Unpacks carried wheels into folders of their own, one a group, without pip and without network.

A folder that stands on PYTHONPATH comes before what the machine has. Groups stay apart, so that a
part of the run sees only what it needs: the trainer's local layers are measured without
Transformer Engine, and the trainer has the machine's transformers, not the one that SGLang needs.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from benchmarks.gpu.bundle import Group, wheels_of
from benchmarks.gpu.wheels import PYTHON

from lopd.errors import ArtifactError

BUILD_TIMEOUT_S = 200
NEW_FUNCTION = "cublasLtGroupedMatrixLayoutInit_internal"
NOT_SUPPORTED = 15  # CUBLAS_STATUS_NOT_SUPPORTED
STAND_IN = "libcublas_stand_in.so"
SOURCE = ".tar.gz"
_MARK = "installed"  # a file beside the group's packages, once all of them are there
NEED_DRIVER = ("sglang_kernel",)  # its library does not load where there is no GPU


def install(wheels: Path, target: Path, group: Group, *, dry_run: bool = False) -> str:
    """Puts what is missing of the group into target/GROUP; says what it did.

    dry_run: without what only loads beside a GPU's driver; SGLang then takes its stand-ins.
    ArtifactError: a part is missing or damaged, or these are not the wheels for this Python.
    """
    if f"{sys.version_info.major}.{sys.version_info.minor}" != PYTHON:
        what = f"the wheels are for Python {PYTHON}, this is {sys.version.split()[0]}"
        raise ArtifactError(what, where=group.name, remedy=f"set PYTHON to a python{PYTHON}")
    folder = target / group.name
    if (folder / _MARK).exists():
        return "is there already"
    new = []
    kept = []
    for name, content in wheels_of(wheels, group):
        is_source = name.endswith(SOURCE)
        package, version = name.removesuffix(SOURCE).split("-")[:2]
        if present(package, version) or (dry_run and package in NEED_DRIVER):
            kept.append(package)
            continue
        unpack(compiled(name, content, folder, target / "build") if is_source else content, folder)
        new.append(package)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).write_text("\n".join(new) + "\n", encoding="utf-8")
    return f"{len(new)} installed, {len(kept)} there already"


def present(package: str, version: str) -> bool:
    """Whether this Python has the package in this version."""
    try:
        return importlib.metadata.version(package) == version
    except importlib.metadata.PackageNotFoundError:
        return False


def unpack(wheel: bytes, folder: Path) -> None:
    """A wheel is an archive of what belongs into the folder; of NAME.data only its libraries."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        for entry in archive.infolist():
            path = PurePosixPath(entry.filename)
            assert not path.is_absolute(), "a wheel's files lie below its root"
            assert ".." not in path.parts, "a wheel's files lie below its root"
            if path.parts[0].endswith(".data"):
                if path.parts[1] not in ("purelib", "platlib"):
                    continue
                path = PurePosixPath(*path.parts[2:])
            if entry.is_dir():
                continue
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(archive.read(entry))
            if entry.external_attr >> 16 & 0o111:
                place.chmod(0o755)


def compiled(name: str, source: bytes, folder: Path, scratch: Path) -> bytes:
    """A wheel of Transformer Engine's extension for torch, built as docker/Dockerfile does.

    ArtifactError: there is no compiler, or it fails or takes too long.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    archive = scratch / name
    archive.write_bytes(source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    command += ["--no-index", "-w", str(scratch), str(archive)]
    log = scratch / "build.log"
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                command,
                env=build_environment(folder),
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=BUILD_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            limit = f"{BUILD_TIMEOUT_S} s"
            raise ArtifactError("its build takes too long", where=name, limit=limit) from None
    built = [*scratch.glob("*.whl")]
    if done.returncode != 0 or not built:
        raise ArtifactError("its build failed", where=name, remedy=f"see {log}")
    return built[0].read_bytes()


def build_environment(folder: Path) -> dict[str, str]:
    import torch

    libraries = Path(torch.__file__).parents[1] / "nvidia"
    headers = [libraries / name / "include" for name in ("cudnn", "nccl", "cu13")]
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "CPATH": os.pathsep.join(str(one) for one in headers if one.is_dir()),
        "NVTE_FRAMEWORK": "pytorch",
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
        "NVTE_NO_LOCAL_VERSION": "1",
        "NVTE_CUDA_ARCHS": "90",
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "MAX_JOBS": str(os.cpu_count()),
    }


def cublas_stand_in(site: Path) -> str:
    """Makes Transformer Engine load beside an older cuBLAS; says what it did.

    Its wheel for CUDA 13 names one function that cuBLAS has from 13.2 on, for grouped products
    on Blackwell. Where the newer library was not carried (it is 380 MiB) a library of that one
    function, which answers "not supported", lets the wheel load; nothing on Hopper calls it.
    """
    if not (site / "engine" / _MARK).exists():
        return "needs no stand-in: Transformer Engine was not carried"
    if (site / "cublas" / _MARK).exists() or has_function():
        return "needs no stand-in: cuBLAS has the function"
    library = site / "engine" / STAND_IN
    source = library.with_suffix(".c")
    source.write_text(f"int {NEW_FUNCTION}(void) {{ return {NOT_SUPPORTED}; }}\n", encoding="utf-8")
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return f"has a stand-in of {NEW_FUNCTION}"


def has_function() -> bool:
    """Whether the cuBLAS beside torch has the function."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None, "torch is there: run.py has asked it for the GPU"
    assert spec.origin is not None, "torch is a package with files"
    library = Path(spec.origin).parents[1] / "nvidia/cu13/lib/libcublasLt.so.13"
    return not library.exists() or hasattr(ctypes.CDLL(str(library)), NEW_FUNCTION)


def environment(site: Path, groups: Sequence[str]) -> dict[str, str]:
    """PYTHONPATH with these groups' folders first; and cuBLAS loaded before torch's own.

    torch's libraries name their folder by RPATH, which LD_LIBRARY_PATH does not override.
    """
    folders = [site / name for name in groups if (site / name / _MARK).exists()]
    paths = [str(one) for one in folders] + [p for p in (os.environ.get("PYTHONPATH"),) if p]
    found = {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}
    libraries = [
        str(folder / "nvidia/cu13/lib" / name)
        for folder in folders
        for name in ("libcublasLt.so.13", "libcublas.so.13")
        if (folder / "nvidia/cu13/lib" / name).exists()
    ]
    if "engine" in groups and not libraries and (site / "engine" / STAND_IN).exists():
        libraries = [str(site / "engine" / STAND_IN)]
    if libraries:
        found["LD_PRELOAD"] = ":".join(libraries)
    return found
