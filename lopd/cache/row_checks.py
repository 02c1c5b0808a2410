"""The rules that the rows of a cache must keep. docs/cache_format.md lists them.

Nothing here stops at the first mistake. A finding names its responses, so that they can be scored
again or left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lopd.cache.columns import (
    ALIGNMENT,
    BASE,
    ENTROPY,
    ROUTED,
    ROUTED_EXPERTS,
    TAIL,
    TOP_IDS,
    TOP_LOGPROBS,
    flat,
    list_lengths,
    loss_tokens,
)
from lopd.records import FINISH_REASONS, Key

# How many responses a finding names. The others are only counted.
NAMED = 5
# A teacher without loaded weights gives every token about -ln(vocabulary). A response is taken for
# one of such a teacher if all its tokens, and at least so many, are within so many nats of that.
UNIFORM_NATS = 0.01
UNIFORM_TOKENS = 8
# How far rounding may take a value over its bound: a log-probability in float32 (as in the scorer),
# an entropy in float32, two neighbours in the order of a top-K, and the sum of a top-K's
# probabilities, also in float16.
POSITIVE_SLACK = 1e-6
ENTROPY_SLACK = 1e-3
ORDER_SLACK = 1e-6
MASS_SLACK = 1e-3
LOGPROBS = ("teacher_logprobs", "sampling_logprobs", BASE)
# The kind of a derived cache. Its teacher_logprobs belong to no distribution and may be positive.
RESIDUALISED = "residualised_cache"
# Without these columns a row cannot be looked at. sampling_logprobs is not among them: an import
# does not have it.
_REQUIRED = (
    "prompt_id",
    "sample_index",
    "prompt_ids",
    "token_ids",
    "finish_reason",
    "weight_version",
)
_TOP_K = (TOP_IDS, TOP_LOGPROBS, TAIL)
_Mask: TypeAlias = NDArray[np.bool_]


@dataclass(slots=True)
class Finding:
    """Something that is wrong.

    Attributes:
        kind: A short name to look for.
        what: The fault in words.
        count: How many responses or files have it.
        named: The first of them.
    """

    kind: str
    what: str
    count: int = 0
    named: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        more = f" and {self.count - len(self.named)} more" if self.count > len(self.named) else ""
        return f"{self.what}: {', '.join(self.named)}{more}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Findings:
    """Findings by kind, in the order in which each kind was found first."""

    def __init__(self) -> None:
        self._by_kind: dict[str, Finding] = {}

    def add(self, kind: str, what: str, name: str) -> None:
        """Count one more response or file that has a fault."""
        finding = self._by_kind.setdefault(kind, Finding(kind, what))
        finding.count += 1
        if len(finding.named) < NAMED:
            finding.named.append(name)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._by_kind.values())

    def __len__(self) -> int:
        return len(self._by_kind)


class RowChecks:
    """Checks the rows of a cache shard by shard, and adds what is wrong to the findings.

    Args:
        vocab_size: Token ids must be below it. None means that it is not known.
        kind: The kind of the artifact.
        teachers: The fingerprints of the teachers that the manifest names.
    """

    def __init__(
        self,
        findings: Findings,
        *,
        vocab_size: int | None,
        kind: str,
        teachers: Collection[str] = (),
    ) -> None:
        self._findings = findings
        # None switches off the checks that need it: ids, the uniform teacher and the largest
        # entropy.
        self._vocab_size = vocab_size
        self._teachers = frozenset(teachers)
        # The columns whose values are logarithms of probabilities and therefore at most 0.
        self._bounded = {*LOGPROBS, TOP_LOGPROBS, TAIL}
        if kind == RESIDUALISED:
            # Its other log-probabilities are still of a distribution.
            self._bounded.remove("teacher_logprobs")
        # A key must be unique in the whole cache, so the keys of earlier shards are kept.
        self._keys: set[Key] = set()

    def add(self, table: pa.Table, where: str) -> bool:
        """Check the rows of one shard.

        Args:
            where: The name of the shard.

        Returns:
            False if a required column is missing. The rows are then not checked.
        """
        # This is a finding of the shard and not of a response: without names no response can be
        # named.
        missing = [name for name in _REQUIRED if name not in table.column_names]
        if missing:
            self._findings.add("missing column", f"columns {', '.join(missing)} are missing", where)
            return False
        prompt_ids = table.column("prompt_id").to_pylist()
        keys = list(zip(prompt_ids, table.column("sample_index").to_pylist(), strict=True))
        lengths = list_lengths(table, "token_ids")
        # From here on every fault is of single responses and names them.
        self._check_keys(keys)
        self._check_endings(table, keys)
        self._flag(keys, lengths == 0, "empty response", "no token in the response")
        # The prompt is checked, too: its ids are fed to the model as well.
        for name in ("prompt_ids", "token_ids"):
            self._check_ids(table, name, keys)
        # A wrong length shifts every value behind it to another token.
        for name in (*LOGPROBS, "loss_mask", ENTROPY, TAIL, ALIGNMENT):
            if name in table.column_names:
                wrong = list_lengths(table, name) != lengths
                what = f"{name} has another length than token_ids"
                self._flag(keys, wrong, f"length of {name}", what)
        # Optional columns are checked where they are there.
        for name in (*LOGPROBS, TOP_LOGPROBS, TAIL):
            if name in table.column_names:
                self._check_logprobs(table, name, keys)
        if self._has_whole_top_k(table):
            self._check_top_k(table, keys, lengths)
        if ENTROPY in table.column_names:
            self._check_entropy(table, keys)
        if ALIGNMENT in table.column_names:
            self._check_alignment(table, keys)
        if ROUTED_EXPERTS in table.column_names:
            self._check_routed(table, keys, lengths)
        self._check_teachers(table, keys)
        return True

    def _check_keys(self, keys: list[Key]) -> None:
        for key in keys:
            if key in self._keys:
                what = "the same prompt_id and sample_index twice"
                # Two responses under one key would be one to every reader that looks by key.
                self._findings.add("duplicate key", what, _name(key))
            self._keys.add(key)

    def _check_endings(self, table: pa.Table, keys: list[Key]) -> None:
        # Training treats a response by how it ended, so an unknown word must not pass.
        what = f"finish_reason is none of {', '.join(FINISH_REASONS)}"
        for key, reason in zip(keys, table.column("finish_reason").to_pylist(), strict=True):
            if reason not in FINISH_REASONS:
                self._findings.add("finish reason", what, _name(key))

    def _check_ids(self, table: pa.Table, column: str, keys: list[Key]) -> None:
        values, rows = flat(table, column)
        # Without a known vocabulary, only what no int32 id can be is refused.
        bound = self._vocab_size if self._vocab_size is not None else 2**31
        wrong = (values < 0) | (values >= bound)
        what = f"{column} outside the vocabulary 0..{bound - 1}"
        self._flag_rows(keys, rows[wrong], f"{column} outside", what)

    def _check_logprobs(self, table: pa.Table, column: str, keys: list[Key]) -> None:
        values, rows = flat(table, column)
        faults: dict[str, tuple[_Mask, str]] = {
            # flat() gives NaN for null, so that one test finds both.
            "NaN": (np.isnan(values), "NaN or null"),
            "infinite": (np.isinf(values), "infinite values"),
        }
        if column in self._bounded:
            # An infinite value has been counted already.
            positive = np.isfinite(values) & (values > POSITIVE_SLACK)
            faults["positive"] = (positive, "values above 0")
        for kind, (wrong, what) in faults.items():
            self._flag_rows(keys, rows[wrong], f"{kind} {column}", f"{what} in {column}")
        # With a vocabulary of one token, 0 is the right value and the uniform one.
        if column == "teacher_logprobs" and self._vocab_size is not None and self._vocab_size > 1:
            # Zeros in place of the values of masked tokens would hide such a teacher.
            mask = loss_tokens(table)
            looked_at = mask if len(mask) == len(values) else np.ones(len(values), bool)
            away = (np.abs(values + math.log(self._vocab_size)) > UNIFORM_NATS) & looked_at
            num_away = np.bincount(rows[away], minlength=len(keys))
            num_looked_at = np.bincount(rows[looked_at], minlength=len(keys))
            # In a short response all values may be near the uniform one by chance.
            uniform = (num_away == 0) & (num_looked_at >= UNIFORM_TOKENS)
            share = f"1 / {self._vocab_size}"
            what = f"the teacher gives every token {share}, as a model without weights does"
            self._flag(keys, uniform, "uniform teacher", what)

    def _has_whole_top_k(self, table: pa.Table) -> bool:
        present = [name for name in _TOP_K if name in table.column_names]
        # The columns are of use together alone: ids without their log-probabilities train nothing.
        if 0 < len(present) < len(_TOP_K):
            what = "of the teacher's top-K only a part is there"
            self._findings.add("missing column", what, ", ".join(present))
        return len(present) == len(_TOP_K)

    def _check_top_k(self, table: pa.Table, keys: list[Key], lengths: NDArray[np.int64]) -> None:
        """Check one K, ids of the vocabulary, no id twice, the order, and a sum of at most 1."""
        num_ids = list_lengths(table, TOP_IDS)
        num_values = list_lengths(table, TOP_LOGPROBS)
        # K is written nowhere. Over all rows the rounded mean is K even if some rows are wrong.
        width = round(num_ids.sum() / max(1, lengths.sum()))
        wrong = (num_ids != lengths * width) | (num_values != num_ids)
        what = f"the teacher's top-K are not {width} ids and values for each token"
        self._flag(keys, wrong, f"length of {TOP_IDS}", what)
        self._check_ids(table, TOP_IDS, keys)
        # The reshape below needs the same K everywhere.
        if wrong.any() or width == 0:
            return
        ids = flat(table, TOP_IDS)[0].reshape(-1, width)
        values = flat(table, TOP_LOGPROBS)[0].reshape(-1, width)
        # Sorted, equal ids are neighbours.
        repeated = np.diff(np.sort(ids, axis=1), axis=1) == 0
        rising = np.diff(values, axis=1) > ORDER_SLACK
        # K probabilities of one distribution add up to at most 1.
        heavy = np.exp(values.astype(np.float64)).sum(1) > 1 + MASS_SLACK
        faults = {
            "twice": (repeated.any(1), "a token twice among the teacher's top-K"),
            "order": (rising.any(1), "the teacher's top-K do not begin with the likeliest"),
            "mass": (heavy, "the teacher's top-K have more than all probability"),
        }
        rows = np.repeat(np.arange(len(keys)), lengths)
        for kind, (mask, what) in faults.items():
            self._flag_rows(keys, rows[mask], f"top-K {kind}", what)

    def _check_entropy(self, table: pa.Table, keys: list[Key]) -> None:
        values, rows = flat(table, ENTROPY)
        # The uniform distribution has the largest entropy.
        most = math.log(self._vocab_size) if self._vocab_size else math.inf
        possible = (values >= -POSITIVE_SLACK) & (values <= most + ENTROPY_SLACK)
        what = f"{ENTROPY} that no distribution over the vocabulary has"
        # Negated, so that a NaN, for which every comparison is false, counts as impossible.
        self._flag_rows(keys, rows[~possible], "entropy", what)

    def _check_alignment(self, table: pa.Table, keys: list[Key]) -> None:
        what = "loss on a token to which no log-probability of the teacher could be brought"
        if "loss_mask" not in table.column_names:
            self._flag(keys, np.ones(len(keys), bool), "unaligned loss", what)
            return
        alignment, rows = flat(table, ALIGNMENT)
        mask, _ = flat(table, "loss_mask")
        # Of columns of different lengths the check of lengths has told.
        if len(alignment) == len(mask):
            wrong = (alignment != 0) & mask.astype(bool)
            self._flag_rows(keys, rows[wrong], "unaligned loss", what)

    def _check_routed(self, table: pa.Table, keys: list[Key], lengths: NDArray[np.int64]) -> None:
        """Check that each position but the last has different experts in each layer."""
        shape = (table.schema.metadata or {}).get(ROUTED)
        if shape is None:
            what = f"{ROUTED_EXPERTS} without the metadata {ROUTED.decode()}, which has its shape"
            self._flag(keys, np.ones(len(keys), bool), f"shape of {ROUTED_EXPERTS}", what)
            return
        about = json.loads(shape)
        layers, chosen = int(about["layers"]), int(about["k"])
        positions = list_lengths(table, "prompt_ids") + lengths - 1
        counts = list_lengths(table, ROUTED_EXPERTS)
        wrong = counts != positions * layers * chosen
        what = f"{ROUTED_EXPERTS} are not {layers} x {chosen} for each position but the last"
        self._flag(keys, wrong, f"length of {ROUTED_EXPERTS}", what)
        # The reshape below needs whole choices everywhere.
        if wrong.any():
            return
        values, rows = flat(table, ROUTED_EXPERTS)
        self._flag_rows(keys, rows[values < 0], "negative expert", f"{ROUTED_EXPERTS} below 0")
        # A server that has kept nothing gives zeros, which would pass for the choice of expert 0.
        choices = np.sort(values.reshape(-1, chosen), axis=1)
        twice = (np.diff(choices, axis=1) == 0).any(1)
        what = f"one expert twice in a choice of {ROUTED_EXPERTS}"
        self._flag_rows(keys, rows[::chosen][twice], "expert twice", what)

    def _check_teachers(self, table: pa.Table, keys: list[Key]) -> None:
        if "teacher" in table.column_names and self._teachers:
            what = "scored by a teacher that the manifest does not name"
            # The scores of a row can be used only if it is known whose they are.
            for key, teacher in zip(keys, table.column("teacher").to_pylist(), strict=True):
                if teacher not in self._teachers:
                    self._findings.add("unknown teacher", what, _name(key))
        elif len(self._teachers) > 1:
            what = "several teachers, and no column that says which scored a response"
            self._findings.add("mixed teachers", what, _name(keys[0]) if keys else "no rows")

    def _flag(self, keys: list[Key], wrong: _Mask, kind: str, what: str) -> None:
        """Add a finding for each row of the mask [rows]."""
        self._flag_rows(keys, np.flatnonzero(wrong), kind, what)

    def _flag_rows(self, keys: list[Key], rows: NDArray[Any], kind: str, what: str) -> None:
        """Add a finding for each row number. A row counts once, however often it occurs."""
        for row in np.unique(rows):
            self._findings.add(kind, what, _name(keys[row]))


def _name(key: Key) -> str:
    return f"{key[0]}/{key[1]}"
