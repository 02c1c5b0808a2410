"""A cache from the Parquet file that the trainer of the paper's reference code reads.

Its columns are prompt (text), label, and metadata, which is a struct of response_tokens, loss_mask,
teacher_log_probs and others. The format lacks much of what a cache has. The manifest says what.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lopd import cache
from lopd.artifacts import ArtifactWriter, identify_model, sha256_file
from lopd.artifacts.lineage import declared
from lopd.cache.row_checks import Findings, RowChecks
from lopd.cache.table import TEACHER_CACHE
from lopd.errors import DataError
from lopd.records import (
    Manifest,
    ModelIdentity,
    Response,
    TeacherScores,
    float32,
    int32,
    token_hash,
)
from lopd.tasks.tokenizer import load_tokenizer, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LACKS_END_TOKEN = (
    "the end token: it was lost with the decoded text, so nothing teaches the student to stop"
)
# What no file of the reference code has. A user should read this before a training, so it stands in
# the manifest and on the screen.
IMPORT_LACKS = (
    "sampled token ids: the response was decoded and tokenised again, "
    "so a trained token need not be a sampled one",
    _LACKS_END_TOKEN,
    "sampling log-probabilities: no importance weights, no advantage at the start",
    "the finish reason: a truncated response cannot be told from a complete one",
    "identity: it is not recorded which teacher scored, which student sampled, at which "
    "temperature; "
    "so distill.cache takes it with allow_foreign_cache alone",
)


def import_reference(
    file: str | Path,
    out: str | Path,
    tokenizer_folder: str | Path,
    *,
    teacher: str | Path | None = None,
    batch_rows: int = 256,
) -> Manifest:
    """Publish a cache with the rows of the file. ``extra.lacks`` says what the rows do not have.

    Args:
        tokenizer_folder: The folder of the student's tokenizer. The text of the prompts is
            tokenised with it, as the reference code does.
        teacher: The model that the user declares as the one that scored.
        batch_rows: The number of rows in a shard.

    Raises:
        DataError: The file has another format, or a response cannot be used.
    """
    file = Path(file)
    out = Path(out)
    tokenizer_folder = Path(tokenizer_folder)
    teacher = Path(teacher) if teacher is not None else None
    tokenizer = load_tokenizer(tokenizer_folder)
    # The finish reason is not in the file. A response that ends with one of these ended by itself.
    ends = stop_token_ids(tokenizer_folder, tokenizer)
    source = _open(file)
    # The fingerprint is of the folder that the user gives. Whether it has scored, nothing can show.
    identity = identify_model(teacher) if teacher is not None else None
    writer = ArtifactWriter(
        out,
        kind=TEACHER_CACHE,
        inputs={
            # By content, so that a changed file of the same name is not continued.
            "import.file": sha256_file(file),
            "import.tokenizer": sha256_file(tokenizer_folder / "tokenizer.json"),
            "import.batch_rows": batch_rows,
        },
        models={} if identity is None else {"teacher": identity},
        lineage=_lineage(identity),
    )
    num_rows = 0
    num_ended = 0
    # The file may be larger than the memory. One batch is one shard.
    batches = source.iter_batches(batch_size=batch_rows)
    for index, (rows, table) in enumerate(_tables(file, batches, tokenizer, ends)):
        num_rows += len(rows)
        num_ended += sum(response.finish_reason == "stop" for response, _ in rows)
        if not writer.is_published(index):
            writer.publish_shard(index, table)
    return writer.finish(
        # Warnings on a screen are forgotten. This stays with the cache.
        lacks=_lacks(num_rows, num_ended),
        vocab_size=len(tokenizer),
        end_token_ids=list(ends),
        logprob_bits=32,
        logprob_loss=None,
    )


def _open(file: Path) -> pq.ParquetFile:
    """Open the file and check its columns. Raises DataError if it has another format."""
    try:
        source = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        # Arrow's messages have many lines, of which the first says what is wrong.
        reason = str(error).splitlines()[0]
        raise DataError(
            f"cannot be read as Parquet ({reason})",
            where=str(file),
            remedy="copy the file again from its source",
        ) from None
    schema = source.schema_arrow
    fields: set[str] = set()
    # Files of other projects may have a column of this name and another type.
    if "metadata" in schema.names and pa.types.is_struct(schema.field("metadata").type):
        fields = {field.name for field in schema.field("metadata").type}
    # All that is missing is named at once.
    missing = [name for name in ("prompt", "metadata") if name not in schema.names]
    if "response_tokens" not in fields:
        missing.append("metadata.response_tokens")
    if missing:
        raise DataError(
            f"the file lacks the columns {' and '.join(missing)}",
            where=str(file),
            limit="the columns of the reference code: prompt, label, metadata",
            remedy="give the file that ends in -precomputed.parquet",
        )
    # The reference code writes two files with nearly the same name and form.
    if "teacher_log_probs" not in fields:
        raise DataError(
            "the file has no metadata.teacher_log_probs, so it is the intermediate file",
            where=str(file),
            remedy="give the file that ends in -precomputed.parquet",
        )
    return source


def _tables(
    file: Path,
    batches: Iterable[pa.RecordBatch],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
) -> Iterator[tuple[list[tuple[Response, TeacherScores]], pa.Table]]:
    """Yield the rows of each batch, as records and as a checked table of a cache.

    Args:
        file: The file that the batches are from.
        batches: Its rows.
        tokenizer: The student's tokenizer, which reads the text of the prompts.
        ends: The token ids that end a response.

    Raises:
        DataError: A row cannot be used.
    """
    findings = Findings()
    checks = RowChecks(findings, vocab_size=len(tokenizer), kind=TEACHER_CACHE)
    # How many responses each prompt has so far. The file does not number them.
    seen: Counter[str] = Counter()
    num_rows = 0
    for batch in batches:
        rows: list[tuple[Response, TeacherScores]] = []
        for raw in batch.to_pylist():
            _check_lengths(file, num_rows + len(rows), raw["metadata"])
            rows.append(_imported(raw, tokenizer, ends, seen))
        num_rows += len(rows)
        table = cache.to_table([response for response, _ in rows], [score for _, score in rows])
        # A record has this column always. These responses have no such values.
        table = table.drop_columns(["sampling_logprobs"])
        # The rows are checked before they are published: nothing unsound gets into a cache.
        checks.add(table, file.name)
        for finding in findings:
            remedy = "remove these rows, or score them again"
            raise DataError(str(finding), where=str(file), remedy=remedy)
        yield rows, table


def _lineage(teacher: ModelIdentity | None) -> dict[str, Any]:
    """Return the lineage of an import. It is never consistent, because nothing proves it."""
    return {
        **declared(None),
        "score_teacher": teacher.weights if teacher else "",
        "score_evidence": "declared" if teacher else "unknown",
        "consistent": False,
    }


def _lacks(num_rows: int, num_ended: int) -> list[str]:
    """Return what the imported rows lack."""
    # The reference code loses the end token. A file that others have made in this form may have it.
    lacks = [reason for reason in IMPORT_LACKS if reason != _LACKS_END_TOKEN or not num_ended]
    if 0 < num_ended < num_rows:
        lacks.append(f"the end token in {num_rows - num_ended} of {num_rows} responses")
    return lacks


def _check_lengths(file: Path, number: int, about: Mapping[str, Any]) -> None:
    """Raise DataError if a column of one row has another length than its tokens."""
    num_tokens = len(about["response_tokens"] or [])
    columns = {
        # An absent list counts as an empty one, which does not fit any token. A mask may be absent.
        "teacher_log_probs": about["teacher_log_probs"] or [],
        "loss_mask": about.get("loss_mask"),
    }
    for name, values in columns.items():
        if values is not None and len(values) != num_tokens:
            raise DataError(
                f"row {number} has {len(values)} {name} for {num_tokens} response_tokens",
                where=str(file),
                remedy="remove this row",
            )


def _imported(
    raw: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    seen: Counter[str],
) -> tuple[Response, TeacherScores]:
    """Return one row of the file as records.

    Args:
        ends: The token ids that end a response.
        seen: How many responses each prompt has so far. This one is counted.
    """
    about = raw["metadata"]
    tokens = about["response_tokens"] or []
    mask = about.get("loss_mask")
    # The file has no names of prompts, so the same text is the same prompt.
    prompt_id = hashlib.sha256(raw["prompt"].encode()).hexdigest()[:16]
    index = seen[prompt_id]
    seen[prompt_id] += 1
    response = Response(
        prompt_id=prompt_id,
        sample_index=index,
        # The text is that of the chat template, with its special tokens.
        prompt_ids=int32(tokenizer.encode(raw["prompt"], add_special_tokens=False)),
        token_ids=int32(tokens),
        # Only to fill the record. The caller drops the column.
        sampling_logprobs=np.zeros(len(tokens), np.float32),
        finish_reason="stop" if tokens and tokens[-1] in ends else "length",
        weight_version="unknown",
        # A mask that masks nothing is what a sampled response has, too, and there it is None.
        loss_mask=None if mask is None or all(mask) else np.asarray(mask, bool),
    )
    name = token_hash(response.prompt_ids, response.token_ids)
    logprobs = float32(about["teacher_log_probs"] or [])
    return response, TeacherScores(prompt_id, index, name, logprobs)
