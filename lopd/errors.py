"""The errors that a user can act on: what is wrong, where, the limit, and the remedy.

Every ``LopdError`` becomes one line on screen and exit code 2, without a traceback. An invariant of
our own code is an ``assert`` instead, because its failure is a bug and needs the traceback.
"""

from __future__ import annotations

# 1 is what Python itself exits with after an unexpected error. A script can tell the two apart.
EXIT_CODE = 2
# Nothing is wrong, but something must be downloaded first (see NotFetched).
EXIT_NOT_FETCHED = 3


class LopdError(Exception):
    """A mistake or a circumstance that the user can correct.

    Args:
        what: What is wrong, with the offending value.
        where: The file, the configuration key or the server.
        limit: The bound that was broken, if there is one.
        remedy: What to do.

    Example:
        >>> str(LopdError("a batch of 0", where="distill.batch_size", limit="at least 1"))
        'distill.batch_size: a batch of 0; limit: at least 1'
    """

    def __init__(self, what: str, *, where: str = "", limit: str = "", remedy: str = "") -> None:
        # The parts are kept beside the line, because other errors quote them one by one.
        self.what = what
        self.where = where
        self.limit = limit
        self.remedy = remedy
        # The place comes first, as in the messages of compilers, so that an editor can open it.
        parts = [f"{where}: {what}" if where else what]
        if limit:
            parts.append(f"limit: {limit}")
        if remedy:
            parts.append(f"remedy: {remedy}")
        # A quoted reason may have several lines. Logs and launchers expect one line per error.
        super().__init__("; ".join(part.replace("\n", " ") for part in parts))


class ConfigError(LopdError):
    """A configuration key is unknown, out of bounds, of a wrong type, or contradicts another."""


class DataError(LopdError):
    """Prompts, demonstrations or rollouts cannot be used as they are."""


class ArtifactError(LopdError):
    """An artifact on disk is missing, damaged, of another run, or of a newer schema."""


class ConsistencyError(LopdError):
    """The scoring teacher is not the teacher that made the student's SFT data."""


class EngineError(LopdError):
    """A server did not start, ended, refused a request, or gave an answer that cannot be used."""


class TrainingError(LopdError):
    """The trainer cannot start or continue."""


class NotFetched(ConfigError, DataError):
    """A model or a prompt file has a name on the hub and is not on this machine yet.

    Nothing is wrong: ``lopd fetch`` downloads it. A command that ends with this error alone has the
    exit code 3.
    """
