"""The statistics of a cache.

These are lengths, log-probabilities, the advantage at the start of the training, endings,
duplicates and bytes. They come from one pass with one shard in memory.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lopd.artifacts import read_manifest, read_shard
from lopd.artifacts.lineage import alignment_of
from lopd.cache.checks import vocabulary
from lopd.cache.columns import ENTROPY, LOSS_MASK, TAIL, TOP_IDS, column_bytes, flat, loss_tokens
from lopd.cache.recommendation import regime_json
from lopd.cache.regime import ADVANTAGE_CLIP, RegimeScan
from lopd.cache.token_alignment import alignment_line, count_alignment
from lopd.cache.verdicts import refuse_verdicts
from lopd.records import Manifest, token_hash

# Edges of histograms, all in nats but those of the shares.
# Log-probabilities of sampled tokens lie mostly between -0.5 and 0. A long tail below -10 shows
# tokens that the policy hardly ever samples.
LOGPROB_EDGES = (-np.inf, -20.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.1, -0.01, np.inf)
# Symmetric around the bin of -0.1 to 0.1, in which teacher and student agree.
ADVANTAGE_EDGES = (-np.inf, -10.0, -5.0, -2.0, -1.0, -0.1, 0.1, 1.0, 2.0, 5.0, 10.0, np.inf)
# Of the probability that lies outside of the teacher's top-K.
SHARE_EDGES = (0.0, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0)
ENTROPY_EDGES = (0.0, 1e-3, 0.01, 0.1, 0.5, 1.0, 2.0, np.inf)
# So many neighbours that both policies give exactly 0 are hardly a model that is certain: what a
# tool wrote looks like this where the mask was forgotten. Single ones are usual of sharp models.
RUN_OF_ZEROS = 8


class Moments:
    """Mean, spread, extremes and a histogram of a stream of values, in constant memory."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        self.edges = edges
        # Sums and extremes are kept instead of values, because a cache has billions of tokens.
        self.counts = np.zeros(len(edges) - 1, np.int64)
        self.number = 0
        self.total = 0.0
        self.squares = 0.0
        self.least = np.inf
        self.most = -np.inf

    def add(self, values: NDArray[Any]) -> None:
        """Add values of any shape. Those that are not finite are left out."""
        # A damaged cache is inspected, too. Its NaN would spoil every figure.
        values = values[np.isfinite(values)].astype(np.float64)
        # An empty array has no smallest value.
        if values.size:
            self.counts += np.histogram(values, self.edges)[0]
            self.number += values.size
            self.total += values.sum()
            self.squares += (values**2).sum()
            self.least = min(self.least, values.min())
            self.most = max(self.most, values.max())

    def as_json(self) -> dict[str, Any] | None:
        """Return the statistics, or None if there were no values."""
        if not self.number:
            return None
        mean = self.total / self.number
        # For equal values, rounding can make this difference slightly negative.
        spread = max(0.0, self.squares / self.number - mean**2) ** 0.5
        # JSON has no infinity.
        edges = [float(edge) if np.isfinite(edge) else None for edge in self.edges]
        histogram = {"edges": edges, "counts": self.counts.tolist()}
        return {
            "mean": mean,
            "standard_deviation": spread,
            "min": float(self.least),
            "max": float(self.most),
            "histogram": histogram,
        }


def inspect_cache(folder: str | Path) -> dict[str, Any]:
    """Return all statistics of an artifact that has responses, as JSON.

    This needs memory for one shard, and about 40 bytes per response.

    Raises:
        ArtifactError: A shard is damaged, or the artifact has verdicts and no responses.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    refuse_verdicts(folder, manifest)
    # With the end tokens of the manifest, the scan can say how many responses end with one.
    scan = _Scan(set(manifest.extra.get("end_token_ids", [])))
    regime = RegimeScan()
    # Artifacts of models list other files.
    shards = [shard for shard in manifest.shards if shard.name.endswith(".parquet")]
    for shard in shards:
        table = read_shard(folder, shard)
        scan.add(table)
        regime.add(table)
    figures = {"regime": regime_json(regime.figures(len(shards), len(shards)))}
    sizes = _sizes(folder, scan.num_tokens)
    return {**_about(folder, manifest), **scan.as_json(), **figures, **sizes}


def _about(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return what the manifest says."""
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
        # By fingerprint, because that is what a row names its teacher by.
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
        # Manifests of other writers may lack all of these.
        "logprob_bits": manifest.extra.get("logprob_bits", 32),
        "logprob_loss": manifest.extra.get("logprob_loss"),
        "lacks": manifest.extra.get("lacks", []),
        "residualisation": manifest.extra.get("residualisation"),
        "token_alignment": alignment_of(manifest),
        "shards": len(manifest.shards),
    }


