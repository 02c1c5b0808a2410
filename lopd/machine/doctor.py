"""What the machine must have for a run, all of it looked at before anything starts: ``lopd doctor
CONFIG``. Changes nothing.

Facts are gathered first and judged afterwards, so that tests judge machines that do not exist.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lopd import processes
from lopd.config import Config
from lopd.config.hub import HubName, hub_folder
from lopd.errors import ConfigError, LopdError
from lopd.machine.hub import Wanted, offline, wanted
from lopd.planning import Assumptions, Node, Plan, make_plan
from lopd.planning.hardware import Gpu, gpu_of_device
from lopd.planning.models import planned_models
from lopd.planning.plan import TRAINED, ranks_of_a_node

_GIB = 2**30
SHM_PER_GPU = (
    _GIB  # NCCL and SGLang's ranks talk through /dev/shm; Docker gives 64 MiB unless told otherwise
)
OPEN_FILES = 16384
MIN_DRIVER = {13: 580, 12: 525}  # CUDA's major version -> NVIDIA driver
NEEDED = {
    "torch": "2.11",
    "megatron-core": "0.16.1",
    "sglang": "0.5.17",
    "transformers": "5.12",
    "pyarrow": "20",
}
NEEDED_ON_GPU = {"transformer-engine": "2.16", "triton": "3.6"}
TOO_NEW = {
    "megatron-core": "0.19",
    "sglang": "0.6",
    "transformers": "6",
}  # the first version that nobody has tried


@dataclass(frozen=True, slots=True)
class Misfit:
    """Two packages that do not fit: one from a version on beside another up to below a version.

    Attributes:
        name: The package that needs something.
        since: The first version of it that needs it.
        other: The package that it needs it of.
        below: The first version of the other package that has it.
        why: What goes wrong otherwise, in a clause.
    """

    name: str
    since: str
    other: str
    below: str
    why: str


MISFITS = (
    Misfit(
        "transformer-engine",
        "2.13",
        "nvidia-cublas",
        "13.2.0.9",
        "its library does not load, and neither does megatron-core",
    ),
    Misfit("megatron-core", "0.17", "triton", "3.6", "its import fails"),
)

Finding = tuple[str, str | LopdError]


@dataclass(frozen=True, slots=True)
class GpuFact:
    name: str
    memory: int  # bytes
    used: int
    driver: str
    mig: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """gpus_problem: why none can be seen. disks: of a folder that is to be, number of its disk and
    free bytes. versions: None where not installed.

    hub: error of asking for a repository, None: it is there.
    """

    gpus: tuple[GpuFact, ...] = ()
    gpus_problem: str = ""
    host_memory: int = 0
    shm: int = 0
    open_files: int = OPEN_FILES
    locked_memory: int = -1  # bytes that may be pinned; -1: any
    disks: Mapping[Path, tuple[int, int]] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    cuda: str | None = None  # of the installed torch
    ports_taken: tuple[int, ...] = ()
    hub: Mapping[HubName, str | None] = field(default_factory=dict)


# ---- gathering ------------------------------------------------------------------------------------------------------------------------------------


def gather(config: Config, also: Sequence[Wanted] = ()) -> Facts:
    """Looks at this machine, and asks the hub whether it has what is not here yet, if downloads are
    allowed. also: names that no key of config holds.
    """
    gpus, problem = _gpus()
    first = config.sglang.port
    ports = range(first, first + config.sglang.replicas) if first is not None else range(0)
    names = {item.name for item in (*wanted(config), *also) if not item.is_there}
    return Facts(
        gpus=gpus,
        gpus_problem=problem,
        host_memory=_host_memory(),
        shm=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        disks={folder: _disk(folder) for folder in (config.run.dir, hub_folder())},
        versions={name: _version(name) for name in (*NEEDED, *NEEDED_ON_GPU, "nvidia-cublas")},
        cuda=_torch_cuda(),
        ports_taken=tuple(port for port in ports if processes.port_taken(port)),
        hub={name: _ask(name) for name in sorted(names, key=str)} if not offline() else {},
    )


def _gpus() -> tuple[tuple[GpuFact, ...], str]:
    query = "--query-gpu=name,memory.total,memory.used,driver_version,mig.mode.current"
    try:
        told = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except FileNotFoundError:
        return (), "nvidia-smi is not installed (in a container: start it with --gpus all)"
    except subprocess.TimeoutExpired:
        return (), "nvidia-smi does not answer"
    if told.returncode != 0:
        return (), " ".join(told.stdout.split())[
            :200
        ] or f"nvidia-smi ends with code {told.returncode}"
    return parse_gpus(told.stdout), ""


def parse_gpus(text: str) -> tuple[GpuFact, ...]:
    """Lines of nvidia-smi: name, memory and used memory in MiB, driver, MIG mode."""
    rows = [
        [cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()
    ]
    return tuple(
        GpuFact(name, int(total) * 2**20, int(used) * 2**20, driver, mig == "Enabled")
        for name, total, used, driver, mig in rows
    )


def _host_memory() -> int:
    """Of the machine, or of the container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _disk(folder: Path) -> tuple[int, int]:
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return existing.stat().st_dev, shutil.disk_usage(existing).free


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_cuda() -> str | None:
    import torch

    return torch.version.cuda


