"""Keeping a server alive: when it is started again, and when that is given up.

The process that owns a server watches it from a thread. Nobody tells the clients of a server about
a restart: they see connection errors and wait until the server accepts connections again
(sglang_rollout.requests.connections). The files of sglang_rollout.servers.weights_file connect the
watcher with other processes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lopd.errors import ConfigError, EngineError, LopdError
from sglang_rollout.servers.weights_file import (
    changed_at,
    end_request,
    failure_file,
    publish,
    read_number,
    restart_request,
    starts_file,
    write_record,
)

# Looking whether a process lives costs next to nothing, and clients wait for a restart.
_WATCH_INTERVAL_S = 0.1
# Unanswered questions in a row before a silent server counts as hanging. A long prefill can keep a
# healthy server from answering one of them.
_FAILED_PROBES = 3


class Activity:
    """What the requests of this process show about a server. Any thread may use it."""

    def __init__(self) -> None:
        # Several streams may run at the same time, each with a thread of its own.
        self._lock = threading.Lock()
        self._num_open = 0
        self._silent_since = time.monotonic()
        self.answered = False

    def begin(self) -> None:
        """Record that a request was sent."""
        with self._lock:
            # An idle server is silent for good reasons, so the silence begins with the request.
            if self._num_open == 0:
                self._silent_since = time.monotonic()
            self._num_open += 1

    def end(self, *, answered: bool) -> None:
        """Record that a request was answered or has failed."""
        with self._lock:
            self._num_open -= 1
            # A failed request is no sign of life. It may have failed because the server is dead.
            if answered:
                self._silent_since = time.monotonic()
                self.answered = True

    def silence_s(self) -> float:
        """Return the seconds since the last answer or since the oldest open request.

        The value is 0 where no request is open.
        """
        with self._lock:
            return time.monotonic() - self._silent_since if self._num_open else 0.0

    def begin_silence(self) -> None:
        """Count the silence from now on."""
        with self._lock:
            self._silent_since = time.monotonic()


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
    """Starts a server again when its process has ended, when it hangs, or on request.

    Attributes:
        num_restarts: How often the server was started again.
        failure: The reason why the server stays dead, or None.
    """

    def __init__(
        self,
        server: Watched,
        *,
        restarts: int,
        hang_timeout_s: float,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            server: The server to watch.
            restarts: The largest number of restarts in a row, without an answer or new weights
                between them. After that the watcher gives up.
            hang_timeout_s: Seconds of silence, with open requests of this process, after which the
                server is asked for its health. Without open requests the server is asked at this
                interval whether its main process is reachable.
            tell: A function that gets one line about each restart.
        """
        self._server = server
        self._restarts = restarts
        self._hang_timeout_s = hang_timeout_s
        self._tell = tell
        self._stop = threading.Event()
        # A daemon, so that an owner that ends without stop() does not wait for it. The server then
        # ends through its guard (lopd.processes).
        self._thread = threading.Thread(target=self._run, name=f"watch-{server.name}", daemon=True)
        # Deaths without an answer or new weights between them.
        self._deaths_in_a_row = 0
        # The number of the process that runs now.
        self._num_starts = 0
        self._failed_probes = 0
        self._next_probe = 0.0
        # The times at which two files last changed: the weights file at the newest start, and the
        # newest request for a restart that was handled.
        self._weights_at_start = 0.0
        self._handled_request = 0.0
        self.num_restarts = 0
        self.failure: EngineError | None = None

    def start(self) -> None:
        """Begin to watch. The server's process has been started by then."""
        server = self._server
        # The files of an earlier run in the same folder must not act on this one: its failure is
        # removed, and its requests count as handled.
        failure_file(server.weights_file).unlink(missing_ok=True)
        self._handled_request = changed_at(restart_request(server.weights_file))
        self._weights_at_start = changed_at(server.weights_file)
        end_request(server.weights_file, server.replica).unlink(missing_ok=True)
        # The server has launched its first process by itself.
        self._count_start(1)
        self._reset_probes()
        self._thread.start()

    def stop(self) -> None:
        """Let no restart begin after this.

        A restart that is under way ends when the server's process is ended. join() waits for that.
        """
        self._stop.set()

    def join(self) -> None:
        """Wait for the thread to end."""
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def _run(self) -> None:
        while not self._stop.wait(_WATCH_INTERVAL_S):
            # A process that has ended can be asked nothing.
            trouble = self._server.death() if not self._server.alive() else self._trouble()
            if trouble is not None and not self._revive(trouble):
                return

    def _trouble(self) -> EngineError | None:
        """Return why a server whose process still runs must end."""
        server = self._server
        if self._restart_requested():
            return EngineError(
                f"a restart of the {server.name} server was requested",
                where=str(server.log),
                remedy="read the log, then run the same command again: finished work is kept",
            )
        silent = server.activity.silence_s() >= self._hang_timeout_s
        if silent:
            # Requests of this process are open, so the scheduler has work and must show life.
            responds = server.responds()
        # After a failed probe the next one follows at once and not after a whole interval.
        elif self._failed_probes or time.monotonic() >= self._next_probe:
            # The client that waits may be another process, for example a trainer that syncs. A
            # scheduler may rightly be paused then, so only the main process is asked.
            responds = server.reachable()
        else:
            return None
        if responds:
            self._reset_probes(silence=silent)
            return None
        # One failed probe is no proof: a server under load may answer late.
        self._failed_probes += 1
        if self._failed_probes < _FAILED_PROBES:
            return None
        return EngineError(
            f"the {server.name} server hangs: it did not answer {_FAILED_PROBES} health "
            "checks in a row",
            where=str(server.log),
            limit=f"at most sglang.hang_timeout_s = {self._hang_timeout_s:g}",
            remedy="read the log",
        )

    def _restart_requested(self) -> bool:
        server = self._server
        # Several servers may share the request for all of them, so nobody may remove it when it is
        # handled. Each watcher remembers the time of the newest request that it has handled.
        requested = changed_at(restart_request(server.weights_file))
        # A request to end one process names the start that it means. A later start is not
        # concerned.
        to_end = read_number(end_request(server.weights_file, server.replica))
        if requested > self._handled_request or to_end == self._num_starts:
            self._handled_request = requested
            return True
        return False

    def _reset_probes(self, *, silence: bool = True) -> None:
        """Forget the failed probes and wait a whole interval for the next one.

        Args:
            silence: Whether the scheduler has shown life, so that the silence begins anew. A main
                process that answers proves nothing about a scheduler that does not.
        """
        self._failed_probes = 0
        self._next_probe = time.monotonic() + self._hang_timeout_s
        if silence:
            self._server.activity.begin_silence()

    def _revive(self, last: EngineError) -> bool:
        """Start the server again until it is healthy. Return False where that is given up."""
        weights_time = changed_at(self._server.weights_file)
        # New weights are progress too: a sync is work that a server did without answering anybody.
        progressed = self._server.activity.answered or weights_time != self._weights_at_start
        self._deaths_in_a_row = 1 if progressed else self._deaths_in_a_row + 1
        # stop() during a start ends the process. The start then fails, and so does this loop.
        while not self._stop.is_set():
            if self._deaths_in_a_row > self._restarts:
                self._give_up(last)
                return False
            self._tell_line(f"{last.what}; starting it again")
            error = self._try_restart()
            if error is None:
                return True
            last = error
            # A start that fails is one more death.
            self._deaths_in_a_row += 1
        return False

    def _try_restart(self) -> EngineError | None:
        """Start the server once more and return what went wrong."""
        server = self._server
        try:
            # The new process has answered nobody yet.
            server.activity.answered = False
            # It is read before the start, so that weights which come meanwhile count as progress.
            self._weights_at_start = changed_at(server.weights_file)
            # The count changes between the end of the old process and the start of the new one. A
            # client that gets an answer then always finds the number of the process that gave it.
            server.end_process()
            self._count_start(self._num_starts + 1)
            server.relaunch()
        except EngineError as error:
            return error
        except ConfigError as error:
            # What was there at the first start is gone, for example a network interface.
            return EngineError(
                error.what, where=error.where, limit=error.limit, remedy=error.remedy
            )
        except OSError as error:
            # The log cannot be written where the disk is full. The thread must not end of that, or
            # the clients would wait for a restart that never comes.
            return EngineError(
                f"the {server.name} server cannot be started again ({error})",
                where=str(server.log),
                remedy="delete files in the folder of this log, or set run.dir to another disk",
            )
        self._reset_probes()
        self.num_restarts += 1
        return None

    def _give_up(self, last: EngineError) -> None:
        """Leave the server dead and tell this process and all others why."""
        # A server that hangs still has a process. It is ended before the failure is known, so that
        # a client that reads the failure never meets it.
        self._server.end_process()
        self.failure = self._final_error(last)
        # Other processes only read the file. A full disk may be what ended the server, and then
        # there is no room for the file either.
        with contextlib.suppress(EngineError):
            record = {
                name: getattr(self.failure, name) for name in ("what", "where", "limit", "remedy")
            }
            write_record(failure_file(self._server.weights_file), record)

    def _count_start(self, number: int) -> None:
        self._num_starts = number
        publish(starts_file(self._server.weights_file, self._server.replica), str(number))

    def _final_error(self, last: EngineError) -> EngineError:
        # Without restarts there was one death, and its own message says everything.
        if self._restarts == 0:
            return last
        return EngineError(
            f"the {self._server.name} server died {self._deaths_in_a_row} times in a row "
            f"without answering a request; at last: {last.what}",
            where=last.where,
            limit=f"at most sglang.restarts = {self._restarts} restarts",
            remedy=last.remedy,
        )

    def _tell_line(self, line: str) -> None:
        if self._tell is not None:
            # A line that finds no room on the disk must not end the watch.
            with contextlib.suppress(OSError, LopdError):
                self._tell(line)
