"""Responses and teacher scores as rows of Parquet, and back.

Demonstrations, rollouts and the teacher cache all have this form. One row is one response. These
columns are always there:

    prompt_id          string
    sample_index       int32
    prompt_ids         list<int32>
    token_ids          list<int32>
    sampling_logprobs  list<float32>
    finish_reason      string
    weight_version     string

Others are there if they are known: loss_mask list<bool>, teacher_logprobs list<float32>, and the
teacher's top-K, its entropy, its base's log-probabilities, its name, the alignment with a teacher
of another tokenizer, and the sampler's routed experts. Every list but prompt_ids has the length of
token_ids. If the manifest says ``logprob_bits`` 16, log-probabilities are stored as float16 and
read as float32. docs/cache_format.md is the specification.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lopd.artifacts import ArtifactWriter, read_manifest, read_shard
from lopd.cache.columns import (
    ALIGNMENT,
    BASE,
    ENTROPY,
    ROUTED,
    ROUTED_EXPERTS,
    TAIL,
    TOP_IDS,
    TOP_LOGPROBS,
    to_arrays,
    to_lists,
)
from lopd.cache.half_precision import halve
from lopd.errors import ArtifactError
from lopd.records import Floats, Manifest, Response, TeacherScores, TopK, token_hash

# The kind of an artifact whose rows have the teacher's log-probabilities.
TEACHER_CACHE = "teacher_cache"
# Columns with one value per row, and all columns that a row cannot do without.
_PLAIN = ("prompt_id", "sample_index", "finish_reason", "weight_version")
_REQUIRED = (*_PLAIN, "prompt_ids", "token_ids", "sampling_logprobs")


def to_table(
    responses: Sequence[Response],
    scores: Sequence[TeacherScores] | None = None,
    *,
    logprob_bits: int = 32,
) -> pa.Table:
    """Return the rows of responses, with the teacher's scores if they are given.

    Args:
        scores: The teacher's scores, in the order of the responses.
        logprob_bits: 32 is lossless. 16 stores float16 and records the change in the metadata.

    Raises:
        ArtifactError: A score belongs to other tokens, or only some scores have an optional column.
    """

    # The names of these columns are those of the record's fields.
    def strings(name: str) -> pa.Array:
        return pa.array([getattr(response, name) for response in responses], pa.string())

    # Each list column takes one array per response and becomes one array of all values.
    def lists(name: str, kind: pa.DataType) -> pa.Array:
        return to_lists([getattr(response, name) for response in responses], kind)

    # Every type is given and never inferred: an empty shard must have the types of a full one.
    columns: dict[str, pa.Array] = {
        "prompt_id": strings("prompt_id"),
        "sample_index": pa.array([response.sample_index for response in responses], pa.int32()),
        "prompt_ids": lists("prompt_ids", pa.int32()),
        "token_ids": lists("token_ids", pa.int32()),
        "sampling_logprobs": lists("sampling_logprobs", pa.float32()),
        "finish_reason": strings("finish_reason"),
        "weight_version": strings("weight_version"),
    }
    # Sampled responses of one turn have no mask. The column would cost bytes and say nothing.
    if any(response.loss_mask is not None for response in responses):
        columns["loss_mask"] = to_lists([_mask_of(response) for response in responses], pa.bool_())
    metadata = None
    routed = [r.routed_experts for r in responses if r.routed_experts is not None]
    # Parquet lists have one dimension. The other two of the experts stand in the metadata.
    if routed and len(routed) == len(responses):
        columns[ROUTED_EXPERTS] = to_lists([one.reshape(-1) for one in routed], pa.int16())
        layers, chosen = routed[0].shape[1:]
        metadata = {ROUTED: json.dumps({"layers": layers, "k": chosen}).encode()}
    if scores is not None:
        _check_belonging(responses, scores)
        columns |= _teacher_columns(scores)
    # The metadata of the table becomes the key-value metadata of the Parquet file.
    table = pa.table(columns, metadata=metadata)
    return table if logprob_bits == 32 else halve(table)


def _mask_of(response: Response) -> NDArray[np.bool_]:
    if response.loss_mask is None:
        # None means that all tokens carry loss. Next to written masks it has to be written, too.
        return np.ones(len(response.token_ids), bool)
    return response.loss_mask


def _check_belonging(responses: Sequence[Response], scores: Sequence[TeacherScores]) -> None:
    """Raise ArtifactError if a score is not of the response in its place."""
    for response, score in zip(responses, scores, strict=True):
        # The key alone is not enough: rollouts that were sampled again have the same keys.
        name = token_hash(response.prompt_ids, response.token_ids)
        if score.key != response.key or score.token_hash != name:
            raise ArtifactError(
                f"teacher scores of {score.key} do not belong to the tokens of response "
                f"{response.key}",
                remedy="run the score stage again",
            )


def _teacher_columns(scores: Sequence[TeacherScores]) -> dict[str, pa.Array]:
    """Return all columns that the scores have.

    Raises:
        ArtifactError: Only some scores have a top-K, an entropy, the base's log-probabilities or an
            alignment.
    """
    columns = {
        # The one column that every score has.
        "teacher_logprobs": to_lists([score.teacher_logprobs for score in scores], pa.float32())
    }
    # With one teacher the manifest names it, and the column would repeat 64 digits in every row.
    if any(score.teacher for score in scores):
        columns["teacher"] = pa.array([score.teacher for score in scores], pa.string())
    tops = [score.top for score in scores if score.top is not None]
    entropies = [score.entropy for score in scores if score.entropy is not None]
    bases = [score.base_logprobs for score in scores if score.base_logprobs is not None]
    alignments = [score.alignment for score in scores if score.alignment is not None]
    # A column of some rows only would need a null in the others, and readers would have to expect
    # it.
    optional = (
        ("a top-K", tops),
        ("an entropy", entropies),
        ("the base's log-probabilities", bases),
        ("an alignment", alignments),
    )
    for name, found in optional:
        if found and len(found) != len(scores):
            raise ArtifactError(
                f"only {len(found)} of {len(scores)} scores have {name}",
                limit="either all scores have it, or none",
                remedy="run the score stage again",
            )
    if tops:
        # [R, K] row after row. K is the length divided by R.
        columns[TOP_IDS] = to_lists([top.ids.reshape(-1) for top in tops], pa.int32())
        columns[TOP_LOGPROBS] = to_lists([top.logprobs.reshape(-1) for top in tops], pa.float32())
        columns[TAIL] = to_lists([top.tail_logprob for top in tops], pa.float32())
    if entropies:
        columns[ENTROPY] = to_lists(entropies, pa.float32())
    if bases:
        columns[BASE] = to_lists(bases, pa.float32())
    if alignments:
        columns[ALIGNMENT] = to_lists(alignments, pa.int8())
    return columns


def from_table(table: pa.Table, where: str = "") -> Iterator[tuple[Response, Floats | None]]:
    """Yield each response with its teacher_logprobs [R], or with None if the table has none.

    Args:
        where: The file, for errors.

    Raises:
        ArtifactError: A column is missing or has another length than the tokens.
    """
    # Most callers want the log-probabilities alone.
    for response, scores in scored_rows(table, where):
        yield response, None if scores is None else scores.teacher_logprobs


def scored_rows(
    table: pa.Table, where: str = "", *, without_sampling: bool = False
) -> Iterator[tuple[Response, TeacherScores | None]]:
    """Yield each response with all that the table has of the teacher.

    Args:
        where: The file, for errors.
        without_sampling: Accept a table without sampling_logprobs, as an import makes it. They are
            then NaN.

    Raises:
        ArtifactError: A column is missing or has another length than the tokens.
    """
    optional = {"sampling_logprobs"} if without_sampling else set()
    # Unknown columns are ignored: an older reader must be able to read a newer cache.
    missing = sorted(set(_REQUIRED) - optional - set(table.column_names))
    if missing:
        raise ArtifactError(
            f"the columns {missing} are missing",
            where=where,
            remedy="add these columns: docs/cache_format.md has the schema",
        )
    # Whole columns are converted before the rows. One conversion per row is much slower.
    lists = {
        name: to_arrays(table.column(name))
        for name in table.column_names
        if pa.types.is_list(table.schema.field(name).type)
    }
    plain = {name: table.column(name).to_pylist() for name in _PLAIN}
    # A cache of one teacher need not have this column.
    teachers = table.column("teacher").to_pylist() if "teacher" in table.column_names else None
    # The column of the experts is flat. Without its shape it is ignored, as an unknown column is.
    shape = json.loads((table.schema.metadata or {}).get(ROUTED, b"null"))
    for row in range(table.num_rows):
        # Views into the arrays of whole columns. Nothing is copied per row.
        own = {name: rows[row] for name, rows in lists.items()}
        # The records check the lengths themselves. Here the file is known, so it is named.
        try:
            about = {name: values[row] for name, values in plain.items()}
            response = _response_of(about, own, shape)
            scores = _scores_of(response, own, teachers[row] if teachers is not None else "")
        except ValueError as error:
            raise ArtifactError(
                str(error), where=where, remedy="run the stage that makes this artifact again"
            ) from None
        yield response, scores


def _response_of(
    plain: Mapping[str, Any], lists: Mapping[str, NDArray[Any]], shape: Mapping[str, int] | None
) -> Response:
    """Build a response from one row. Raises ValueError if lengths differ.

    Args:
        shape: The number of layers and of chosen experts, if the table has them.
    """
    # An absent value must not look like a certain token, which 0 would be: NaN spoils what uses it.
    sampling = lists.get("sampling_logprobs")
    if sampling is None:
        sampling = np.full(len(lists["token_ids"]), np.nan, np.float32)
    return Response(
        # Names, finish reason and weight version. The record refuses an unknown finish reason.
        **plain,
        prompt_ids=lists["prompt_ids"],
        token_ids=lists["token_ids"],
        sampling_logprobs=sampling,
        loss_mask=lists.get("loss_mask"),
        routed_experts=_experts_of(plain, lists.get(ROUTED_EXPERTS), shape),
    )


def _experts_of(
    plain: Mapping[str, Any], flat: NDArray[Any] | None, shape: Mapping[str, int] | None
) -> NDArray[Any] | None:
    """Return the routed experts of one row. Raises ValueError if they are not of the shape."""
    if flat is None or shape is None:
        return None
    layers, chosen = shape["layers"], shape["k"]
    # Without this check the reshape would fail with a message that names no response.
    if len(flat) % (layers * chosen):
        raise ValueError(
            f"response {(plain['prompt_id'], plain['sample_index'])} has {len(flat)} routed "
            f"experts, which are not {layers} x {chosen} for each position"
        )
    return flat.reshape(-1, layers, chosen)


def _scores_of(
    response: Response, lists: Mapping[str, NDArray[Any]], teacher: str
) -> TeacherScores | None:
    """Build the teacher's scores of one row. Raises ValueError if lengths differ."""
    # Rollouts have the same form as a cache, without this column.
    if "teacher_logprobs" not in lists:
        return None
    # The record itself cannot check this length, because it does not have the tokens.
    logprobs = lists["teacher_logprobs"]
    length = len(response.token_ids)
    if len(logprobs) != length:
        raise ValueError(
            f"response {response.key} has {len(logprobs)} teacher log-probabilities for "
            f"{length} tokens"
        )
    top = None
    if TOP_IDS in lists:
        ids = lists[TOP_IDS]
        values = lists[TOP_LOGPROBS]
        # Without this check the reshape below would fail with a message that names no response.
        if length and (len(ids) % length or len(ids) != len(values)):
            raise ValueError(
                f"response {response.key} has {len(ids)} rows of top-K ids and "
                f"{len(values)} of top-K values for {length} tokens"
            )
        top = TopK(ids.reshape(length, -1), values.reshape(length, -1), lists[TAIL])
    return TeacherScores(
        response.prompt_id,
        response.sample_index,
        # Of the ids that were read, so that a later check compares with what is in the file.
        token_hash(response.prompt_ids, response.token_ids),
        logprobs,
        top=top,
        entropy=lists.get(ENTROPY),
        teacher=teacher,
        base_logprobs=lists.get(BASE),
        alignment=lists.get(ALIGNMENT),
    )