def _ask(name: HubName) -> str | None:
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(
            name.repository,
            repo_type="dataset" if name.dataset else "model",
            revision=name.revision,
            timeout=15,
        )
    except (
        Exception
    ) as error:  # huggingface_hub's own, and whatever its connection raises: it cannot be had
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


# ---- judging --------------------------------------------------------------------------------------------------------------------------------------


def findings(config: Config, facts: Facts, also: Sequence[Wanted] = ()) -> Iterator[Finding]:
    """Everything, right or wrong, by name; one that is wrong keeps no other from being looked at.
    also: as for gather.
    """
    plan = _plan(config, facts)
    if isinstance(plan, LopdError):
        yield "plan", plan
    for name, judge in JUDGES.items():
        for finding in judge(config, facts, None if isinstance(plan, LopdError) else plan):
            yield name, finding
    for item in also:
        yield "sources", _source(item.key, item.path, item, facts)


def _plan(config: Config, facts: Facts) -> Plan | LopdError:
    """What the run needs, on the GPUs that are here, or on what it was written for where there are
    none.
    """
    first = facts.gpus[0] if facts.gpus else None
    known = gpu_of_device(first.name if first else "NVIDIA H100 80GB HBM3")
    gpu = (
        known
        if first is None
        else Gpu(first.name, first.memory, known.flops, known.bandwidth, known.link)
    )
    try:
        return make_plan(
            config,
            planned_models(config, {}),
            Node(gpu, gpus_needed(config), facts.host_memory, 2**60),
            Assumptions(),
            build=False,
        )
    except LopdError as error:
        return error


def gpus_needed(config: Config) -> int:
    """On a machine: ranks of the larger training, or GPUs of all servers of a model."""
    servers = config.sglang.tensor * config.sglang.data * config.sglang.replicas
    return max(ranks_of_a_node(config.sft), ranks_of_a_node(config.distill), servers)


def _on_cpu(config: Config, facts: Facts) -> bool:
    """A trial on a CPU was asked for: what a GPU needs is not looked for."""
    return config.launch.device == "cpu" and not facts.gpus


def _judge_gpus(config: Config, facts: Facts, plan: Plan | None) -> Iterator[str | LopdError]:
    if _on_cpu(config, facts):
        yield "none is needed: launch.device is cpu"
        return
    needed = gpus_needed(config)
    if len(facts.gpus) < needed:
        found = f"{len(facts.gpus)} GPUs" + (
            f" ({facts.gpus_problem})" if facts.gpus_problem else ""
        )
        yield ConfigError(
            found,
            where="this machine",
            limit=f"{needed} (ranks of sft and distill, and servers)",
            remedy="lopd plan CONFIG --gpus N --suggest",
        )
    if any(gpu.mig for gpu in facts.gpus):
        yield ConfigError(
            "a GPU is in MIG mode",
            where="this machine",
            remedy="use whole GPUs: NCCL does not cross MIG instances",
        )
    if len({gpu.name for gpu in facts.gpus}) > 1:
        names = ", ".join(sorted({gpu.name for gpu in facts.gpus}))
        yield ConfigError(
            f"GPUs of several kinds: {names}",
            where="this machine",
            remedy="choose those of one kind with CUDA_VISIBLE_DEVICES",
        )
    busy = [index for index, gpu in enumerate(facts.gpus) if gpu.used > 2 * _GIB]
    if busy:
        yield ConfigError(
            f"GPUs {', '.join(map(str, busy))} hold memory of other programs",
            where="this machine",
            remedy="nvidia-smi shows whose; end them",
        )
    if len(facts.gpus) >= needed and not busy:
        yield f"{len(facts.gpus)} x {facts.gpus[0].name}, {facts.gpus[0].memory / _GIB:.1f} GiB"


