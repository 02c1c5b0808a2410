"""Why a checkpoint could not be written or read, in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron.core.dist_checkpointing.mapping import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from lopd.artifacts import storage_errors
from lopd.errors import TrainingError

# What dist_checkpointing.load and the code around it raise for files that are damaged or missing.
READ_ERRORS = (
    CheckpointException,
    CheckpointingException,
    OSError,
    RuntimeError,
    KeyError,
    ValueError,
)


@contextlib.contextmanager
def explain_failed_save(partial: Path) -> Iterator[None]:
    """Turn the errors of a failed save into one line about this folder.

    Raises:
        ArtifactError: The disk is full or forbidden.
        TrainingError: The checkpoint cannot be written.
    """
    try:
        with storage_errors(partial):
            yield
    except (CheckpointException, CheckpointingException) as error:
        # The writer of some rank has failed, and Megatron-Core or torch has told the others.
        raise _not_written(partial, error) from error
    except RuntimeError as error:
        # torch.save on a full disk raises a RuntimeError that says no more than "iostream error".
        # Any other RuntimeError is a fault of the program, and must not look like a full disk.
        if "iostream" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise _not_written(partial, error) from error


def _not_written(partial: Path, error: BaseException) -> TrainingError:
    return TrainingError(
        f"the checkpoint cannot be written ({innermost_reason(error)})",
        where=str(partial),
        remedy="free disk space, then run the same command again",
    )


def innermost_reason(error: BaseException) -> str:
    """Return the innermost cause of an error in one line of at most 300 characters."""
    # torch collects the errors of all ranks in one exception. Megatron-Core and torch wrap a
    # writer's error several times, with the cause in the last line.
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip()
    return text.splitlines()[-1][:300] if text else type(error).__name__
