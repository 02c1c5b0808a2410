"""``lopd plan``: what a run will need, before anything starts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lopd.config import load_config
from lopd.errors import EXIT_CODE, ConfigError, LopdError
from lopd.verbs.arguments import AsJson, ConfigFile, Overrides

if TYPE_CHECKING:
    from lopd.planning import Plan
    from lopd.planning.layouts import Suggestion

# Eight H100 are the machine of the paper, and of the recipes in examples/.
GPU = "h100-80gb"
GPUS = 8
NumGpus = Annotated[
    int | None,
    typer.Option(min=1, help="Number of GPUs of the node. If absent, 8.", show_default=False),
]
# lopd.planning.hardware has all names. An unknown one is refused with the nearest.
GpuName = Annotated[
    str | None,
    typer.Option(
        help="Kind of GPU: h100-80gb, h200-141gb, a100-80gb, ... If absent, h100-80gb.",
        show_default=False,
    ),
]
# The formula and Megatron-Core agree; the plan of a changed Megatron-Core is what this is for.
Build = Annotated[
    bool,
    typer.Option(
        "--build",
        help="Count parameters on the models as Megatron-Core builds them, which takes seconds, "
        "and hold the formula against them.",
    ),
]
# The host's memory matters if the optimizer is offloaded to it.
HostGib = Annotated[
    float | None,
    typer.Option(
        min=1,
        help="Memory of the machine in GiB. If absent, 256 GiB per GPU.",
        show_default=False,
    ),
]
# Checkpoints to resume from take most of the disk.
DiskGib = Annotated[
    float | None,
    typer.Option(
        min=1,
        help="Disk for run.dir in GiB. If absent, 3.5 TiB per GPU.",
        show_default=False,
    ),
]
# A plan is often made before the models are downloaded. A config.json is small.
StudentConfig = Annotated[
    Path | None,
    typer.Option(
        help="config.json of the student, if its folder is not on this machine.",
        show_default=False,
    ),
]
TeacherConfig = Annotated[
    Path | None,
    typer.Option(
        help="config.json of the teacher, if its folder is not on this machine.",
        show_default=False,
    ),
]
# The first guess of a rate is ours. After a first run, users know theirs.
Assume = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Replace an assumption, for example dense_utilisation=0.3. The plan lists all "
        "assumptions. May be repeated.",
        show_default=False,
    ),
]
# The comparison shows what the stored scores save: no teacher shares the GPUs with training.
Cohost = Annotated[
    bool,
    typer.Option(
        "--cohost",
        help="Plan standard OPD instead: servers of teacher and student run beside the trainer.",
    ),
]
# The result is printed as overrides, ready to be pasted after `lopd run CONFIG`.
Suggest = Annotated[
    bool,
    typer.Option("--suggest", help="Search for the nearest settings that fit, and show them."),
]


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: NumGpus = None,
    gpu: GpuName = None,
    host_gib: HostGib = None,
    disk_gib: DiskGib = None,
    student_config: StudentConfig = None,
    teacher_config: TeacherConfig = None,
    assume: Assume = None,
    cohost: Cohost = False,
    suggest: Suggest = False,
    build: Build = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run will need: memory of GPUs and machine, disk, operations, hours.

    Reads CONFIG and the config.json of the models. Writes nothing and starts nothing. The command
    needs no GPU and no weights.

    What cannot be known before the run is assumed. The plan shows every assumption, and each can be
    set. The command ends with exit code 2 if the run does not fit, or if lopd check would refuse
    the configuration on any machine.

    Memory and hours are those of GPUs. With launch.device = "cpu", and no --gpu and no --gpus, the
    plan has tokens, operations and disk, and estimates no memory and no hours.
    """
    loaded = load_config(config, overrides or [])
    from lopd import checks
    from lopd.planning import make_plan, node_of
    from lopd.planning.assumptions import read_assumptions
    from lopd.planning.layouts import nearest_that_fits
    from lopd.planning.models import planned_models
    from lopd.planning.stages import given_stages

    # A user who names GPUs plans for them, whatever the configuration's jobs ask for.
    has_gpus = loaded.launch.device == "gpu" or gpu is not None or gpus is not None
    if not has_gpus:
        _refuse_without_gpus({"--suggest": suggest, "--cohost": cohost})
    # The node need not be this machine, so nothing of this machine is looked at.
    node = node_of(gpu or GPU, gpus or GPUS, host_gib=host_gib, disk_gib=disk_gib)
    models = planned_models(loaded, _config_files(student_config, teacher_config))
    assumed = read_assumptions(assume or [])
    shapes = {role: model.arch for role, model in models.items()}
    # A plan that fits is of no use if lopd check then refuses the configuration on the node.
    refused = list(checks.check_anywhere(loaded, shapes, given_stages(loaded)))
    made: Plan | ConfigError
    try:
        made = make_plan(
            loaded, models, node, assumed, build=build, cohost=cohost, has_gpus=has_gpus
        )
    except ConfigError as error:
        # The layout does not divide the model. With --suggest other layouts may.
        if not suggest:
            raise
        made = error
    # The search makes hundreds of plans, so it runs only if it is asked for.
    found = nearest_that_fits(loaded, models, node, assumed, cohost=cohost) if suggest else None
    show = _print_json if as_json else _show
    show(made, refused, found, suggest=suggest)
    # A script that starts a run can rely on the exit code alone.
    if isinstance(made, ConfigError) or not made.fits or refused:
        raise typer.Exit(EXIT_CODE)