def _judge_memory(config: Config, facts: Facts, plan: Plan | None) -> Iterator[str | LopdError]:
    """The plan's verdict for the GPUs and the memory that are here."""
    if _on_cpu(config, facts):
        yield "not judged: the plan is one of GPUs, and launch.device is cpu"
        return
    if plan is None:
        return
    relevant = [problem for problem in plan.problems if "wants" not in problem.what]
    for problem in relevant:
        yield ConfigError(
            f"{problem.stage} does not fit: {problem.what}",
            where="this machine",
            remedy="lopd plan CONFIG --suggest",
        )
    if not relevant:
        most = max(use.gpu_total for use in plan.memory.values())
        host = max(use.host_total for use in plan.memory.values())
        yield f"needs up to {most / _GIB:.0f} GiB of a GPU, {host / _GIB:.0f} GiB of the machine's {facts.host_memory / _GIB:.0f}"


def _judge_disk(config: Config, facts: Facts, plan: Plan | None) -> Iterator[str | LopdError]:
    """Of the run, and of models that are still to be fetched; the two may share a disk."""
    if plan is None:
        return
    absent = {item.key for item in wanted(config) if not item.is_there}
    sizes = {"models.teacher": 2.0 * plan.teacher_total, "models.student": 2.0 * plan.total}
    needs = {
        config.run.dir: sum(plan.disk.values()),
        hub_folder(): sum(size for key, size in sizes.items() if key in absent),
    }
    disks: dict[int, list[Path]] = {}
    for folder in needs:
        disks.setdefault(facts.disks.get(folder, (0, 0))[0], []).append(folder)
    for folders in disks.values():
        needed, free = (
            sum(needs[folder] for folder in folders),
            facts.disks.get(folders[0], (0, 0))[1],
        )
        where = " and ".join(map(str, folders))
        if free < needed:
            remedy = "free space, or set run.dir and LOPD_HUB to other disks"
            yield ConfigError(
                f"{free / _GIB:,.0f} GiB free",
                where=where,
                limit=f"about {needed / _GIB:,.0f} GiB",
                remedy=remedy,
            )
        else:
            yield f"{where}: {free / _GIB:,.0f} GiB free, about {needed / _GIB:,.0f} GiB needed"


def _judge_driver(config: Config, facts: Facts, plan: Plan | None) -> Iterator[str | LopdError]:
    if _on_cpu(config, facts):
        yield "none is needed: launch.device is cpu"
        return
    if facts.cuda is None:
        yield ConfigError(
            "the installed torch has no CUDA",
            where="torch",
            remedy="use the image (docker/), or install requirements for a GPU",
        )
        return
    if facts.gpus:
        major, least = (
            int(facts.gpus[0].driver.partition(".")[0]),
            MIN_DRIVER.get(int(facts.cuda.partition(".")[0]), 0),
        )
        if major < least:
            limit = f"{least} for CUDA {facts.cuda}"
            yield ConfigError(
                f"NVIDIA driver {facts.gpus[0].driver}",
                where="this machine",
                limit=limit,
                remedy="install a newer driver on the host",
            )
        else:
            yield f"NVIDIA driver {facts.gpus[0].driver}, CUDA {facts.cuda}"


def _judge_limits(config: Config, facts: Facts, plan: Plan | None) -> Iterator[str | LopdError]:
    shm = 0 if _on_cpu(config, facts) else SHM_PER_GPU * gpus_needed(config)
    if facts.shm < shm:
        remedy = "in a container: --ipc=host, or --shm-size"
        yield ConfigError(
            f"shared memory of {facts.shm / _GIB:.2f} GiB",
            where="/dev/shm",
            limit=f"{shm / _GIB:.0f} GiB",
            remedy=remedy,
        )
    else:
        yield f"/dev/shm: {facts.shm / _GIB:.0f} GiB"
    if 0 <= facts.open_files < OPEN_FILES:
        yield ConfigError(
            f"{facts.open_files} open files",
            where="ulimit -n",
            limit=str(OPEN_FILES),
            remedy="raise the hard limit (ulimit -n)",
        )
    offload = any(getattr(config, name).megatron.get("optimizer_cpu_offload") for name in TRAINED)
    if offload and facts.locked_memory >= 0 and not _on_cpu(config, facts):
        what = f"only {facts.locked_memory / 2**20:.0f} MiB of memory may be pinned; an offloaded optimizer pins hundreds of GiB"
        yield ConfigError(what, where="ulimit -l", remedy="in a container: --ulimit memlock=-1")


