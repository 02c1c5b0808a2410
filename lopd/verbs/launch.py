"""``lopd launch``, and what a job of it says of its place: ``--shards`` of the sampling stages,
``--node`` of the training ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from lopd.config import load_config
from lopd.errors import ConfigError

ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="TOML file. Relative paths in it are relative to its folder.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Overrides of knobs, in TOML syntax.", show_default=False
    ),
]
Shards = Annotated[
    str | None,
    typer.Option(
        metavar="i/n",
        help="Only every n-th shard, from the i-th; auto/n: the cluster says which. Run without it afterwards.",
        show_default=False,
    ),
]
Node = Annotated[
    str | None,
    typer.Option(
        metavar="i/n",
        help="This is machine i of n (parallel.nodes): 0 drives, the others follow; auto/n: the cluster says which.",
        show_default=False,
    ),
]
Verb = Callable[[Path, list[str] | None], None]
_SHARED, _SPREAD = (
    ("demonstrate", "rollout", "score"),
    ("sft", "distill"),
)  # and evaluate, whose verb has more options


def with_place(stage: str, whole: Verb) -> Callable[..., None]:
    """The verb of a stage, with the option that says which part of it this process is."""
    return (
        _with_shards(stage, whole)
        if stage in _SHARED
        else _with_node(stage, whole)
        if stage in _SPREAD
        else whole
    )


def _with_node(stage: str, whole: Verb) -> Callable[..., None]:
    def verb(config: ConfigFile, overrides: Overrides = None, node: Node = None) -> None:
        if node is None or not follows(stage, config, overrides or [], node):
            whole(config, overrides)

    verb.__doc__ = whole.__doc__
    return verb


def follows(stage: str, config: Path, overrides: list[str], node: str) -> bool:
    """What ``--node`` asks for: on machine 0 says to the trainer which one it is, on another one
    does its part of the stage and is True.
    """
    from lopd import pipeline
    from lopd.launching.place import read_node
    from lopd.megatron.ranks import nodes

    index, count = read_node(node)
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

        share = read_share(shards)

        checks.check_all(loaded, stage=stage)
        pipeline.run_share(loaded, stage, share)

    verb.__doc__ = whole.__doc__
    return verb


def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    on: Annotated[
        str, typer.Option("--on", metavar="WHERE", help="local, docker, slurm, k8s or skypilot.")
    ] = "local",
    stages: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="Only these stages; what they read from must be done.",
            show_default=False,
        ),
    ] = "",
    render: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write what would be submitted there, and submit nothing.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Run the stages as jobs of one nemo-run experiment: on this machine, in containers, on Slurm,
    on Kubernetes, or where SkyPilot finds GPUs.

    One job a stage, after the one it reads from; launch.workers jobs share the prompts of
    demonstrate, rollout and score; sft and distill use parallel.nodes machines. The same command
    again goes on from what is published. lopd status reads the same run directory. docs/launch.md
    """
    loaded = load_config(config, overrides or [])
    from lopd.launching import TARGETS, make_plan
    from lopd.launching import launch as start
    from lopd.report.console import say

    target = next((name for name in TARGETS if name == on), None)
    if target is None:
        raise ConfigError(
            f"--on {on!r:.40}",
            where="lopd launch",
            limit=", ".join(TARGETS),
            remedy="choose one of these",
        )
    plan = make_plan(
        loaded,
        target,
        config_file=config,
        overrides=overrides or [],
        stages=[name for name in stages.split(",") if name],
    )
    if not as_json:
        for job in plan.jobs:
            say(
                f"launch: {job.name}{f' x{job.workers}' if job.workers > 1 else ''}{f' on {job.nodes} nodes' if job.nodes > 1 else ''}"
            )
    result = start(plan, render_to=render.resolve() if render is not None else None)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        say(
            f"launch: {'written to ' + str(render) if render is not None else 'submitted; lopd status tells how far it is'}"
        )
