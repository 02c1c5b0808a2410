"""``lopd audit``: can these responses have come from this teacher?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lopd.errors import EXIT_CODE, DataError

if TYPE_CHECKING:
    from lopd.audit import Scores
    from lopd.records import Manifest, Response


def audit(
    responses: Annotated[
        Path,
        typer.Argument(
            metavar="RESPONSES",
            help="Demonstrations or rollouts: a folder with manifest.json.",
            show_default=False,
        ),
    ],
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Hugging Face folder. Absent: columns teacher_logprobs and teacher_entropy of the folder."
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="At which it would have sampled. Absent: as the manifest says."
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="Nucleus mass. Absent: as the manifest says."),
    ] = None,
    max_responses: Annotated[int, typer.Option(min=1, help="Take so many at random.")] = 1000,
    tolerance: Annotated[
        float,
        typer.Option(
            min=1e-9,
            help="A mean drift, nats per token, that must have shown before the verdict is consistent.",
        ),
    ] = 0.005,
    alpha: Annotated[
        float,
        typer.Option(
            min=1e-9, max=0.5, help="How often a true teacher may be called inconsistent."
        ),
    ] = 0.01,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of responses.")] = 0,
    picture: Annotated[
        Path | None,
        typer.Option(help="PNG with the curves by position, entropy and kind of the token before."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Test whether responses can have come from a teacher at a temperature and top-p: consistent,
    inconsistent (exit code 2), or cannot tell.

    For text that the teacher sampled, log-probability plus entropy has mean zero at every token,
    whatever the text. The verdict is of the mean over all tokens.
    """
    from lopd.artifacts import read_manifest
    from lopd.audit import as_json as plain
    from lopd.audit import audit as examine
    from lopd.report.audit_picture import draw_audit
    from lopd.report.audit_view import show_audit

    manifest = read_manifest(responses)
    at, mass = _conditions(responses, manifest, temperature, top_p)
    scores = _scores(responses, manifest, teacher, at, mass, max_responses, seed)
    result: dict[str, Any] = {
        **plain(examine(scores, tolerance=tolerance, alpha=alpha)),
        "temperature": at,
        "top_p": mass,
        "teacher": str(teacher or ""),
    }
    if picture is not None:
        draw_audit(result, picture)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        show_audit(result, picture)
    if result["verdict"] == "inconsistent":
        raise typer.Exit(EXIT_CODE)


def _conditions(
    folder: Path, manifest: Manifest, temperature: float | None, top_p: float | None
) -> tuple[float, float]:
    sampling = manifest.sampling
    at, mass = temperature or sampling.get("temperature"), top_p or sampling.get("top_p")
    if at is None or mass is None:
        raise DataError(
            "the manifest does not say at which temperature and top-p",
            where=str(folder),
            remedy="give --temperature and --top-p",
        )
    if sampling.get("top_k", -1) != -1 or sampling.get("min_p", 0.0) != 0.0:
        limit = "temperature and top-p alone"
        raise DataError(
            f"sampled with top_k {sampling.get('top_k')}, min_p {sampling.get('min_p')}",
            where=str(folder),
            limit=limit,
        )
    return float(at), float(mass)


def _scores(
    folder: Path,
    manifest: Manifest,
    teacher: Path | None,
    temperature: float,
    top_p: float,
    count: int,
    seed: int,
) -> Scores:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute

    from lopd.artifacts import identify_model, read_shard
    from lopd.audit.scores import score_from_columns, score_with_model

    if manifest.rows == 0:
        raise DataError("no responses", where=str(folder))
    chosen = np.sort(
        np.random.default_rng(seed).choice(manifest.rows, min(count, manifest.rows), replace=False)
    )
    tables, start = [], 0
    for shard in manifest.shards:
        here = chosen[(chosen >= start) & (chosen < start + shard.rows)] - start
        start += shard.rows
        if len(here):
            tables.append(read_shard(folder, shard).take(pa.array(here)))
    table = pa.concat_tables(tables)
    if (
        teacher is not None and "teacher" in table.column_names
    ):  # of several teachers: its own alone, or, where none is, all
        own = pa.compute.equal(table.column("teacher"), identify_model(teacher).weights)
        table = table.filter(own) if pa.compute.any(own).as_py() else table
    if teacher is not None:
        return score_with_model(
            teacher, _records(table, folder), temperature=temperature, top_p=top_p
        )
    scores = score_from_columns(table)
    if scores is None:
        raise DataError(
            "no column teacher_entropy",
            where=str(folder),
            remedy="give --teacher FOLDER: it is scored here, in float32",
        )
    if (temperature, top_p) != (1.0, 1.0):
        raise DataError(
            "its entropies are at temperature 1 and top-p 1",
            where=str(folder),
            remedy="give --teacher FOLDER for another temperature",
        )
    return scores


def _records(table: Any, folder: Path) -> list[Response]:
    from lopd.cache import from_table

    return [response for response, _ in from_table(table, where=str(folder))]
