"""``lopd cache``: look at a cache of teacher log-probabilities, check it, or derive another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lopd.errors import EXIT_CODE, LopdError
from lopd.verbs.arguments import AsJson, Cache, Tokenizer, VerbGroup
from lopd.verbs.cache_figures import figures_of, print_json, show_new_cache, size_line
from lopd.verbs.cache_import import EPILOG as IMPORT_EPILOG
from lopd.verbs.cache_import import import_
from lopd.verbs.cache_judge import EPILOG, judge

app = VerbGroup(
    help=(
        "Verify, inspect, merge, split, export and import caches of teacher log-probabilities.\n\n"
        "docs/cache_format.md specifies the format."
    ),
    no_args_is_help=True,
)
# An artifact of other inputs that is there is not overwritten.
Out = Annotated[
    Path, typer.Option("--out", help="Folder of the new artifact to write.", show_default=False)
]


# In its place in the list of verbs: before those that derive another cache.
app.command(epilog=EPILOG)(judge)


@app.command(epilog="Example:  lopd cache verify runs/tiny_moe/score")
def verify(
    cache: Cache,
    # Without it, a token id beyond the vocabulary cannot be noticed.
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Size of the vocabulary, if neither the manifest nor the teacher's folder has it.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find everything that is wrong with a cache.

    Reads the whole cache and writes nothing. The command compares files with their checksums, and
    checks that each response has possible values. It names the responses that are wrong. It ends
    with exit code 2 if anything is wrong.
    """
    from lopd.cache.checks import check_cache
    from lopd.report.cache_view import show_findings

    # All findings are collected first: a user then repairs a cache once, not error by error.
    findings, figures = check_cache(cache, vocab_size=vocab_size)
    if as_json:
        rows = [finding.as_json() for finding in findings]
        print_json({"ok": not len(findings), **figures, "findings": rows})
    else:
        show_findings(str(cache), findings, figures)
    if len(findings):
        raise typer.Exit(EXIT_CODE)


@app.command(epilog="Example:  lopd cache inspect runs/tiny_moe/rollout --sample 3")
def inspect(
    cache: Cache,
    sample: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also show the text of this number of prompts and responses. Where they have "
            "scores, the colour of a token shows how far teacher and student disagree. Answers of "
            "an evaluation have their verdict.",
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the choice of responses.")] = 0,
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
) -> None:
    """Show what an artifact of responses holds, and which models made it.

    Reads a cache, rollouts, demonstrations or the answers of an evaluation (run.dir/demonstrate,
    run.dir/rollout, run.dir/score, run.dir/evaluate/answers-distilled), and writes nothing. The
    command shows sizes, histograms of lengths, the advantages at the start of training, how
    responses end, and duplicates.
    """
    from lopd.cache.statistics import inspect_cache
    from lopd.report.cache_view import show_inspection, show_responses
    from lopd.verbs.cache_samples import require_responses, sample_of

    require_responses(cache)
    # One pass over the cache, whatever is shown of it.
    figures = inspect_cache(cache)
    shown = sample_of(cache, sample, seed, tokenizer) if sample else []
    if as_json:
        print_json({**figures, "sample": [one.as_json() for one in shown]} if sample else figures)
        return
    show_inspection(figures)
    # The responses come after the statistics, which are too many to scroll back for.
    if shown:
        show_responses(shown)


