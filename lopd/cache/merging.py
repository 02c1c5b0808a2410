"""One cache from several.

Nothing is merged that a training could not tell apart again. Rows of other temperatures, other
tokenizers or other students are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lopd.artifacts import ArtifactWriter, read_complete, read_shard
from lopd.artifacts.lineage import TOKEN_ALIGNMENT
from lopd.errors import ArtifactError, ConsistencyError, DataError
from lopd.records import Key, Manifest, ModelIdentity

# The keys of a manifest's `extra` that stay true of a cache made from it.
_CARRIED = (
    "vocab_size",
    "end_token_ids",
    "logprob_bits",
    "logprob_loss",
    "lacks",
    TOKEN_ALIGNMENT,
)
# The sampling parameters that decide the distribution of the tokens.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


def merge(
    sources: Sequence[str | Path], out: str | Path, *, teacher_column: bool = False
) -> Manifest:
    """Publish one artifact with the shards of several, in their order.

    Args:
        teacher_column: Accept caches of several teachers. Each row then names its own teacher, by
            the fingerprint of the weights.

    Raises:
        ArtifactError: A response is in two sources, or the sources differ in their kind, their
            sampling parameters or their columns.
        DataError: The teachers have different tokenizers.
        ConsistencyError: The sources have several students, or several teachers and no column that
            names them.
    """
    folders = [Path(source) for source in sources]
    manifests = [read_complete(folder) for folder in folders]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        _check_alike(folder, manifest, folders[0], manifests[0])
        _check_models(folder, manifest, folders[0], manifests[0], teacher_column)
        _check_columns(folder, manifest, folders[0], manifests[0], teacher_column)
    # This reads every shard, so it comes after the checks that read manifests alone.
    _check_unique(folders, manifests)
    first = manifests[0]
    writer = ArtifactWriter(
        out,
        kind=first.kind,
        inputs={"merge.teacher_column": teacher_column},
        # The number of the source is in the name, so that the order of the sources counts.
        parents={f"part-{index:03d}": one.fingerprint for index, one in enumerate(manifests)},
        # All identities go along: a later training checks the student, a later verification the
        # teachers.
        models={**_teachers(manifests), **_base(first), **_student(manifests)},
        sampling=first.sampling,
        lineage=_joint_lineage(manifests),
    )
    # One list of all shards, in which the position of a shard is its number in the result.
    shards = [
        (folder, manifest, shard)
        for folder, manifest in zip(folders, manifests, strict=True)
        for shard in manifest.shards
    ]
    for index, (folder, manifest, shard) in enumerate(shards):
        # A killed merge has published some. They are not read again.
        if writer.is_published(index):
            continue
        table = read_shard(folder, shard)
        # A source that was merged before has the column already.
        if teacher_column and "teacher" not in table.column_names:
            names = [manifest.models["teacher"].weights] * table.num_rows
            table = table.append_column("teacher", pa.array(names, pa.string()))
        writer.publish_shard(index, table)
    return writer.finish(**{**carried(first), **_joint_loss(manifests)})


def carried(manifest: Manifest) -> dict[str, Any]:
    """Return the part of ``extra`` that stays true of a cache made from this one."""
    return {name: manifest.extra[name] for name in _CARRIED if name in manifest.extra}


def _check_alike(folder: Path, manifest: Manifest, first_folder: Path, first: Manifest) -> None:
    """Raise ArtifactError if the kind or the distribution of the tokens is another one."""
    if manifest.kind != first.kind:
        raise ArtifactError(
            f"this artifact is of kind {manifest.kind}, and the first one is of kind {first.kind}",
            where=str(folder),
            limit=f"the kind {first.kind}, which {first_folder} has",
            remedy="give caches of one kind",
        )
    # The length limit may differ: it cuts responses and does not change how their tokens are drawn.
    mixed = [name for name in _SAMPLING if manifest.sampling.get(name) != first.sampling.get(name)]
    if mixed:
        differences = [
            f"{name} {manifest.sampling.get(name)} against {first.sampling.get(name)}"
            for name in mixed
        ]
        raise ArtifactError(
            f"the responses were sampled with other settings: {', '.join(differences)}",
            where=str(folder),
            limit=f"that of {first_folder}",
            remedy="train on these caches one after the other: "
            "a cache has one sampling distribution",
        )


def _check_models(
    folder: Path, manifest: Manifest, first_folder: Path, first: Manifest, teacher_column: bool
) -> None:
    """Raise an error if the teachers or the students must not be in one cache."""
    # An import may not know its teacher. Where nobody knows, nothing can be compared.
    teacher = manifest.models.get("teacher")
    known = first.models.get("teacher")
    if teacher is not None and known is not None and teacher.tokenizer != known.tokenizer:
        raise DataError(
            "the teachers' tokenizers differ: the same token ids stand for different text",
            where=str(folder),
            limit=f"that of {first_folder}",
            remedy="merge only caches whose teachers have the same tokenizer",
        )
    if not teacher_column:
        # A known and an unknown teacher count as two.
        if (teacher and teacher.weights) != (known and known.weights):
            raise ConsistencyError(
                f"teacher {_named(teacher)} scored these responses, but {_named(known)} "
                f"scored those of {first_folder}",
                where=str(folder),
                limit="exactly one teacher in a cache without a teacher column",
                remedy="add --teacher-column: each row then names its teacher",
            )
        # The lineage of the whole cache names one SFT teacher, so it must be one.
        if manifest.lineage.get("sft_teacher") != first.lineage.get("sft_teacher"):
            raise ConsistencyError(
                "the students of these caches learnt from demonstrations of different teachers",
                where=str(folder),
                remedy="add --teacher-column",
            )
    # Its base and what it saw decide a teacher's scores as much as its weights do.
    for name, ours, theirs in (
        ("base of the teacher", _base(manifest), _base(first)),
        (
            "prompt of the teacher",
            manifest.lineage.get("teacher_prompt"),
            first.lineage.get("teacher_prompt"),
        ),
    ):
        if ours != theirs:
            raise ConsistencyError(
                f"the {name} is not that of {first_folder}",
                where=str(folder),
                limit=f"exactly one {name} in a cache",
                remedy="train on one of these caches",
            )
    # Advantages are relative to the student that sampled. Two of them in one cache would mix two
    # baselines.
    student = manifest.models.get("student")
    other = first.models.get("student")
    if student is not None and other is not None and student.weights != other.weights:
        raise ConsistencyError(
            f"student {_named(student)} sampled these responses, but {_named(other)} "
            f"sampled those of {first_folder}",
            where=str(folder),
            limit="exactly one student in a cache",
            remedy="train on one of these caches",
        )


def _check_columns(
    folder: Path, manifest: Manifest, first_folder: Path, first: Manifest, teacher_column: bool
) -> None:
    """Raise ArtifactError if the columns or their number formats differ."""
    # All shards of an artifact have the columns of its first one.
    if not manifest.shards or not first.shards:
        return
    # Only the footer of one file is read.
    schema = pq.read_schema(folder / manifest.shards[0].name)
    expected = pq.read_schema(first_folder / first.shards[0].name)
    # A source that was merged before has this column already, and the others get it.
    ignored = {"teacher"} if teacher_column else set()
    found, wanted = ([one for one in of if one.name not in ignored] for of in (schema, expected))
    if found != wanted:
        # Columns of one name and two types differ, too, for example in 16 and in 32 bits.
        differing = {str(field) for field in wanted} ^ {str(field) for field in found}
        raise ArtifactError(
            f"these columns are not in both caches: {', '.join(sorted(differing))}",
            where=str(folder),
            limit=f"those of {first_folder}",
            remedy="score again with the same settings, so that all caches have the same columns",
        )


def _check_unique(sources: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Raise ArtifactError if a response is in more than one of the sources."""
    # Keys alone are held: the responses of all caches would not fit into memory.
    seen: set[Key] = set()
    doubled: Counter[str] = Counter()
    for folder, manifest in zip(sources, manifests, strict=True):
        for shard in manifest.shards:
            table = read_shard(folder, shard)
            prompt_ids = table.column("prompt_id").to_pylist()
            indices = table.column("sample_index").to_pylist()
            # Within one source a key is unique already, or `lopd cache verify` names it.
            for key in zip(prompt_ids, indices, strict=True):
                if key in seen:
                    doubled[f"{key[0]}/{key[1]}"] += 1
                seen.add(key)
    if doubled:
        # Enough to see which prompts they are of.
        named = ", ".join(list(doubled)[:5])
        raise ArtifactError(
            f"{len(doubled)} responses are in more than one cache: {named}",
            where="lopd cache merge",
            limit="each prompt_id and sample_index in exactly one cache",
            remedy="leave out one of these caches",
        )


