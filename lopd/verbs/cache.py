"""``lopd cache``: look at a cache of teacher log-probabilities, check it, and make others from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lopd.errors import EXIT_CODE, LopdError

if TYPE_CHECKING:
    from collections.abc import Callable

app = typer.Typer(
    help="Verify, inspect, merge, split, export, import caches of teacher log-probabilities. Format: docs/cache_format.md.",
    no_args_is_help=True,
)
Cache = Annotated[
    Path,
    typer.Argument(
        metavar="CACHE",
        help="Folder with manifest.json and shards: run.dir/score, for one.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Folder of the new artifact.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        help="Hugging Face folder with the tokenizer. Absent: the teacher's, where the manifest says it is."
    ),
]


def _print(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


@app.command(
    epilog="Exit code 2 if anything is wrong. Example:  lopd cache verify runs/tiny_moe/score"
)
def verify(
    cache: Cache,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Size of the vocabulary, where neither manifest nor teacher says it."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find everything that is wrong with a cache: files against their checksums, responses against
    what they can be. Names the responses.
    """
    from lopd.cache.checks import check_cache
    from lopd.report.cache_view import show_findings

    findings, figures = check_cache(cache, vocab_size=vocab_size)
    if as_json:
        _print(
            {
                "ok": not len(findings),
                **figures,
                "findings": [finding.as_json() for finding in findings],
            }
        )
    else:
        show_findings(str(cache), findings, figures)
    if len(findings):
        raise typer.Exit(EXIT_CODE)


