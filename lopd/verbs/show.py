"""``lopd show``: what the models of a run answered, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lopd.errors import ConfigError
from lopd.verbs.arguments import AsJson, Tokenizer
from lopd.verbs.watch import run_directory

if TYPE_CHECKING:
    from lopd.records import Key
    from lopd.report.transcripts_view import Comparison
    from lopd.verbs.run_transcripts import Source

EPILOG = "Example:  lopd show runs/tiny_moe --worst 5   lopd show runs/tiny_moe --fixed 3"
# Shown where no choice is made.
_DEFAULT = 3
_BEFORE = "sft"
_AFTER = "distilled"


Run = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Run directory, TOML file of a run, or one artifact of responses.",
        show_default=False,
    ),
]
PromptName = Annotated[
    str | None, typer.Option(help="A prompt's name, or one response as NAME/SAMPLE.")
]
Worst = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1000,
        help="The responses of the last model on whose tokens it disagrees most with the "
        "teacher, by the mean over tokens. The choice if none is made.",
    ),
]
# These two compare the verdicts on the same prompt before and after distill.
Fixed = Annotated[
    int | None,
    typer.Option(min=1, max=1000, help="Wrong by the SFT student, right after distill."),
]
Broken = Annotated[
    int | None,
    typer.Option(min=1, max=1000, help="Right by the SFT student, wrong after distill."),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        help="A model to show: teacher, base, sft, sft_longer or distilled. May be given "
        "several times. If absent: teacher, sft and distilled."
    ),
]


def show(
    run: Run,
    prompt: PromptName = None,
    worst: Worst = None,
    fixed: Fixed = None,
    broken: Broken = None,
    model: Models = None,
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
) -> None:
    """Show what the teacher, the SFT student and the distilled student answered, side by side.

    Tokens are red where the teacher finds them less likely than the student does, and green where
    it finds them likelier. Reads the stage evaluate. Before it is done, the rollouts are shown with
    their scores. Nothing is written.
    """
    given = {"--prompt": prompt, "--worst": worst, "--fixed": fixed, "--broken": broken}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise ConfigError(
            f"{' and '.join(chosen)} are two choices",
            where="lopd show",
            remedy=f"leave out {chosen[-1]}",
        )
    # One artifact can be shown alone, for example the rollouts before anything was distilled.
    place = run if (run / "manifest.json").is_file() else run_directory(run)
    # Imported here: a wrong option is said before anything heavy is imported.
    from lopd.verbs import run_transcripts as transcripts

    # The worst responses are what a reader wants to see first.
    if not chosen:
        worst = _DEFAULT
    sources = transcripts.sources_of(place, model or [], scored=worst is not None)
    keys: list[Key]
    if prompt is not None:
        keys = transcripts.of_prompt(sources, prompt)
    elif worst is not None:
        keys = transcripts.worst(sources[-1], worst)
    else:
        before, after = _two(place)
        keys = transcripts.changed(
            before, after, fixed or broken or _DEFAULT, to_right=fixed is not None
        )
    found = transcripts.compare(sources, keys, place, tokenizer)
    if as_json:
        typer.echo(json.dumps([one.as_json() for one in found], indent=1))
        return
    # Without an evaluation the rollouts are shown, from the stage score.
    is_evaluated = sources[0].responses.parent.name == "evaluate"
    told = transcripts.earlier_answers(place, "evaluate" if is_evaluated else "score").told
    if told:
        typer.echo(f"outdated: {told}")
    _print(found)


def _print(found: list[Comparison]) -> None:
    """Print the responses as text: beside each other on a terminal, below each other in a file."""
    from rich.console import Console

    from lopd.report.text_width import text_width
    from lopd.report.transcripts_view import show_comparisons

    console = Console(highlight=False)
    if not console.is_terminal:
        # In a file responses stand below each other, and a line may be searched for.
        console = Console(highlight=False, width=text_width() - 1)
    if not found:
        typer.echo("no such answers", err=True)
    show_comparisons(found, console)


def _two(place: Path) -> tuple[Source, Source]:
    """Return the SFT student and the distilled student."""
    from lopd.verbs.run_transcripts import sources_of

    before, after = sources_of(place, [_BEFORE, _AFTER], scored=False)
    return before, after
