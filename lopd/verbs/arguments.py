"""Arguments and options that several verbs share, so that their help is written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Both -h and --help show the help of a group of verbs, and with it of each verb in the group.
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}

# The first argument of nearly every verb. It is a path to read, so typer must not create it.
ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="TOML file. Relative paths in it, and in overrides, are relative to its folder.",
        show_default=False,
    ),
]
# All further words. They have no dashes, so that they look like lines of the TOML file.
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Knobs that replace those of CONFIG, in TOML syntax: distill.num_steps=8",
        show_default=False,
    ),
]
# With this option nothing but JSON goes to stdout, and the exit code stays the same.
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")
]
