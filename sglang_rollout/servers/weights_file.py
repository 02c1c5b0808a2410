"""The files beside a server's log, through which the processes around it communicate.

The process that owns a server starts it again when it dies. Another process, a rank of the trainer,
may put the newest weights into it. So the newest weights, the requests for a restart, the number of
starts and the reason of a failure stand in files. All of them are named after the weights file,
which the servers of one model share.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from lopd.errors import EngineError


def remember_weights(file: Path, model_dir: Path, version: str) -> None:
    """Record the checkpoint and the weight version that a restarted server must serve.

    Call it when the servers have the weights, and before the folder of the previous weights is
    removed.

    Args:
        file: The weights file of the servers.
        model_dir: The checkpoint folder. It must exist as long as it is the newest.
        version: The weight version of the checkpoint.

    Raises:
        EngineError: The file cannot be written.
    """
    # The order in the docstring matters. Recorded too early, a server that dies would start with
    # weights that the others do not have yet. Recorded too late, it would find its folder gone.
    # Absolute: the owner may have another working directory.
    write_record(file, {"model_dir": str(model_dir.resolve()), "version": version})


def remember_unsaved_weights(file: Path, version: str) -> None:
    """Record that the newest weights are in no folder, because they came by tensor or broadcast.

    A server that dies then starts with the weights of its first start, under their version. Clients
    notice the version (OtherWeights in sglang_rollout.requests.client), and the weights are sent
    again.

    Args:
        file: The weights file of the servers.
        version: The weight version that the servers have now.
    """
    # The file must change although a restart cannot use it: the watcher counts a new weights file
    # as progress between two deaths.
    write_record(file, {"model_dir": None, "version": version})


def remembered_weights(file: Path) -> tuple[Path, str] | None:
    """Return the checkpoint folder and the version of the newest weights.

    None means that a server must start with its first weights: there are no newer ones, or the
    newer ones are in no folder.

    Raises:
        EngineError: The file is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        model_dir = content["model_dir"]
        version = str(content["version"])
    except FileNotFoundError:
        return None
    # publish() never leaves half of a text, so something else has damaged the file. To start with
    # the first weights instead would hide that.
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"the record of the newest weights cannot be read ({error})",
            where=str(file),
            remedy="run the same command again",
        ) from None
    # A version without a folder is of no use to a restart.
    return None if model_dir is None else (Path(model_dir), version)


def ask_for_restart(weights_file: Path) -> None:
    """Ask the process that owns the servers to restart all servers that use this file.

    They then load the newest weights. Any process may call this function: when a server hangs, or
    when a server has received only a part of an update. The call does not wait for the restart.
    """
    # The time of the file is the request. Every server that shares the file compares it with the
    # time of the last request that it has handled.
    restart_request(weights_file).touch()


def ask_to_end(weights_file: Path, replica: int, start: int) -> None:
    """Ask the owner to end one process of a server and to start the server again.

    The call returns at once. Nothing happens if the server has been started again since.

    Args:
        weights_file: The weights file of the servers.
        replica: The index of the server among those that share the file.
        start: The number of the start, from num_starts(), whose process must end.
    """
    # The number of the start makes the request safe to repeat and to send late: it never ends a
    # process that was started after the caller has looked.
    publish(end_request(weights_file, replica), str(start))


def num_starts(weights_file: Path, replica: int) -> int:
    """Return how often this server has been started, from 1 on. 0 means that nobody watches it.

    The number is written before the new process can answer. A caller that compares the numbers
    before and after several calls therefore knows whether one and the same process answered them.

    Args:
        weights_file: The weights file of the servers.
        replica: The index of the server among those that share the file.
    """
    return read_number(starts_file(weights_file, replica))


def check_not_given_up(weights_file: Path) -> None:
    """Raise the reason why the owner does not start the server again.

    For a process that does not own the server.

    Raises:
        EngineError: The owner has given up.
    """
    # Without the file the owner has not given up.
    with contextlib.suppress(FileNotFoundError):
        raise EngineError(**json.loads(failure_file(weights_file).read_text(encoding="utf-8")))


# All names derive from the weights file. A process that knows it finds the others.
def restart_request(weights_file: Path) -> Path:
    return weights_file.with_name(f"{weights_file.name}.restart")


def starts_file(weights_file: Path, replica: int) -> Path:
    return weights_file.with_name(f"{weights_file.name}.{replica}.starts")


def end_request(weights_file: Path, replica: int) -> Path:
    return weights_file.with_name(f"{weights_file.name}.{replica}.end")


def failure_file(weights_file: Path) -> Path:
    return weights_file.with_name(f"{weights_file.name}.failure")


def write_record(file: Path, content: dict[str, str | None]) -> None:
    publish(file, json.dumps(content) + "\n")


def publish(file: Path, text: str) -> None:
    """Write a file so that a reader in another process sees the previous text or the new one.

    Raises:
        EngineError: The disk is full, or the folder cannot be written.
    """
    # The process id keeps two writers apart, for example the owner and a rank of the trainer.
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        # The replacement is atomic: no reader sees half of the text.
        os.replace(partial, file)
    except OSError as error:
        raise EngineError(
            f"{file.name} cannot be written ({error})",
            where=str(file.parent),
            remedy="delete files in this folder, or set run.dir to another disk",
        ) from None


def read_number(file: Path) -> int:
    """Return the number in a file, or 0 where there is no file."""
    try:
        return int(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return 0


def changed_at(file: Path) -> float:
    """Return the time of the last change in seconds, or 0 where there is no file."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
