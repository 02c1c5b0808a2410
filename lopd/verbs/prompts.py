"""``lopd prompts``: prompt files made ready: chosen, deduplicated, cut to length, and without what
is in the evaluation sets.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from lopd.errors import ConfigError

app = typer.Typer(
    name="prompts",
    help="Make prompt files ready, and list the data sets whose columns are known.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(
    epilog="Example:  lopd prompts prepare dapo/ --format dapo_math_17k --against aime25.jsonl:aime_2025 --out opd.jsonl"
)
def prepare(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="JSONL or Parquet file, or a folder of them.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="JSONL to write, in our own form; its report goes beside it, as NAME.report.json."
        ),
    ],
    form: Annotated[
        str, typer.Option("--format", help="Whose columns SOURCE has: lopd prompts formats.")
    ] = "lopd",
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:FORMAT]", help="An evaluation set to keep clear of; may be repeated."
        ),
    ] = None,
    ngram: Annotated[
        int, typer.Option(min=5, help="Words in common that make a prompt one of the evaluation's.")
    ] = 13,
    min_coverage: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of an evaluation prompt's word groups that must be found; 0: one.",
        ),
    ] = 0.0,
    field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COLUMN", help="Column of question, messages, answer, prompt_id or domain."
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=VALUE", help="Only such rows; also a list, or {min=..., max=...}."
        ),
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(help="Text around {question}; or plain, boxed. Absent: the format's own."),
    ] = None,
    duplicates: Annotated[
        str | None,
        typer.Option(help="keep or drop repeated questions. Absent: drop, of our own form keep."),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="So many of those that are left.")
    ] = None,
    shuffle_seed: Annotated[
        int | None,
        typer.Option(min=0, help="Take them at random, by this seed. Absent: the first ones."),
    ] = None,
    max_chars: Annotated[
        int | None, typer.Option(min=1, help="Leave out longer prompts, in characters.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Leave out longer prompts, in tokens; needs --tokenizer."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder of a tokenizer with a chat template: lengths in tokens."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Task that must be able to use the answers. Absent: the domain's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report.")] = False,
) -> None:
    """Write a prompt set: read, choose, drop repeated questions, too long ones and those that share
    words with evaluation prompts; report what was left out.

    The same command does nothing where its inputs have not changed. It replaces only a file that it
    has written itself.
    """
    from lopd.tasks import prompt_files

    if max_tokens is not None and tokenizer is None:
        raise ConfigError(
            "--max-tokens counts tokens",
            where="lopd prompts prepare",
            remedy="give --tokenizer FOLDER",
        )
    settings = {
        "file": source.expanduser().absolute(),
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
    report = prompt_files.prepare(
        prompt_files.prompt_set(settings),
        out,
        against=against or [],
        ngram=ngram,
        min_coverage=min_coverage,
        tokenizer=tokenizer,
        task=task,
    )
    if as_json:
        typer.echo(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        for line in prompt_files.report_lines(report):
            typer.echo(line)


def _pairs(given: list[str] | None, option: str) -> dict[str, Any]:
    """``name=value`` with the value in TOML syntax; a bare word is text."""
    pairs: dict[str, Any] = {}
    for one in given or []:
        name, equals, text = one.partition("=")
        if not equals or not name:
            raise ConfigError(
                f"{one!r:.80} is not NAME=VALUE",
                where=option,
                remedy=f"write for example {option} domain=math",
            )
        try:
            parsed = tomllib.loads(f"value = {text}")
            pairs[name] = parsed["value"] if len(parsed) == 1 else text
        except tomllib.TOMLDecodeError:
            pairs[name] = text
    return pairs


@app.command(
    epilog="Example:  lopd prompts show aime25.jsonl --format aime_2025 --tokenizer Qwen3-8B"
)
def show(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="JSONL or Parquet file, or a folder of them.", show_default=False
        ),
    ],
    form: Annotated[
        str, typer.Option("--format", help="Whose columns SOURCE has: lopd prompts formats.")
    ] = "lopd",
    field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COLUMN", help="Column of question, messages, answer, prompt_id or domain."
        ),
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(help="Text around {question}; or plain, boxed. Absent: the format's own."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a tokenizer: the text that a model sees, chat template included."
        ),
    ] = None,
    thinking: Annotated[bool, typer.Option(help="What the chat template is told.")] = True,
    num_prompts: Annotated[int, typer.Option(min=1, help="So many, from the first.")] = 1,
) -> None:
    """Show prompts as a model sees them, with their answers."""
    from lopd.tasks import prompt_files

    settings = {
        "file": source.expanduser().absolute(),
        "format": form,
        "fields": _pairs(field, "--field"),
        "instruction": instruction,
        "thinking": thinking,
    }
    for line in prompt_files.shown(prompt_files.prompt_set(settings), num_prompts, tokenizer):
        typer.echo(line)


@app.command()
def formats() -> None:
    """List the data sets whose columns are known."""
    from lopd.tasks.formats import FORMATS

    for name, form in FORMATS.items():
        columns = {
            field: " or ".join(paths) for field, paths in form.columns.items()
        } | dict.fromkeys(form.computed, "computed")
        typer.echo(f"{name}: {form.title}  ({form.source})")
        if form.note:
            typer.echo(f"    {form.note}")
        if columns and name != "lopd":
            typer.echo(f"    {', '.join(f'{field} = {path}' for field, path in columns.items())}")
