"""``lopd doctor`` and ``lopd fetch``: is the machine right for this run, and the models and prompts
it names on the hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lopd.config import load_config
from lopd.errors import EXIT_CODE, LopdError

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="TOML file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides of knobs.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="hf://NAME",
            help="Another name on the hub that will be needed; may be repeated.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell everything that this machine lacks for a run, at once; exit code 2 if something is.

    GPUs, their memory and the machine's against the plan, disk, driver, shared memory and limits,
    ports, versions, and whether models and prompts are here or to be had from the hub. Starts,
    downloads and changes nothing. lopd check looks at the configuration itself, once the models are
    here.
    """
    loaded = load_config(config, overrides or [])
    from lopd.machine import doctor as machine
    from lopd.machine import hub

    others = [hub.named(name) for name in also or ()]
    found = machine.findings(loaded, machine.gather(loaded, others), others)
    rows = [
        {"name": name, "ok": not isinstance(finding, LopdError), "finding": str(finding)}
        for name, finding in found
    ]
    show_findings(rows, as_json=as_json)


def show_findings(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Rows of name, ok and finding as a table or JSON; exit code 2 where one is wrong."""
    from lopd.report.overview import check_table

    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        check_table(rows)
    if not all(row["ok"] for row in rows):
        raise typer.Exit(EXIT_CODE)


def fetch(
    what: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|hf://NAME",
            help="TOML file, or one name on the hub.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    only_path: Annotated[
        bool, typer.Option("--path", help="Of one name: print nothing but where it lies.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Download the models and prompts that a configuration names on the Hugging Face hub
    (hf://org/name@revision); what is here is left alone.

    Weights as safetensors, JSON, tokenizers, prompts as JSONL or Parquet: never code. Into
    $LOPD_HUB, or lopd/hub in $XDG_CACHE_HOME or ~/.cache. HF_HUB_OFFLINE=1 forbids it. This and
    lopd doctor are the only verbs that use the network.
    """
    from lopd.config.hub import PREFIX
    from lopd.machine import hub
    from lopd.report.console import say

    items = (
        [hub.named(what)]
        if what.startswith(PREFIX)
        else [*hub.wanted(load_config(Path(what), overrides or []))]
    )
    quiet = as_json or only_path
    rows = hub.fetch(items, (lambda line: None) if quiet else say)
    if only_path:
        typer.echo("\n".join(str(item.path) for item in items))
    elif as_json:
        typer.echo(json.dumps(rows, indent=1))
    elif not rows:
        say(
            "nothing of this configuration is on the hub: all its models and prompts are local paths"
        )