def _teachers(manifests: Sequence[Manifest]) -> dict[str, ModelIdentity]:
    """Return all teachers of the sources by their role. One teacher keeps the plain name."""
    found = {
        identity.weights: identity
        for manifest in manifests
        for role, identity in manifest.models.items()
        if role.startswith("teacher")
    }
    # Readers that know nothing of several teachers look for this name.
    if len(found) == 1:
        return {"teacher": next(iter(found.values()))}
    return {f"teacher-{index}": identity for index, identity in enumerate(found.values())}


def _base(manifest: Manifest) -> dict[str, ModelIdentity]:
    """Return the teacher's base, if the cache has its log-probabilities."""
    return {role: identity for role, identity in manifest.models.items() if role == "base"}


def _student(manifests: Sequence[Manifest]) -> dict[str, ModelIdentity]:
    """Return the student that sampled, if every source says which one. It is the same then."""
    known = [one.models["student"] for one in manifests if "student" in one.models]
    # If one source does not know its student, nobody knows whether it is the same.
    return {"student": known[0]} if len(known) == len(manifests) else {}


def _joint_lineage(manifests: Sequence[Manifest]) -> Mapping[str, Any]:
    # Caches of one run that was split have the same lineage, and so has the merged one.
    lineages = [dict(manifest.lineage) for manifest in manifests]
    if all(lineage == lineages[0] for lineage in lineages):
        return lineages[0]
    # A row names its teacher, and here is what is known of that teacher.
    by_teacher: dict[str, Mapping[str, Any]] = {}
    for manifest in manifests:
        for weights, lineage in _known_of_teachers(manifest):
            # If it did not make the demonstrations of one source, it has foreign rows.
            if weights not in by_teacher or not lineage.get("consistent", False):
                by_teacher[weights] = lineage
    # One source with foreign scores makes the whole cache inconsistent.
    consistent = all(lineage.get("consistent", False) for lineage in lineages)
    return {"by_teacher": by_teacher, "consistent": consistent}