def _judge_ports(config: Config, facts: Facts, plan: Plan | None) -> Iterator[str | LopdError]:
    for port in facts.ports_taken:
        yield ConfigError(
            f"port {port} is taken",
            where="127.0.0.1",
            remedy="leave sglang.port out: free ports are taken",
        )
    if not facts.ports_taken:
        yield "free" if config.sglang.port is not None else "free ones are taken"


def _judge_versions(config: Config, facts: Facts, plan: Plan | None) -> Iterator[str | LopdError]:
    for name, least in {**NEEDED, **(NEEDED_ON_GPU if facts.gpus else {})}.items():
        version = facts.versions.get(name)
        if version is None or _numbers(version) < _numbers(least):
            found = f"{name} {version}" if version else f"{name} is not installed"
            yield ConfigError(
                found,
                where="python environment",
                limit=f"{least} or newer",
                remedy="use the image (docker/)",
            )
        elif name in TOO_NEW and _numbers(version) >= _numbers(TOO_NEW[name]):
            limit = f"below {TOO_NEW[name]}: nothing newer has been tried"
            yield ConfigError(
                f"{name} {version}",
                where="python environment",
                limit=limit,
                remedy="use the image (docker/)",
            )
    yield from _misfits(facts.versions)
    yield ", ".join(f"{name} {version}" for name, version in facts.versions.items() if version)


def _misfits(versions: Mapping[str, str | None]) -> Iterator[LopdError]:
    """Packages that are each right and do not fit together. One that is not installed is judged
    elsewhere.
    """
    for rule in MISFITS:
        version, other = versions.get(rule.name), versions.get(rule.other)
        if version is None or other is None:
            continue
        if _numbers(version) >= _numbers(rule.since) and _numbers(other) < _numbers(rule.below):
            what = f"{rule.name} {version} beside {rule.other} {other}: {rule.why}"
            limit = f"{rule.other} {rule.below} or newer"
            yield ConfigError(
                what,
                where="python environment",
                limit=limit,
                remedy=f"pip install '{rule.other}>={rule.below}', or use the image (docker/)",
            )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:4])


def _judge_sources(config: Config, facts: Facts, plan: Plan | None) -> Iterator[str | LopdError]:
    """Models and prompt files: here, or on the hub and to be had."""
    named = {item.key: item for item in wanted(config)}
    for key, path in _paths(config).items():
        yield _source(key, path, named.get(key), facts)


def _source(key: str, path: Path, item: Wanted | None, facts: Facts) -> str | LopdError:
    if path.exists():
        return f"{key}: {path}"
    if item is None:
        return ConfigError(
            f"{key} is not there",
            where=str(path),
            remedy="put it there, or name it on the hub: hf://org/name@revision",
        )
    if item.name not in facts.hub:
        remedy = (
            "unset HF_HUB_OFFLINE and run lopd fetch CONFIG, or put the files there by other means"
        )
        return ConfigError(
            f"{key}: {item.name} is not here, and downloads are switched off",
            where=str(item.path),
            remedy=remedy,
        )
    if facts.hub[item.name] is not None:
        return ConfigError(
            f"{key}: {item.name} cannot be had: {facts.hub[item.name]}",
            where="hub",
            remedy="check name, revision, network and login",
        )
    return f"{key}: {item.name} is on the hub (lopd fetch CONFIG)"


def _paths(config: Config) -> dict[str, Path]:
    paths: dict[str, Path | None] = {
        "models.teacher": config.models.teacher,
        "models.student": config.models.student,
    }
    paths |= {f"models.teachers.{domain}": path for domain, path in config.models.teachers.items()}
    paths |= {
        f"prompts.{name}.file": getattr(config.prompts, name).file
        for name in ("sft", "opd", "eval")
    }
    if config.sft.demonstrations is not None:
        paths["sft.demonstrations"] = config.sft.demonstrations
        paths.pop("prompts.sft.file")
    return {key: path for key, path in paths.items() if path is not None}


Judge = Callable[[Config, Facts, "Plan | None"], Iterator[str | LopdError]]
JUDGES: dict[str, Judge] = {
    "GPUs": _judge_gpus,
    "memory": _judge_memory,
    "disk": _judge_disk,
    "driver": _judge_driver,
    "limits": _judge_limits,
    "ports": _judge_ports,
    "versions": _judge_versions,
    "sources": _judge_sources,
}