@app.command(epilog="Example:  lopd cache inspect runs/tiny_moe/score --sample 3")
def inspect(
    cache: Cache,
    sample: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also show so many responses, tokens coloured by teacher-student disagreement.",
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Which ones.")] = 0,
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a cache holds, by whom, how long: sizes, histograms, advantages at the start,
    endings, duplicates.
    """
    from lopd.cache.statistics import inspect_cache
    from lopd.report.cache_view import show_inspection, show_responses

    figures = inspect_cache(cache)
    if as_json:
        _print(figures)
        return
    show_inspection(figures)
    if sample:
        show_responses(_sample(cache, sample, seed), _text_of(cache, tokenizer))


def _sample(folder: Path, count: int, seed: int) -> Any:
    import numpy as np

    from lopd.artifacts import read_manifest
    from lopd.cache import read_rows

    rows = read_manifest(folder).rows
    chosen = set(np.random.default_rng(seed).choice(rows, min(count, rows), replace=False).tolist())
    found = [row for index, row in enumerate(read_rows(folder)) if index in chosen]
    return [(response, scores) for response, scores in found if scores is not None]


def _text_of(folder: Path, tokenizer: Path | None) -> Callable[[int], str]:
    """A token id as text where a tokenizer is at hand, else as a number."""
    from lopd.artifacts import read_manifest
    from lopd.tasks.tokenizer import decode, load_tokenizer

    known = next(
        (
            identity
            for role, identity in read_manifest(folder).models.items()
            if role.startswith("teacher")
        ),
        None,
    )
    place = tokenizer or (Path(known.path) if known is not None else None)
    if place is None or (tokenizer is None and not (place / "tokenizer.json").is_file()):
        return lambda token: f"{token} "
    loaded = load_tokenizer(place)
    return lambda token: decode(loaded, [token])


@app.command(
    epilog="Example:  lopd cache merge runs/math/score runs/code/score --out caches/both --teacher-column"
)
def merge(
    caches: Annotated[list[Path], typer.Argument(metavar="CACHE CACHE...", show_default=False)],
    out: Out,
    teacher_column: Annotated[
        bool,
        typer.Option(
            "--teacher-column", help="Caches of several teachers: each row names its own."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Join caches. Refuses duplicate keys, mixed temperatures, mixed tokenizers, and mixed teachers
    without a teacher column.
    """
    from lopd.cache import merging

    if len(caches) < 2:
        raise LopdError(
            "one cache",
            where="lopd cache merge",
            limit="at least two",
            remedy="give the folders of the caches to join",
        )
    manifest = merging.merge(caches, out, teacher_column=teacher_column)
    _made(manifest, out, as_json)


@app.command(epilog="Example:  lopd cache split runs/tiny_moe/score --parts 2 --out caches/halves")
def split(
    cache: Cache,
    out: Out,
    parts: Annotated[int, typer.Option(min=2, help="Number of parts.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Cut a cache into parts (OUT/part-00, ..); a prompt with all its responses goes into exactly
    one.
    """
    from lopd.cache import splitting
    from lopd.report.cache_view import show_line

    manifests = splitting.split(cache, out, parts)
    if as_json:
        _print(
            [
                _figures(manifest, out / f"part-{part:02d}")
                for part, manifest in enumerate(manifests)
            ]
        )
    for part, manifest in enumerate(manifests if not as_json else []):
        show_line(
            f"{out / f'part-{part:02d}'}: {manifest.rows:,} responses, fingerprint {manifest.fingerprint[:12]}"
        )


@app.command(
    epilog="Example:  lopd cache export runs/tiny_moe/score --out tiny-lightning-opd-precomputed.parquet"
)
def export(
    cache: Cache,
    out: Annotated[Path, typer.Option("--out", help="The parquet file.", show_default=False)],
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
) -> None:
    """Write the parquet file that the paper's reference code trains on; says what that format
    cannot hold.
    """
    from lopd.cache import reference_export
    from lopd.report.cache_view import show_line

    about = reference_export.export_reference(cache, out, tokenizer)
    if as_json:
        _print(about)
        return
    show_line(
        f"{out}: {about['rows']:,} responses, {about['tokens']:,} tokens, {about['bytes_per_token']:.2f} bytes per token"
    )
    show_line(f"this format cannot hold: {'; '.join(about['loses'])}", "yellow")
    if about["prompts_changed"]:
        show_line(
            f"{about['prompts_changed']:,} prompts get other ids when that code tokenises their text again",
            "yellow",
        )


@app.command(
    "import",
    epilog="Example:  lopd cache import rollouts-lightning-opd-precomputed.parquet --tokenizer checkpoints/sft --out caches/imported",
)
def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="PARQUET",
            help="The file that the reference code's trainer reads.",
            show_default=False,
        ),
    ],
    out: Out,
    tokenizer: Annotated[
        Path,
        typer.Option(
            help="Hugging Face folder of the student: the prompts' text is tokenised with it.",
            show_default=False,
        ),
    ],
    teacher: Annotated[
        Path | None, typer.Option(help="Hugging Face folder of the teacher, as you declare it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a cache from the parquet file of the paper's reference code; says what that lacks."""
    from lopd.cache import reference_import
    from lopd.report.cache_view import show_line

    manifest = reference_import.import_reference(file, out, tokenizer, teacher=teacher)
    _made(manifest, out, as_json)
    for reason in manifest.extra["lacks"] if not as_json else []:
        show_line(f"lacks {reason}", "yellow")


@app.command(epilog="Example:  lopd cache residualise runs/foreign/score --out caches/residualised")
def residualise(
    cache: Cache,
    out: Out,
    folds: Annotated[
        int, typer.Option(help="Folds, by prompt: a token's bias comes from the other folds.")
    ] = 5,
    position_bins: Annotated[int, typer.Option(help="Bins of the position in the response.")] = 10,
    surprisal_bins: Annotated[
        int, typer.Option(help="Bins of the student's surprisal, geometric from 0.01 to 8 nats.")
    ] = 8,
    smoothing: Annotated[
        float, typer.Option(help="How many responses speak for the mean in every cell.")
    ] = 1.0,
    token_share: Annotated[
        float,
        typer.Option(
            help="Share of the token table in the bias; the rest is of position and surprisal."
        ),
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the folds.")] = 0,
    show: Annotated[int, typer.Option(min=0, help="Tokens of the table to show.")] = 15,
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
) -> None:
    """Correct the scores of a teacher other than that of the demonstrations (Lightning OPD 2.0):
    take away what its style alone predicts.

    The bias of a token is fitted on responses to other prompts: by its id, and by its position and
    surprisal. The result is a cache of its own.
    """
    from lopd.cache.residualise import residualise as make
    from lopd.cache.style import Settings
    from lopd.report.cache_view import show_line, show_residualisation

    manifest = make(
        cache, out, Settings(folds, position_bins, surprisal_bins, smoothing, token_share, seed)
    )
    about = manifest.extra["residualisation"]
    if as_json:
        _print({**_figures(manifest, out), **about})
        return
    _made(manifest, out, as_json)
    if manifest.lineage.get("consistent"):
        show_line(
            "this teacher made the student's demonstrations itself: what is taken away here is not a foreign style but the lesson",
            "yellow",
        )
    show_residualisation(about, _text_of(cache, tokenizer), show)


def _made(manifest: Any, out: Path, as_json: bool) -> None:
    from lopd.report.cache_view import show_line

    figures = _figures(manifest, out)
    if as_json:
        _print(figures)
    else:
        show_line(
            f"{out}: {figures['rows']:,} responses, {figures['tokens']:,} tokens, {figures['bytes_per_token']:.2f} bytes per token"
        )
        show_line(f"fingerprint {figures['fingerprint']}")


def _figures(manifest: Any, folder: Path) -> dict[str, Any]:
    from lopd.cache import column_bytes

    tokens, size = (
        sum(shard.tokens for shard in manifest.shards),
        sum(column_bytes(folder).values()),
    )
    lacks = list(manifest.extra.get("lacks", []))
    return {
        "folder": str(folder), "fingerprint": manifest.fingerprint, "rows": manifest.rows, "tokens": tokens, "bytes": size,
        "bytes_per_token": size / max(1, tokens), "lacks": lacks,
    }  # fmt: skip
