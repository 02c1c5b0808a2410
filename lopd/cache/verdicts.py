"""Verdicts beside a cache: which response was right, and which prompts the teacher can solve.

Both come from ``lopd cache judge`` (lopd/stages/judge.py). A verdict belongs to the exact tokens
that were judged, so it is found again in a cache that was scored, merged, split or residualised
since.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lopd.artifacts import read_complete, read_shard
from lopd.cache.reader import CacheReader
from lopd.errors import ArtifactError, DataError
from lopd.records import Key, Manifest, token_hash

# The kind of an artifact with verdicts.
VERDICTS = "verdicts"
Rows: TypeAlias = NDArray[np.int64]


def right_of(reader: CacheReader, folder: str | Path) -> NDArray[np.bool_]:
    """Return whether each response of a cache was right [rows].

    Args:
        reader: The cache.
        folder: The verdicts.

    Raises:
        ArtifactError: The folder holds no complete verdicts.
        DataError: A response has no verdict.
    """
    verdicts = read_verdict_manifest(folder)
    known: dict[int, bool] = {}
    # The verdicts are a fraction of the cache, so they are all held while the cache is read once.
    for shard in verdicts.shards:
        for row in read_shard(folder, shard).to_pylist():
            # By key and tokens: the same prompt may have been answered again since it was judged.
            known[_name_of((row["prompt_id"], row["sample_index"]), row["token_hash"])] = row[
                "right"
            ]
    right = np.zeros(len(reader), dtype=np.bool_)
    lacking: list[Key] = []
    for index, (response, _) in enumerate(reader.scored_rows()):
        name = _name_of(response.key, token_hash(response.prompt_ids, response.token_ids))
        if name in known:
            right[index] = known[name]
        else:
            # Counted to the end: the number tells whether the wrong folder was named or the judging
            # was cut short.
            lacking.append(response.key)
    if lacking:
        raise DataError(
            f"{len(lacking):,} of {len(reader):,} responses have no verdict there, for example "
            f"{lacking[0]}",
            where=str(folder),
            limit=f"a verdict of the exact tokens of every response of {reader.folder}",
            remedy=f"lopd cache judge {reader.folder} CONFIG --out FOLDER",
        )
    return right


def _name_of(key: Key, tokens: str) -> int:
    """Return 64 bits that name a judged response."""
    # The tokens alone are not enough: two prompts may have the same text and other answers. As a
    # number a verdict takes about 100 bytes of memory, as strings several times that.
    return hash((*key, tokens))


def rows_that_the_teacher_solves(reader: CacheReader, folder: str | Path, share: float) -> Rows:
    """Return the rows of a cache whose prompts the teacher answers well enough.

    Args:
        reader: The cache.
        folder: The verdicts of the teacher's answers.
        share: The least share of right answers.

    Raises:
        ArtifactError: The folder holds no complete verdicts.
        DataError: A prompt has no answer of the teacher, or no prompt is left.
    """
    answers: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for shard in read_verdict_manifest(folder).shards:
        table = read_shard(folder, shard)
        prompts = table.column("prompt_id").to_pylist()
        for prompt_id, is_right in zip(prompts, table.column("right").to_pylist(), strict=True):
            answers[prompt_id] += 1
            right[prompt_id] += is_right
    # The cache and the teacher's answers share prompts and not responses, so the prompts are
    # compared.
    asked = reader.prompts_of_rows()
    unknown = sorted({name for name in asked if name not in answers})
    if unknown:
        raise DataError(
            f"{len(unknown):,} prompts of the cache have no answer of the teacher there, for "
            f"example {unknown[0]!r}",
            where=str(folder),
            limit=f"a verdict for every prompt of {reader.folder}",
            remedy="let the teacher answer the prompts of prompts.opd, and judge these answers",
        )
    # Multiplied and not divided, so that no rounding decides at the very share.
    kept = [row for row, name in enumerate(asked) if right[name] >= share * answers[name]]
    if not kept:
        raise DataError(
            "the teacher solves none of the prompts, so nothing is left to learn from",
            where=str(folder),
            limit=f"at least one prompt with a share of right answers >= {share}",
            remedy="use another teacher, lower distill.teacher_right_share, or remove "
            "distill.teacher_verdicts",
        )
    return np.array(kept, dtype=np.int64)


def refuse_verdicts(folder: str | Path, manifest: Manifest) -> None:
    """Refuse verdicts where an artifact of responses is asked for.

    Raises:
        ArtifactError: The artifact has verdicts in it, and no responses.
    """
    if manifest.kind == VERDICTS:
        raise ArtifactError(
            f"this artifact is of kind {VERDICTS} and has no responses",
            where=str(folder),
            limit="an artifact of responses: a cache, rollouts, demonstrations or answers",
            remedy="give the artifact that was judged",
        )


def read_verdict_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of complete verdicts. ArtifactError: They are not complete verdicts."""
    manifest = read_complete(folder)
    if manifest.kind != VERDICTS:
        raise ArtifactError(
            f"this artifact is of kind {manifest.kind}",
            where=str(folder),
            limit=f"exactly {VERDICTS}",
            remedy="give the folder that lopd cache judge has made",
        )
    return manifest
