"""A derived cache for a foreign teacher: teacher_logprobs minus the style bias that other prompts'
responses predict. See lopd.cache.style.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lopd import cache
from lopd.artifacts import ArtifactWriter, read_manifest, read_shard
from lopd.cache.checks import RESIDUALISED, flat, require_sound, vocabulary
from lopd.cache.style import Effect, Settings, StyleTables, Tokens, prepare
from lopd.cache.table import ENTROPY, TAIL, TOP_IDS, TOP_LOGPROBS, bare
from lopd.cache.tools import KIND, part_of
from lopd.errors import ArtifactError, LopdError
from lopd.records import Manifest

LISTED = 100  # tokens of the table in the manifest


def fold_of(prompt_id: str, settings: Settings) -> int:
    """All responses to a prompt are in one fold, the same on every machine."""
    return part_of(prompt_id, settings.folds, seed=f"fold {settings.seed}")


def residualise(source: Path, out: Path, settings: Settings) -> Manifest:
    """Publishes the derived cache; its manifest's extra.residualisation has the settings, the
    tables, and what they changed. Two passes, a shard at a time.

    ArtifactError: no cache of teacher and sampling log-probabilities; LopdError: it is not sound,
    or fewer than two folds have prompts.
    """
    _check(settings)
    manifest = read_manifest(source)
    if manifest.kind != KIND:
        raise ArtifactError(
            f"is of kind {manifest.kind}",
            where=str(source),
            limit=KIND,
            remedy="give the cache that the score stage made",
        )
    if sum(role.startswith("teacher") for role in manifest.models) > 1:
        remedy = "residualise the cache of each teacher, then merge them with --teacher-column"
        raise ArtifactError(
            "holds scores of several teachers, each with a style of its own",
            where=str(source),
            limit="one teacher",
            remedy=remedy,
        )
    require_sound(source)
    tables = StyleTables(settings, _vocab_size(source, manifest))
    folds: set[int] = set()
    for _, tokens in _batches(source, manifest, settings):
        tables.add(tokens)
        folds |= set(tokens.fold.tolist())
    if len(folds) < 2:
        raise LopdError(
            f"prompts in {len(folds)} folds",
            where=str(source),
            limit="at least 2, to fit on other prompts",
            remedy="use more prompts or folds",
        )
    writer = ArtifactWriter(
        out,
        kind=RESIDUALISED,
        inputs={f"residualise.{name}": value for name, value in settings.as_json().items()},
        parents={manifest.kind: manifest.fingerprint},
        models=manifest.models,
        sampling=manifest.sampling,
        lineage={**manifest.lineage, "residualised": True},
    )
    effect = Effect()
    for index, (table, tokens) in enumerate(_batches(source, manifest, settings)):
        bias = tables.bias(tokens)
        effect.add(tokens, bias, tables.bias(tokens, cross_fitted=False))
        if index not in writer.published:
            writer.publish_shard(index, _corrected(table, bias))
    num_tokens, num_bytes = effect.tokens, sum(cache.column_bytes(out).values())
    carried = {
        name: manifest.extra[name]
        for name in ("vocab_size", "end_token_ids", "logprob_bits")
        if name in manifest.extra
    }
    about = {
        "settings": settings.as_json(),
        "effect": effect.as_json(),
        "tokens": tables.token_table()[:LISTED],
        "context": tables.context_table(),
    }
    return writer.finish(
        **carried,
        logprob_loss=cache.logprob_loss(out),
        tokens=num_tokens,
        bytes=num_bytes,
        bytes_per_token=num_bytes / max(1, num_tokens),
        residualisation=about,
    )


def _check(settings: Settings) -> None:
    bounds = {
        "folds": (2, 1000),
        "position_bins": (1, 1000),
        "surprisal_bins": (1, 1000),
        "smoothing": (0, float("inf")),
        "token_share": (0, 1),
    }
    for name, (low, high) in bounds.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise LopdError(
                f"{name} {value}", where="lopd cache residualise", limit=f"{low} to {high}"
            )


def _vocab_size(folder: Path, manifest: Manifest) -> int:
    known = vocabulary(manifest)
    if known is not None:
        return known
    return 1 + max(
        (
            int(flat(read_shard(folder, shard), "token_ids")[0].max(initial=0))
            for shard in manifest.shards
        ),
        default=0,
    )


def _batches(
    folder: Path, manifest: Manifest, settings: Settings
) -> Iterator[tuple[pa.Table, Tokens]]:
    for shard in manifest.shards:
        table = read_shard(folder, shard)
        for name in ("teacher_logprobs", "sampling_logprobs"):
            if name not in table.column_names:
                raise ArtifactError(
                    f"no {name}",
                    where=str(folder / shard.name),
                    remedy="the deviation is teacher minus student: both are needed",
                )
        ids, rows = flat(table, "token_ids")
        fold = np.array(
            [fold_of(name, settings) for name in table.column("prompt_id").to_pylist()],
            dtype=np.int64,
        )
        lengths = np.bincount(rows, minlength=table.num_rows)
        yield (
            table,
            prepare(
                ids,
                flat(table, "teacher_logprobs")[0],
                flat(table, "sampling_logprobs")[0],
                lengths,
                fold,
                settings,
            ),
        )


def _corrected(table: pa.Table, bias: np.ndarray[Any, Any]) -> pa.Table:
    values, rows = flat(table, "teacher_logprobs")
    kind = table.schema.field("teacher_logprobs").type.value_type
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=table.num_rows))]).astype(
        np.int32
    )
    corrected = pa.ListArray.from_arrays(
        pa.array(offsets), pa.array((values - bias).astype(np.float32), pa.float32())
    )
    whole = bare(
        table.set_column(
            table.column_names.index("teacher_logprobs"), "teacher_logprobs", corrected
        )
    )
    whole = whole.drop_columns(
        [name for name in (TOP_IDS, TOP_LOGPROBS, TAIL, ENTROPY) if name in table.column_names]
    )  # of the teacher as it was
    return cache.halve(whole) if pa.types.is_float16(kind) else whole
