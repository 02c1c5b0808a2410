"""The teachers of a cache: which there are, and by which name people know them."""

from __future__ import annotations

from lopd.cache.reader import CacheReader
from lopd.errors import DataError
from lopd.records import Manifest


def teachers_in(reader: CacheReader) -> dict[str, str]:
    """Return the teachers of a cache that has several; empty where it has one.

    Returns:
        The weights' fingerprint of each teacher, and its name: the domains that it scored, where
        they are known.

    Raises:
        DataError: There are several, and no column says which response is whose.
    """
    # Teachers are told apart by content. A cache that was merged may name one under several roles.
    names: dict[str, str] = {}
    for role, identity in reader.manifest.models.items():
        if role.startswith("teacher"):
            name = "other" if role == "teacher" else role.removeprefix("teachers.")
            # One teacher may serve several domains.
            known = names.get(identity.weights)
            names[identity.weights] = name if known is None else f"{known}+{name}"
    if len(names) > 1 and "teacher" not in reader.columns:
        raise DataError(
            f"the cache has {len(names)} teachers, but no column with the name 'teacher'",
            where=str(reader.folder),
            remedy="merge the caches again with --teacher-column",
        )
    return names if len(names) > 1 else {}


def own_teachers(manifest: Manifest) -> frozenset[str]:
    """Return the teachers of a cache that made the student's demonstrations, by their fingerprints.

    A teacher of several domains is among them if it made the demonstrations of all of them.
    """
    lineage = manifest.lineage
    # The score stage records what is known of each teacher by domain, and a merge by teacher.
    several = lineage.get("by_domain", lineage.get("by_teacher"))
    known = [lineage] if several is None else list(several.values())
    own = {one.get("score_teacher", "") for one in known if one.get("consistent")}
    foreign = {one.get("score_teacher", "") for one in known if not one.get("consistent")}
    return frozenset(own - foreign)