def _sizes(folder: Path, num_tokens: int) -> dict[str, Any]:
    """Return the bytes on disk, also per response token."""
    columns = column_bytes(folder)
    tokens = max(1, num_tokens)
    # The reference code has no sampling log-probabilities. Sizes are compared without them.
    without_sampling = sum(columns.values()) - columns.get("sampling_logprobs", 0)
    total = sum(columns.values())
    return {
        "bytes": total,
        "bytes_per_token": total / tokens,
        "bytes_per_token_without_sampling_logprobs": without_sampling / tokens,
        "bytes_per_token_by_column": {name: size / tokens for name, size in columns.items()},
    }


class _Scan:
    """Collects the statistics of all rows, shard by shard.

    Args:
        end_token_ids: The tokens that end a response. It is empty if the manifest does not say.
    """

    def __init__(self, end_token_ids: set[int]) -> None:
        self._ends = end_token_ids
        # One array per shard.
        self._lengths: list[NDArray[Any]] = []
        self._prompt_lengths: list[NDArray[Any]] = []
        # How often each finish reason occurs. Its sum is the number of rows.
        self._reasons: Counter[str] = Counter()
        # Of the responses that ended by themselves.
        self._last_tokens: Counter[int] = Counter()
        # Of all rows. Duplicates may lie in different shards.
        self._keys: Counter[tuple[str, int]] = Counter()
        self._sequences: Counter[str] = Counter()
        self._prompts: set[str] = set()
        self._teachers: Counter[str] = Counter()
        # An imported cache has only the first of the two.
        self._logprobs = {
            name: Moments(LOGPROB_EDGES) for name in ("teacher_logprobs", "sampling_logprobs")
        }
        self._tail = Moments(SHARE_EDGES)
        self._entropy = Moments(ENTROPY_EDGES)
        self._num_top_ids = 0
        # Of a teacher with another tokenizer: the tokens by what became of them.
        self._alignment: Counter[str] = Counter()
        # Those whose log-probabilities are some: all but the masked ones.
        self._num_scored = 0
        # Of tokens that carry loss, and of those in long runs of tokens whose two log-probabilities
        # are exactly 0.
        self._has_mask = False
        self._num_loss_tokens = 0
        self._num_turns = 0
        self._num_certain = 0
        # The advantage is counted apart from its histogram, whose edges need not be 1 and 10.
        self._advantage = Moments(ADVANTAGE_EDGES)
        self._num_over_one = 0
        self._num_clipped = 0
        self.num_tokens = 0

    def add(self, table: pa.Table) -> None:
        """Add the rows of one shard."""
        self._add_names(table)
        self._add_sequences(table)
        self._alignment.update(count_alignment(table))
        carries_loss = loss_tokens(table)
        self._add_mask(table, carries_loss)
        self._add_logprobs(table, carries_loss)
        # The other optional columns.
        if TOP_IDS in table.column_names:
            # K is written nowhere. It is the number of ids per token.
            self._num_top_ids += len(flat(table, TOP_IDS)[0])
        if TAIL in table.column_names:
            # As a probability: the share of the teacher that the top-K does not show.
            self._tail.add(_chosen(np.exp(flat(table, TAIL)[0].astype(np.float64)), carries_loss))
        if ENTROPY in table.column_names:
            self._entropy.add(_chosen(flat(table, ENTROPY)[0], carries_loss))

    def _add_mask(self, table: pa.Table, carries_loss: NDArray[np.bool_]) -> None:
        """Count the tokens that carry loss and the turns, which are runs of such tokens."""
        self._has_mask |= LOSS_MASK in table.column_names
        self._num_loss_tokens += int(carries_loss.sum())
        _, rows = flat(table, "token_ids")
        # A turn begins at a token with loss behind one without, or at the first of its response.
        begins = carries_loss.copy()
        begins[1:] &= ~carries_loss[:-1] | (rows[1:] != rows[:-1])
        self._num_turns += int(begins.sum())

    def _add_names(self, table: pa.Table) -> None:
        # Several responses to one prompt count as one prompt.
        names = table.column("prompt_id").to_pylist()
        self._prompts.update(names)
        self._keys.update(zip(names, table.column("sample_index").to_pylist(), strict=True))
        if "teacher" in table.column_names:
            self._teachers.update(table.column("teacher").to_pylist())

    def _add_sequences(self, table: pa.Table) -> None:
        """Add lengths, endings, and the sequences themselves by their hash."""
        ids, rows = flat(table, "token_ids")
        prompts, prompt_rows = flat(table, "prompt_ids")
        lengths = np.bincount(rows, minlength=table.num_rows)
        prompt_lengths = np.bincount(prompt_rows, minlength=table.num_rows)
        self._lengths.append(lengths)
        self._prompt_lengths.append(prompt_lengths)
        self.num_tokens += len(ids)
        reasons = table.column("finish_reason").to_pylist()
        self._reasons.update(reasons)
        ends = np.cumsum(lengths)
        prompt_ends = np.cumsum(prompt_lengths)
        for row, reason in enumerate(reasons):
            # Slices of the flat arrays. A row ends where the running sum of the lengths says.
            prompt = prompts[prompt_ends[row] - prompt_lengths[row] : prompt_ends[row]]
            response = ids[ends[row] - lengths[row] : ends[row]]
            # A truncated response ends with whatever token was the last.
            if reason == "stop" and len(response):
                self._last_tokens[int(response[-1])] += 1
            # The hash has 16 digits. The sequences themselves would be the whole cache in memory.
            self._sequences[token_hash(prompt, response)] += 1

    def _add_logprobs(self, table: pa.Table, carries_loss: NDArray[np.bool_]) -> None:
        # Both columns are read once and serve two statistics, their own and the advantage.
        names = [name for name in self._logprobs if name in table.column_names]
        # A token without loss was not sampled, or has no score, and 0 stands in place of its
        # log-probabilities. Two zeros would count as perfect agreement.
        found = {name: _chosen(flat(table, name)[0], carries_loss) for name in names}
        for name, values in found.items():
            self._logprobs[name].add(values)
        # The policy that sampled is the student at the start, so the difference is the advantage of
        # the first step. In a damaged cache the two columns may differ in length.
        if len(found) == 2 and len({len(values) for values in found.values()}) == 1:
            advantage = found["teacher_logprobs"].astype(np.float64) - found["sampling_logprobs"]
            self._advantage.add(advantage)
            self._num_scored += len(advantage)
            self._num_over_one += int((np.abs(advantage) > 1).sum())
            self._num_clipped += int((np.abs(advantage) > ADVANTAGE_CLIP).sum())
            certain = (found["teacher_logprobs"] == 0) & (found["sampling_logprobs"] == 0)
            self._num_certain += _in_long_runs(certain, RUN_OF_ZEROS)

    def as_json(self) -> dict[str, Any]:
        # Every response has one finish reason, so their sum is the number of responses.
        rows = sum(self._reasons.values())
        tokens = max(1, self.num_tokens)
        stopped = self._reasons["stop"]
        # If the manifest does not say it, the end token is the one that most responses end with. A
        # token that ends only one response says nothing.
        ends = self._ends or {
            token for token, count in self._last_tokens.most_common(1) if count > 1
        }
        num_ended = sum(self._last_tokens[token] for token in ends)
        guessed = "the commonest last token of responses that stopped"
        advantage = self._advantage.as_json()
        if advantage is not None:
            advantage |= {
                "share_over_1_nat": self._num_over_one / max(1, self._num_scored),
                "share_clipped": self._num_clipped / max(1, self._num_scored),
                "share_in_runs_of_zeros": self._num_certain / max(1, self._num_scored),
            }
        return {
            "rows": rows,
            "tokens": self.num_tokens,
            "has_loss_mask": self._has_mask,
            "loss_tokens": self._num_loss_tokens,
            "turns": self._num_turns,
            "prompts": len(self._prompts),
            "lengths": _lengths_json(self._lengths),
            "prompt_lengths": _lengths_json(self._prompt_lengths),
            "finish_reasons": dict(self._reasons),
            "truncated_share": self._reasons["length"] / max(1, rows),
            "end_token_ids": sorted(ends),
            "end_tokens_from": "manifest" if self._ends else guessed,
            "end_token_coverage": num_ended / stopped if stopped else None,
            "duplicate_keys": sum(count - 1 for count in self._keys.values()),
            "duplicate_sequences": sum(count - 1 for count in self._sequences.values()),
            "rows_by_teacher": dict(self._teachers),
            "alignment": dict(self._alignment),
            "alignment_line": alignment_line(self._alignment) if self._alignment else "",
            **{name: moments.as_json() for name, moments in self._logprobs.items()},
            "advantage_at_start": advantage,
            "top_k": self._num_top_ids // tokens,
            "teacher_tail": self._tail.as_json(),
            "teacher_entropy": self._entropy.as_json(),
        }


