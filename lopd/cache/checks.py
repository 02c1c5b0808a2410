"""Is this cache what it says it is? Every file against its checksum and its artifact, every
response against what a log-probability can be.

Nothing here stops at the first mistake: findings name the responses, so that they can be scored
again or left out. docs/cache_format.md lists the rules.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lopd.artifacts import origin_of, read_manifest, read_shard
from lopd.cache.table import ENTROPY, TAIL, TOP_IDS, TOP_LOGPROBS
from lopd.errors import ArtifactError, LopdError
from lopd.records import FINISH_REASONS, Manifest

NAMED = 5  # responses that a finding names
UNIFORM_NATS, UNIFORM_TOKENS = (
    0.01,
    8,
)  # a teacher that gives every one of so many tokens -ln V to within this was not loaded
POSITIVE_SLACK = 1e-6  # rounding of a log-softmax in float32, as for the scorer
ENTROPY_SLACK, ORDER_SLACK, MASS_SLACK = 1e-3, 1e-6, 1e-3  # of float32, the last also of float16
LOGPROBS = ("teacher_logprobs", "sampling_logprobs")
# kind of a derived cache, whose teacher_logprobs are no log-probabilities of a distribution any
# more
RESIDUALISED = "residualised_cache"
_REQUIRED = (
    "prompt_id",
    "sample_index",
    "prompt_ids",
    "token_ids",
    "finish_reason",
    "weight_version",
)


@dataclass(slots=True)
class Finding:
    """Something wrong: a kind to look for, how many responses (or files) have it, and the first of
    them by name.
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
    """Findings by kind, in the order in which they were first met."""

    def __init__(self) -> None:
        self._by_kind: dict[str, Finding] = {}

    def add(self, kind: str, what: str, name: str) -> None:
        finding = self._by_kind.setdefault(kind, Finding(kind, what))
        finding.count += 1
        if len(finding.named) < NAMED:
            finding.named.append(name)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._by_kind.values())

    def __len__(self) -> int:
        return len(self._by_kind)