def _known_of_teachers(manifest: Manifest) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the fingerprint of each teacher of a source, and what is known of it."""
    lineage = manifest.lineage
    if "by_teacher" in lineage:  # It was merged before.
        yield from lineage["by_teacher"].items()
    elif "by_domain" in lineage:  # One teacher may have scored several domains.
        yield from ((one["score_teacher"], one) for one in lineage["by_domain"].values())
    elif "teacher" in manifest.models:
        yield manifest.models["teacher"].weights, lineage


def _joint_loss(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Return what 16 bits changed in all sources together, if all are in 16 bits."""
    losses = [loss for manifest in manifests if (loss := manifest.extra.get("logprob_loss"))]
    if len(losses) != len(manifests):
        return {}
    # The manifests have means, so each counts as much as its source has tokens.
    tokens = [sum(shard.tokens for shard in manifest.shards) for manifest in manifests]
    total = sum(loss["mean_abs"] * count for loss, count in zip(losses, tokens, strict=True))
    # The largest change is a bound and does not depend on sizes.
    largest = max(loss["max_abs"] for loss in losses)
    return {"logprob_loss": {"max_abs": largest, "mean_abs": total / max(1, sum(tokens))}}


def _named(model: ModelIdentity | None) -> str:
    return "unknown" if model is None else f"{model.path} (weights {model.weights[:12]})"
