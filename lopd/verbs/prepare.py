"""``lopd doctor`` and ``lopd fetch``: what a machine needs before a run.

doctor says whether the machine is right for the run. fetch downloads the models and prompts that
the run names on the hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from lopd.config import load_config
from lopd.errors import EXIT_CODE, EXIT_NOT_FETCHED, LopdError
from lopd.verbs.arguments import AsJson, ConfigFile, Overrides


def doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="hf://NAME",
            help="Another name on the hub that will be needed. May be repeated.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show everything that this machine lacks for a run, at once.

    Reads CONFIG and facts about the machine, and asks the hub whether it has what is missing here.
    The command starts nothing, downloads nothing and changes nothing.

    It looks at GPUs, at their memory and the machine's memory against the plan, at disk, driver,
    shared memory and limits, at ports and versions, and at the models and prompts. lopd check
    looks at the configuration itself, once the models are here. The exit code is 2 if something is
    wrong, and 3 if nothing is wrong but lopd fetch must download something first.
    """
    # The configuration says which machine is needed. Without it nothing can be judged.
    loaded = load_config(config, overrides or [])
    from lopd.machine import doctor as judge
    from lopd.machine import facts, hub
    from lopd.report.waiting import Waiting

    # Recipes need evaluation sets that are not part of their configuration.
    others = [hub.named(name) for name in also or ()]
    # First all facts, then all verdicts: a fact that is slow to get is asked for once.
    with Waiting() as waiting:
        waiting.begin("looking at this machine, and asking the hub for what is missing")
        gathered = facts.gather(loaded, others)
    found = judge.findings(loaded, gathered, others)
    # Findings that are right are shown too: a list without a subject says nothing about it.
    show_findings(found, config, as_json=as_json)


def show_findings(
    findings: Iterable[tuple[str, str | LopdError]], config: Path, *, as_json: bool
) -> None:
    """Print findings as they come, or all as JSON.

    Args:
        findings: The name of each subject, and what was found.
        config: The TOML file, for the command that downloads.
        as_json: Whether to print JSON.

    Raises:
        typer.Exit: A finding is wrong (exit code 2), or something must be downloaded first (3).
    """
    from lopd.report.overview import finding_row, print_finding

    rows = []
    for name, finding in findings:
        rows.append(finding_row(name, finding))
        # One after the other: the prompts of a large set take long, and what is known is shown.
        if not as_json:
            print_finding(rows[-1])
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    states = {row["state"] for row in rows}
    if "fetch" in states and not as_json:
        typer.echo(f"not downloaded yet: lopd fetch {config}")
    # The exit code comes last, so that the whole table is shown first.
    if "wrong" in states:
        raise typer.Exit(EXIT_CODE)
    if "fetch" in states:
        raise typer.Exit(EXIT_NOT_FETCHED)


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
        bool,
        typer.Option(
            "--path", help="For one name on the hub, print only the path of its folder or file."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Download the models and prompts that a configuration names on the Hugging Face hub.

    Reads CONFIG, where such a name is hf://org/name@revision. Writes into $LOPD_HUB, or into
    lopd/hub in $XDG_CACHE_HOME or ~/.cache. What is already there is left alone.

    It downloads weights as safetensors, JSON files, tokenizers, and prompts as JSONL or Parquet. It
    never downloads code. HF_HUB_OFFLINE=1 forbids downloads. Only this command and lopd doctor use
    the network.
    """
    from lopd.config.hub import PREFIX
    from lopd.machine import hub
    from lopd.report.console import print_line

    if what.startswith(PREFIX):
        # Useful for one evaluation set, or to fetch on a machine that has no configuration.
        items = [hub.named(what)]
    else:
        items = list(hub.wanted(load_config(Path(what), overrides or [])))
    # Programs read the output of these two forms, so progress lines must not be part of it.
    quiet = as_json or only_path
    rows = hub.fetch(items, (lambda line: None) if quiet else print_line)
    # For shells: `--model "$(lopd fetch --path hf://...)"`.
    if only_path:
        typer.echo("\n".join(str(item.path) for item in items))
    elif as_json:
        typer.echo(json.dumps(rows, indent=1))
    elif not rows:
        print_line(
            "nothing of this configuration is on the hub: all its models and prompts are local "
            "paths"
        )
