"""A derived cache for a foreign teacher (Lightning OPD 2.0).

Its teacher_logprobs are the teacher's minus the style bias that the responses to other prompts
predict. lopd/cache/style.py has the statistics. Where a cache has several teachers, each has a
style of its own, which is fitted on its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
from lopd.cache.reader import CacheReader
from lopd.cache.row_checks import RESIDUALISED
from lopd.cache.splitting import part_of
from lopd.cache.style import Effect, Settings, StyleTables, Tokens, prepare
from lopd.cache.table import TEACHER_CACHE
from lopd.cache.teachers import own_teachers, teachers_in
from lopd.errors import ArtifactError, LopdError
from lopd.records import Manifest

# How many tokens of the token table go into the manifest.
LISTED = 100
# The teacher of every row of a cache that has one teacher.
ONE_TEACHER = ""
# What stays true of the derived cache.
_CARRIED = ("vocab_size", "end_token_ids", "logprob_bits")


def fold_of(prompt_id: str, settings: Settings) -> int:
    """Return the fold of a prompt. It is the same on every machine."""
    # By prompt and not by response: two responses to one prompt share their evidence.
    return part_of(prompt_id, settings.folds, seed=f"fold {settings.seed}")


def residualise(
    source: str | Path, out: str | Path, settings: Settings, *, foreign_only: bool = False
) -> Manifest:
    """Publish the derived cache.

    ``extra.residualisation`` of its manifest has the settings, the tables, and what they changed.
    The source is read twice, with one shard in memory.

    Args:
        source: The folder of the cache.
        out: The folder of the derived cache.
        settings: How the style is fitted.
        foreign_only: Leave the scores of teachers as they are that made the student's
            demonstrations.

    Raises:
        ArtifactError: The source is not a teacher's cache with sampling log-probabilities.
        LopdError: The source is not sound, or fewer than two folds have prompts of a teacher, or
            there is no foreign teacher.
    """
    source = Path(source)
    out = Path(out)
    _check_settings(settings)
    manifest = read_manifest(source)
    _check_source(source, manifest)
    # The first pass fits, the second corrects. One pass cannot do both, because a correction needs
    # the tables of all other folds.
    styles = _fit(source, manifest, settings, foreign_only=foreign_only)
    # A cache that was made before this choice keeps its fingerprint.
    choice = {"residualise.foreign_only": True} if foreign_only else {}
    writer = ArtifactWriter(
        out,
        kind=RESIDUALISED,
        # Every setting changes the content, so another setting makes another artifact.
        inputs={f"residualise.{name}": value for name, value in settings.as_json().items()}
        | choice,
        parents={manifest.kind: manifest.fingerprint},
        models=manifest.models,
        sampling=manifest.sampling,
        # Who scored stays true. That the scores are corrected is new.
        lineage={**manifest.lineage, "residualised": True},
    )
    for index, (table, tokens) in enumerate(_batches(source, manifest, settings)):
        # A killed call has published some. The effect is still needed of all of them.
        bias = styles.correct(table, tokens)
        if not writer.is_published(index):
            writer.publish_shard(index, _corrected(table, bias))
    num_bytes = sum(cache.column_bytes(out).values())
    num_tokens = sum(shard.tokens for shard in manifest.shards)
    carried = {name: manifest.extra[name] for name in _CARRIED if name in manifest.extra}
    return writer.finish(
        **carried,
        # Of this artifact: halving the corrected values changes them by another amount.
        logprob_loss=cache.logprob_loss(out),
        tokens=num_tokens,
        bytes=num_bytes,
        bytes_per_token=num_bytes / max(1, num_tokens),
        residualisation={"settings": settings.as_json(), **styles.as_json()},
    )


def _check_source(source: Path, manifest: Manifest) -> None:
    """Raise an error unless the source is a sound cache of teachers with the student's tokens."""
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
    # Last, because it reads the whole cache.
    require_sound(source)