@app.command(
    epilog="Example:  lopd cache merge runs/math/score runs/code/score --out caches/both "
    "--teacher-column"
)
def merge(
    caches: Annotated[
        list[Path],
        typer.Argument(
            metavar="CACHE CACHE...", help="Folders of the caches to join.", show_default=False
        ),
    ],
    out: Out,
    # Off by default: mixed teachers are more often a mistake than a wish.
    teacher_column: Annotated[
        bool,
        typer.Option(
            "--teacher-column",
            help="Allow caches of several teachers. Each row then names its own teacher.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Join several caches into one.

    Reads the caches and writes a new one into --out. The command refuses duplicate keys, mixed
    temperatures, mixed tokenizers, and mixed teachers without --teacher-column.
    """
    from lopd.cache import merging

    # typer has no way to ask for two or more arguments.
    if len(caches) < 2:
        raise LopdError(
            "only one cache is given",
            where="lopd cache merge",
            limit="at least 2",
            remedy="give the folders of the caches to join",
        )
    manifest = merging.merge(caches, out, teacher_column=teacher_column)
    show_new_cache(manifest, out, as_json)


@app.command(epilog="Example:  lopd cache split runs/tiny_moe/score --parts 2 --out caches/halves")
def split(
    cache: Cache,
    out: Out,
    parts: Annotated[int, typer.Option(min=2, help="Number of parts.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Cut a cache into parts.

    Reads the cache and writes the parts into OUT/part-00, OUT/part-01 and so on. All responses to
    one prompt are in the same part.
    """
    from lopd.cache import splitting
    from lopd.report.cache_view import show_line

    # By a hash of the prompt, so that the parts are the same on every machine.
    manifests = splitting.split(cache, out, parts)
    folders = [out / f"part-{part:02d}" for part in range(len(manifests))]
    if as_json:
        print_json(
            [
                figures_of(manifest, folder)
                for manifest, folder in zip(manifests, folders, strict=True)
            ]
        )
        return
    for manifest, folder in zip(manifests, folders, strict=True):
        # 12 of the 64 hexadecimal digits are enough to tell artifacts apart on a screen.
        show_line(f"{folder}: {manifest.rows:,} responses, fingerprint {manifest.fingerprint[:12]}")


@app.command(
    epilog="Example:  lopd cache export runs/tiny_moe/score "
    "--out tiny-lightning-opd-precomputed.parquet"
)
def export(
    cache: Cache,
    out: Annotated[
        Path, typer.Option("--out", help="The Parquet file to write.", show_default=False)
    ],
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
) -> None:
    """Write the Parquet file that the paper's reference code trains on.

    Reads the cache and the tokenizer. Writes one file. The command says what that format cannot
    hold.
    """
    from lopd.cache import reference_export
    from lopd.report.cache_view import show_line

    # That format has text and not token ids, so a tokenizer is needed for the prompts.
    about = reference_export.export_reference(cache, out, tokenizer)
    if as_json:
        print_json(about)
        return
    show_line(size_line(out, about))
    # What is lost is said every time: an exported cache looks complete.
    show_line(f"this format cannot hold: {'; '.join(about['loses'])}", "yellow")
    # The reference code tokenises the text of prompts again. Where that gives other ids, it trains
    # on other prompts than those that were sampled from.
    if about["prompts_changed"]:
        show_line(
            f"{about['prompts_changed']:,} prompts get other ids "
            "when that code tokenises their text again",
            "yellow",
        )


# In its place in the list of verbs: behind the export.
app.command("import", epilog=IMPORT_EPILOG)(import_)


# Five folds, as in the paper. A token must not be corrected by its own response.
Folds = Annotated[
    int,
    typer.Option(
        help="Number of folds. Prompts are divided into folds, and the bias of a token is "
        "fitted on the other folds."
    ),
]
PositionBins = Annotated[int, typer.Option(help="Number of bins for the position in the response.")]
# Geometric steps: most tokens have a surprisal near 0, and few have a large one.
SurprisalBins = Annotated[
    int,
    typer.Option(
        help="Number of bins for the student's surprisal, in geometric steps from 0.01 to 8 nats."
    ),
]
# Cells with few tokens would otherwise fit noise.
Smoothing = Annotated[
    float,
    typer.Option(help="Weight of the global mean in each cell, as a number of responses."),
]
TokenShare = Annotated[
    float,
    typer.Option(
        help="Share of the token table in the bias. The table of position and surprisal has the "
        "rest."
    ),
]
FoldSeed = Annotated[int, typer.Option(help="Seed for the division into folds.")]
ForeignOnly = Annotated[
    bool,
    typer.Option(
        help="Leave the scores of teachers as they are that made the student's demonstrations. "
        "Without this, every teacher of the cache is corrected."
    ),
]
ShowTokens = Annotated[
    int, typer.Option(min=0, help="Number of tokens of the token table to show.")
]


@app.command(epilog="Example:  lopd cache residualise runs/foreign/score --out caches/residualised")
def residualise(
    cache: Cache,
    out: Out,
    folds: Folds = 5,
    position_bins: PositionBins = 10,
    surprisal_bins: SurprisalBins = 8,
    smoothing: Smoothing = 1.0,
    token_share: TokenShare = 0.5,
    seed: FoldSeed = 0,
    foreign_only: ForeignOnly = False,
    show: ShowTokens = 15,
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
) -> None:
    """Correct the scores of a teacher that did not make the demonstrations (Lightning OPD 2.0).

    Reads the cache and writes a new one into --out. The command subtracts from each score what the
    style of the teacher alone predicts. The bias of a token is fitted on responses to other
    prompts, from its id, its position and its surprisal. In a cache of several teachers, each
    teacher's bias is fitted on that teacher's rows alone.
    """
    from lopd.cache.residualise import residualise as write_residualised
    from lopd.cache.style import Settings
    from lopd.report.cache_view import show_line, show_residualisation
    from lopd.verbs.cache_samples import token_text

    # The defaults are those of the method: 5 folds, and half of the bias from each table (arXiv
    # 2607.28449). Bins and smoothing are choices of this project.
    settings = Settings(folds, position_bins, surprisal_bins, smoothing, token_share, seed)
    manifest = write_residualised(cache, out, settings, foreign_only=foreign_only)
    about = manifest.extra["residualisation"]
    if as_json:
        print_json({**figures_of(manifest, out), **about})
        return
    show_new_cache(manifest, out, as_json)
    # The correction is for a foreign teacher. With the own one it takes away what should be learnt.
    for name in _corrected_own(manifest):
        show_line(
            f"{name} made the student's demonstrations itself: "
            "what is taken away here is not a foreign style but the lesson",
            "yellow",
        )
    show_residualisation(about, token_text(cache, tokenizer), show)


def _corrected_own(manifest: Any) -> list[str]:
    """Return the corrected teachers that made the student's demonstrations, for a line."""
    from lopd.cache.teachers import own_teachers

    own = own_teachers(manifest)
    teachers = manifest.extra["residualisation"].get("teachers")
    if teachers is None:
        return ["this teacher"] if own else []
    return [f"teacher {name}" for name, about in teachers.items() if about["weights"] in own]
