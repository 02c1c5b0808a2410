"""What a machine must have for a run: ``lopd doctor CONFIG``.

lopd.machine.facts gathers what the machine has. Here it is judged, all of it at once, before
anything starts. Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from lopd.config import Config
from lopd.errors import ConfigError, LopdError, NotFetched
from lopd.machine.facts import OPEN_FILES, Facts
from lopd.machine.hub import Wanted, named_paths, wanted
from lopd.machine.versions import MIN_DRIVER, judge_versions
from lopd.planning import Assumptions, Node, Plan, make_plan
from lopd.planning.disk import judge_room, room_needed
from lopd.planning.hardware import Gpu, gpu_of_device
from lopd.planning.models import planned_models
from lopd.planning.stages import TRAINED, ranks_of_a_node

_GIB = 2**30
# Bytes of /dev/shm for each GPU, an estimate. NCCL and the ranks of SGLang exchange data through
# it. Docker gives a container 64 MiB unless it is told otherwise.
SHM_PER_GPU = _GIB
# Bytes that a GPU may show as used although no program uses it: the driver itself, and displays.
_USED_BY_NOBODY = 2 * _GIB
# Bytes of a disk without a limit. judge_room judges the real disks.
_ANY_DISK = 2**60
# If the machine has no GPU, the plan is made for the GPU that the recipes are written for.
_USUAL_DEVICE = "NVIDIA H100 80GB HBM3"

Verdicts: TypeAlias = Iterator[str | LopdError]
Finding = tuple[str, str | LopdError]


def findings(config: Config, facts: Facts, also: Sequence[Wanted] = ()) -> Iterator[Finding]:
    """Yield everything that was looked at, right or wrong.

    A finding that is wrong does not keep anything else from being looked at.

    Args:
        config: The configuration of the run.
        facts: What is known of the machine.
        also: Names on the hub that no key of the configuration holds.

    Yields:
        The name of the subject, and what was found: text if it is right, an error if it is wrong.
    """
    plan = _plan(config, facts)
    if isinstance(plan, LopdError):
        yield "plan", plan
    # Without a plan, the subjects that need one yield nothing. The plan's own error is above.
    for name, judge in JUDGES.items():
        for verdict in judge(config, facts, None if isinstance(plan, LopdError) else plan):
            yield name, verdict
    for item in also:
        yield "sources", _judge_source(item.key, item.path, item, facts)


def _plan(config: Config, facts: Facts) -> Plan | LopdError:
    """Return what the run needs on this machine's GPUs, or why that cannot be said."""
    first = facts.gpus[0] if facts.gpus else None
    gpu = gpu_of_device(first.name if first else _USUAL_DEVICE)
    if first is not None:
        # The speeds are those of the table. The memory is what this GPU really has.
        gpu = Gpu(first.name, first.memory, gpu.flops, gpu.bandwidth, gpu.link)
    # The node has as many GPUs as the run needs. That there are fewer, _judge_gpus says.
    node = Node(gpu, gpus_needed(config), facts.host_memory, _ANY_DISK)
    try:
        models = planned_models(config, {})
        return make_plan(config, models, node, Assumptions(), build=False)
    except LopdError as error:
        return error


def gpus_needed(config: Config) -> int:
    """Return the GPUs that a run needs on one machine.

    They are those of the larger training, or of all servers of one model.
    """
    servers = config.sglang.tensor * config.sglang.data * config.sglang.replicas
    return max(ranks_of_a_node(config.sft), ranks_of_a_node(config.distill), servers)


def _is_cpu_trial(config: Config, facts: Facts) -> bool:
    """Return whether a trial on a CPU is asked for, which needs nothing that a GPU needs."""
    return config.launch.device == "cpu" and not facts.gpus


