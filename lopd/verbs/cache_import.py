"""``lopd cache import``: an artifact from files that other programs have written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lopd.errors import LopdError
from lopd.verbs.arguments import AsJson, input_path

EPILOG = (
    "Examples:  lopd cache import rollouts-lightning-opd-precomputed.parquet "
    "--tokenizer checkpoints/sft --out caches/imported\n\n"
    "lopd cache import agent.jsonl --tokenizer checkpoints/sft --as demonstrations "
    "--teacher Qwen3-32B --out caches/agent"
)


def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            parser=input_path,
            help="Transcripts (JSONL or Parquet), or the Parquet file that the trainer of the "
            "reference code reads.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the new artifact to write.", show_default=False)
    ],
    tokenizer: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            parser=input_path,
            help="Hugging Face folder of the student. Its tokenizer has the ids, and its chat "
            "template renders messages.",
            show_default=False,
        ),
    ],
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            parser=input_path,
            help="Hugging Face folder of the teacher that scored, or that wrote demonstrations. "
            "The file does not name it, so the cache records it as your own statement.",
        ),
    ] = None,
    student: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            parser=input_path,
            help="Hugging Face folder of the model that wrote the answers of rollouts, as your own "
            "statement. Only for transcripts.",
        ),
    ] = None,
    kind: Annotated[
        Literal["rollouts", "demonstrations"],
        typer.Option(
            "--as", help="What transcripts are. With teacher_logprobs they are a teacher cache."
        ),
    ] = "rollouts",
    as_json: AsJson = False,
) -> None:
    """Make a cache from transcripts, or from the Parquet file of the paper's reference code.

    Reads the file and the tokenizer. Writes a new cache into --out. A transcript has messages with
    roles, or token ids with a mask; tokens that the model did not write carry no loss. The command
    says what the file lacks.
    """
    from lopd.cache import reference_import, transcript_import
    from lopd.report.cache_view import show_line
    from lopd.verbs.cache_figures import show_new_cache

    if transcript_import.is_reference_file(file):
        for name, given in (("--student", student is not None), ("--as", kind != "rollouts")):
            if given:
                raise LopdError(
                    f"{name} has no effect for the file of the reference code",
                    where="lopd cache import",
                    remedy=f"remove {name}",
                )
        manifest = reference_import.import_reference(file, out, tokenizer, teacher=teacher)
    else:
        manifest = transcript_import.import_transcripts(
            file, out, tokenizer, kind=kind, student=student, teacher=teacher
        )
    show_new_cache(manifest, out, as_json)
    # Later checks look for these: without sampling log-probabilities, for one, no importance
    # weights.
    for reason in manifest.extra["lacks"] if not as_json else []:
        show_line(f"lacks {reason}", "yellow")
