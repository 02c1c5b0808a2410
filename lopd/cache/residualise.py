"""A derived cache for a foreign teacher (Lightning OPD 2.0).

Its teacher_logprobs are the teacher's minus the style bias that the responses to other prompts
predict. lopd/cache/style.py has the statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lopd import cache
from lopd.artifacts import ArtifactWriter, read_manifest, read_shard
from lopd.artifacts.lineage import alignment_of
from lopd.cache.checks import require_sound, vocabulary
from lopd.cache.columns import (
    ENTROPY,
    TAIL,
    TOP_IDS,
    TOP_LOGPROBS,
    flat,
    loss_tokens,
    without_origin,
)
from lopd.cache.row_checks import RESIDUALISED
from lopd.cache.splitting import part_of
from lopd.cache.style import Effect, Settings, StyleTables, Tokens, prepare
from lopd.cache.table import TEACHER_CACHE
from lopd.errors import ArtifactError, LopdError
from lopd.records import Manifest

# How many tokens of the token table go into the manifest.
LISTED = 100
# What stays true of the derived cache.
_CARRIED = ("vocab_size", "end_token_ids", "logprob_bits")


def fold_of(prompt_id: str, settings: Settings) -> int:
    """Return the fold of a prompt. It is the same on every machine."""
    # By prompt and not by response: two responses to one prompt share their evidence.
    return part_of(prompt_id, settings.folds, seed=f"fold {settings.seed}")


def residualise(source: str | Path, out: str | Path, settings: Settings) -> Manifest:
    """Publish the derived cache.

    ``extra.residualisation`` of its manifest has the settings, the tables, and what they changed.
    The source is read twice, with one shard in memory.

    Raises:
        ArtifactError: The source is not a cache of one teacher with sampling log-probabilities.
        LopdError: The source is not sound, or fewer than two folds have prompts.
    """
    source = Path(source)
    out = Path(out)
    _check_settings(settings)
    manifest = read_manifest(source)
    _check_source(source, manifest)
    # The first pass fits, the second corrects. One pass cannot do both, because a correction needs
    # the tables of all other folds.
    tables = _fit(source, manifest, settings)
    writer = ArtifactWriter(
        out,
        kind=RESIDUALISED,
        # Every setting changes the content, so another setting makes another artifact.
        inputs={f"residualise.{name}": value for name, value in settings.as_json().items()},
        parents={manifest.kind: manifest.fingerprint},
        models=manifest.models,
        sampling=manifest.sampling,
        # Who scored stays true. That the scores are corrected is new.
        lineage={**manifest.lineage, "residualised": True},
    )
    effect = Effect()
    for index, (table, tokens) in enumerate(_batches(source, manifest, settings)):
        # The in-sample bias is computed as well, only to show what it would have leaked.
        bias = tables.bias(tokens)
        effect.add(tokens, bias, tables.bias(tokens, cross_fitted=False))
        # A killed call has published some. The effect is still needed of all of them.
        if not writer.is_published(index):
            writer.publish_shard(index, _corrected(table, bias))
    num_bytes = sum(cache.column_bytes(out).values())
    carried = {name: manifest.extra[name] for name in _CARRIED if name in manifest.extra}
    about = {
        "settings": settings.as_json(),
        "effect": effect.as_json(),
        # A vocabulary has more than 100,000 tokens. A manifest should stay readable.
        "tokens": tables.token_table()[:LISTED],
        "context": tables.context_table(),
    }
    return writer.finish(
        **carried,
        # Of this artifact: halving the corrected values changes them by another amount.
        logprob_loss=cache.logprob_loss(out),
        tokens=effect.tokens,
        bytes=num_bytes,
        bytes_per_token=num_bytes / max(1, effect.tokens),
        residualisation=about,
    )


def _check_source(source: Path, manifest: Manifest) -> None:
    """Raise an error unless the source is a sound cache of one teacher."""
    if manifest.kind != TEACHER_CACHE:
        raise ArtifactError(
            f"this artifact is of kind {manifest.kind}, but residualising needs a teacher's cache",
            where=str(source),
            limit=f"exactly {TEACHER_CACHE}",
            remedy="give the cache that the score stage made",
        )
    # Its masked tokens have no scores, and its other scores are parts of sums over chunks: what
    # they deviate by is not a style of single tokens.
    if alignment_of(manifest) is not None:
        raise ArtifactError(
            "this cache holds scores of a teacher with another tokenizer",
            where=str(source),
            limit="scores of the very tokens that were sampled",
            remedy="train on this cache as it is",
        )
    # One table for two styles would fit neither of them.
    if sum(role.startswith("teacher") for role in manifest.models) > 1:
        remedy = (
            "residualise the cache of each teacher alone, then merge the caches with "
            "--teacher-column"
        )
        raise ArtifactError(
            "this cache holds scores of several teachers, and each teacher has its own style",
            where=str(source),
            limit="exactly one teacher",
            remedy=remedy,
        )
    # Last, because it reads the whole cache.
    require_sound(source)


def _fit(source: Path, manifest: Manifest, settings: Settings) -> StyleTables:
    """Fit the tables. Raises LopdError if fewer than two folds have prompts."""
    tables = StyleTables(settings, _vocab_size(source, manifest))
    folds: set[int] = set()
    # A fold without prompts is possible with few prompts, because a hash deals them.
    for _, tokens in _batches(source, manifest, settings):
        tables.add(tokens)
        folds |= set(tokens.fold.tolist())
    # With one fold there are no other prompts to fit on. Every bias would be 0.
    if len(folds) < 2:
        raise LopdError(
            f"the prompts are in {len(folds)} folds",
            where=str(source),
            limit="at least 2 folds: each fold is corrected with a fit on the other folds",
            remedy="use more prompts, or more folds",
        )
    return tables


def _check_settings(settings: Settings) -> None:
    # The upper bounds only keep the tables from becoming larger than the memory.
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
                f"{name} {value} is out of range",
                where="lopd cache residualise",
                limit=f"at least {low} and at most {high}",
                remedy=f"correct --{name.replace('_', '-')}",
            )


def _vocab_size(folder: Path, manifest: Manifest) -> int:
    """Return the size of the token table."""
    known = vocabulary(manifest)
    if known is not None:
        return known
    # An imported cache may not know it. The largest id is enough for the table.
    largest = 0
    for shard in manifest.shards:
        ids, _ = flat(read_shard(folder, shard), "token_ids")
        largest = max(largest, int(ids.max(initial=0)))
    return 1 + largest


def _batches(
    folder: Path, manifest: Manifest, settings: Settings
) -> Iterator[tuple[pa.Table, Tokens]]:
    """Yield the rows of each shard, and its tokens as the tables take them."""
    for shard in manifest.shards:
        table = read_shard(folder, shard)
        # Imported caches have no sampling log-probabilities.
        for name in ("teacher_logprobs", "sampling_logprobs"):
            if name not in table.column_names:
                raise ArtifactError(
                    f"the shard has no column {name}",
                    where=str(folder / shard.name),
                    remedy="make the cache again with the student's and the teacher's "
                    "log-probabilities: the correction needs both",
                )
        ids, rows = flat(table, "token_ids")
        # By the name of the prompt, so a prompt that is spread over shards stays in one fold.
        folds = [fold_of(name, settings) for name in table.column("prompt_id").to_pylist()]
        tokens = prepare(
            ids,
            flat(table, "teacher_logprobs")[0],
            # The policy that sampled is the reference: one response per prompt was sampled from it.
            flat(table, "sampling_logprobs")[0],
            lengths=np.bincount(rows, minlength=table.num_rows),
            fold=np.array(folds, dtype=np.int64),
            settings=settings,
            carries_loss=loss_tokens(table),
        )
        yield table, tokens


def _corrected(table: pa.Table, bias: NDArray[np.float64]) -> pa.Table:
    """Return the rows with the bias taken off the teacher's log-probabilities.

    Args:
        table: The rows.
        bias: The bias of each token that carries loss. The others keep their values.
    """
    name = "teacher_logprobs"
    values, rows = flat(table, name)
    offsets = np.zeros(table.num_rows + 1, np.int32)
    np.cumsum(np.bincount(rows, minlength=table.num_rows), out=offsets[1:])
    # In float64 until here, so that the difference is rounded once.
    values = values.astype(np.float64)
    values[loss_tokens(table)] -= bias
    values = values.astype(np.float32)
    corrected = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.float32()))
    # The shard belongs to another artifact now, and gets the origin of that one when it is written.
    derived = without_origin(table.set_column(table.column_names.index(name), name, corrected))
    # The top-K and the entropy are of the teacher's distribution. The corrected values belong to no
    # distribution.
    outdated = [n for n in (TOP_IDS, TOP_LOGPROBS, TAIL, ENTROPY) if n in table.column_names]
    derived = derived.drop_columns(outdated)
    # A cache in 16 bits stays one.
    was_halved = pa.types.is_float16(table.schema.field(name).type.value_type)
    return cache.halve(derived) if was_halved else derived
