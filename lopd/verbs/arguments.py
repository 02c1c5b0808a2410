"""What several verbs share: their arguments and options, and how their help is laid out."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from lopd.config.hub import PREFIX, local_path
from lopd.errors import ConfigError, LopdError

Verb = TypeVar("Verb", bound=Callable[..., Any])

# Both -h and --help show the help of a group of verbs, and with it of each verb in the group.
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


def input_path(text: str) -> Path:
    """Return the path of a file or folder to read. A name on the hub stands for its download.

    Args:
        text: What the user typed: a path, or ``hf://org/name@revision``.

    Raises:
        ConfigError: The text begins like a name on the hub and is none.
    """
    # Before it becomes a path: an absolute path of such a name would no longer begin like one.
    if not text.startswith(PREFIX):
        return Path(text).expanduser()
    try:
        return local_path(text)
    except ValueError as error:
        raise ConfigError(
            f"{text!r:.120} is not a name on the hub",
            where="command line",
            limit="hf://org/name@revision or hf://datasets/org/name@revision/file",
            remedy="correct the name",
        ) from error


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
# The folder of a score stage, or an artifact that a verb of lopd cache has made.
Cache = Annotated[
    Path,
    typer.Argument(
        metavar="CACHE",
        help="Folder with manifest.json and shards, for example run.dir/score.",
        show_default=False,
    ),
]
# Only for text on screen, and for the text that the reference code wants.
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        parser=input_path,
        help="Hugging Face folder with the tokenizer. If absent, that of a model of the run, by "
        "its manifests.",
    ),
]
# With this option nothing but JSON goes to stdout, and the exit code stays the same.
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")
]


@contextlib.contextmanager
def options_named(options: Mapping[str, str]) -> Iterator[None]:
    """Let errors name the options that the user typed, and not the knobs that they became.

    Args:
        options: The option by the dotted key of the knob, for options that were given.

    Raises:
        LopdError: The error of the block, in the words of the command line.
    """
    # The longest key first: prompts.eval.file is not prompts.eval with something behind it.
    keys = sorted(options, key=len, reverse=True)
    # A whole key, with neither a name before it nor a further part behind it.
    whole = re.compile("|".join(rf"(?<![\w.-]){re.escape(key)}(?!\w|\.\w)" for key in keys))

    def typed(text: str) -> str:
        return whole.sub(lambda found: options[found[0]], text)

    try:
        yield
    except LopdError as error:
        if not options:
            raise
        # In place, because the classes of errors have constructors of their own.
        LopdError.__init__(
            error,
            typed(error.what),
            where=typed(error.where),
            limit=typed(error.limit),
            remedy=typed(error.remedy),
        )
        raise


class VerbGroup(typer.Typer):
    """A group of verbs whose help fits any width of the terminal."""

    def command(self, *arguments: Any, **named: Any) -> Callable[[Verb], Verb]:
        """Return a decorator that adds a verb, as typer's own method does."""
        add = super().command(*arguments, **named)

        def add_verb(verb: Verb) -> Verb:
            # typer keeps the line breaks of a docstring, which are made for 100 columns. On a
            # narrower terminal every second line would have one or two words.
            paragraphs = inspect.cleandoc(verb.__doc__ or "").split("\n\n")
            verb.__doc__ = "\n\n".join(" ".join(text.split()) for text in paragraphs)
            return add(verb)

        return add_verb
