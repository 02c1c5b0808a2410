"""Is this cache what it says it is?

Every file is held against its checksum and its artifact, and every response against what a
log-probability can be. docs/cache_format.md lists the rules.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from lopd.artifacts import ORIGIN_KEY, origin_of, read_manifest, read_shard
from lopd.cache.columns import list_lengths
from lopd.cache.row_checks import Findings, RowChecks
from lopd.cache.verdicts import refuse_verdicts
from lopd.errors import ArtifactError, LopdError
from lopd.records import Manifest


def check_cache(
    folder: str | Path, *, vocab_size: int | None = None
) -> tuple[Findings, dict[str, Any]]:
    """Return everything that is wrong with an artifact of responses.

    Args:
        vocab_size: None means the one of the manifest, or of the teacher's config.json if it is
            still at its path.

    Returns:
        The findings, and ``rows``, ``tokens``, ``shards``, ``vocab_size`` and ``complete``.

    Raises:
        ArtifactError: There is no manifest that can be read, or it is one of verdicts.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    refuse_verdicts(folder, manifest)
    findings = Findings()
    # It is a finding and no error, so that the shards that are there are checked, too.
    if not manifest.complete:
        what = "the artifact is not complete: its stage was not finished"
        findings.add("incomplete", what, str(folder))
    # What the user gives wins over what the manifest says.
    size = vocab_size or vocabulary(manifest)
    models = manifest.models.items()
    teachers = [identity.weights for role, identity in models if role.startswith("teacher")]
    # A cache of several domains has several teachers, each under a role of its own.
    checks = RowChecks(findings, vocab_size=size, kind=manifest.kind, teachers=teachers)
    rows = 0
    tokens = 0
    for table, where in _readable_shards(folder, manifest, findings):
        # A shard without its columns has no rows that could be counted.
        if checks.add(table, where):
            rows += table.num_rows
            tokens += int(list_lengths(table, "token_ids").sum())
    # Tools that read a folder of Parquet files would take a foreign file in. While the artifact is
    # not complete, no shard is listed yet.
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


def _readable_shards(
    folder: Path, manifest: Manifest, findings: Findings
) -> Iterator[tuple[pa.Table, str]]:
    """Yield the rows and the name of each shard that can be read, and check the shard as a file."""
    expected = origin_of(manifest).encode()
    for shard in manifest.shards:
        if not shard.name.endswith(".parquet"):
            continue
        # One damaged shard must not hide what is wrong with the others.
        try:
            table = read_shard(folder, shard)
        except ArtifactError as error:
            findings.add("damaged", "missing, truncated or changed", f"{shard.name} ({error.what})")
            continue
        # Other writers need not know the key, so only a wrong value is a fault.
        origin = (table.schema.metadata or {}).get(ORIGIN_KEY)
        if origin is not None and origin != expected:
            what = "a shard of another run: it was made from other inputs than the manifest says"
            findings.add("another run", what, shard.name)
        has_tokens = "token_ids" in table.column_names
        # CacheReader finds a row by these counts. Wrong ones would give it another row.
        tokens = int(list_lengths(table, "token_ids").sum()) if has_tokens else 0
        if (table.num_rows, tokens) != (shard.rows, shard.tokens):
            findings.add("counts", "rows or tokens differ from the manifest's", shard.name)
        yield table, shard.name


def vocabulary(manifest: Manifest) -> int | None:
    """Return the size of the vocabulary, or None if it is known nowhere.

    The manifest says it, or the teacher's config.json if it is still at its path.
    """
    # Whoever made the cache knew the size best. The teacher's folder may be gone by now.
    size = manifest.extra.get("vocab_size")
    if isinstance(size, int):
        return size
    teacher = manifest.models.get("teacher")
    path = Path(teacher.path) / "config.json" if teacher is not None else None
    if path is None or not path.is_file():
        return None
    # The file is not ours and may have become anything. A check of ids is then left out, which is
    # better than a check that fails for another reason.
    try:
        size = json.loads(path.read_text(encoding="utf-8")).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def require_sound(folder: str | Path) -> None:
    """Refuse a cache in which anything is wrong. Nothing is derived from such a cache.

    Raises:
        LopdError: The first finding.
    """
    folder = Path(folder)
    # The whole cache is checked although one finding is enough: the message counts how many
    # responses have the fault.
    findings, _ = check_cache(folder)
    for finding in findings:
        remedy = f"see all with: lopd cache verify {folder}"
        raise LopdError(str(finding), where=str(folder), remedy=remedy)
