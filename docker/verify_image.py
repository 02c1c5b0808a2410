"""Check that this image is what docker/versions.env says.

    python verify_image.py --without-driver
        while the image is built: versions, pip check, imports that need no GPU driver
    python verify_image.py
        on the node: also GPUs, driver, NCCL, cuDNN, kernels, and that nobody is root

The script uses the standard library only, until it imports a package in order to check it.
Tells all that is wrong at once, one line each; exit code 1 if something is.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PACKAGES = {  # key of versions.env -> distribution
    "TORCH_VERSION": "torch",
    "TRITON_VERSION": "triton",
    "CUDNN_VERSION": "nvidia-cudnn-cu13",
    "NCCL_VERSION": "nvidia-nccl-cu13",
    "CUBLAS_VERSION": "nvidia-cublas",
    "SGLANG_VERSION": "sglang",
    "SGLANG_KERNEL_VERSION": "sglang-kernel",
    "FLASHINFER_VERSION": "flashinfer-python",
    "TRANSFORMERS_VERSION": "transformers",
    "TOKENIZERS_VERSION": "tokenizers",
    "MEGATRON_CORE_VERSION": "megatron-core",
    "TRANSFORMER_ENGINE_VERSION": "transformer-engine",
}
SAME_VERSION = {
    "TRANSFORMER_ENGINE_VERSION": ("transformer-engine-cu13", "transformer-engine-torch")
}
WITHOUT_DRIVER = (
    "torch",
    "megatron.core",
    "transformers",
    "sglang",
    "safetensors.torch",
    "pyarrow.parquet",
    "lopd.cli",
    "lopd.objective",
    "megatron_patches",
)
WITH_DRIVER = (
    "transformer_engine.pytorch",
    "sgl_kernel",
    "flashinfer",
    "sglang.srt.server_args",
    "lopd.megatron.training.trainer",
)
LEAST_DRIVER = (580, 65)  # of CUDA 13.0
LAUNCH_PYTHON = Path("/opt/launch/bin/python")


def read_versions(path: Path) -> dict[str, str]:
    """KEY=value lines; comments and empty lines are skipped."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {key: value for key, _, value in pairs}


def public_version(version: str) -> str:
    """2.11.0+cu130 -> 2.11.0: what a build adds says where it was built."""
    return version.partition("+")[0]


def wrong_versions(
    wanted: Mapping[str, str], installed: Callable[[str], str] = importlib.metadata.version
) -> Iterator[str]:
    """A line for each package that is missing or of another version."""
    for key, package in PACKAGES.items():
        for name in (package, *SAME_VERSION.get(key, ())):
            try:
                found = public_version(installed(name))
            except importlib.metadata.PackageNotFoundError:
                found = "not installed"
            if found != wanted[key]:
                yield f"{name}: {found}, versions.env says {wanted[key]}"


def wrong_python(wanted: Mapping[str, str]) -> Iterator[str]:
    found = f"{sys.version_info.major}.{sys.version_info.minor}"
    if found != wanted["PYTHON_VERSION"]:
        yield f"python: {found}, versions.env says {wanted['PYTHON_VERSION']}"


def known_complaints(wanted: Mapping[str, str]) -> set[str]:
    """The lines of pip check that are not faults of the image.

    The file WHEEL inside transformer_engine_cu13's wheel says cp310, although the wheel is for
    every
    Python. pip check compares it with this Python. Wheels since 2.17.1 say it right.
    """
    version = wanted["TRANSFORMER_ENGINE_VERSION"]
    if tuple(int(part) for part in version.split(".")[:3]) >= (2, 17, 1):
        return set()
    return {f"transformer_engine_cu13 {version} is not supported on this platform"}


def broken_requirements(
    wanted: Mapping[str, str], check: Callable[[], str] | None = None
) -> Iterator[str]:
    """What pip check finds: a package whose requirements are missing or of another version.

    check: gives the output of pip check; absent, pip is run.
    """
    output = (check or _pip_check)()
    lines = (line.strip() for line in output.splitlines())
    known = {"No broken requirements found.", "", *known_complaints(wanted)}
    yield from (f"pip check: {line}" for line in lines if line not in known)