class RowChecks:
    """Checks rows shard by shard. vocab_size None: ids are not compared with a vocabulary."""

    def __init__(
        self,
        findings: Findings,
        *,
        vocab_size: int | None,
        kind: str,
        teachers: Collection[str] = (),
    ) -> None:
        """teachers: fingerprints of the teachers that the manifest names."""
        self._findings, self._vocab_size, self._teachers = findings, vocab_size, frozenset(teachers)
        self._bounded = {*LOGPROBS, TOP_LOGPROBS, TAIL} - (
            {"teacher_logprobs"} if kind == RESIDUALISED else set()
        )
        self._keys: set[tuple[str, int]] = set()

    def add(self, table: pa.Table, where: str) -> bool:
        """Checks a shard's rows; False where a column is missing, so that its rows cannot be looked
        at.
        """
        missing = [name for name in _REQUIRED if name not in table.column_names]
        if missing:
            self._findings.add("missing column", f"columns {', '.join(missing)} are missing", where)
            return False
        names = list(
            zip(
                table.column("prompt_id").to_pylist(),
                table.column("sample_index").to_pylist(),
                strict=True,
            )
        )
        for key, reason in zip(names, table.column("finish_reason").to_pylist(), strict=True):
            if key in self._keys:
                self._findings.add(
                    "duplicate key", "the same prompt_id and sample_index twice", _name(key)
                )
            self._keys.add(key)
            if reason not in FINISH_REASONS:
                self._findings.add(
                    "finish reason",
                    f"finish_reason is none of {', '.join(FINISH_REASONS)}",
                    _name(key),
                )
        lengths = _lengths(table, "token_ids")
        self._flag(names, lengths == 0, "empty response", "no token in the response")
        for name in ("prompt_ids", "token_ids"):
            self._ids(table, name, names)
        for name in (*LOGPROBS, "loss_mask", ENTROPY, TAIL):
            if name in table.column_names:
                self._flag(
                    names,
                    _lengths(table, name) != lengths,
                    f"length of {name}",
                    f"{name} has another length than token_ids",
                )
        for name in (*LOGPROBS, TOP_LOGPROBS, TAIL):
            if name in table.column_names:
                self._logprobs(table, name, names)
        self._optional(table, names, lengths)
        return True

    def _optional(
        self, table: pa.Table, names: list[tuple[str, int]], lengths: NDArray[np.int64]
    ) -> None:
        present = [name for name in (TOP_IDS, TOP_LOGPROBS, TAIL) if name in table.column_names]
        if 0 < len(present) < 3:
            self._findings.add(
                "missing column", "of the teacher's top-K only a part is there", ", ".join(present)
            )
        elif present:
            self._top_k(table, names, lengths)
        if ENTROPY in table.column_names:
            values, rows = flat(table, ENTROPY)
            most = math.log(self._vocab_size) if self._vocab_size else math.inf
            for row in np.unique(
                rows[~((values >= -POSITIVE_SLACK) & (values <= most + ENTROPY_SLACK))]
            ):
                self._findings.add(
                    "entropy",
                    f"{ENTROPY} that no distribution over the vocabulary has",
                    _name(names[row]),
                )
        if "teacher" in table.column_names and self._teachers:
            for name, teacher in zip(names, table.column("teacher").to_pylist(), strict=True):
                if teacher not in self._teachers:
                    self._findings.add(
                        "unknown teacher",
                        "scored by a teacher that the manifest does not name",
                        _name(name),
                    )
        elif len(self._teachers) > 1:
            self._findings.add(
                "mixed teachers",
                "several teachers, and no column that says which scored a response",
                _name(names[0]) if names else "no rows",
            )

    def _top_k(
        self, table: pa.Table, names: list[tuple[str, int]], lengths: NDArray[np.int64]
    ) -> None:
        """Ids within the vocabulary and not twice, K the same everywhere, probabilities that are
        not above 1 in sum and stand in order.
        """
        counts, others = _lengths(table, TOP_IDS), _lengths(table, TOP_LOGPROBS)
        width = round(counts.sum() / max(1, lengths.sum()))
        wrong = (counts != lengths * width) | (others != counts)
        self._flag(
            names,
            wrong,
            f"length of {TOP_IDS}",
            f"the teacher's top-K are not {width} ids and values for each token",
        )
        self._ids(table, TOP_IDS, names)
        if wrong.any() or width == 0:
            return
        ids, values = (flat(table, name)[0].reshape(-1, width) for name in (TOP_IDS, TOP_LOGPROBS))
        of_row = np.repeat(np.arange(len(names)), lengths)
        faults = {
            "twice": (
                (np.diff(np.sort(ids, axis=1), axis=1) == 0).any(1),
                "a token twice among the teacher's top-K",
            ),
            "order": (
                (np.diff(values, axis=1) > ORDER_SLACK).any(1),
                "the teacher's top-K do not begin with the likeliest",
            ),
            "mass": (
                np.exp(values.astype(np.float64)).sum(1) > 1 + MASS_SLACK,
                "the teacher's top-K have more than all probability",
            ),
        }
        for kind, (mask, what) in faults.items():
            for row in np.unique(of_row[mask]):
                self._findings.add(f"top-K {kind}", what, _name(names[row]))

    def _flag(
        self, names: list[tuple[str, int]], wrong: NDArray[np.bool_], kind: str, what: str
    ) -> None:
        for row in np.flatnonzero(wrong):
            self._findings.add(kind, what, _name(names[row]))

    def _ids(self, table: pa.Table, column: str, names: list[tuple[str, int]]) -> None:
        values, rows = flat(table, column)
        bound = self._vocab_size if self._vocab_size is not None else 2**31
        wrong = np.unique(rows[(values < 0) | (values >= bound)])
        for row in wrong:
            self._findings.add(
                f"{column} outside",
                f"{column} outside the vocabulary 0..{bound - 1}",
                _name(names[row]),
            )

    def _logprobs(self, table: pa.Table, column: str, names: list[tuple[str, int]]) -> None:
        values, rows = flat(table, column)
        wrong = {
            "NaN": (np.isnan(values), "NaN or null"),
            "infinite": (np.isinf(values), "infinite values"),
            "positive": (
                np.isfinite(values) & (values > POSITIVE_SLACK)
                if column in self._bounded
                else np.zeros(len(values), bool),
                "values above 0",
            ),
        }
        for kind, (mask, what) in wrong.items():
            for row in np.unique(rows[mask]):
                self._findings.add(f"{kind} {column}", f"{what} in {column}", _name(names[row]))
        if column == "teacher_logprobs" and self._vocab_size is not None and self._vocab_size > 1:
            away = np.abs(values + math.log(self._vocab_size)) > UNIFORM_NATS
            num_away = np.bincount(rows[away], minlength=len(names))
            uniform = (num_away == 0) & (_lengths(table, column) >= UNIFORM_TOKENS)
            self._flag(
                names,
                uniform,
                "uniform teacher",
                f"the teacher gives every token 1 / {self._vocab_size}, as a model without weights does",
            )


