"""``lopd prompts``: prepare prompt files.

A prepared file has chosen prompts, none of them twice, none too long, and none that is in an
evaluation set.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from lopd.errors import ConfigError
from lopd.verbs.arguments import HELP_OPTIONS, VerbGroup, input_path, options_named

app = VerbGroup(
    name="prompts",
    help="Prepare prompt files, and list the data sets whose columns are known.",
    no_args_is_help=True,
    context_settings=HELP_OPTIONS,
)
Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        parser=input_path,
        help="JSONL or Parquet file, or a folder of them.",
        show_default=False,
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="The data set whose columns SOURCE has. lopd prompts formats lists them.",
    ),
]
# For data sets whose columns are not known, or have changed since.
Field = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=COLUMN",
        help="The column that has the question, messages, answer, prompt_id or domain. May be "
        "repeated.",
    ),
]
# The boxed form asks for the answer in a box, where the verifier of math looks first.
Instruction = Annotated[
    str | None,
    typer.Option(help="Text around {question}, or plain, or boxed. If absent, that of the format."),
]
# The report beside the file has the hashes of all inputs, by which a later call sees that nothing
# changed.
PreparedFile = Annotated[
    Path,
    typer.Option(
        help="JSONL file to write, in the format of lopd. Its report is written beside it, as "
        "NAME.report.json."
    ),
]
# A student that has seen an evaluation problem while it was trained scores too well on it.
Against = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:FORMAT]",
        help="An evaluation set. Prompts that share words with it are left out. May be repeated.",
    ),
]
# 13 words in a row are the usual bound of published decontaminations. Fewer find chance matches,
# and more miss edited prompts.
Ngram = Annotated[
    int,
    typer.Option(
        min=5,
        help="Number of words in a row. A prompt that shares them with an evaluation prompt is "
        "left out.",
    ),
]
# Long evaluation prompts may share a common formula with many others. A share above 0 asks for more
# than one such group.
MinCoverage = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Share of an evaluation prompt's groups of words that must be found. 0 means that "
        "one group is enough.",
    ),
]
# Data sets mix sources, levels and languages, which a column tells apart.
Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="COLUMN=VALUE",
        help="Take only rows with this value. VALUE may also be a list, or {min=..., max=...}. "
        "May be repeated.",
    ),
]
# A file in the format of lopd has been prepared already, so its repetitions are meant.
Duplicates = Annotated[
    str | None,
    typer.Option(
        help="keep or drop questions that come twice. If absent, they are dropped, but kept in "
        "the format of lopd."
    ),
]
NumPrompts = Annotated[
    int | None, typer.Option(min=1, help="Take this number of the prompts that are left.")
]
# Files are often sorted by source or by level. The first prompts are then no fair sample.
ShuffleSeed = Annotated[
    int | None,
    typer.Option(min=0, help="Take them at random with this seed. If absent, take the first ones."),
]
MaxChars = Annotated[
    int | None, typer.Option(min=1, help="Leave out prompts with more characters.")
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Leave out prompts with more tokens. Needs --tokenizer.")
]
# Prompts are measured as a model sees them, so the template counts.
LengthTokenizer = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        parser=input_path,
        help="Folder of a tokenizer with a chat template. It measures lengths in tokens.",
    ),
]
# A prompt whose answer no verifier can use would count as wrong for every model.
TaskName = Annotated[
    str | None,
    typer.Option(
        help="The task that must be able to use the answers. If absent, that of the domain."
    ),
]
Report = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


# The options that are settings of a prompt set under another name.
_OPTIONS = {
    "format": "--format",
    "instruction": "--instruction",
    "duplicates": "--duplicates",
    "num_prompts": "--num-prompts",
    "shuffle_seed": "--shuffle-seed",
    "max_prompt_chars": "--max-chars",
    "max_prompt_tokens": "--max-tokens",
}


@app.command(
    epilog="Example:  lopd prompts prepare dapo/ --format dapo_math_17k "
    "--against aime25.jsonl:aime_2025 --out opd.jsonl"
)
def prepare(
    source: Source,
    out: PreparedFile,
    form: Format = "lopd",
    against: Against = None,
    ngram: Ngram = 13,
    min_coverage: MinCoverage = 0.0,
    field: Field = None,
    where: Where = None,
    instruction: Instruction = None,
    duplicates: Duplicates = None,
    num_prompts: NumPrompts = None,
    shuffle_seed: ShuffleSeed = None,
    max_chars: MaxChars = None,
    max_tokens: MaxTokens = None,
    tokenizer: LengthTokenizer = None,
    task: TaskName = None,
    as_json: Report = False,
) -> None:
    """Write a prompt set: read, choose, and leave out what must not be in it.

    Reads SOURCE and the evaluation sets. Writes --out and its report. It leaves out questions that
    come twice, prompts that are too long, and prompts that share words with evaluation prompts. The
    report says how many of each.

    If its inputs have not changed, the command does nothing. It replaces only a file that it has
    written itself.
    """
    from lopd.tasks import prompt_files

    # Characters are no measure for tokens: a formula has far more tokens per character.
    if max_tokens is not None and tokenizer is None:
        raise ConfigError(
            "--max-tokens needs a tokenizer, because it counts tokens",
            where="lopd prompts prepare",
            remedy="add --tokenizer FOLDER",
        )
    # The same settings as those of prompts.* in a configuration, under the same names.
    settings = {
        "file": source.absolute(),
        "format": form,
        "fields": _pairs(field, "--field"),
        "where": _pairs(where, "--where"),
        "instruction": instruction,
        "duplicates": duplicates,
        "num_prompts": num_prompts,
        "shuffle_seed": shuffle_seed,
        "max_prompt_chars": max_chars,
        "max_prompt_tokens": max_tokens,
    }
    # Around this alone: "format" and "duplicates" are words of other messages too.
    with options_named(_OPTIONS):
        chosen = prompt_files.prompt_set(settings)
    report = prompt_files.prepare(
        chosen,
        out,
        against=against or [],
        ngram=ngram,
        min_coverage=min_coverage,
        tokenizer=tokenizer,
        task=task,
    )
    _print_report(report, as_json=as_json)


def _print_report(report: dict[str, Any], *, as_json: bool) -> None:
    """Print the report of a prompt file."""
    from lopd.tasks import prompt_files

    if as_json:
        typer.echo(json.dumps(report, indent=1, ensure_ascii=False))
        return
    for line in prompt_files.report_lines(report):
        typer.echo(line)


def _pairs(given: list[str] | None, option: str) -> dict[str, Any]:
    """Return NAME=VALUE words as a dict.

    Args:
        given: The words. A value is TOML. A value that is not TOML is text.
        option: The name of the option, for error lines.

    Raises:
        ConfigError: A word has no name or no equals sign.
    """
    pairs: dict[str, Any] = {}
    # The same option may be given several times, with one pair each.
    for word in given or []:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise ConfigError(
                f"{word!r:.80} is not of the form NAME=VALUE",
                where=option,
                remedy=f"write for example {option} domain=math",
            )
        try:
            parsed = tomllib.loads(f"value = {text}")
        except tomllib.TOMLDecodeError:
            # A bare word, such as domain=math.
            pairs[name] = text
        else:
            # Text with line breaks may parse as several settings. It was meant as text.
            pairs[name] = parsed["value"] if len(parsed) == 1 else text
    return pairs


@app.command(
    epilog="Example:  lopd prompts show aime25.jsonl --format aime_2025 --tokenizer Qwen3-8B"
)
def show(
    source: Source,
    form: Format = "lopd",
    field: Field = None,
    instruction: Instruction = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            parser=input_path,
            help="Folder of a tokenizer. With it, the text that a model sees is shown, with the "
            "chat template.",
        ),
    ] = None,
    thinking: Annotated[
        bool, typer.Option(help="Whether the chat template lets the model think.")
    ] = True,
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Show this number of prompts, from the first on.")
    ] = 1,
) -> None:
    """Show prompts as a model sees them, with their answers.

    Reads SOURCE and the tokenizer. Writes nothing.
    """
    from lopd.tasks import prompt_files

    settings = {
        "file": source.absolute(),
        "format": form,
        "fields": _pairs(field, "--field"),
        "instruction": instruction,
        "thinking": thinking,
    }
    # The code that shows a prompt is the code that a run reads prompts with.
    for line in prompt_files.shown(prompt_files.prompt_set(settings), num_prompts, tokenizer):
        typer.echo(line)


@app.command(epilog="Example:  lopd prompts formats")
def formats() -> None:
    """List the data sets whose columns are known, for --format. Reads and writes no file."""
    from lopd.tasks.formats import FORMATS

    for name, form in FORMATS.items():
        # Versions of a data set name a column differently. The first one that a row has counts.
        columns = {field: " or ".join(paths) for field, paths in form.columns.items()}
        # These fields are computed from a whole row, so no column is theirs.
        columns |= dict.fromkeys(form.computed, "computed")
        typer.echo(f"{name}: {form.title}  ({form.source})")
        # What a user should know before the set is used.
        if form.note:
            typer.echo(f"    {form.note}")
        # The format of lopd itself has its columns under their own names.
        if columns and name != "lopd":
            typer.echo(f"    {', '.join(f'{field} = {path}' for field, path in columns.items())}")
