"""What a cache holds, in figures: lengths, log-probabilities, the advantage at the start, endings,
duplicates, bytes. One pass, a shard at a time.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lopd.artifacts import read_manifest, read_shard
from lopd.cache import column_bytes
from lopd.cache.checks import flat, vocabulary
from lopd.cache.table import ENTROPY, TAIL, TOP_IDS
from lopd.records import Manifest, token_hash

LOGPROB_EDGES = (-np.inf, -20.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.1, -0.01, np.inf)
ADVANTAGE_EDGES = (-np.inf, -10.0, -5.0, -2.0, -1.0, -0.1, 0.1, 1.0, 2.0, 5.0, 10.0, np.inf)
SHARE_EDGES = (
    0.0,
    1e-5,
    1e-4,
    1e-3,
    0.01,
    0.1,
    1.0,
)  # of the probability outside of the teacher's top-K
ENTROPY_EDGES = (0.0, 1e-3, 0.01, 0.1, 0.5, 1.0, 2.0, np.inf)
ADVANTAGE_CLIP = 10.0  # of the paper


class Moments:
    """Mean, spread, extremes and a histogram of a stream of values, in constant memory."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        self.edges, self.counts = edges, np.zeros(len(edges) - 1, np.int64)
        self.number, self.total, self.squares, self.least, self.most = 0, 0.0, 0.0, np.inf, -np.inf

    def add(self, values: NDArray[Any]) -> None:
        values = values[np.isfinite(values)].astype(np.float64)
        if values.size:
            self.counts += np.histogram(values, self.edges)[0]
            self.number, self.total, self.squares = (
                self.number + values.size,
                self.total + values.sum(),
                self.squares + (values**2).sum(),
            )
            self.least, self.most = min(self.least, values.min()), max(self.most, values.max())

    def as_json(self) -> dict[str, Any] | None:
        if not self.number:
            return None
        mean = self.total / self.number
        spread = max(0.0, self.squares / self.number - mean**2) ** 0.5
        edges = [float(edge) if np.isfinite(edge) else None for edge in self.edges]
        histogram = {"edges": edges, "counts": self.counts.tolist()}
        return {
            "mean": mean,
            "standard_deviation": spread,
            "min": float(self.least),
            "max": float(self.most),
            "histogram": histogram,
        }


def inspect_cache(folder: Path) -> dict[str, Any]:
    """All figures of an artifact of responses, as JSON. Memory: one shard, and some 40 bytes a
    response. ArtifactError: damaged.
    """
    manifest = read_manifest(folder)
    scan = _Scan(set(manifest.extra.get("end_token_ids", [])))
    for shard in manifest.shards:
        if shard.name.endswith(".parquet"):
            scan.add(read_shard(folder, shard))
    return {**_about(folder, manifest), **scan.as_json(), **_sizes(folder, scan.num_tokens)}


def _about(folder: Path, manifest: Manifest) -> dict[str, Any]:
    teacher = manifest.models.get("teacher")
    return {
        "folder": str(folder),
        "kind": manifest.kind,
        "complete": manifest.complete,
        "fingerprint": manifest.fingerprint,
        "schema_version": manifest.schema_version,
        "teacher": None
        if teacher is None
        else {"path": teacher.path, "weights": teacher.weights, "tokenizer": teacher.tokenizer},
        "teachers": {
            identity.weights: f"{role}: {identity.path}"
            for role, identity in manifest.models.items()
            if role.startswith("teacher")
        },
        "student": manifest.models["student"].path if "student" in manifest.models else None,
        "lineage": dict(manifest.lineage),
        "sampling": dict(manifest.sampling),
        "parents": dict(manifest.parents),
        "versions": dict(manifest.versions),
        "vocab_size": vocabulary(manifest),
        "logprob_bits": manifest.extra.get("logprob_bits", 32),
        "logprob_loss": manifest.extra.get("logprob_loss"),
        "lacks": manifest.extra.get("lacks", []),
        "residualisation": manifest.extra.get("residualisation"),
        "shards": len(manifest.shards),
    }


def _sizes(folder: Path, num_tokens: int) -> dict[str, Any]:
    columns, tokens = column_bytes(folder), max(1, num_tokens)
    total = sum(columns.values())
    return {
        "bytes": total,
        "bytes_per_token": total / tokens,
        "bytes_per_token_without_sampling_logprobs": (total - columns.get("sampling_logprobs", 0))
        / tokens,
        "bytes_per_token_by_column": {name: size / tokens for name, size in columns.items()},
    }


