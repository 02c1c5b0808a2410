"""Responses and teacher scores as Parquet rows: demonstrations, rollouts, and the teacher cache
that Lightning OPD learns from.

Schema (one row a response; every list of a row has the length of ``token_ids`` except
``prompt_ids``):
prompt_id string, sample_index int32, prompt_ids list<int32>, token_ids list<int32>,
sampling_logprobs list<float32>, finish_reason string,
weight_version string, and where present loss_mask list<bool>, teacher_logprobs list<float32>
(natural log, temperature 1), and the optional columns of
docs/cache_format.md, which is the specification: the teacher's top-K, its entropy, its name, the
sampler's routed experts. Where a manifest says
``logprob_bits`` 16 the log-probabilities are list<float16>; they are read as float32.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lopd.artifacts import ArtifactWriter, read_manifest, read_shard
from lopd.errors import ArtifactError
from lopd.records import Floats, Manifest, Response, TeacherScores, TopK, token_hash

# in a shard's metadata, where log-probabilities were stored in 16 bits: what that changed
LOSS = b"lopd.logprob_loss"
ROUTED = (
    b"lopd.routed_experts"  # in a shard's metadata, where it has that column: JSON {"layers", "k"}
)
TOP_IDS, TOP_LOGPROBS, TAIL, ENTROPY = (
    "teacher_top_ids",
    "teacher_top_logprobs",
    "teacher_tail_logprob",
    "teacher_entropy",
)
REQUIRED = (
    "prompt_id",
    "sample_index",
    "prompt_ids",
    "token_ids",
    "sampling_logprobs",
    "finish_reason",
    "weight_version",
)
_HALVED = ("sampling_logprobs", "teacher_logprobs", TOP_LOGPROBS, TAIL)


def to_table(
    responses: Sequence[Response],
    scores: Sequence[TeacherScores] | None = None,
    *,
    logprob_bits: int = 32,
) -> pa.Table:
    """Rows of responses, with the teacher's scores where given (same order; ArtifactError if a
    score belongs to other tokens).

    logprob_bits: 32 is lossless; 16 stores float16 and notes in the table's metadata how far values
    moved.
    """
    columns: dict[str, pa.Array] = {
        "prompt_id": pa.array([response.prompt_id for response in responses], pa.string()),
        "sample_index": pa.array([response.sample_index for response in responses], pa.int32()),
        "prompt_ids": _lists([response.prompt_ids for response in responses], pa.int32()),
        "token_ids": _lists([response.token_ids for response in responses], pa.int32()),
        "sampling_logprobs": _lists(
            [response.sampling_logprobs for response in responses], pa.float32()
        ),
        "finish_reason": pa.array([response.finish_reason for response in responses], pa.string()),
        "weight_version": pa.array(
            [response.weight_version for response in responses], pa.string()
        ),
    }
    masks = [response.loss_mask for response in responses]
    if any(mask is not None for mask in masks):
        filled = [
            np.ones(len(r.token_ids), bool) if m is None else m
            for r, m in zip(responses, masks, strict=True)
        ]
        columns["loss_mask"] = _lists(filled, pa.bool_())
    metadata = None
    routed = [response.routed_experts for response in responses]
    if routed and all(experts is not None for experts in routed):
        columns["routed_experts"] = _lists(
            [experts.reshape(-1) for experts in routed if experts is not None], pa.int16()
        )
        layers, chosen = next(experts.shape[1:] for experts in routed if experts is not None)
        metadata = {ROUTED: json.dumps({"layers": layers, "k": chosen}).encode()}
    if scores is not None:
        columns |= _teacher_columns(responses, scores)
    table = pa.table(columns, metadata=metadata)
    return table if logprob_bits == 32 else halve(table)


def _teacher_columns(
    responses: Sequence[Response], scores: Sequence[TeacherScores]
) -> dict[str, pa.Array]:
    for response, score in zip(responses, scores, strict=True):
        if score.key != response.key or score.token_hash != token_hash(
            response.prompt_ids, response.token_ids
        ):
            raise ArtifactError(
                f"teacher scores of {score.key} do not belong to the tokens of response {response.key}",
                remedy="score again",
            )
    columns = {
        "teacher_logprobs": _lists([score.teacher_logprobs for score in scores], pa.float32())
    }
    if any(score.teacher for score in scores):
        columns["teacher"] = pa.array([score.teacher for score in scores], pa.string())
    tops = [score.top for score in scores if score.top is not None]
    entropies = [score.entropy for score in scores if score.entropy is not None]
    for name, found in (("a top-K", tops), ("an entropy", entropies)):
        if found and len(found) != len(scores):
            raise ArtifactError(
                f"{len(found)} of {len(scores)} scores have {name}",
                limit="all or none",
                remedy="score again",
            )
    if tops:
        columns[TOP_IDS] = _lists([top.ids.reshape(-1) for top in tops], pa.int32())
        columns[TOP_LOGPROBS] = _lists([top.logprobs.reshape(-1) for top in tops], pa.float32())
        columns[TAIL] = _lists([top.tail_logprob for top in tops], pa.float32())
    if entropies:
        columns[ENTROPY] = _lists(entropies, pa.float32())
    return columns


def halve(table: pa.Table) -> pa.Table:
    """The same rows with log-probabilities as float16. Metadata: number of values, largest and
    summed absolute change in nats, over all such columns.
    """
    num_values, largest, summed = 0, 0.0, 0.0
    for name in _HALVED:
        if name in table.column_names:
            rows = _rows(table.column(name))
            exact = np.concatenate(rows) if rows else np.zeros(0, np.float32)
            if exact.size and np.abs(exact).max() > np.finfo(np.float16).max:
                raise ArtifactError(
                    f"{name} of {exact.min()} nats",
                    limit="float16 ends at -65504",
                    remedy="set score.logprob_bits = 32",
                )
            change = np.abs(exact.astype(np.float64) - exact.astype(np.float16))
            num_values, largest, summed = (
                num_values + len(change),
                max(largest, float(change.max(initial=0))),
                summed + float(change.sum()),
            )
            table = table.set_column(
                table.column_names.index(name),
                name,
                _lists([row.astype(np.float16) for row in rows], pa.float16()),
            )
    loss = {"num_values": num_values, "max_abs": largest, "sum_abs": summed}
    return table.replace_schema_metadata(
        {**(table.schema.metadata or {}), LOSS: json.dumps(loss).encode()}
    )


def bare(table: pa.Table) -> pa.Table:
    """The rows without what a shard says of the artifact that it was part of; what says how its
    columns are to be read stays.
    """
    found = table.schema.metadata or {}
    return table.replace_schema_metadata({ROUTED: found[ROUTED]} if ROUTED in found else None)


def logprob_loss(folder: Path, manifest: Manifest | None = None) -> dict[str, float] | None:
    """What 16 bits changed over all shards, in nats: {max_abs, mean_abs}; None for a lossless
    artifact. Reads only the shards' footers.
    """
    names = (
        [shard.name for shard in manifest.shards]
        if manifest is not None
        else sorted(path.name for path in folder.glob("shard-*.parquet"))
    )
    found = [
        metadata[LOSS]
        for name in names
        if LOSS in (metadata := pq.read_schema(folder / name).metadata or {})
    ]
    if not found:
        return None
    losses = [json.loads(value) for value in found]
    total = sum(loss["num_values"] for loss in losses)
    return {
        "max_abs": max(loss["max_abs"] for loss in losses),
        "mean_abs": sum(loss["sum_abs"] for loss in losses) / max(1, total),
    }


def column_bytes(folder: Path) -> dict[str, int]:
    """Bytes on disk by column, compressed; ``footers``: all that belongs to no column. Reads only
    the footers.
    """
    total: dict[str, int] = {"footers": 0}
    for path in sorted(folder.glob("shard-*.parquet")):
        metadata = pq.read_metadata(path)
        total["footers"] += path.stat().st_size
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                name = column.path_in_schema.partition(".")[0]
                total[name] = total.get(name, 0) + column.total_compressed_size
                total["footers"] -= column.total_compressed_size
    return total


def _lists(rows: Sequence[NDArray[Any]], kind: pa.DataType) -> pa.ListArray:
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate(rows) if rows else np.zeros(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=kind))


def _rows(column: pa.ChunkedArray) -> list[NDArray[Any]]:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # zero chunks
        return []
    offsets = array.offsets.to_numpy()
    values = array.values.to_numpy(zero_copy_only=False)
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    return [values[start:end] for start, end in itertools.pairwise(offsets)]


def from_table(table: pa.Table, where: str = "") -> Iterator[tuple[Response, Floats | None]]:
    """Rows as records, with teacher_logprobs [R] where the table has them. ArtifactError: a column
    is missing or lengths differ.
    """
    for response, scores in scored_rows(table, where):
        yield response, None if scores is None else scores.teacher_logprobs


def scored_rows(
    table: pa.Table, where: str = "", *, without_sampling: bool = False
) -> Iterator[tuple[Response, TeacherScores | None]]:
    """Rows as records, with all that the table has of the teacher. without_sampling: where it has
    no sampling_logprobs (an imported cache) they are NaN.

    ArtifactError: a column is missing or lengths differ.
    """
    missing = sorted(
        set(REQUIRED)
        - set(table.column_names)
        - ({"sampling_logprobs"} if without_sampling else set())
    )
    if missing:
        raise ArtifactError(
            f"columns {missing} are missing",
            where=where,
            remedy="see docs/cache_format.md for the schema",
        )
    lists = {
        name: _rows(table.column(name))
        for name in table.column_names
        if pa.types.is_list(table.schema.field(name).type)
    }
    plain = {
        name: table.column(name).to_pylist()
        for name in ("prompt_id", "sample_index", "finish_reason", "weight_version")
    }
    teachers = table.column("teacher").to_pylist() if "teacher" in table.column_names else None
    about_experts = json.loads((table.schema.metadata or {}).get(ROUTED, b"null"))
    for row in range(table.num_rows):
        own = {name: rows[row] for name, rows in lists.items()}
        try:
            routed = own.get("routed_experts") if about_experts else None
            response = Response(
                prompt_id=plain["prompt_id"][row],
                sample_index=plain["sample_index"][row],
                prompt_ids=own["prompt_ids"],
                token_ids=own["token_ids"],
                sampling_logprobs=own["sampling_logprobs"]
                if "sampling_logprobs" in own
                else np.full(len(own["token_ids"]), np.nan, np.float32),
                finish_reason=plain["finish_reason"][row],
                weight_version=plain["weight_version"][row],
                loss_mask=own.get("loss_mask"),
                routed_experts=None
                if routed is None
                else routed.reshape(-1, about_experts["layers"], about_experts["k"]),
            )
            scores = _scores_of(response, own, teachers[row] if teachers is not None else "")
        except ValueError as error:
            raise ArtifactError(str(error), where=where) from None
        yield response, scores


def _scores_of(
    response: Response, own: Mapping[str, NDArray[Any]], teacher: str
) -> TeacherScores | None:
    """ValueError: lengths differ."""
    if "teacher_logprobs" not in own:
        return None
    logprobs, length = own["teacher_logprobs"], len(response.token_ids)
    if len(logprobs) != length:
        raise ValueError(
            f"response {response.key}: {len(logprobs)} teacher log-probabilities for {length} tokens"
        )
    top = None
    if TOP_IDS in own:
        if length and (len(own[TOP_IDS]) % length or len(own[TOP_IDS]) != len(own[TOP_LOGPROBS])):
            raise ValueError(
                f"response {response.key}: top-K of {len(own[TOP_IDS])} ids and {len(own[TOP_LOGPROBS])} values for {length} tokens"
            )
        top = TopK(
            own[TOP_IDS].reshape(length, -1), own[TOP_LOGPROBS].reshape(length, -1), own[TAIL]
        )
    name = token_hash(response.prompt_ids, response.token_ids)
    return TeacherScores(
        response.prompt_id, response.sample_index, name, logprobs, top, own.get(ENTROPY), teacher
    )


def read_rows(
    folder: Path, manifest: Manifest | None = None
) -> Iterator[tuple[Response, Floats | None]]:
    """Every response of an artifact in shard order, one shard in memory at a time, checksums
    verified. ArtifactError: damage, or a duplicate key.
    """
    manifest = manifest or read_manifest(folder)
    seen: set[tuple[str, int]] = set()
    for shard in manifest.shards:
        for response, scores in from_table(
            read_shard(folder, shard), where=str(folder / shard.name)
        ):
            if response.key in seen:
                raise ArtifactError(
                    f"response {response.key} occurs twice",
                    where=str(folder / shard.name),
                    remedy="remove one of the shards",
                )
            seen.add(response.key)
            yield response, scores


def write_responses(
    folder: Path,
    responses: Iterable[Response],
    *,
    kind: str,
    inputs: Mapping[str, Any],
    shard_size: int = 4096,
    **about: Any,
) -> Manifest:
    """Publishes responses that are already at hand as a complete artifact. about: parents, models,
    sampling, lineage of the manifest.
    """
    writer = ArtifactWriter(folder, kind=kind, inputs=inputs, **about)
    pending: list[Response] = []
    index = 0

    def flush() -> None:
        nonlocal index
        if pending and index not in writer.published:
            writer.publish_shard(index, to_table(pending))
        index += bool(pending)
        pending.clear()

    for response in responses:
        pending.append(response)
        if len(pending) == shard_size:
            flush()
    flush()
    return writer.finish()