def _judge_gpus(config: Config, facts: Facts, plan: Plan | None) -> Verdicts:
    if _is_cpu_trial(config, facts):
        yield "none is needed: launch.device is cpu"
        return
    gpus = facts.gpus
    needed = gpus_needed(config)
    # The numbers in the limit are what the configuration asks for, so another layout may help.
    if len(gpus) < needed:
        problem = f" ({facts.gpus_problem})" if facts.gpus_problem else ""
        yield ConfigError(
            f"this machine has only {len(gpus)} GPUs{problem}",
            where="this machine",
            limit=f"at least {needed}, the largest number of ranks or servers that run at once",
            remedy="use a machine with more GPUs, or run lopd plan CONFIG --gpus N --suggest to "
            "find a layout; for a trial on the CPU, set launch.device=cpu",
        )
    # A MIG instance looks like a GPU to torch, and the error would come only from NCCL.
    if any(gpu.mig for gpu in gpus):
        yield ConfigError(
            "a GPU is in MIG mode",
            where="this machine",
            remedy="switch MIG mode off: NCCL does not connect MIG instances",
        )
    # All ranks wait for the slowest GPU, and the smallest one runs out of memory first.
    names = sorted({gpu.name for gpu in gpus})
    if len(names) > 1:
        yield ConfigError(
            f"this machine has GPUs of several kinds: {', '.join(names)}",
            where="this machine",
            remedy="set CUDA_VISIBLE_DEVICES to GPUs of one kind",
        )
    busy = [str(index) for index, gpu in enumerate(gpus) if gpu.used > _USED_BY_NOBODY]
    # The plan counts on the whole memory of each GPU.
    if busy:
        yield ConfigError(
            f"other programs use memory of the GPUs {', '.join(busy)}",
            where="this machine",
            remedy="end these programs: nvidia-smi shows them",
        )
    if len(gpus) >= needed and not busy:
        yield f"{len(gpus)} x {gpus[0].name}, {gpus[0].memory / _GIB:.1f} GiB"


def _judge_memory(config: Config, facts: Facts, plan: Plan | None) -> Verdicts:
    """Yield the plan's verdict on the memory of the GPUs and of the machine."""
    if _is_cpu_trial(config, facts):
        yield (
            f"{facts.host_memory / _GIB:.1f} GiB; what the run takes is not estimated "
            "(launch.device is cpu, and the plan's sizes are those of GPUs)"
        )
        return
    if plan is None:
        return
    # The number of GPUs is judged by _judge_gpus.
    problems = [problem for problem in plan.problems if not problem.is_count]
    for problem in problems:
        yield ConfigError(
            f"the stage {problem.stage} does not fit: {problem.what}",
            where="this machine",
            remedy="run lopd plan CONFIG --suggest to find a layout that fits",
        )
    if not problems:
        # Stages run one after the other, so the largest one decides.
        gpu = max(use.gpu_total for use in plan.memory.values())
        host = max(use.host_total for use in plan.memory.values())
        yield (
            f"needs up to {gpu / _GIB:.0f} GiB of a GPU, "
            f"{host / _GIB:.0f} GiB of the machine's {facts.host_memory / _GIB:.0f}"
        )


def _judge_disk(config: Config, facts: Facts, plan: Plan | None) -> Verdicts:
    """Yield whether there is room for the run, and for the models that are still to be fetched."""
    # Without a plan the shape of a model is not known.
    if plan is not None:
        yield from judge_room(room_needed(config), facts.disks)


def _judge_driver(config: Config, facts: Facts, plan: Plan | None) -> Verdicts:
    if _is_cpu_trial(config, facts):
        yield "none is needed: launch.device is cpu"
        return
    # lopd trains on a CPU too, but a machine without CUDA is rarely what was meant.
    if facts.cuda is None:
        yield ConfigError(
            "the installed torch has no CUDA",
            where="torch",
            remedy="use the image (docker/), or install the requirements for a GPU; for a trial on "
            "the CPU, set launch.device=cpu",
        )
        return
    # Without a GPU there is no driver to judge, and _judge_gpus says so.
    if not facts.gpus:
        return
    # All GPUs of a machine share one driver.
    driver = facts.gpus[0].driver
    # A CUDA version without a row in the table has no limit that is known.
    oldest = MIN_DRIVER.get(int(facts.cuda.partition(".")[0]), 0)
    if int(driver.partition(".")[0]) < oldest:
        yield ConfigError(
            f"the NVIDIA driver {driver} is too old",
            where="this machine",
            limit=f"at least {oldest} for CUDA {facts.cuda}",
            remedy="install a newer driver on the host",
        )
    else:
        yield f"NVIDIA driver {driver}, CUDA {facts.cuda}"


