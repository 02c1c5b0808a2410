"""``lopd launch``, and the options that tell a job of it which part of a stage is its own.

These options are ``--shards`` of the sampling stages and ``--node`` of the training stages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lopd.config import load_config
from lopd.errors import ConfigError
from lopd.verbs.arguments import AsJson, ConfigFile, Overrides

if TYPE_CHECKING:
    from lopd.launching import Job

# Shards of independent requests: any machine can make any of them, in any order.
Shards = Annotated[
    str | None,
    typer.Option(
        metavar="i/n",
        help="Make only every n-th shard, from shard i on. With auto/n the cluster gives i. Run "
        "the verb without this option afterwards.",
        show_default=False,
    ),
]
# The machines meet by a file in the run directory, so no address is given here.
Node = Annotated[
    str | None,
    typer.Option(
        metavar="i/n",
        help="This is machine i of n (parallel.nodes). Machine 0 leads and the others follow. "
        "With auto/n the cluster gives i.",
        show_default=False,
    ),
]
On = Annotated[
    str,
    typer.Option(
        "--on",
        metavar="WHERE",
        help="Where the jobs run: local, docker, slurm, k8s or skypilot.",
    ),
]
# A text with commas and no repeated option: stages are few, and their order follows from the run.
Stages = Annotated[
    str,
    typer.Option(
        metavar="A,B",
        help="Run only these stages. The stages that they read from must be done.",
        show_default=False,
    ),
]
Render = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Write into this folder what would be submitted, and submit nothing.",
        show_default=False,
    ),
]
# A verb of a stage without its option.
Verb = Callable[[Path, list[str] | None], None]
# Stages of independent requests: their shards can be shared among any number of machines.
_SAMPLING = ("demonstrate", "rollout", "score")
# Stages whose ranks span several machines. evaluate is one too, but its verb has more options and
# handles --node itself.
_TRAINING = ("sft", "distill")


def with_place(stage: str, whole: Verb) -> Callable[..., None]:
    """Return the verb of a stage with the option that says which part this process makes.

    Args:
        stage: The name of the stage.
        whole: The verb that makes the whole stage. It is called if the option is absent.
    """
    # export copies files. It needs neither option.
    if stage in _SAMPLING:
        return _with_shards(stage, whole)
    if stage in _TRAINING:
        return _with_node(stage, whole)
    return whole


def _with_node(stage: str, whole: Verb) -> Callable[..., None]:
    def verb(config: ConfigFile, overrides: Overrides = None, node: Node = None) -> None:
        # A follower has done its part inside of the call. Machine 0 runs the stage as a whole.
        if node is None or not run_as_follower(stage, config, overrides or [], node):
            whole(config, overrides)

    verb.__doc__ = whole.__doc__
    return verb


def run_as_follower(stage: str, config: Path, overrides: list[str], node: str) -> bool:
    """Do this machine's part of a training stage, unless it is machine 0.

    Args:
        stage: The name of the stage.
        config: The TOML file.
        overrides: Overrides of knobs.
        node: The value of --node.

    Returns:
        True if this machine is a follower, which has then ended its part. False on machine 0,
        which still has to run the stage.
    """
    from lopd import pipeline
    from lopd.launching.place import read_node
    from lopd.megatron.ranks import nodes

    index, count = read_node(node)
    # The trainer starts the ranks many calls below. It reads its place from the environment, as
    # it would from a cluster.
    os.environ[nodes.NODE] = f"{index}/{count}"
    if index > 0:
        pipeline.follow(load_config(config, overrides), stage, index, count)
    return index > 0


def _with_shards(stage: str, whole: Verb) -> Callable[..., None]:
    def verb(config: ConfigFile, overrides: Overrides = None, shards: Shards = None) -> None:
        if shards is None:
            whole(config, overrides)
            return
        loaded = load_config(config, overrides or [])
        from lopd import checks, pipeline
        from lopd.launching.place import read_share

        # A share publishes shards only. The verb without the option makes the artifact of them.
        share = read_share(shards)
        checks.check_all(loaded, stage=stage)
        pipeline.run_share(loaded, stage, share)

    verb.__doc__ = whole.__doc__
    return verb


def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    on: On = "local",
    stages: Stages = "",
    render: Render = None,
    as_json: AsJson = False,
) -> None:
    """Run the stages as jobs on this machine, in containers, or on a cluster.

    Reads CONFIG, its launch table above all. Writes the jobs and their logs into run.dir/launch,
    and the jobs write the stages into run.dir. nemo-run submits the jobs, to Slurm, Kubernetes or
    SkyPilot for example.

    Each stage is one job, and it starts after the job that it reads from. The jobs of
    launch.workers share the prompts of demonstrate, rollout and score. sft and distill use
    parallel.nodes machines. The same command again continues from what is published. lopd status
    shows how far the run is. docs/launch.md tells more.
    """
    loaded = load_config(config, overrides or [])
    from lopd.launching import TARGETS, make_plan
    from lopd.launching import launch as start
    from lopd.report.console import print_line

    # typer could check the choice, but its message is a box and not one of our error lines.
    target = next((name for name in TARGETS if name == on), None)
    if target is None:
        raise ConfigError(
            f"--on {on!r:.40} is not a known target",
            where="lopd launch",
            limit=f"one of {', '.join(TARGETS)}",
            remedy="choose one of these",
        )
    # The plan is pure. Everything that can be refused is refused before nemo-run starts.
    plan = make_plan(
        loaded,
        target,
        config_file=config,
        overrides=overrides or [],
        # An empty text means all stages, and a trailing comma means nothing.
        stages=[name for name in stages.split(",") if name],
    )
    if not as_json:
        # The list comes before the submission, which may take minutes on a cluster.
        for job in plan.jobs:
            print_line(_job_line(job))
    # An absolute path: nemo-run runs in a process of its own.
    result = start(plan, render_to=render.resolve() if render is not None else None)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    elif render is not None:
        print_line(f"launch: written to {render}")
    else:
        print_line("launch: submitted; lopd status tells how far it is")


def _job_line(job: Job) -> str:
    workers = f" x{job.workers}" if job.workers > 1 else ""
    nodes = f" on {job.nodes} nodes" if job.nodes > 1 else ""
    return f"launch: {job.name}{workers}{nodes}"
