"""The calls around an update of weights, whatever brings them: requests held back, cached prefixes
forgotten, the version set, requests let go.

What SGLang 0.5.17 does with running requests, and what that is good for:

finish  (through a folder only) the update waits until all running requests have ended, and new ones
wait: a response has one version.
pause   requests are taken back into the queue and their keys and values forgotten (SGLang: retract); they go on with the new weights, which first read
        again what was written so far.
keep    requests stop where they are (in_place) and go on with the new weights and the old keys and values.
abort   requests end at once (finish reason abort); our client sends them again, to the new weights.

Cached prefixes of the old weights must not serve the new ones, but SGLang forgets its cache only
while no request is running or waiting. With pause and keep and requests under way that is
impossible, so the sync is then refused before anything has changed, unless the server has no prefix
cache (disable_radix_cache). With finish it is asked in the same call as the update; where that
comes before the scheduler has put away the request that ended last, an assertion of SGLang ends the
server (sgl-project/sglang issue 14062). So it is not asked of a server without a prefix cache; with
one, and with requests under way, it can happen.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from lopd.errors import EngineError
from sglang_rollout.requests.client import Refused, SGLangEngine
from sglang_rollout.weight_sync.interface import model_info, on_all

RunningRequests: TypeAlias = Literal["finish", "pause", "keep", "abort"]

_MODES = {"pause": "retract", "keep": "in_place", "abort": "abort"}  # SGLang's words
_BRACKETED_SINCE = (
    0,
    5,
    21,
)  # from this version on, weights change only between /begin_weight_update and /end_weight_update
_FLUSH_PATIENCE_S = 10  # requests that were just aborted need a moment to be gone
_CLEANING_TIMEOUT_S = 10.0  # for a call that only tidies up after a failure


class UpdateSession:
    """One update on several servers at once: open, then whatever changes the weights, then close or
    abandon.

    weights_changed: to be called before the first byte of the served weights changes; from then on
    the servers report an incomplete version, and abandon leaves them paused: what they hold is a
    mixture that nobody may be answered with.
    """

    def __init__(
        self, engines: Sequence[SGLangEngine], running_requests: RunningRequests, timeout_s: float
    ) -> None:
        self.engines, self._running, self._timeout_s = tuple(engines), running_requests, timeout_s
        self._infos: list[dict[str, Any]] = []
        self._bracketed: list[SGLangEngine] = []  # inside begin and end
        self._paused = self._changing = False
        self._version = ""

    @property
    def num_ranks(self) -> list[int]:
        """Tensor-parallel ranks of each server."""
        return [int(info.get("tp_size", 1)) for info in self._infos]

    @property
    def flushed_by_update(self) -> list[bool]:
        """Whether an update through a folder must forget a server's cached prefixes in the same
        breath.
        """
        return [
            self._running == "finish" and not info.get("disable_radix_cache")
            for info in self._infos
        ]

    def open(self, version: str, *, in_place: bool) -> None:
        """Hold requests back. EngineError: a server refuses or is silent, or has cached prefixes
        that it could not forget; all serve on as before.
        """
        self._version, self._changing = version, False
        if (
            not self._infos or self._running not in _MODES
        ):  # else they are asked below, and were found fit before
            # their schedulers too: of requests that have ended nothing is left in them afterwards
            self._infos = self._ask()
        copies = max(
            int(info.get("dp_size", 1)) * int(info.get("pp_size", 1)) for info in self._infos
        )
        if in_place and copies > 1:
            raise EngineError(
                f"a server of {copies} data-parallel copies or pipeline stages takes weights from a folder only",
                where=self.engines[0].url,
                limit="sglang.data = 1 for other transports",
                remedy='set sync.transport = "disk", or use sglang.replicas',
            )
        try:
            if self._running in _MODES:
                self._paused = True
                self._post("/pause_generation", {"mode": _MODES[self._running]})
                # what a scheduler ended before it came to the pause is then answered, under the
                # version that it has
                self._infos = self._ask()
                self._forget_prefixes()
            for engine, info in zip(self.engines, self._infos, strict=True):
                if _numbers(str(info["version"])) >= _BRACKETED_SINCE:
                    self._open_bracket(engine)
        except EngineError:
            self.abandon()
            raise

    def _open_bracket(self, engine: SGLangEngine) -> None:
        try:
            engine.call("POST", "/begin_weight_update", {}, timeout_s=self._timeout_s)
        except Refused as error:
            if "already open" not in error.what:  # by one who was killed before it came to the end
                raise
            engine.call("POST", "/end_weight_update", {}, timeout_s=self._timeout_s)
            engine.call("POST", "/begin_weight_update", {}, timeout_s=self._timeout_s)
        self._bracketed.append(engine)

    def weights_changed(self) -> None:
        if not self._changing:
            self._changing = True
            self.set_version(f"{self._version} (incomplete)")

    def end_of_changes(self) -> None:
        """The last byte is in place."""
        while self._bracketed:
            self._bracketed.pop().call("POST", "/end_weight_update", {}, timeout_s=self._timeout_s)
        self._forget_prefixes()

    def close(self) -> None:
        """Give the servers the version and let requests go on. EngineError: a server reports
        another version afterwards.
        """
        if self._changing:
            self.set_version(self._version)
        self._changing = False
        if self._paused:
            self._post("/continue_generation", {})
            self._paused = False
        for engine in self.engines:
            reported = model_info(engine, self._timeout_s)["weight_version"]
            if reported != self._version:
                raise EngineError(
                    f"the server reports weight version {reported!r} after the update to {self._version!r}",
                    where=engine.url,
                )

    def abandon(self) -> bool:
        """Leave, without an error of its own: servers whose weights have not been touched go on
        with them, the others stay paused and answer nobody.

        True where they hold a mixture.
        """

        timeout_s = min(self._timeout_s, _CLEANING_TIMEOUT_S)

        def leave(engine: SGLangEngine) -> None:
            with contextlib.suppress(EngineError):
                if engine in self._bracketed:
                    engine.call("POST", "/end_weight_update", {}, timeout_s=timeout_s)
                if self._paused and not self._changing:
                    engine.call("POST", "/continue_generation", {}, timeout_s=timeout_s)
                elif self._changing:  # whoever waits for an answer is told at once
                    engine.call("POST", "/abort_request", {"abort_all": True}, timeout_s=timeout_s)

        with contextlib.suppress(EngineError):
            on_all(self.engines, leave, 3 * timeout_s)
        self._bracketed.clear()
        mixture, self._paused, self._changing = self._changing, False, False
        return mixture

    def set_version(self, version: str) -> None:
        self._post("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def _forget_prefixes(self) -> None:
        if self._running == "finish":  # the update itself does it
            return
        kept = self._running in ("pause", "keep")
        for engine, info in zip(self.engines, self._infos, strict=True):
            if kept and info.get("disable_radix_cache"):
                continue
            try:
                engine.call(
                    "POST",
                    f"/flush_cache?timeout={0 if kept else _FLUSH_PATIENCE_S}",
                    timeout_s=self._timeout_s,
                )
            except EngineError as error:
                raise EngineError(
                    f"cached prefixes of the old weights cannot be forgotten while requests are under way ({error.what})",
                    where=engine.url,
                    limit=f"sync.running_requests = {self._running}",
                    remedy='use "abort", or start the servers with sglang.extra_args.disable_radix_cache = true',
                ) from None

    def _ask(self) -> list[dict[str, Any]]:
        return self._all(
            lambda engine: dict(engine.call("GET", "/server_info", timeout_s=self._timeout_s))
        )

    def _post(self, path: str, body: dict[str, Any]) -> None:
        self._all(lambda engine: engine.call("POST", path, body, timeout_s=self._timeout_s))

    def _all(self, call: Any) -> list[Any]:
        return on_all(self.engines, call, self._timeout_s + _CLEANING_TIMEOUT_S)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