def read_rows(
    folder: str | Path, manifest: Manifest | None = None, *, without_sampling: bool = False
) -> Iterator[tuple[Response, Floats | None]]:
    """Yield every response of an artifact with its teacher_logprobs, in the order of the shards.

    One shard is in memory at a time, and its checksum is verified.

    Args:
        folder: The artifact.
        manifest: Its manifest. None: it is read.
        without_sampling: See scored_rows.

    Raises:
        ArtifactError: A shard is damaged, or a response occurs twice.
    """
    folder = Path(folder)
    manifest = manifest or read_manifest(folder)
    # Some hundred bytes per response. CacheReader.require_unique() does it in 8.
    seen: set[tuple[str, int]] = set()
    for shard in manifest.shards:
        where = str(folder / shard.name)
        table = read_shard(folder, shard)
        for response, scores in scored_rows(table, where, without_sampling=without_sampling):
            # A response that occurs twice would count double in every mean over responses.
            if response.key in seen:
                raise ArtifactError(
                    f"response {response.key} occurs twice",
                    where=where,
                    remedy="remove one of the two shards and run the stage that makes it again",
                )
            seen.add(response.key)
            yield response, None if scores is None else scores.teacher_logprobs


def write_responses(
    folder: str | Path,
    responses: Iterable[Response],
    *,
    kind: str,
    inputs: Mapping[str, Any],
    shard_size: int = 4096,
    **about: Any,
) -> Manifest:
    """Publish responses that are already at hand as a complete artifact.

    Args:
        shard_size: The number of responses in a shard.
        about: ``parents``, ``models``, ``sampling`` and ``lineage`` of the manifest.
    """
    folder = Path(folder)
    # Responses come from an iterator, so that they need not all be in memory.
    writer = ArtifactWriter(folder, kind=kind, inputs=inputs, **about)
    pending: list[Response] = []
    index = 0

    # The last shard may be smaller, and an empty one is never published.
    def flush() -> None:
        nonlocal index
        # A killed call may have published this shard already. Its index still has to be counted.
        if pending and not writer.is_published(index):
            writer.publish_shard(index, to_table(pending))
        index += bool(pending)
        pending.clear()

    for response in responses:
        pending.append(response)
        if len(pending) == shard_size:
            flush()
    flush()
    return writer.finish()
