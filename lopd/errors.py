"""What is wrong, where, and the remedy: the errors a user can act on.

Every ``LopdError`` becomes one line on screen and exit code 2, without a traceback. A broken
invariant of ours is an ``assert`` instead.
"""

from __future__ import annotations

EXIT_CODE = 2


class LopdError(Exception):
    """A mistake or a circumstance that the user can mend.

    what: what is wrong, with the offending value. where: file, key or server. limit: the bound that
    was broken, if there is one. remedy: what to do.
    """

    def __init__(self, what: str, *, where: str = "", limit: str = "", remedy: str = "") -> None:
        self.what, self.where, self.limit, self.remedy = what, where, limit, remedy
        parts = [f"{where}: {what}" if where else what]
        if limit:
            parts.append(f"limit: {limit}")
        if remedy:
            parts.append(f"remedy: {remedy}")
        super().__init__("; ".join(part.replace("\n", " ") for part in parts))


class ConfigError(LopdError):
    """A key of the configuration is unknown, of the wrong type, out of bounds, or contradicts
    another.
    """


class DataError(LopdError):
    """Prompts, demonstrations or rollouts that cannot be used as they are."""


class ArtifactError(LopdError):
    """An artifact on disk is missing, damaged, of another run, or of a newer schema."""


class ConsistencyError(LopdError):
    """The teacher that scores is not the teacher that made the student's SFT data."""


class EngineError(LopdError):
    """A server did not start, died, refused, or answered something it must not answer."""


class TrainingError(LopdError):
    """The trainer cannot start or go on."""
