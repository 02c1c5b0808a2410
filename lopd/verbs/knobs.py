"""``lopd knobs``: the knobs by section, by a word, or those that a configuration changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic.fields import FieldInfo

from lopd.config import known_keys, load_config, nearest_key
from lopd.errors import ConfigError

Section = Annotated[
    str,
    typer.Argument(
        metavar="SECTION",
        help="A section, such as distill or distill.optimizer, or the beginning of a key.",
        show_default=False,
    ),
]
Search = Annotated[
    str | None,
    typer.Option(metavar="WORD", help="Show only knobs with this word in their key or meaning."),
]
Changed = Annotated[
    Path | None,
    typer.Option(
        metavar="CONFIG",
        help="Show only what this TOML file sets to another value than the default.",
    ),
]
All = Annotated[bool, typer.Option("--all", help="Show all knobs of all sections.")]


def knobs(
    section: Section = "", search: Search = None, changed: Changed = None, all_knobs: All = False
) -> None:
    """Show the knobs of a configuration: key, default, type, bounds and meaning.

    Without a section it lists the sections. With --changed the command reads CONFIG. It writes
    nothing.
    """
    from lopd.report.knobs import changed_lines, overview_lines, section_lines
    from lopd.report.text_width import text_width

    width = text_width()
    chosen = _chosen(section, search)
    if changed is not None:
        lines = changed_lines(load_config(changed), chosen, width)
    # Any choice shows whole knobs. Without one, all knobs would fill many screens.
    elif all_knobs or section or search is not None:
        lines = section_lines(chosen, width)
    else:
        lines = overview_lines(chosen, width)
    for line in lines:
        typer.echo(line)


def _chosen(section: str, search: str | None) -> dict[str, FieldInfo]:
    """Return the fields that are asked for by their keys.

    Raises:
        ConfigError: There is none.
    """
    # A prefix, not a pattern: distill.optimizer shows the knobs of one table. A dot at the end, as
    # in `distill.`, is what completion by hand leaves.
    chosen = {key: field for key, field in known_keys().items() if key.startswith(section)}
    if not chosen:
        raise ConfigError(
            f"no knob starts with {section!r:.80}",
            where="lopd knobs",
            # A mistyped key is the usual reason, so the line ends with what was probably meant.
            remedy=f"the nearest known key is {nearest_key(section)}",
        )
    if search is None:
        return chosen
    # Users write KL, kl or Kl. The case says nothing about which knob they want.
    word = search.lower()
    found = {
        key: field
        for key, field in chosen.items()
        if word in key.lower() or word in (field.description or "").lower()
    }
    if not found:
        raise ConfigError(
            f"no knob has {search!r:.80} in its key or its meaning",
            where="lopd knobs --search",
            remedy=f"try a shorter word; the nearest known key is {nearest_key(search)}",
        )
    return found