def _judge_limits(config: Config, facts: Facts, plan: Plan | None) -> Verdicts:
    """Yield whether the limits of the system, or of the container, are high enough."""
    is_cpu_trial = _is_cpu_trial(config, facts)
    # On a CPU gloo exchanges through sockets, and needs no shared memory.
    shm = 0 if is_cpu_trial else SHM_PER_GPU * gpus_needed(config)
    if facts.shm < shm:
        yield ConfigError(
            f"the shared memory has only {facts.shm / _GIB:.2f} GiB",
            where="/dev/shm",
            limit=f"at least {shm / _GIB:.0f} GiB",
            remedy="start the container with --ipc=host, or with a larger --shm-size",
        )
    else:
        yield f"/dev/shm: {facts.shm / _GIB:.0f} GiB"
    # A negative limit means none.
    if 0 <= facts.open_files < OPEN_FILES:
        yield ConfigError(
            f"a process may open only {facts.open_files} files",
            where="ulimit -n",
            limit=f"at least {OPEN_FILES}",
            remedy="raise the hard limit (ulimit -n)",
        )
    # Only pinned memory can be copied to a GPU while the GPU computes.
    offloads = any(getattr(config, name).megatron.get("optimizer_cpu_offload") for name in TRAINED)
    if offloads and facts.locked_memory >= 0 and not is_cpu_trial:
        yield ConfigError(
            f"only {facts.locked_memory / 2**20:.0f} MiB of memory may be pinned; "
            "an offloaded optimizer pins hundreds of GiB",
            where="ulimit -l",
            remedy="start the container with --ulimit memlock=-1",
        )


def _judge_ports(config: Config, facts: Facts, plan: Plan | None) -> Verdicts:
    # Without sglang.port the system gives a free port when the server starts.
    for port in facts.ports_taken:
        yield ConfigError(
            f"port {port} is taken",
            where="127.0.0.1",
            remedy="remove sglang.port: lopd then uses free ports",
        )
    if not facts.ports_taken:
        yield "free" if config.sglang.port is not None else "lopd will use free ports"


def _judge_versions(config: Config, facts: Facts, plan: Plan | None) -> Verdicts:
    return judge_versions(facts.versions, has_gpus=bool(facts.gpus))


def _judge_sources(config: Config, facts: Facts, plan: Plan | None) -> Verdicts:
    """Yield whether models and prompt files are on this machine, or can be fetched."""
    # The same keys as those of the paths below. Local paths have no name on the hub.
    on_hub = {item.key: item for item in wanted(config)}
    for key, path in _paths_to_read(config).items():
        yield _judge_source(key, path, on_hub.get(key), facts)


def _judge_source(key: str, path: Path, item: Wanted | None, facts: Facts) -> str | LopdError:
    """Return what was found of one model or file.

    Args:
        key: The key of the configuration that names it.
        path: Where it must be on this machine.
        item: The item's name on the hub, if it has one.
        facts: The facts about the machine, with the answers of the hub.
    """
    # What is here is not compared with the hub: a name with a revision does not change.
    if path.exists():
        return f"{key}: {path}"
    if item is None:
        return ConfigError(
            f"{key}: this folder does not exist",
            where=str(path),
            remedy=f"put the files there, or set {key} to a name on the hub: hf://org/name@revision",
        )
    # gather() asks the hub for everything that is missing, unless downloads are forbidden.
    if item.name not in facts.hub:
        return NotFetched(
            f"{key}: {item.name} is not downloaded yet, and downloads are switched off",
            where=str(item.path),
            remedy="unset HF_HUB_OFFLINE and run lopd fetch CONFIG, or copy the files there by "
            "other means",
        )
    if facts.hub[item.name] is not None:
        return ConfigError(
            f"{key}: {item.name} cannot be fetched: {facts.hub[item.name]}",
            where="hub",
            remedy="check the name, the revision, the network and the login",
        )
    return NotFetched(
        f"{key}: {item.name} is not downloaded yet; the hub has it",
        where=str(item.path),
        remedy="lopd fetch CONFIG",
    )


def _paths_to_read(config: Config) -> dict[str, Path]:
    """Return what the run reads, by its key of the configuration."""
    paths = {**named_paths(config), "sft.demonstrations": config.sft.demonstrations}
    # These two are read only for what their manifests say. lopd check judges them.
    for key in ("sft.declared_teacher", "sft.checkpoint"):
        paths.pop(key)
    # Given demonstrations are read instead of prompts.
    if config.sft.demonstrations is not None:
        paths.pop("prompts.sft.file")
    return {key: path for key, path in paths.items() if path is not None}


Judge = Callable[[Config, Facts, "Plan | None"], Verdicts]
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