def _chosen(values: NDArray[Any], carries_loss: NDArray[np.bool_]) -> NDArray[Any]:
    """Return the values [N] of tokens with loss, or all of a damaged column of another length."""
    return values[carries_loss] if len(values) == len(carries_loss) else values


def _in_long_runs(values: NDArray[np.bool_], least: int) -> int:
    """Return how many values are in runs of true of at least this length."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], values, [False]]).astype(np.int8)))
    lengths = edges[1::2] - edges[::2]
    return int(lengths[lengths >= least].sum())


def _lengths_json(parts: list[NDArray[Any]]) -> dict[str, Any] | None:
    """Return the distribution of lengths in tokens, or None if there are none."""
    lengths = np.concatenate(parts) if parts else np.zeros(0)
    if not len(lengths):
        return None
    # Bins of less than one token would be empty by construction.
    counts, edges = np.histogram(lengths, bins=min(12, int(lengths.max() - lengths.min()) + 1))
    # The median and the tail say more of lengths than a standard deviation, because they are
    # skewed.
    quantiles = {
        name: float(np.quantile(lengths, share))
        for name, share in (("min", 0), ("median", 0.5), ("p95", 0.95), ("max", 1))
    }
    return {
        "mean": float(lengths.mean()),
        **quantiles,
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
