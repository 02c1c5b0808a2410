"""What to start: one job a stage, after the jobs it reads from, with the machines it needs. Pure:
no files, no cluster.

Stages that sample or score can be shared by several workers (``launch.workers``): an array of jobs
that each publish their shards, then one short job that finds all of them and completes the
artifact, making what a lost worker left. A training over several nodes (``parallel.nodes``) is one
job on as many machines: each runs the same command, the first one drives, the others follow it.
"""

from __future__ import annotations

import dataclasses
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
SHARED = ("demonstrate", "rollout", "score")  # stages that workers can share
SINGLE_NODE = ("local", "docker")  # executors of one machine
CONTAINERS = ("docker", "k8s", "skypilot")  # executors that run nothing without an image


@dataclasses.dataclass(frozen=True)
class Job:
    """A command on ``nodes`` machines at once, ``workers`` times over (an array), once all jobs of
    ``after`` have succeeded (shares: have ended).
    """

    name: str
    stage: str
    command: tuple[str, ...]
    after: tuple[str, ...]
    nodes: int = 1
    workers: int = 1
    gpus: int = 0  # per node
    cpus: int = 1  # per node
    # a worker's part of a stage: the job after it makes up for what it leaves, so that job waits
    # for its end, not for its success
    share: bool = False


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    title: str
    target: Target
    run_dir: str
    jobs: tuple[Job, ...]
    settings: dict[str, Any]  # the [launch] section

    @property
    def folder(self) -> str:
        """Where the plan, nemo-run's own files and the jobs' logs are."""
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
    """The jobs of a configuration. stages: only these, in the pipeline's order (what they read from
    must then be done).

    ConfigError: several nodes where the target has one, ranks that do not divide by nodes, no such
    stage, a container image that is missing.
    """
    chosen = _chosen(config, stages)
    _check(config, target, chosen)
    _check_no_secret(overrides)
    jobs: list[Job] = []
    for stage in chosen:
        jobs += _jobs_of(
            stage,
            config,
            target,
            [str(config_file.resolve()), *overrides],
            after=(jobs[-1].name,) if jobs else (),
        )
    settings = config.launch.model_dump(mode="json")
    return LaunchPlan(
        title="lopd",
        target=target,
        run_dir=str(config.run.dir),
        jobs=tuple(jobs),
        settings=settings,
    )


def _chosen(config: Config, stages: Sequence[str]) -> list[str]:
    order = ["demonstrate", "sft", "rollout", "score", "distill", "evaluate", "export"]
    unknown = [stage for stage in stages if stage not in order]
    if unknown:
        raise ConfigError(
            f"no stage {unknown[0]!r:.40}",
            where="lopd launch --stages",
            limit=", ".join(order),
            remedy="give stages by name, with commas",
        )
    needed = [
        stage
        for stage in order
        if stage != "demonstrate" or (config.sft.demonstrations or config.sft.checkpoint) is None
    ]
    return [stage for stage in needed if not stages or stage in stages]


def _check(config: Config, target: Target, chosen: Sequence[str]) -> None:
    for stage, parallel in (("sft", config.sft.parallel), ("distill", config.distill.parallel)):
        if stage in chosen and parallel.ranks % parallel.nodes:
            remedy = f"set {stage}.parallel.nodes to a divisor of {parallel.ranks}"
            raise ConfigError(
                f"{parallel.ranks} ranks on {parallel.nodes} nodes",
                where=f"{stage}.parallel",
                limit="equal parts",
                remedy=remedy,
            )
        if stage in chosen and parallel.nodes > 1 and target in SINGLE_NODE:
            remedy = "launch on slurm, k8s or skypilot, or set it to 1"
            raise ConfigError(
                f"{stage}.parallel.nodes = {parallel.nodes}",
                where=f"--on {target}",
                limit="1: it is one machine",
                remedy=remedy,
            )
    if config.score.forward.parallel.nodes > 1:
        what = f"score.forward.parallel.nodes = {config.score.forward.parallel.nodes}"
        raise ConfigError(
            what,
            where="score.forward",
            limit="1: scoring is shared by launch.workers",
            remedy="set it to 1",
        )
    if "/nemo_run" in str(config.run.dir):
        what = f"run.dir {config.run.dir} has /nemo_run in it, which nemo-run replaces wherever it stands in a job"
        raise ConfigError(what, where="run.dir", remedy="give another run.dir")
    if target in CONTAINERS and not config.launch.image:
        raise ConfigError(
            "launch.image is missing",
            where=f"--on {target}",
            remedy="build the image (docs/image.md) and name it: launch.image=lopd:0.1",
        )


def _check_no_secret(overrides: Sequence[str]) -> None:
    """An override stands in the command of every job, and so in its script and in lists of
    processes.
    """
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        if holds_secret({key.strip(): value}):
            remedy = "put it into the TOML file, which the jobs read, or into the cluster's own store of secrets"
            raise ConfigError(
                f"{key.strip()} holds what may be a secret, and would stand in the scripts of the jobs",
                where="command line",
                remedy=remedy,
            )


def _jobs_of(
    stage: str, config: Config, target: Target, arguments: list[str], *, after: tuple[str, ...]
) -> list[Job]:
    in_container = target in CONTAINERS or (target == "slurm" and bool(config.launch.image))
    launcher = ("lopd",) if in_container else (sys.executable, "-m", "lopd.cli")
    command = (*launcher, stage, *arguments)
    gpus, cpus, nodes = _machine(stage, config)
    if nodes > 1:
        command = (*command, "--node", f"auto/{nodes}")
    job = Job(stage, stage, command, after, nodes=nodes, gpus=gpus, cpus=cpus)
    workers = config.launch.workers
    if stage not in SHARED or workers == 1:
        return [job]
    share = dataclasses.replace(job, share=True)
    if target in SINGLE_NODE:  # no arrays there: jobs of their own, side by side
        shares = [
            dataclasses.replace(
                share, name=f"{stage}-{index}", command=(*command, "--shards", f"{index}/{workers}")
            )
            for index in range(workers)
        ]
    else:
        shares = [
            dataclasses.replace(
                share,
                name=f"{stage}-workers",
                command=(*command, "--shards", f"auto/{workers}"),
                workers=workers,
            )
        ]
    return [*shares, dataclasses.replace(job, after=tuple(share.name for share in shares))]


def _machine(stage: str, config: Config) -> tuple[int, int, int]:
    """GPUs and cores per node, and nodes."""
    servers = config.sglang.tensor * config.sglang.data * config.sglang.replicas
    baseline = [config.sft] if config.evaluate.equal_compute_baseline else []
    trainings: dict[str, Sequence[TrainSection]] = {
        "sft": [config.sft],
        "distill": [config.distill],
        "evaluate": baseline,
    }
    sections = trainings.get(stage, ())
    scorers = (
        config.score.forward.parallel.ranks
        if stage == "score" and config.score.engine == "megatron"
        else 0
    )
    nodes = max((section.parallel.nodes for section in sections), default=1)
    ranks = max(
        (section.parallel.ranks // section.parallel.nodes for section in sections), default=0
    )
    serves = stage not in ("sft", "export")
    ranks, serves = max(ranks, scorers), serves and not scorers
    devices = 0 if stage == "export" else max(ranks, servers if serves else 0)
    if config.launch.device == "gpu":
        return devices, max(4, 8 * devices), nodes
    threads = max((section.threads_per_rank or 1 for section in sections), default=1)
    return 0, max(1, ranks * threads, servers if serves else 0), nodes
