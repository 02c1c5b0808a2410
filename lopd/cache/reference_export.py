"""The Parquet file that the trainer of the paper's reference code reads, from a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lopd.artifacts import publish_json, read_complete, read_shard, sha256_file, storage_errors
from lopd.artifacts.lineage import alignment_of
from lopd.errors import ArtifactError, DataError
from lopd.records import Manifest
from lopd.tasks.tokenizer import decode, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What that format has no place for.
EXPORT_LOSES = (
    "prompt ids (written as text)",
    "sampling log-probabilities",
    "finish reason",
    "prompt id and sample index",
    "weight version",
    "fingerprints of teacher, student, tokenizer and sampling parameters",
    "checksums",
)
# The types of that code: 8 bytes for an id, a flag and a log-probability.
_METADATA = pa.struct(
    [
        ("is_lightning_opd", pa.bool_()),
        ("response_tokens", pa.list_(pa.int64())),
        ("loss_mask", pa.list_(pa.int64())),
        ("response", pa.string()),
        ("teacher_log_probs", pa.list_(pa.float64())),
    ]
)
_SCHEMA = pa.schema([("prompt", pa.string()), ("label", pa.string()), ("metadata", _METADATA)])


@dataclass
class _Counts:
    """What an export has written.

    Attributes:
        rows: Responses.
        tokens: Tokens of these responses.
        prompts_changed: Prompts whose text, tokenised again, gives other ids.
    """

    rows: int = 0
    tokens: int = 0
    prompts_changed: int = 0


def export_reference(
    folder: str | Path, file: str | Path, tokenizer_folder: str | Path | None = None
) -> dict[str, Any]:
    """Write the file, and beside it ``FILE.json``, which says what the file is made from.

    Args:
        folder: The folder of the cache.
        tokenizer_folder: Decodes the prompts. None means the teacher's folder of the manifest.

    Returns:
        ``rows``, ``tokens``, ``bytes``, ``bytes_per_token``, ``loses`` (what the format cannot
        hold) and ``prompts_changed`` (how many prompts get other ids when that code tokenises their
        text again).

    Raises:
        DataError: There is no tokenizer.
        ArtifactError: The cache has no teacher log-probabilities, or the file exists.
    """
    folder = Path(folder)
    file = Path(file)
    manifest = read_complete(folder)
    place = _tokenizer_folder(folder, manifest, tokenizer_folder)
    # A training of that code may be reading it.
    if file.exists():
        raise ArtifactError(
            "the file exists already",
            where=str(file),
            limit="a new file: lopd replaces no file here",
            remedy="remove the file, or set --out to another file",
        )
    counts = _write(folder, manifest, file, load_tokenizer(place))
    # Of the finished file, with its footer.
    size = file.stat().st_size
    about = {
        "rows": counts.rows,
        "tokens": counts.tokens,
        "bytes": size,
        "bytes_per_token": size / max(1, counts.tokens),
        "prompts_changed": counts.prompts_changed,
        "loses": list(EXPORT_LOSES),
    }
    # The file itself cannot say from which cache it is.
    source = {"from": manifest.fingerprint, "tokenizer": sha256_file(place / "tokenizer.json")}
    publish_json(file.with_name(file.name + ".json"), {**about, **source})
    return about


def _tokenizer_folder(folder: Path, manifest: Manifest, given: str | Path | None) -> Path:
    """Return the folder of the tokenizer whose ids the rows have.

    Args:
        folder: The folder of the cache, for the message.
        manifest: Its manifest.
        given: The folder that the user names, if any.

    Raises:
        DataError: There is no such folder on this machine.
    """
    # Whose tokens the rows have. A teacher with another tokenizer cannot read them.
    owner = "teacher" if alignment_of(manifest) is None else "student"
    known = manifest.models.get(owner)
    # The path of the manifest is that of the machine on which the cache was made.
    place = Path(known.path) if known is not None else None
    if given is not None:
        place = Path(given)
    if place is None or not place.is_dir():
        raise DataError(
            "there is no tokenizer to write the prompts as text",
            where=str(place or folder),
            remedy="add --tokenizer FOLDER",
        )
    return place


def _write(
    folder: Path, manifest: Manifest, file: Path, tokenizer: PreTrainedTokenizerBase
) -> _Counts:
    """Write the rows of all shards into the file, and return how many there are."""
    counts = _Counts()
    # Written under another name: a file that a killed export leaves behind must not look complete.
    partial = file.with_name(file.name + ".partial")
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(partial, _SCHEMA) as writer:
            # Shard by shard, each as one row group.
            for table in _tables(folder, manifest):
                rows, changed = _reference_rows(table, tokenizer)
                writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                counts.prompts_changed += changed
                counts.rows += len(rows)
                counts.tokens += sum(len(row["metadata"]["response_tokens"]) for row in rows)
        partial.rename(file)
    return counts


def _tables(folder: Path, manifest: Manifest) -> Iterator[pa.Table]:
    """Yield the rows of each shard. Raises ArtifactError if they have no scores."""
    for shard in manifest.shards:
        table = read_shard(folder, shard)
        # Rollouts have the same form as a cache and are easily given by mistake.
        if "teacher_logprobs" not in table.column_names:
            raise ArtifactError(
                "the shard has no teacher log-probabilities",
                where=str(folder / shard.name),
                remedy="give the folder of a teacher cache, which the score stage makes",
            )
        yield table


def _reference_rows(
    table: pa.Table, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict[str, Any]], int]:
    """Return the rows in the form of the reference code, and how many prompts change."""
    rows = []
    num_changed = 0
    columns = ["prompt_ids", "token_ids", "teacher_logprobs"]
    if "loss_mask" in table.column_names:
        columns.append("loss_mask")
    for row in table.select(columns).to_pylist():
        prompt = decode(tokenizer, row["prompt_ids"])
        # That code trains on what the text gives when it is tokenised again.
        num_changed += tokenizer.encode(prompt, add_special_tokens=False) != row["prompt_ids"]
        # That format always has a mask. Its values are numbers.
        mask = row.get("loss_mask") or [True] * len(row["token_ids"])
        metadata = {
            "is_lightning_opd": True,
            "response_tokens": row["token_ids"],
            "loss_mask": [int(value) for value in mask],
            "response": decode(tokenizer, row["token_ids"]),
            "teacher_log_probs": [float(value) for value in row["teacher_logprobs"]],
        }
        # That code wants a label and does not use it.
        rows.append({"prompt": prompt, "label": "0", "metadata": metadata})
    return rows, num_changed