def _pip_check() -> str:
    command = [sys.executable, "-m", "pip", "check", "--disable-pip-version-check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def failing_imports(modules: tuple[str, ...]) -> Iterator[str]:
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a library raises at import is the finding
            yield (
                f"import {module}: {type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}"
            )


def wrong_launcher(wanted: Mapping[str, str], python: Path = LAUNCH_PYTHON) -> Iterator[str]:
    """nemo-run imports in its own environment, and has its version."""
    if not python.exists():
        yield f"{python}: missing"
        return
    code = "import importlib.metadata, nemo_run; print(importlib.metadata.version('nemo-run'))"
    result = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    found = (
        result.stdout.strip()
        if result.returncode == 0
        else (result.stderr.strip().splitlines() or ["failed"])[-1]
    )
    if found != wanted["NEMO_RUN_VERSION"]:
        yield f"nemo-run: {found}, versions.env says {wanted['NEMO_RUN_VERSION']}"


def wrong_build(wanted: Mapping[str, str]) -> Iterator[str]:
    """What torch was built with; needs no driver."""
    import torch

    if torch.version.cuda != wanted["TORCH_CUDA"]:
        yield (
            f"torch: built for CUDA {torch.version.cuda}, versions.env says {wanted['TORCH_CUDA']}"
        )


def wrong_devices(wanted: Mapping[str, str]) -> Iterator[str]:
    """GPUs, driver, NCCL and cuDNN as torch sees them. Needs a node with GPUs."""
    import torch

    if not torch.cuda.is_available():
        yield "no GPU is visible (docker run --gpus all)"
        return
    query = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    driver = (query.stdout.splitlines() or ["0"])[0].strip()
    if tuple(int(part) for part in driver.split(".")[:2]) < LEAST_DRIVER:
        yield f"driver {driver}: CUDA 13.0 needs {'.'.join(map(str, LEAST_DRIVER))} or newer"
    for index in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(index) != (9, 0):
            yield (
                f"GPU {index} ({torch.cuda.get_device_name(index)}): "
                "the image is built for compute capability 9.0 alone"
            )
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    if nccl != wanted["NCCL_VERSION"]:
        yield f"NCCL {nccl} is loaded, versions.env says {wanted['NCCL_VERSION']}"
    cudnn = torch.backends.cudnn.version()
    parts = [int(part) for part in wanted["CUDNN_VERSION"].split(".")]
    if cudnn != parts[0] * 10000 + parts[1] * 100 + parts[2]:
        yield f"cuDNN {cudnn} is loaded, versions.env says {wanted['CUDNN_VERSION']}"


def findings(
    wanted: Mapping[str, str], *, driver: bool, launcher: Path = LAUNCH_PYTHON
) -> Iterator[str]:
    yield from wrong_python(wanted)
    yield from wrong_versions(wanted)
    yield from broken_requirements(wanted)
    yield from failing_imports(WITHOUT_DRIVER)
    yield from wrong_launcher(wanted, launcher)
    if "torch" in sys.modules:
        yield from wrong_build(wanted)
    if driver:
        if os.getuid() == 0:
            yield "running as root: the image's user is 1000"
        if "torch" in sys.modules:
            yield from wrong_devices(wanted)
        yield from failing_imports(WITH_DRIVER)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--without-driver", action="store_true", help="only what needs no GPU driver"
    )
    parser.add_argument("--versions", type=Path, default=Path(__file__).with_name("versions.env"))
    parser.add_argument(
        "--launcher", type=Path, default=LAUNCH_PYTHON, help="the Python that has nemo-run"
    )
    options = parser.parse_args()
    wanted = read_versions(options.versions)
    wrong = list(findings(wanted, driver=not options.without_driver, launcher=options.launcher))
    for line in wrong:
        sys.stdout.write(f"WRONG {line}\n")
    sys.stdout.write(
        f"{len(wrong)} things are wrong\n" if wrong else "the image is as versions.env says\n"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