class _Styles:
    """The style of each teacher that is corrected, and what its correction changed."""

    def __init__(self, names: Mapping[str, str], settings: Settings, vocab_size: int) -> None:
        """Begin without any rows.

        Args:
            names: The name of each teacher that is corrected, by its fingerprint. Empty: the cache
                has one teacher.
            settings: How the style is fitted.
            vocab_size: Token ids must be below it.
        """
        self._names = dict(names)
        teachers = self._names or {ONE_TEACHER: ""}
        # One table for two styles would fit neither of them.
        self._tables = {teacher: StyleTables(settings, vocab_size) for teacher in teachers}
        self._effects = {teacher: Effect() for teacher in teachers}
        self._folds: dict[str, set[int]] = {teacher: set() for teacher in teachers}
        # Of all rows that are corrected.
        self.effect = Effect()

    def add(self, table: pa.Table, tokens: Tokens) -> None:
        """Add the rows of a shard to the tables of their teachers."""
        for teacher, chosen in self._rows_by_teacher(table):
            own = tokens.of_rows(chosen)
            self._tables[teacher].add(own)
            self._folds[teacher] |= set(own.fold.tolist())

    def require_folds(self, source: Path) -> None:
        """Raise LopdError if the prompts of a teacher are in fewer than two folds."""
        for teacher, folds in self._folds.items():
            # A fold without prompts is possible with few prompts, because a hash deals them. With
            # one fold there are no other prompts to fit on, and every bias would be 0.
            if len(folds) < 2:
                of = f" of the teacher {self._names[teacher]!r}" if self._names else ""
                raise LopdError(
                    f"the prompts{of} are in {len(folds)} folds",
                    where=str(source),
                    limit="at least 2 folds: each fold is corrected with a fit on the other folds",
                    remedy="use more prompts, or more folds",
                )

    def correct(self, table: pa.Table, tokens: Tokens) -> NDArray[np.float64]:
        """Return the bias of every token of a shard [N], and add what it changes to the effects."""
        bias = np.zeros(len(tokens.token_ids))
        for teacher, chosen in self._rows_by_teacher(table):
            own = tokens.of_rows(chosen)
            tables = self._tables[teacher]
            own_bias = tables.bias(own)
            # The in-sample bias is computed as well, only to show what it would have leaked.
            in_sample = tables.bias(own, cross_fitted=False)
            for effect in (self._effects[teacher], self.effect):
                effect.add(own, own_bias, in_sample)
            bias[chosen[tokens.row]] = own_bias
        return bias

    def as_json(self) -> dict[str, Any]:
        """Return the tables and the effects for the manifest.

        With several teachers, ``teachers`` has those of each by its name, and ``effect`` is of all
        rows that are corrected.
        """
        whole = {"effect": self.effect.as_json()}
        if not self._names:
            return {**whole, **_tables_as_json(self._tables[ONE_TEACHER])}
        by_name = {
            name: {
                "weights": teacher,
                "effect": self._effects[teacher].as_json(),
                **_tables_as_json(self._tables[teacher]),
            }
            for teacher, name in self._names.items()
        }
        return {**whole, "teachers": by_name}

    def _rows_by_teacher(self, table: pa.Table) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Yield each corrected teacher with rows in a shard, and which rows these are [rows]."""
        if not self._names:
            yield ONE_TEACHER, np.ones(table.num_rows, bool)
            return
        # That every row names a known teacher was checked with the other rules for rows.
        of_rows = np.array(table.column("teacher").to_pylist(), dtype=object)
        for teacher in self._names:
            chosen = of_rows == teacher
            if chosen.any():
                yield teacher, chosen


def _tables_as_json(tables: StyleTables) -> dict[str, Any]:
    # A vocabulary has more than 100,000 tokens. A manifest should stay readable.
    return {"tokens": tables.token_table()[:LISTED], "context": tables.context_table()}


def _fit(source: Path, manifest: Manifest, settings: Settings, *, foreign_only: bool) -> _Styles:
    """Fit the tables of each teacher that is corrected.

    Raises:
        LopdError: One has prompts in fewer than two folds, or none is left.
    """
    names = teachers_in(CacheReader(source))
    if foreign_only:
        names = _foreign(source, manifest, names)
    styles = _Styles(names, settings, _vocab_size(source, manifest))
    for table, tokens in _batches(source, manifest, settings):
        styles.add(table, tokens)
    styles.require_folds(source)
    return styles


def _foreign(source: Path, manifest: Manifest, names: Mapping[str, str]) -> dict[str, str]:
    """Return the teachers that did not make the demonstrations. Raises LopdError without any."""
    own = own_teachers(manifest)
    found = {teacher: name for teacher, name in names.items() if teacher not in own}
    # With one teacher there are no names, and the record is about that teacher.
    if not (found or (not names and not own)):
        raise LopdError(
            "every teacher of this cache made the student's demonstrations",
            where=str(source),
            limit="at least 1 foreign teacher, whose style can be taken away",
            remedy="learn from this cache as it is",
        )
    return found


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
