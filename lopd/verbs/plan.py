"""``lopd plan``: what a run will need, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lopd.config import load_config
from lopd.errors import EXIT_CODE, ConfigError

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="TOML file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides of knobs.", show_default=False),
]


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the node.")] = 8,
    gpu: Annotated[
        str, typer.Option(help="Which: h100-80gb, h200-141gb, a100-80gb, ...")
    ] = "h100-80gb",
    host_gib: Annotated[
        float | None,
        typer.Option(
            min=1, help="Memory of the machine; absent: 256 GiB per GPU.", show_default=False
        ),
    ] = None,
    disk_gib: Annotated[
        float | None,
        typer.Option(min=1, help="Disk for run.dir; absent: 3.5 TiB per GPU.", show_default=False),
    ] = None,
    student_config: Annotated[
        Path | None,
        typer.Option(
            help="config.json of the student, where its folder is not there.", show_default=False
        ),
    ] = None,
    teacher_config: Annotated[
        Path | None, typer.Option(help="config.json of the teacher.", show_default=False)
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            help="name=value: another assumption (the plan lists them).", show_default=False
        ),
    ] = None,
    cohost: Annotated[
        bool,
        typer.Option(
            "--cohost", help="Standard OPD: teacher and student are served live beside the trainer."
        ),
    ] = False,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Search layouts for the nearest that fits.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Tell what a run will need: parameters by rank, memory of GPUs and machine, disk, operations,
    hours. Starts nothing, needs no GPU and no weights.

    Parameters are counted on the model as Megatron-Core builds it, on torch's meta device, with the
    layout of sft and of distill. Everything that cannot be known before is assumed, shown, and can
    be set. Exit code 2 where the run does not fit, or where lopd check would refuse it on any
    machine.
    """
    loaded = load_config(config, overrides or [])
    from lopd import checks
    from lopd.planning import Plan, make_plan, node_of
    from lopd.planning.assumptions import read_assumptions
    from lopd.planning.layouts import nearest_that_fits
    from lopd.planning.models import planned_models
    from lopd.planning.plan import as_json as plan_as_json
    from lopd.planning.plan import given_stages
    from lopd.planning.view import show_plan, show_refused, show_suggestion
    from lopd.report.console import show_error

    node = node_of(gpu, gpus, host_gib=host_gib, disk_gib=disk_gib)
    given = {
        role: path
        for role, path in (("student", student_config), ("teacher", teacher_config))
        if path is not None
    }
    models = planned_models(loaded, given)
    assumed = read_assumptions(assume or [])
    refused = [
        *checks.check_anywhere(
            loaded, {role: model.arch for role, model in models.items()}, given_stages(loaded)
        )
    ]
    try:
        made: Plan | ConfigError = make_plan(loaded, models, node, assumed, cohost=cohost)
    except ConfigError as error:  # a layout that does not divide the model: others may
        if not suggest:
            raise
        made = error
    found = nearest_that_fits(loaded, models, node, assumed, cohost=cohost) if suggest else None
    if as_json:
        about: dict[str, Any] = (
            {"fits": False, "problems": [{"stage": "layout", "what": str(made)}]}
            if isinstance(made, ConfigError)
            else plan_as_json(made)
        )
        if refused:
            about |= {
                "fits": False,
                "problems": [
                    *about["problems"],
                    *({"stage": "configuration", "what": str(error)} for error in refused),
                ],
            }
        typer.echo(
            json.dumps(
                {
                    **about,
                    **({"suggestion": found.as_json() if found else None} if suggest else {}),
                },
                indent=1,
            )
        )
    else:
        if isinstance(made, ConfigError):
            show_error(made)
        else:
            show_plan(made)
        show_refused(refused)
        if suggest:
            show_suggestion(found)
    if isinstance(made, ConfigError) or not made.fits or refused:
        raise typer.Exit(EXIT_CODE)
