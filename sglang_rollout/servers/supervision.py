"""Keeping a server alive: who restarts it, when that is given up, and which weights a restarted one
must serve.

The process that owns a server watches it from a thread. The weights may be put into it by another
process (a trainer's rank), so what they are stands in a file beside the server's log. Clients of a
server that is being restarted wait for it (sglang_rollout.requests.connections); nobody tells them.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lopd.errors import ConfigError, EngineError, LopdError

_LOOK_EVERY_S = 0.1
# in a row, before a server that is silent counts as hanging: a long prefill can keep it from
# answering one
_FAILED_PROBES = 3


# --- the newest weights --------------------------------------------------------------------------------------------------------------------------------


def remember_weights(file: Path, model_dir: Path, version: str) -> None:
    """Say, for whoever restarts the server, that it now serves this checkpoint under this version.
    Atomic: a reader sees the former or the new.

    Call it once the server has the weights, and before the folder of the former ones is removed.
    model_dir must stay as long as it is the newest.
    """
    _write(file, {"model_dir": str(model_dir.resolve()), "version": version})


def _write(file: Path, content: dict[str, str | None]) -> None:
    _publish(file, json.dumps(content) + "\n")


def _publish(file: Path, text: str) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        raise EngineError(
            f"{file.name} cannot be written ({error})",
            where=str(file.parent),
            remedy="free space there",
        ) from None


def remember_unsaved_weights(file: Path, version: str) -> None:
    """Say that the newest weights went in without a folder (by tensor, by broadcast): a server that
    dies then comes back with those of its first start, under their version. Whoever needs the
    newest sees that by the version, and puts them in anew (OtherWeights of
    sglang_rollout.requests.client).
    """
    _write(file, {"model_dir": None, "version": version})


def remembered_weights(file: Path) -> tuple[Path, str] | None:
    """Checkpoint folder and version of the newest weights; None: a server is to start with its
    first ones, as there are no others, or they are in no folder.

    EngineError: damaged file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        model_dir, version = content["model_dir"], str(content["version"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"the newest weights are not to be read ({error})",
            where=str(file),
            remedy="run the same command again",
        ) from None
    return None if model_dir is None else (Path(model_dir), version)


def ask_for_restart(weights_file: Path) -> None:
    """Have the owner end the server (all that share the file) and start it again with the newest
    weights; from whatever process. Returns at once.

    For one who finds the server hanging, or left with half an update.
    """
    _request(weights_file).touch()


def _request(weights_file: Path) -> Path:
    return weights_file.with_name(f"{weights_file.name}.restart")


def num_starts(weights_file: Path, replica: int) -> int:
    """How often this one of the servers that share the file has been started, from 1. A process
    that answers has been counted before it could.

    So who talks to a server in several calls sees whether it was one and the same process. 0:
    nobody watches over it.
    """
    return _number_in(_starts(weights_file, replica))


def ask_to_end(weights_file: Path, replica: int, start: int) -> None:
    """Have the owner end the process of this start and start the server again. Nothing happens
    where it has been started again by itself. Returns at once.
    """
    _publish(_end_of(weights_file, replica), str(start))


def _starts(weights_file: Path, replica: int) -> Path:
    return weights_file.with_name(f"{weights_file.name}.{replica}.starts")


def _end_of(weights_file: Path, replica: int) -> Path:
    return weights_file.with_name(f"{weights_file.name}.{replica}.end")


def _number_in(file: Path) -> int:
    """0: there is none."""
    try:
        return int(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return 0


def check_not_given_up(weights_file: Path) -> None:
    """For a process that does not own the server. EngineError: its owner does not start it again;
    why.
    """
    with contextlib.suppress(FileNotFoundError):
        raise EngineError(**json.loads(_failure(weights_file).read_text(encoding="utf-8")))


def _failure(weights_file: Path) -> Path:
    return weights_file.with_name(f"{weights_file.name}.failure")


# --- the watching thread -------------------------------------------------------------------------------------------------------------------------------


class Activity:
    """What the requests of this process tell of a server: is anything open, how long has it been
    silent, has it answered at all. For any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open, self._since, self.answered = 0, time.monotonic(), False

    def begin(self) -> None:
        """A request was sent."""
        with self._lock:
            if self._open == 0:
                self._since = time.monotonic()
            self._open += 1

    def end(self, *, answered: bool) -> None:
        """It was answered, or failed."""
        with self._lock:
            self._open -= 1
            if answered:
                self._since, self.answered = time.monotonic(), True

    def silence_s(self) -> float:
        """Seconds since the last answer, or since the oldest request; 0 where nothing is open."""
        with self._lock:
            return time.monotonic() - self._since if self._open else 0.0

    def begin_silence(self) -> None:
        """Count the silence from now."""
        with self._lock:
            self._since = time.monotonic()


class Watched(Protocol):
    """What the watcher needs of a server."""

    name: str
    replica: int
    log: Path
    weights_file: Path
    activity: Activity

    def alive(self) -> bool: ...

    def responds(self) -> bool: ...

    def reachable(self) -> bool: ...

    def end_process(self) -> None: ...

    def relaunch(self) -> None: ...

    def death(self) -> EngineError: ...


class Watcher:
    """Starts a server again when its process has ended, when it hangs, or when asked to
    (ask_for_restart).

    restarts: how many in a row, without an answer or new weights between them, before ``failure``
    is set and the server stays dead. hang_timeout_s: silence, with requests of this process open,
    after which its health is asked; without any, so often it is asked whether it is there at all.
    tell: gets a line about each restart.
    """

    def __init__(
        self,
        server: Watched,
        *,
        restarts: int,
        hang_timeout_s: float,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._server, self._restarts, self._hang_timeout_s, self._tell = (
            server,
            restarts,
            hang_timeout_s,
            tell,
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch-{server.name}", daemon=True)
        self._deaths = self._num_starts = 0  # deaths in a row
        self._failed_probes, self._next_look = 0, 0.0
        self._weights_at_start = self._asked = 0.0
        self.num_restarts = 0
        self.failure: EngineError | None = None

    def start(self) -> None:
        _failure(self._server.weights_file).unlink(missing_ok=True)  # of a former run
        self._asked = _time_of(_request(self._server.weights_file))  # likewise
        self._weights_at_start = _time_of(self._server.weights_file)
        _end_of(self._server.weights_file, self._server.replica).unlink(missing_ok=True)
        self._count_start(1)
        self._begin_patience()
        self._thread.start()

    def stop(self) -> None:
        """No restart begins after this. One that is under way ends once the server's process is
        ended; join() waits for that.
        """
        self._stop.set()

    def join(self) -> None:
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_S):
            trouble = self._server.death() if not self._server.alive() else self._trouble()
            if trouble is not None and not self._revive(trouble):
                return

    def _trouble(self) -> EngineError | None:
        """Why a server whose process lives must end."""
        server, asked = self._server, _time_of(_request(self._server.weights_file))
        for_this = _number_in(_end_of(server.weights_file, server.replica)) == self._num_starts
        if asked > self._asked or for_this:  # by time, because several servers may share the file
            self._asked = asked
            return EngineError(
                f"a restart of the {server.name} server was asked for", where=str(server.log)
            )
        silent = server.activity.silence_s() >= self._hang_timeout_s
        if silent:
            responds = server.responds()
        elif self._failed_probes or time.monotonic() >= self._next_look:
            responds = (
                server.reachable()
            )  # who waits for an answer may be another process: its trainer, say
        else:
            return None
        if responds:
            self._begin_patience(silence=silent)
            return None
        self._failed_probes += 1
        if self._failed_probes < _FAILED_PROBES:
            return None
        what = f"the {server.name} server hangs: {_FAILED_PROBES} questions in a row about its health were not answered"
        return EngineError(
            what,
            where=str(server.log),
            limit=f"sglang.hang_timeout_s = {self._hang_timeout_s:g}",
            remedy="read the log",
        )

    def _begin_patience(self, *, silence: bool = True) -> None:
        self._failed_probes = 0
        self._next_look = time.monotonic() + self._hang_timeout_s
        if silence:  # a main process that answers says nothing of a scheduler that does not
            self._server.activity.begin_silence()

    def _revive(self, last: EngineError) -> bool:
        """Start the server until it is healthy; False where that is given up."""
        progressed = (
            self._server.activity.answered
            or _time_of(self._server.weights_file) != self._weights_at_start
        )
        self._deaths = 1 if progressed else self._deaths + 1
        while not self._stop.is_set():
            if self._deaths > self._restarts:
                self._server.end_process()
                self.failure = self._given_up(last)
                with contextlib.suppress(EngineError):  # the disk may be what ended it
                    _write(
                        _failure(self._server.weights_file),
                        {
                            name: getattr(self.failure, name)
                            for name in ("what", "where", "limit", "remedy")
                        },
                    )
                return False
            self._say(f"{last.what}; starting it again")
            try:
                self._server.activity.answered = False
                self._weights_at_start = _time_of(
                    self._server.weights_file
                )  # what comes while it starts is progress
                self._server.end_process()
                self._count_start(
                    self._num_starts + 1
                )  # between its end and its start: whoever gets an answer finds the number of who gave it
                self._server.relaunch()
                self._begin_patience()
                self.num_restarts += 1
                return True
            except EngineError as error:
                last = error
            except (
                ConfigError
            ) as error:  # of something that was there at its first start: a network interface, say
                last = EngineError(
                    error.what, where=error.where, limit=error.limit, remedy=error.remedy
                )
            except OSError as error:  # its log, on a full disk; the thread must not end of it
                what = f"the {self._server.name} server cannot be started again ({error})"
                last = EngineError(what, where=str(self._server.log), remedy="free space there")
            self._deaths += 1
        return False

    def _count_start(self, number: int) -> None:
        self._num_starts = number
        _publish(_starts(self._server.weights_file, self._server.replica), str(number))

    def _given_up(self, last: EngineError) -> EngineError:
        if self._restarts == 0:
            return last
        what = f"the {self._server.name} server died {self._deaths} times in a row without answering a request; at last: {last.what}"
        return EngineError(
            what, where=last.where, limit=f"sglang.restarts = {self._restarts}", remedy=last.remedy
        )

    def _say(self, line: str) -> None:
        if self._tell is not None:
            with contextlib.suppress(
                OSError, LopdError
            ):  # a line that finds no room on the disk must not end the watch
                self._tell(line)


def _time_of(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
