"""What to start: one job for each stage, after the jobs it reads from, on the machines it needs.

This file is pure: it touches no files and no cluster.

Several workers can share a stage that samples or scores (``launch.workers``). They are an array of
jobs, and each publishes its own shards. One short job follows. It finds all shards, makes those
that a lost worker left out, and completes the artifact. A training over several nodes
(``parallel.nodes``) is one job on as many machines. Each machine runs the same command. The first
one leads, and the others follow it.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lopd.config import Config, TrainSection
from lopd.config.secrets import holds_secret
from lopd.errors import ConfigError

Target = Literal["local", "docker", "slurm", "k8s", "skypilot"]
TARGETS: tuple[Target, ...] = get_args(Target)
STAGES = ("demonstrate", "sft", "rollout", "score", "distill", "evaluate", "export")
# Stages that workers can share.
SHARED = ("demonstrate", "rollout", "score")
# Targets that are one machine.
SINGLE_NODE = ("local", "docker")
# Targets that run nothing without a container image.
CONTAINERS = ("docker", "k8s", "skypilot")
# CPU cores of a job with GPUs: for each GPU, and at least. SGLang's tokenizer, the trainer's data
# and the verifiers need them. The figure is an estimate.
CORES_PER_GPU = 8
MIN_CORES = 4
# What may not be in a path that stands in a batch script without quotes.
_UNSAFE_IN_SLURM = re.compile(r"[^\w./+@:,=#~^-]")


@dataclasses.dataclass(frozen=True)
class Job:
    """A command that a cluster runs.

    Attributes:
        name: The name of the job. It is unique in its plan.
        stage: The stage that the command makes, or a part of it.
        command: The words of the command.
        after: Names of the jobs that must have succeeded before it starts. If they are shares, they
            must only have ended.
        nodes: Machines that run the command at once.
        workers: Copies of the job, as an array.
        gpus: GPUs of each machine.
        cpus: CPU cores of each machine.
        share: Whether the job is a worker's part of a stage. The job after it makes what the worker
            leaves out, so that job waits for its end and not for its success.
    """

    name: str
    stage: str
    command: tuple[str, ...]
    after: tuple[str, ...]
    nodes: int = 1
    workers: int = 1
    gpus: int = 0
    cpus: int = 1
    share: bool = False


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """All jobs of one launch.

    Attributes:
        title: The title of nemo-run's experiment.
        target: Where the jobs run.
        run_dir: The run directory.
        jobs: The jobs, each after those it waits for.
        settings: The [launch] section of the configuration.
    """

    title: str
    target: Target
    run_dir: str
    jobs: tuple[Job, ...]
    settings: dict[str, Any]

    @property
    def folder(self) -> str:
        """The folder of the plan, of nemo-run's own files, and of the jobs' logs."""
        return f"{self.run_dir}/launch"

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "home": f"{self.folder}/nemo"}


def make_plan(
    config: Config,
    target: Target,
    *,
    config_file: Path,
    overrides: Sequence[str] = (),
    stages: Sequence[str] = (),
) -> LaunchPlan:
    """Return the jobs of a configuration.

    Args:
        config: The configuration.
        target: Where the jobs run.
        config_file: The TOML file, which every job reads again.
        overrides: Overrides of knobs, for every job.
        stages: The only stages to run, in any order. What they read from must then be done. Empty
            means all stages.

    Raises:
        ConfigError: A training has several nodes but the target has one, ranks do not divide by
            nodes, a stage is unknown, the container image is missing, or an override holds a
            secret.
    """
    chosen = _chosen_stages(config, stages)
    _check_nodes(config, target, chosen)
    _check_target(config, target)
    _check_no_secret(overrides)
    # The jobs may start in another folder.
    arguments = [str(config_file.resolve()), *overrides]
    jobs: list[Job] = []
    # Each stage waits for the last job of the stage before it, so the jobs form a chain.
    for stage in chosen:
        after = (jobs[-1].name,) if jobs else ()
        jobs += _jobs_of(stage, config, target, arguments, after=after)
    return LaunchPlan(
        title="lopd",
        target=target,
        run_dir=str(config.run.dir),
        jobs=tuple(jobs),
        settings=config.launch.model_dump(mode="json"),
    )


def _chosen_stages(config: Config, stages: Sequence[str]) -> list[str]:
    """Return the stages to run, in the order of the pipeline."""
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ConfigError(
            f"there is no stage {unknown[0]!r:.40}",
            where="lopd launch --stages",
            limit=f"one of {', '.join(STAGES)}",
            remedy="give the names of stages, separated by commas",
        )
    # The same stages as lopd.stages.order leaves out, which imports too much for this file.
    left_out: set[str] = set()
    # Nobody reads demonstrations of this run if others, or a student, are given.
    if (config.sft.demonstrations or config.sft.checkpoint) is not None:
        left_out |= {"demonstrate"}
    # Nor rollouts and scores, if a cache is given.
    if config.distill.cache is not None:
        left_out |= {"rollout", "score"}
    if not config.evaluate.enabled:
        left_out |= {"evaluate"}
    return [stage for stage in STAGES if stage not in left_out and (not stages or stage in stages)]


def _check_nodes(config: Config, target: Target, chosen: Sequence[str]) -> None:
    for stage, parallel in (("sft", config.sft.parallel), ("distill", config.distill.parallel)):
        if stage not in chosen:
            continue
        # torchrun starts equally many ranks on every machine.
        if parallel.ranks % parallel.nodes:
            raise ConfigError(
                f"{parallel.ranks} ranks cannot be divided equally among {parallel.nodes} nodes",
                where=f"{stage}.parallel",
                limit="the same number of ranks on each node",
                remedy=f"set {stage}.parallel.nodes to a divisor of {parallel.ranks}",
            )
        # Several nodes on one machine would share its GPUs.
        if parallel.nodes > 1 and target in SINGLE_NODE:
            raise ConfigError(
                f"{stage}.parallel.nodes = {parallel.nodes} is too large",
                where=f"--on {target}",
                limit="exactly 1, because this target is one machine",
                remedy=f"launch on slurm, k8s or skypilot, or set {stage}.parallel.nodes to 1",
            )
    # Scoring needs no exchange between nodes. Workers share its prompts instead.
    nodes = config.score.forward.parallel.nodes
    if nodes > 1:
        raise ConfigError(
            f"score.forward.parallel.nodes = {nodes} is too large",
            where="score.forward",
            limit="exactly 1 (launch.workers is the number of machines that score)",
            remedy="set score.forward.parallel.nodes to 1",
        )


def _check_target(config: Config, target: Target) -> None:
    # nemo-run replaces this text by its own folder in every word of a job, paths included.
    if "/nemo_run" in str(config.run.dir):
        raise ConfigError(
            f"run.dir {config.run.dir} contains /nemo_run, and nemo-run replaces this "
            "text everywhere in a job",
            where="run.dir",
            remedy="set run.dir to another folder",
        )
    # nemo-run writes this path without quotes, into lines of shell and of Slurm: a blank would cut
    # it, a shell would replace $HOME, and Slurm would replace %j.
    unsafe = _UNSAFE_IN_SLURM.search(str(config.run.dir))
    if target == "slurm" and unsafe is not None:
        raise ConfigError(
            f"run.dir {config.run.dir} has the character {unsafe[0]!r}, which changes meaning in a "
            "batch script",
            where=f"--on {target}",
            limit="letters, digits and ./_+-@:,=#~^",
            remedy="set run.dir to a folder whose path has no other character",
        )
    # Slurm runs with or without a container, and so does this machine.
    if target in CONTAINERS and not config.launch.image:
        raise ConfigError(
            "launch.image is missing",
            where=f"--on {target}",
            remedy="build the image (docs/image.md), then set its name, for example "
            "launch.image=lopd:0.1",
        )


def _check_no_secret(overrides: Sequence[str]) -> None:
    """Refuse a secret in an override.

    An override is part of the command of every job. Scripts and lists of processes show it.
    """
    # What stands in the TOML file is safe: the jobs read the file, and no command shows it.
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        # The value is parsed, because a table may hold a secret inside.
        if holds_secret({key.strip(): value}):
            raise ConfigError(
                f"{key.strip()} may hold a secret, and lopd writes the arguments of a launch into "
                "the scripts of the jobs",
                where="command line",
                remedy="put this key into the TOML file, which the jobs read, or into the secret "
                "store of the cluster",
            )


def _jobs_of(
    stage: str, config: Config, target: Target, arguments: list[str], *, after: tuple[str, ...]
) -> list[Job]:
    """Return the jobs of one stage, the one that others wait for last."""
    in_container = target in CONTAINERS or (target == "slurm" and bool(config.launch.image))
    # In the image `lopd` is on the path. Outside, the jobs use this very environment.
    launcher = ("lopd",) if in_container else (sys.executable, "-m", "lopd.cli")
    command = (*launcher, stage, *arguments)
    gpus, cpus, nodes = _machine_of(stage, config)
    if nodes > 1:
        # The cluster tells each machine its number, so all of them run the same command.
        command = (*command, "--node", f"auto/{nodes}")
    job = Job(stage, stage, command, after, nodes=nodes, gpus=gpus, cpus=cpus)
    workers = config.launch.workers
    if stage not in SHARED or workers == 1:
        return [job]
    # The job itself stays as the last one, which completes the artifact.
    share = dataclasses.replace(job, share=True)
    if target in SINGLE_NODE:
        # These targets have no arrays. The shares are jobs of their own, side by side.
        shares = [
            dataclasses.replace(
                share, name=f"{stage}-{index}", command=(*command, "--shards", f"{index}/{workers}")
            )
            for index in range(workers)
        ]
    else:
        array = dataclasses.replace(
            share,
            name=f"{stage}-workers",
            command=(*command, "--shards", f"auto/{workers}"),
            workers=workers,
        )
        shares = [array]
    return [*shares, dataclasses.replace(job, after=tuple(share.name for share in shares))]


def _machine_of(stage: str, config: Config) -> tuple[int, int, int]:
    """Return the GPUs and the CPU cores of each machine that a stage needs, and the machines."""
    trainings = _trainings_of(stage, config)
    nodes = max((section.parallel.nodes for section in trainings), default=1)
    ranks = max(
        (section.parallel.ranks // section.parallel.nodes for section in trainings), default=0
    )
    servers = config.sglang.tensor * config.sglang.data * config.sglang.replicas
    # Megatron-Core's ranks score without a server.
    if stage == "score" and config.score.engine == "megatron":
        ranks = config.score.forward.parallel.ranks
        servers = 0
    if stage in ("sft", "export"):
        servers = 0
    # Servers and ranks use the same GPUs, so the larger number of the two is enough.
    devices = max(ranks, servers)
    if config.launch.device == "gpu":
        return devices, max(MIN_CORES, CORES_PER_GPU * devices), nodes
    # On a CPU a rank computes with several threads, and a server with one process.
    # Without a knob, each rank has one thread.
    threads = max((section.threads_per_rank or 1 for section in trainings), default=1)
    return 0, max(1, ranks * threads, servers), nodes


def _trainings_of(stage: str, config: Config) -> Sequence[TrainSection]:
    """Return the settings of the trainings that a stage makes."""
    if stage == "sft":
        return [config.sft]
    if stage == "distill":
        return [config.distill]
    # evaluate trains the baseline with the settings of SFT.
    if stage == "evaluate" and config.evaluate.equal_compute_baseline:
        return [config.sft]
    return []