class _Scan:
    def __init__(self, end_token_ids: set[int]) -> None:
        self._ends = end_token_ids
        self._lengths: list[NDArray[Any]] = []
        self._prompt_lengths: list[NDArray[Any]] = []
        self._reasons: Counter[str] = Counter()
        self._last_tokens: Counter[int] = Counter()  # of responses that ended by themselves
        self._keys: Counter[tuple[str, int]] = Counter()
        self._sequences: Counter[str] = Counter()
        self._prompts: set[str] = set()
        self._teachers: Counter[str] = Counter()
        self._logprobs = {
            name: Moments(LOGPROB_EDGES) for name in ("teacher_logprobs", "sampling_logprobs")
        }
        self._tail, self._entropy, self._top_ids = Moments(SHARE_EDGES), Moments(ENTROPY_EDGES), 0
        self._advantage, self._over_one, self._clipped = Moments(ADVANTAGE_EDGES), 0, 0
        self.num_tokens = 0

    def add(self, table: pa.Table) -> None:
        ids, rows = flat(table, "token_ids")
        lengths = np.bincount(rows, minlength=table.num_rows)
        prompts, prompt_rows = flat(table, "prompt_ids")
        prompt_lengths = np.bincount(prompt_rows, minlength=table.num_rows)
        self._lengths.append(lengths)
        self._prompt_lengths.append(prompt_lengths)
        self.num_tokens += len(ids)
        reasons = table.column("finish_reason").to_pylist()
        self._reasons.update(reasons)
        names = table.column("prompt_id").to_pylist()
        self._prompts.update(names)
        self._keys.update(zip(names, table.column("sample_index").to_pylist(), strict=True))
        if "teacher" in table.column_names:
            self._teachers.update(table.column("teacher").to_pylist())
        ends, prompt_ends = np.cumsum(lengths), np.cumsum(prompt_lengths)
        for row, reason in enumerate(reasons):
            response = ids[ends[row] - lengths[row] : ends[row]]
            if reason == "stop" and len(response):
                self._last_tokens[int(response[-1])] += 1
            self._sequences[
                token_hash(
                    prompts[prompt_ends[row] - prompt_lengths[row] : prompt_ends[row]], response
                )
            ] += 1
        found = {
            name: flat(table, name)[0] for name in self._logprobs if name in table.column_names
        }
        for name, values in found.items():
            self._logprobs[name].add(values)
        if TOP_IDS in table.column_names:
            self._top_ids += len(flat(table, TOP_IDS)[0])
        if TAIL in table.column_names:
            self._tail.add(np.exp(flat(table, TAIL)[0].astype(np.float64)))
        if ENTROPY in table.column_names:
            self._entropy.add(flat(table, ENTROPY)[0])
        if len(found) == 2 and len({len(values) for values in found.values()}) == 1:
            advantage = found["teacher_logprobs"].astype(np.float64) - found["sampling_logprobs"]
            self._advantage.add(advantage)
            self._over_one += int((np.abs(advantage) > 1).sum())
            self._clipped += int((np.abs(advantage) > ADVANTAGE_CLIP).sum())

    def as_json(self) -> dict[str, Any]:
        rows, tokens = sum(self._reasons.values()), max(1, self.num_tokens)
        stopped = self._reasons["stop"]
        ends = self._ends or {
            token for token, count in self._last_tokens.most_common(1) if count > 1
        }
        advantage = self._advantage.as_json()
        if advantage is not None:
            advantage |= {
                "share_over_1_nat": self._over_one / tokens,
                "share_clipped": self._clipped / tokens,
            }
        return {
            "rows": rows,
            "tokens": self.num_tokens,
            "prompts": len(self._prompts),
            "lengths": _lengths_json(self._lengths),
            "prompt_lengths": _lengths_json(self._prompt_lengths),
            "finish_reasons": dict(self._reasons),
            "truncated_share": self._reasons["length"] / max(1, rows),
            "end_token_ids": sorted(ends),
            "end_tokens_from": "manifest"
            if self._ends
            else "the commonest last token of responses that stopped",
            "end_token_coverage": sum(self._last_tokens[token] for token in ends) / stopped
            if stopped
            else None,
            "duplicate_keys": sum(count - 1 for count in self._keys.values()),
            "duplicate_sequences": sum(count - 1 for count in self._sequences.values()),
            "rows_by_teacher": dict(self._teachers),
            **{name: moments.as_json() for name, moments in self._logprobs.items()},
            "advantage_at_start": advantage,
            "top_k": self._top_ids // tokens,
            "teacher_tail": self._tail.as_json(),
            "teacher_entropy": self._entropy.as_json(),
        }


def _lengths_json(parts: list[NDArray[Any]]) -> dict[str, Any] | None:
    lengths = np.concatenate(parts) if parts else np.zeros(0)
    if not len(lengths):
        return None
    counts, edges = np.histogram(lengths, bins=min(12, int(lengths.max() - lengths.min()) + 1))
    quantiles = {
        name: float(np.quantile(lengths, share))
        for name, share in (("min", 0), ("median", 0.5), ("p95", 0.95), ("max", 1))
    }
    return {
        "mean": float(lengths.mean()),
        **quantiles,
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
