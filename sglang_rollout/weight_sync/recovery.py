"""Servers that are lost under a sequence of calls, for a process that does not own them: which are,
and the wait until their owner has started them again.

One call that fails says little: of two servers in a broadcast the one that lives may be the one
that complains. So who is lost is found by asking all of them, and by the owner's count of their
starts (sglang_rollout.servers.supervision), which also tells of a server that is back already, with
the weights of its start.
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

_ANSWER_S = 30.0  # a scheduler that is given nothing else to do answers at once
_POLL_S = 0.1


class RestartedServers:
    """Servers of lopd's that another process owns and starts again when they die."""

    def __init__(
        self, engines: Sequence[SGLangEngine], weights_file: Path, timeout_s: float
    ) -> None:
        """engines: in the order of replicas. timeout_s: for a question that only tells whether a
        server is there; 30 s where that is more.
        """
        self._engines, self._file, self._answer_s = (
            tuple(engines),
            weights_file,
            min(timeout_s, _ANSWER_S),
        )
        self._starts = [0] * len(self._engines)  # of the processes that are dealt with
        self._leaving = [False] * len(self._engines)  # those are dead, or will be ended

    def await_all(self) -> None:
        """Until each answers, those that are lost by another process. EngineError: one stays dead
        (why), or is not back within sglang.outage_timeout_s.
        """
        for replica, engine in enumerate(self._engines):
            limit = engine.settings.outage_timeout_s
            deadline = time.monotonic() + limit
            while True:
                start = num_starts(
                    self._file, replica
                )  # before it answers: what dies afterwards is noticed
                if not (
                    self._leaving[replica] and start == self._starts[replica]
                ) and self._is_there(engine):
                    break
                engine.check_alive()
                if time.monotonic() > deadline:
                    remedy = "read its log; where it takes longer to start, raise sglang.outage_timeout_s"
                    raise EngineError(
                        "the server is not back after its restart",
                        where=engine.url,
                        limit=f"sglang.outage_timeout_s = {limit:g}",
                        remedy=remedy,
                    )
                time.sleep(_POLL_S)
            self._starts[replica], self._leaving[replica] = start, False

    def restarted(self) -> list[int]:
        """Replicas that are no longer the processes that await_all has found."""
        return [
            replica
            for replica, start in enumerate(self._starts)
            if num_starts(self._file, replica) != start
        ]

    def lost(self) -> list[int]:
        """Those, and the ones whose scheduler does not answer."""
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
        return sorted(silent.union(self.restarted()))

    def end(self, replicas: Sequence[int]) -> None:
        """Have those that still run ended and started again. await_all then waits for it."""
        for replica in replicas:
            self._leaving[replica] = True
            ask_to_end(self._file, replica, self._starts[replica])

    def urls(self, replicas: Sequence[int]) -> str:
        return ", ".join(self._engines[replica].url for replica in replicas)

    def _is_there(self, engine: SGLangEngine) -> bool:
        try:
            model_info(engine, self._answer_s)
        except EngineError:
            return False
        return True