def _config_files(student: Path | None, teacher: Path | None) -> dict[str, Path]:
    """Return the files of --student-config and --teacher-config that are given, by role."""
    # A config.json that is given wins over the folder that the configuration names.
    files = {"student": student, "teacher": teacher}
    return {role: path for role, path in files.items() if path is not None}


def _refuse_without_gpus(options: Mapping[str, bool]) -> None:
    """Refuse options that ask how a run fits GPUs, where no GPU is planned for."""
    for option, is_given in options.items():
        if is_given:
            raise ConfigError(
                f"{option} with launch.device = cpu",
                where="lopd plan",
                limit="a plan for GPUs",
                remedy=f"say which: --gpus {GPUS} --gpu {GPU}",
            )


def _print_json(
    made: Plan | ConfigError,
    refused: Sequence[LopdError],
    found: Suggestion | None,
    *,
    suggest: bool,
) -> None:
    """Print one JSON value, whatever happens, so that a program can always read it."""
    table = _as_json(made, refused)
    if suggest:
        table["suggestion"] = found.as_json() if found else None
    typer.echo(json.dumps(table, indent=1))


def _as_json(made: Plan | ConfigError, refused: Sequence[LopdError]) -> dict[str, Any]:
    """Return the plan for programs. What is refused joins the problems, so `fits` says all."""
    from lopd.planning.plan_json import as_json

    if isinstance(made, ConfigError):
        # No plan could be made. Programs still find the keys that they decide by.
        table: dict[str, Any] = {
            "fits": False,
            "problems": [{"stage": "layout", "what": str(made)}],
        }
    else:
        table = as_json(made)
    # A plan can fit a node and still be refused, so both lists are joined.
    if refused:
        table["fits"] = False
        table["problems"] = [
            *table["problems"],
            *({"stage": "configuration", "what": str(error)} for error in refused),
        ]
    return table


def _show(
    made: Plan | ConfigError,
    refused: Sequence[LopdError],
    found: Suggestion | None,
    *,
    suggest: bool,
) -> None:
    """Print the plan as tables, then what is refused, then the suggestion."""
    from lopd.planning.view import show_plan, show_refused, show_suggestion
    from lopd.report.console import show_error

    if isinstance(made, ConfigError):
        show_error(made)
    else:
        show_plan(made)
    show_refused(refused)
    if suggest:
        show_suggestion(found)