def check_cache(folder: Path, *, vocab_size: int | None = None) -> tuple[Findings, dict[str, Any]]:
    """Everything that is wrong with an artifact of responses, and {rows, tokens, shards,
    vocab_size, complete}.

    vocab_size: absent, it is the manifest's, or that of the teacher's config.json where it is still
    at its path. ArtifactError: no readable manifest.
    """
    manifest = read_manifest(folder)
    findings = Findings()
    if not manifest.complete:
        findings.add(
            "incomplete", "the artifact is not complete: its stage was not finished", str(folder)
        )
    size = vocab_size or vocabulary(manifest)
    teachers = [
        identity.weights for role, identity in manifest.models.items() if role.startswith("teacher")
    ]
    checks = RowChecks(findings, vocab_size=size, kind=manifest.kind, teachers=teachers)
    rows = tokens = 0
    for table, where in _sound_shards(folder, manifest, findings):
        if checks.add(table, where):
            rows, tokens = rows + table.num_rows, tokens + int(_lengths(table, "token_ids").sum())
    listed = {shard.name for shard in manifest.shards}
    for path in sorted(folder.glob("*.parquet")):
        if manifest.complete and path.name not in listed:
            findings.add("foreign file", "a shard that the manifest does not list", path.name)
    return findings, {
        "rows": rows,
        "tokens": tokens,
        "shards": len(manifest.shards),
        "vocab_size": size,
        "complete": manifest.complete,
    }


def _sound_shards(
    folder: Path, manifest: Manifest, findings: Findings
) -> Iterator[tuple[pa.Table, str]]:
    expected = origin_of(manifest)
    for shard in manifest.shards:
        if not shard.name.endswith(".parquet"):
            continue
        try:
            table = read_shard(folder, shard)
        except ArtifactError as error:
            findings.add("damaged", "missing, truncated or changed", f"{shard.name} ({error.what})")
            continue
        origin = (table.schema.metadata or {}).get(b"lopd.origin")
        if origin is not None and origin.decode() != expected:
            findings.add(
                "another run",
                "a shard of another run: it was made from other inputs than the manifest says",
                shard.name,
            )
        if (
            table.num_rows,
            len(flat(table, "token_ids")[0]) if "token_ids" in table.column_names else 0,
        ) != (shard.rows, shard.tokens):
            findings.add("counts", "rows or tokens differ from the manifest's", shard.name)
        yield table, shard.name


def vocabulary(manifest: Manifest) -> int | None:
    """Size of the vocabulary: as the manifest says, or as the teacher's config.json says where it
    is still there; None if nobody knows.
    """
    size = manifest.extra.get("vocab_size")
    if isinstance(size, int):
        return size
    teacher = manifest.models.get("teacher")
    path = Path(teacher.path) / "config.json" if teacher is not None else None
    if path is None or not path.is_file():
        return None
    try:
        size = json.loads(path.read_text(encoding="utf-8")).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def flat(table: pa.Table, column: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """All values of a list column in order, and the row each belongs to: [N] and [N]. float16
    becomes float32, null becomes NaN.
    """
    lists = table.column(column)
    values = (
        np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in lists.chunks])
        if lists.num_chunks
        else np.zeros(0)
    )
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    return values, np.repeat(np.arange(table.num_rows), _lengths(table, column))


def _lengths(table: pa.Table, column: str) -> NDArray[np.int64]:
    lengths: NDArray[np.int64] = np.asarray(
        pc.fill_null(pc.list_value_length(table.column(column)), 0).to_numpy(), dtype=np.int64
    )
    return lengths


def _name(key: tuple[str, int]) -> str:
    return f"{key[0]}/{key[1]}"


def require_sound(folder: Path) -> None:
    """LopdError with the first finding, where there is any: nothing is derived from a cache that is
    not sound.
    """
    findings, _ = check_cache(folder)
    for finding in findings:
        raise LopdError(
            f"{finding}", where=str(folder), remedy=f"see all with: lopd cache verify {folder}"
        )
