"""Facts about this machine, gathered without changing anything.

lopd.machine.doctor judges them. The two are apart, so that tests can judge machines that do not
exist.
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lopd import processes
from lopd.config import Config
from lopd.config.hub import HubName, hub_folder
from lopd.devices import torch_cuda
from lopd.machine.hub import Wanted, offline, wanted
from lopd.machine.versions import PACKAGES
from lopd.planning.disk import disk_of

# Open files that one process must be allowed, an estimate. A server has a connection for each
# request, and weights, logs and sockets of its processes besides.
OPEN_FILES = 16384
# Seconds in which nvidia-smi must answer. It waits for a driver that initialises its GPUs.
_SMI_TIMEOUT_S = 60
# Seconds in which the hub must answer for one repository.
_HUB_TIMEOUT_S = 15
# Characters of a foreign error line that are shown.
_ERROR_LEN = 200


@dataclass(frozen=True, slots=True)
class GpuFact:
    """One GPU.

    Attributes:
        name: The name that nvidia-smi shows.
        memory: Bytes of its memory.
        used: Bytes of it that programs hold now.
        driver: Version of the NVIDIA driver.
        mig: Whether the GPU is cut into MIG instances.
    """

    name: str
    memory: int
    used: int
    driver: str
    mig: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a machine.

    Attributes:
        gpus: The GPUs of the machine.
        gpus_problem: Why no GPU can be seen.
        host_memory: Bytes of memory of the machine, or of the container.
        shm: Bytes of /dev/shm.
        open_files: Open files that a process may have.
        locked_memory: Bytes of memory that a process may pin. -1 means any.
        disks: For each folder that will be written, the number of its disk and the free bytes.
        versions: Version by package. None if it is not installed.
        cuda: CUDA version of the installed torch. None if it has no CUDA.
        ports_taken: The ports of sglang.port on which another program listens.
        hub: For each name on the hub, the error that the hub returned, or None if the hub has it.
    """

    gpus: tuple[GpuFact, ...] = ()
    gpus_problem: str = ""
    host_memory: int = 0
    shm: int = 0
    open_files: int = OPEN_FILES
    locked_memory: int = -1
    disks: Mapping[Path, tuple[int, int]] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    cuda: str | None = None
    ports_taken: tuple[int, ...] = ()
    hub: Mapping[HubName, str | None] = field(default_factory=dict)


def gather(config: Config, also: Sequence[Wanted] = ()) -> Facts:
    """Look at this machine.

    If downloads are allowed, the hub is asked whether it has what is not on this machine yet.

    Args:
        config: The configuration of the run.
        also: Names on the hub that no key of the configuration holds.
    """
    # What cannot be found out is a fact too, and is judged like one.
    gpus, gpus_problem = _gpus()
    first_port = config.sglang.port
    ports = range(0)
    if first_port is not None:
        ports = range(first_port, first_port + config.sglang.replicas)
    # A set, because several keys may name the same repository.
    missing = {item.name for item in (*wanted(config), *also) if not item.is_there}
    return Facts(
        gpus=gpus,
        gpus_problem=gpus_problem,
        host_memory=_host_memory(),
        shm=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        # The hard limit of open files, because SGLang raises its own soft limit up to it. The soft
        # limit of pinned memory, because nothing raises that one.
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        disks={folder: disk_of(folder) for folder in (config.run.dir, hub_folder())},
        versions={name: _version(name) for name in PACKAGES},
        cuda=torch_cuda(),
        ports_taken=tuple(port for port in ports if processes.port_taken(port)),
        hub={} if offline() else {name: _ask_hub(name) for name in sorted(missing, key=str)},
    )


def _gpus() -> tuple[tuple[GpuFact, ...], str]:
    """Return the GPUs, and why there are none."""
    # nvidia-smi, not torch: torch would create a CUDA context on every GPU, and tell less.
    query = "--query-gpu=name,memory.total,memory.used,driver_version,mig.mode.current"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_SMI_TIMEOUT_S,
            # An exit code is judged below, where the message of nvidia-smi can be shown.
            check=False,
        )
    # A machine without NVIDIA's driver has no nvidia-smi. Containers get it from the host.
    except FileNotFoundError:
        return (), "nvidia-smi is not installed (in a container: start it with --gpus all)"
    # A driver with a GPU that has fallen off the bus may never answer.
    except subprocess.TimeoutExpired:
        return (), "nvidia-smi does not answer"
    if done.returncode != 0:
        # nvidia-smi writes its errors to stdout.
        message = " ".join(done.stdout.split())[:_ERROR_LEN]
        return (), message or f"nvidia-smi ends with code {done.returncode}"
    return parse_gpus(done.stdout), ""


def parse_gpus(text: str) -> tuple[GpuFact, ...]:
    """Return the GPUs of nvidia-smi's lines.

    Args:
        text: Lines with name, memory and used memory in MiB, driver, and MIG mode.
    """
    rows = [
        [cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()
    ]
    return tuple(
        # GPUs that cannot be cut have "[N/A]" as their MIG mode.
        GpuFact(name, int(total) * 2**20, int(used) * 2**20, driver, mig == "Enabled")
        for name, total, used, driver, mig in rows
    )


def _host_memory() -> int:
    """Return the bytes of memory of the machine, or of the container if it has less."""
    # Physical memory. Swap is no help: an optimizer touches all of its state in every step.
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # The limit of a container, in version 2 of Linux' control groups. "max" means none.
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _version(package: str) -> str | None:
    # The installed files are read. Importing the packages would take a minute, or fail.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ask_hub(name: HubName) -> str | None:
    """Return why the hub does not give a repository, or None if it does."""
    from huggingface_hub import HfApi

    try:
        # One question for the repository alone: nothing is downloaded.
        HfApi().repo_info(
            name.repository,
            repo_type="dataset" if name.dataset else "model",
            revision=name.revision,
            timeout=_HUB_TIMEOUT_S,
        )
    except Exception as error:
        # These are huggingface_hub's own errors, and whatever its connection raises. All of them
        # mean that the files cannot be had, and the doctor must continue to the next finding.
        return " ".join(str(error).split())[:_ERROR_LEN] or type(error).__name__
    return None
