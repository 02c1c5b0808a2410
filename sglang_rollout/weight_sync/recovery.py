"""Servers that are lost during a sequence of calls, seen from a process that does not own them.

The process finds which servers were lost, and waits until their owner has started them again.

One call that fails says little: of two servers in a broadcast, the living one may be the one that
complains. So all servers are asked, and the owner's count of their starts is read
(sglang_rollout.servers.weights_file). The count also shows a server that is back already, with the
weights of its start.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lopd.errors import EngineError
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.servers.weights_file import ask_to_end, num_starts
from sglang_rollout.weight_sync.interface import model_info, started

# A scheduler that has nothing else to do answers at once.
_ANSWER_S = 30.0
_POLL_S = 0.1


class RestartedServers:
    """Servers that another process of lopd has started, and restarts when they end unexpectedly."""

    def __init__(
        self, engines: Sequence[SGLangEngine], weights_file: Path, timeout_s: float
    ) -> None:
        """
        Args:
            engines: One engine for each server, in the order of the replicas.
            weights_file: The weights file that the servers share.
            timeout_s: The longest time in seconds for a question that only asks whether a server is
                there, at most 30.
        """
        self._engines = tuple(engines)
        self._file = weights_file
        self._answer_s = min(timeout_s, _ANSWER_S)
        # For each replica the number of the start whose process the current sync deals with.
        self._starts = [0] * len(self._engines)
        # Whether that process is dead or will be ended.
        self._ending = [False] * len(self._engines)

    def await_all(self) -> None:
        """Wait until each server answers.

        After end() the answer must come from a new process.

        Raises:
            EngineError: A server stays dead (the message has the reason), or it is not back within
                sglang.outage_timeout_s.
        """
        for replica, engine in enumerate(self._engines):
            # Each server has the whole patience. A slow one must not use up the time of the next.
            limit = engine.settings.outage_timeout_s
            deadline = time.monotonic() + limit
            while True:
                # The count is read before the question. If the server dies after its answer, the
                # count will differ later and restarted() finds it. In the other order a death
                # between the two would be counted as a start that was seen.
                start = num_starts(self._file, replica)
                # An old process that hangs may still answer while its owner has yet to end it.
                is_old = self._ending[replica] and start == self._starts[replica]
                if not is_old and self._is_there(engine):
                    break
                engine.check_alive()
                if time.monotonic() > deadline:
                    raise EngineError(
                        "the server does not answer after its restart",
                        where=engine.url,
                        limit=f"at most sglang.outage_timeout_s = {limit:g}",
                        remedy="read the log of the server; raise sglang.outage_timeout_s if the "
                        "server needs more time to start",
                    )
                time.sleep(_POLL_S)
            self._starts[replica] = start
            self._ending[replica] = False

    def restarted(self) -> list[int]:
        """Return the replicas that are no longer the processes that await_all() has found."""
        return [
            replica
            for replica, start in enumerate(self._starts)
            # The owner counts before a new process can answer, so the number is never behind.
            if num_starts(self._file, replica) != start
        ]

    def lost(self) -> list[int]:
        """Return the restarted replicas and those whose scheduler does not answer."""
        # /server_info asks the scheduler. /model_info is answered by the main process alone, which
        # can live on where the scheduler hangs.
        # All at the same time, because each silent server takes the whole timeout.
        asked = [
            started(partial(engine.call, "GET", "/server_info", timeout_s=self._answer_s))
            for engine in self._engines
        ]
        silent = set()
        for replica, answer in enumerate(asked):
            try:
                answer.result()
            except EngineError:
                silent.add(replica)
        # The counts are read after the answers: a server that died and came back between two calls
        # of the sync answers well, with its first weights.
        return sorted(silent.union(self.restarted()))

    def end(self, replicas: Sequence[int]) -> None:
        """Have these servers ended, where they still run, and started again.

        await_all() then waits for it.
        """
        for replica in replicas:
            # await_all() must not take the old process for the new one.
            self._ending[replica] = True
            ask_to_end(self._file, replica, self._starts[replica])

    def urls(self, replicas: Sequence[int]) -> str:
        """Return the URLs of these replicas for a message."""
        return ", ".join(self._engines[replica].url for replica in replicas)

    def _is_there(self, engine: SGLangEngine) -> bool:
        try:
            # A plain question that the main process answers, also while its scheduler is paused for
            # a sync.
            model_info(engine, self._answer_s)
        except EngineError:
            return False
        return True
