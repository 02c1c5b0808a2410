"""Caches made from caches: merged, split by prompt, and exchanged with the parquet file of the
paper's reference code.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lopd import cache
from lopd.artifacts import (
    ArtifactWriter,
    identify_model,
    publish_json,
    read_manifest,
    read_shard,
    sha256_file,
    storage_errors,
)
from lopd.artifacts.lineage import declared
from lopd.cache.checks import Findings, RowChecks
from lopd.cache.table import bare
from lopd.errors import ArtifactError, ConsistencyError, DataError, LopdError
from lopd.records import Manifest, Response, TeacherScores, float32, int32, token_hash
from lopd.tasks.tokenizer import decode, load_tokenizer, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "teacher_cache"
IMPORT_LACKS = (
    "sampled token ids: the response was decoded and tokenised again, so a trained token need not be a sampled one",
    "the end token: it was lost with the decoded text, so nothing teaches the student to stop",
    "sampling log-probabilities: no importance weights, no advantage at the start",
    "the finish reason: a truncated response cannot be told from a complete one",
    "identity: nobody knows which teacher scored, which student sampled, at which temperature; so distill.cache takes it with allow_foreign_cache alone",
)
EXPORT_LOSES = (
    "prompt ids (written as text)", "sampling log-probabilities", "finish reason", "prompt id and sample index",
    "weight version", "fingerprints of teacher, student, tokenizer and sampling parameters", "checksums",
)  # fmt: skip
_CARRIED = ("vocab_size", "end_token_ids", "logprob_bits", "logprob_loss", "lacks")
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
)  # what the distribution of the tokens depends on


# ---- merge and split ------------------------------------------------------------------------------------------------------------------------------


def merge(sources: Sequence[Path], out: Path, *, teacher_column: bool = False) -> Manifest:
    """One artifact with the shards of several, in order. teacher_column: caches of several
    teachers, each row naming its own (weights' sha256).

    Refused: duplicate keys, mixed temperatures, mixed number formats or columns (ArtifactError),
    mixed tokenizers (DataError), mixed teachers without a teacher column (ConsistencyError).
    """
    manifests = [_complete(folder) for folder in sources]
    _refuse_mixed(sources, manifests, teacher_column)
    _refuse_duplicates(sources, manifests)
    first = manifests[0]
    writer = ArtifactWriter(
        out,
        kind=first.kind,
        inputs={"merge.teacher_column": teacher_column},
        parents={
            f"part-{index:03d}": manifest.fingerprint for index, manifest in enumerate(manifests)
        },
        models={**_teachers(manifests), **_student(manifests)},
        sampling=first.sampling,
        lineage=_joint_lineage(manifests),
    )
    index = 0
    for folder, manifest in zip(sources, manifests, strict=True):
        for shard in manifest.shards:
            if index not in writer.published:
                table = read_shard(folder, shard)
                if teacher_column and "teacher" not in table.column_names:
                    table = table.append_column(
                        "teacher",
                        pa.array(
                            [manifest.models["teacher"].weights] * table.num_rows, pa.string()
                        ),
                    )
                writer.publish_shard(index, table)
            index += 1
    extra = _carried(first)
    losses = [loss for manifest in manifests if (loss := manifest.extra.get("logprob_loss"))]
    if len(losses) == len(manifests):
        tokens = [sum(shard.tokens for shard in manifest.shards) for manifest in manifests]
        total = sum(loss["mean_abs"] * count for loss, count in zip(losses, tokens, strict=True))
        largest = max(loss["max_abs"] for loss in losses)
        extra["logprob_loss"] = {"max_abs": largest, "mean_abs": total / max(1, sum(tokens))}
    return writer.finish(**extra)


def split(source: Path, out: Path, parts: int) -> list[Manifest]:
    """``out/part-00``, ``part-01``, ..: every prompt, with all its responses, in exactly one of
    them, by a hash of its id.
    """
    if parts < 2:
        raise LopdError(
            f"{parts} parts",
            where="lopd cache split",
            limit="at least 2",
            remedy="give --parts 2 or more",
        )
    manifest = _complete(source)
    if parts > manifest.rows:
        raise LopdError(
            f"{parts} parts",
            where="lopd cache split",
            limit=f"the cache's {manifest.rows} responses",
            remedy="give a smaller --parts",
        )
    if out.resolve().is_relative_to(source.resolve()):
        raise LopdError(
            "the parts would lie inside the cache",
            where=str(out),
            limit="a folder of its own",
            remedy="give another --out",
        )
    writers = [
        ArtifactWriter(
            out / f"part-{part:02d}",
            kind=manifest.kind,
            inputs={"split.part": part, "split.parts": parts},
            parents={manifest.kind: manifest.fingerprint},
            models=manifest.models,
            sampling=manifest.sampling,
            lineage=manifest.lineage,
        )
        for part in range(parts)
    ]
    for index, shard in enumerate(manifest.shards):
        table = bare(read_shard(source, shard))
        owner = np.array(
            [part_of(name, parts) for name in table.column("prompt_id").to_pylist()], dtype=np.int64
        )
        for part, writer in enumerate(writers):
            rows = np.flatnonzero(owner == part)
            if len(rows) and index not in writer.published:
                writer.publish_shard(index, table.take(pa.array(rows)))
    return [writer.finish(**_carried(manifest)) for writer in writers]


def part_of(prompt_id: str, parts: int, seed: str = "") -> int:
    """Which of so many parts a prompt belongs to: the same on every machine, and independent for
    another seed.
    """
    return (
        int.from_bytes(hashlib.sha256(f"{seed}\0{prompt_id}".encode()).digest()[:8], "big") % parts
    )


def _complete(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise ArtifactError("is not complete", where=str(folder), remedy="run its stage to the end")
    return manifest


def _carried(manifest: Manifest) -> dict[str, Any]:
    return {name: manifest.extra[name] for name in _CARRIED if name in manifest.extra}


def _refuse_mixed(
    sources: Sequence[Path], manifests: Sequence[Manifest], teacher_column: bool
) -> None:
    first = manifests[0]
    for folder, manifest in zip(sources[1:], manifests[1:], strict=True):
        if manifest.kind != first.kind:
            raise ArtifactError(
                f"is of kind {manifest.kind}",
                where=str(folder),
                limit=f"{first.kind}, as {sources[0]}",
            )
        mixed = [
            name for name in _SAMPLING if manifest.sampling.get(name) != first.sampling.get(name)
        ]
        if mixed:
            said = ", ".join(
                f"{name} {manifest.sampling.get(name)} against {first.sampling.get(name)}"
                for name in mixed
            )
            remedy = "train on them one after the other: a cache has one sampling distribution"
            raise ArtifactError(
                f"sampled otherwise: {said}",
                where=str(folder),
                limit=f"that of {sources[0]}",
                remedy=remedy,
            )
        teacher, known = manifest.models.get("teacher"), first.models.get("teacher")
        if teacher is not None and known is not None and teacher.tokenizer != known.tokenizer:
            raise DataError(
                "the teachers' tokenizers differ: the same ids mean other text",
                where=str(folder),
                limit=f"that of {sources[0]}",
            )
        if not teacher_column and (teacher and teacher.weights) != (known and known.weights):
            said = f"scored by teacher {_short(teacher)}, and {sources[0]} by {_short(known)}"
            remedy = "merge with --teacher-column: each row then names its teacher"
            raise ConsistencyError(
                said,
                where=str(folder),
                limit="one teacher in a cache without a teacher column",
                remedy=remedy,
            )
        if not teacher_column and manifest.lineage.get("sft_teacher") != first.lineage.get(
            "sft_teacher"
        ):
            raise ConsistencyError(
                "the students learnt from demonstrations of different teachers",
                where=str(folder),
                remedy="merge with --teacher-column",
            )
        sampler, others = manifest.models.get("student"), first.models.get("student")
        if sampler is not None and others is not None and sampler.weights != others.weights:
            said = f"sampled by student {_short(sampler)}, and {sources[0]} by {_short(others)}"
            raise ConsistencyError(
                said,
                where=str(folder),
                limit="one student in a cache: it is the reference of the method",
                remedy="train on one of them",
            )
        schemas = [
            pq.read_schema(place / made.shards[0].name)
            for place, made in ((sources[0], first), (folder, manifest))
            if made.shards
        ]
        if len(schemas) == 2 and not schemas[0].remove_metadata().equals(
            schemas[1].remove_metadata()
        ):
            differing = {str(field) for field in schemas[0]} ^ {str(field) for field in schemas[1]}
            raise ArtifactError(
                f"has other columns: {', '.join(sorted(differing))}",
                where=str(folder),
                limit=f"those of {sources[0]}",
            )


def _refuse_duplicates(sources: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    owner: dict[tuple[str, int], Path] = {}
    doubled: Counter[str] = Counter()
    for folder, manifest in zip(sources, manifests, strict=True):
        for shard in manifest.shards:
            table = read_shard(folder, shard)
            for key in zip(
                table.column("prompt_id").to_pylist(),
                table.column("sample_index").to_pylist(),
                strict=True,
            ):
                if key in owner:
                    doubled[f"{key[0]}/{key[1]}"] += 1
                owner[key] = folder
    if doubled:
        named = ", ".join(list(doubled)[:5])
        what = f"{len(doubled)} responses are in more than one of the caches: {named}"
        raise ArtifactError(
            what,
            where="lopd cache merge",
            limit="a prompt_id and sample_index once",
            remedy="leave one of the caches out",
        )


def _teachers(manifests: Sequence[Manifest]) -> dict[str, Any]:
    found = {
        identity.weights: identity
        for manifest in manifests
        for role, identity in manifest.models.items()
        if role.startswith("teacher")
    }
    if len(found) == 1:
        return {"teacher": next(iter(found.values()))}
    return {f"teacher-{index}": identity for index, identity in enumerate(found.values())}


def _student(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Whose responses they are, where all say so; _refuse_mixed has seen that it is one."""
    known = [manifest.models.get("student") for manifest in manifests]
    return {"student": known[0]} if None not in known else {}


def _joint_lineage(manifests: Sequence[Manifest]) -> Mapping[str, Any]:
    lineages = [dict(manifest.lineage) for manifest in manifests]
    if all(lineage == lineages[0] for lineage in lineages):
        return lineages[0]
    by_teacher = {
        manifest.models["teacher"].weights: lineage
        for manifest, lineage in zip(manifests, lineages, strict=True)
        if "teacher" in manifest.models
    }
    return {
        "by_teacher": by_teacher,
        "consistent": all(lineage.get("consistent", False) for lineage in lineages),
    }


def _short(identity: Any) -> str:
    return "unknown" if identity is None else f"{identity.path} (weights {identity.weights[:12]})"


# ---- the reference code's parquet -----------------------------------------------------------------------------------------------------------------


def import_reference(
    file: Path,
    out: Path,
    tokenizer_folder: Path,
    *,
    teacher: Path | None = None,
    batch_rows: int = 256,
) -> Manifest:
    """A cache from the parquet of the paper's reference code: columns prompt (text), label,
    metadata {response_tokens, loss_mask, teacher_log_probs, ..}.

    What it lacks is said in the manifest (IMPORT_LACKS). tokenizer_folder: the student's; the
    prompts' text is tokenised with it, as the reference does. teacher: whom the user declares as
    the one that scored. DataError: another file, or a response that cannot be used.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    ends = stop_token_ids(tokenizer_folder, tokenizer)
    try:
        source = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot be read as Parquet ({str(error).splitlines()[0]})", where=str(file)
        ) from None
    _check_reference_schema(file, source.schema_arrow)
    identity = identify_model(teacher) if teacher is not None else None
    writer = ArtifactWriter(
        out,
        kind=KIND,
        inputs={
            "import.file": sha256_file(file),
            "import.tokenizer": sha256_file(tokenizer_folder / "tokenizer.json"),
            "import.batch_rows": batch_rows,
        },
        models={} if identity is None else {"teacher": identity},
        lineage={
            **declared(None),
            "score_teacher": identity.weights if identity else "",
            "score_evidence": "declared" if identity else "unknown",
            "consistent": False,
        },
    )
    findings = Findings()
    checks = RowChecks(findings, vocab_size=len(tokenizer), kind=KIND)
    seen: Counter[str] = Counter()
    num_rows = num_ended = 0
    for index, batch in enumerate(source.iter_batches(batch_size=batch_rows)):
        rows = [
            _imported(file, index * batch_rows + row, raw, tokenizer, ends, seen)
            for row, raw in enumerate(batch.to_pylist())
        ]
        table = cache.to_table(
            [response for response, _ in rows], [score for _, score in rows]
        ).drop_columns(["sampling_logprobs"])
        checks.add(table, file.name)
        num_rows, num_ended = (
            num_rows + len(rows),
            num_ended + sum(response.finish_reason == "stop" for response, _ in rows),
        )
        for finding in findings:
            raise DataError(
                str(finding),
                where=str(file),
                remedy="leave these responses out or score them again",
            )
        if index not in writer.published:
            writer.publish_shard(index, table)
    lacks = [
        reason for reason in IMPORT_LACKS if not (reason.startswith("the end token") and num_ended)
    ]
    if 0 < num_ended < num_rows:
        lacks.append(f"the end token in {num_rows - num_ended} of {num_rows} responses")
    return writer.finish(
        lacks=lacks,
        vocab_size=len(tokenizer),
        end_token_ids=list(ends),
        logprob_bits=32,
        logprob_loss=None,
    )


def _check_reference_schema(file: Path, schema: pa.Schema) -> None:
    fields = (
        {field.name for field in schema.field("metadata").type}
        if "metadata" in schema.names and pa.types.is_struct(schema.field("metadata").type)
        else set()
    )
    missing = [name for name in ("prompt", "metadata") if name not in schema.names] + [
        f"metadata.{name}" for name in ("response_tokens",) if name not in fields
    ]
    if missing:
        raise DataError(
            f"{' and '.join(missing)} missing",
            where=str(file),
            limit="the columns of the reference code: prompt, label, metadata",
        )
    if "teacher_log_probs" not in fields:
        raise DataError(
            "no metadata.teacher_log_probs: this is the intermediate file",
            where=str(file),
            remedy="give the file that ends in -precomputed.parquet",
        )


def _imported(
    file: Path,
    number: int,
    raw: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    seen: Counter[str],
) -> tuple[Response, TeacherScores]:
    about = raw["metadata"]
    tokens, logprobs = about["response_tokens"] or [], about["teacher_log_probs"] or []
    mask = about.get("loss_mask")
    for name, values in (("teacher_log_probs", logprobs), ("loss_mask", mask)):
        if values is not None and len(values) != len(tokens):
            raise DataError(
                f"row {number}: {len(values)} {name} for {len(tokens)} response_tokens",
                where=str(file),
                remedy="leave this row out",
            )
    prompt_id = hashlib.sha256(raw["prompt"].encode()).hexdigest()[:16]
    index, seen[prompt_id] = seen[prompt_id], seen[prompt_id] + 1
    response = Response(
        prompt_id=prompt_id,
        sample_index=index,
        prompt_ids=int32(tokenizer.encode(raw["prompt"], add_special_tokens=False)),
        token_ids=int32(tokens),
        sampling_logprobs=np.zeros(
            len(tokens), np.float32
        ),  # the column is dropped: there are none
        finish_reason="stop" if tokens and tokens[-1] in ends else "length",
        weight_version="unknown",
        loss_mask=None if mask is None or all(mask) else np.asarray(mask, bool),
    )
    return response, TeacherScores(
        prompt_id, index, token_hash(response.prompt_ids, response.token_ids), float32(logprobs)
    )


_REFERENCE = pa.schema(
    [
        ("prompt", pa.string()),
        ("label", pa.string()),
        (
            "metadata",
            pa.struct(
                [
                    ("is_lightning_opd", pa.bool_()),
                    ("response_tokens", pa.list_(pa.int64())),
                    ("loss_mask", pa.list_(pa.int64())),
                    ("response", pa.string()),
                    ("teacher_log_probs", pa.list_(pa.float64())),
                ]
            ),
        ),
    ]
)


def export_reference(
    folder: Path, file: Path, tokenizer_folder: Path | None = None
) -> dict[str, Any]:
    """Writes the parquet that the reference code's trainer reads. Returns {rows, tokens, bytes,
    bytes_per_token, loses, prompts_changed}.

    tokenizer_folder: absent, the teacher's folder as the manifest names it. prompts_changed:
    prompts whose text does not give the same ids when that code tokenises it again. DataError: no
    tokenizer; ArtifactError: no teacher log-probabilities, or the file exists.
    """
    manifest = _complete(folder)
    known = manifest.models.get("teacher")
    place = tokenizer_folder or (Path(known.path) if known is not None else None)
    if place is None or not place.is_dir():
        raise DataError(
            "no tokenizer to write the prompts as text",
            where=str(place or folder),
            remedy="give --tokenizer FOLDER",
        )
    if file.exists():
        raise ArtifactError(
            "exists already",
            where=str(file),
            limit="nothing is replaced",
            remedy="remove it or give another --out",
        )
    tokenizer = load_tokenizer(place)
    changed = rows = tokens = 0
    partial = file.with_name(file.name + ".partial")
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(partial, _REFERENCE) as writer:
            for table in _tables(folder, manifest):
                records, moved = _reference_rows(table, tokenizer)
                writer.write_table(pa.Table.from_pylist(records, _REFERENCE))
                changed, rows, tokens = (
                    changed + moved,
                    rows + len(records),
                    tokens + sum(len(row["metadata"]["response_tokens"]) for row in records),
                )
        partial.rename(file)
    size = file.stat().st_size
    about = {
        "rows": rows,
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": size / max(1, tokens),
        "prompts_changed": changed,
        "loses": list(EXPORT_LOSES),
    }
    publish_json(
        file.with_name(file.name + ".json"),
        {**about, "from": manifest.fingerprint, "tokenizer": sha256_file(place / "tokenizer.json")},
    )
    return about


def _tables(folder: Path, manifest: Manifest) -> Iterator[pa.Table]:
    for shard in manifest.shards:
        table = read_shard(folder, shard)
        if "teacher_logprobs" not in table.column_names:
            raise ArtifactError(
                "no teacher log-probabilities",
                where=str(folder / shard.name),
                remedy="export the artifact of the score stage",
            )
        yield table


def _reference_rows(
    table: pa.Table, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict[str, Any]], int]:
    changed, records = 0, []
    columns = [
        "prompt_ids",
        "token_ids",
        "teacher_logprobs",
        *(["loss_mask"] if "loss_mask" in table.column_names else []),
    ]
    for row in table.select(columns).to_pylist():
        prompt = decode(tokenizer, row["prompt_ids"])
        changed += tokenizer.encode(prompt, add_special_tokens=False) != row["prompt_ids"]
        about = {
            "is_lightning_opd": True,
            "response_tokens": row["token_ids"],
            "loss_mask": [
                int(value) for value in row.get("loss_mask") or [True] * len(row["token_ids"])
            ],
            "response": decode(tokenizer, row["token_ids"]),
            "teacher_log_probs": [float(value) for value in row["teacher_logprobs"]],
        }
        records.append({"prompt": prompt, "label": "0", "metadata": about})
    return records, changed
