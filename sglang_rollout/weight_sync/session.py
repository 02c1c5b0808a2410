"""The calls around an update of weights, whatever transport brings them.

Requests are held back, cached prefixes forgotten, the version set, and requests let go again. What
SGLang 0.5.17 does with running requests:

finish  The update waits until all running requests have ended, and new ones wait. A response has
        one version. Only a folder can be loaded this way.
pause   Requests go back into the queue and lose their keys and values (SGLang: retract). They
        continue with the new weights, which first compute the keys and values of all tokens so far.
keep    Requests stop where they are (SGLang: in_place). They continue with the new weights and the
        old keys and values.
abort   Requests end at once with the finish reason abort. Our client sends them again, to the new
        weights.

Cached prefixes of the old weights must not serve the new ones. But SGLang forgets its cache only
while no request is running or waiting. With pause and keep that is impossible while requests are
under way, so the sync is then refused before anything has changed. A server without a prefix cache
(disable_radix_cache) has nothing to forget.
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

# Our name -> SGLang's name of the mode of /pause_generation.
_MODES = {"pause": "retract", "keep": "in_place", "abort": "abort"}
# From this version on, weights change only between /begin_weight_update and /end_weight_update.
_BRACKETED_SINCE = (0, 5, 21)
# Seconds. Requests that were just aborted need a moment to be gone.
_FLUSH_PATIENCE_S = 10
# For a call that only tidies up after a failure. A longer wait would only delay the error.
_CLEANING_TIMEOUT_S = 10.0


class UpdateSession:
    """One update of weights on several servers at once.

    The calls are open(), then whatever changes the weights, then end_of_changes() and close().
    After an error the last call is abandon().

    A transport that changes weights in place calls weights_changed() before the first byte of the
    served weights changes. From then on the servers report an incomplete version, and abandon()
    leaves them paused: they hold a mixture of two versions, and no request may be answered by it.
    """

    def __init__(
        self, engines: Sequence[SGLangEngine], running_requests: RunningRequests, timeout_s: float
    ) -> None:
        """
        Args:
            engines: One engine for each server.
            running_requests: What happens to running requests.
            timeout_s: The longest time in seconds that one call to a server may take.
        """
        self.engines = tuple(engines)
        self._running = running_requests
        self._timeout_s = timeout_s
        # The answers of /server_info, one for each server.
        self._infos: list[dict[str, Any]] = []
        # Servers between /begin_weight_update and /end_weight_update.
        self._bracketed: list[SGLangEngine] = []
        self._paused = False
        self._changing = False
        self._version = ""

    @property
    def num_ranks(self) -> list[int]:
        """The number of tensor-parallel ranks of each server."""
        # /server_info has the fields of ServerArgs.
        return [int(info.get("tp_size", 1)) for info in self._infos]

    @property
    def flushed_by_update(self) -> list[bool]:
        """For each server, whether the update itself must forget its cached prefixes.

        This is so for an update through a folder.
        """
        # With "finish" nothing is paused. Between the update and a flush of its own, a new request
        # could use a prefix of the old weights, so both must be one call. Where that call comes
        # before the scheduler has put away the request that ended last, an assertion of SGLang ends
        # the server (sgl-project/sglang issue 14062). So a server without a prefix cache is not
        # asked. With one, and with requests under way, the assertion can happen.
        return [
            self._running == "finish" and not info.get("disable_radix_cache")
            for info in self._infos
        ]

    def open(self, version: str, *, in_place: bool) -> None:
        """Hold requests back.

        Args:
            version: The weight version that the servers will have.
            in_place: Whether the weights change while the server holds requests back, and not in
                one call that loads a folder.

        Raises:
            EngineError: A server refuses or is silent, or has cached prefixes that it could not
                forget. All servers then continue as before.
        """
        self._version = version
        self._changing = False
        # /server_info also asks the schedulers. A request that has ended is then behind them, which
        # an update with "finish" needs (see flushed_by_update). The paused modes ask again below,
        # so for them the first answers of an earlier sync are good enough for the next check.
        if not self._infos or self._running not in _MODES:
            self._infos = self._ask()
        self._check_copies(in_place)
        try:
            if self._running in _MODES:
                # Set before the call: if one of several servers fails, the others are paused and
                # abandon() must let them continue.
                self._paused = True
                self._post("/pause_generation", {"mode": _MODES[self._running]})
                # Responses that a scheduler ended before it came to the pause are on their way out.
                # The answer to this question comes after them, so they have left with the version
                # that they were sampled with.
                self._infos = self._ask()
                # Now, and not only after the update: a cache that cannot be forgotten must be found
                # before the weights have changed.
                self._forget_prefixes()
            for engine, info in zip(self.engines, self._infos, strict=True):
                if _numbers(str(info["version"])) >= _BRACKETED_SINCE:
                    self._open_bracket(engine)
        except EngineError:
            self.abandon()
            raise

    def _check_copies(self, in_place: bool) -> None:
        copies = max(
            int(info.get("dp_size", 1)) * int(info.get("pp_size", 1)) for info in self._infos
        )
        # SGLang asserts dp_size = 1 where weights come by tensor or broadcast. And for pipeline
        # stages num_ranks would count too few ranks.
        if in_place and copies > 1:
            raise EngineError(
                f"a server with {copies} data-parallel copies or pipeline stages accepts "
                "weights only from a folder",
                where=self.engines[0].url,
                limit="exactly sglang.data = 1 for other transports",
                remedy='set sync.transport = "disk", or use sglang.replicas',
            )

    def _open_bracket(self, engine: SGLangEngine) -> None:
        try:
            engine.call("POST", "/begin_weight_update", {}, timeout_s=self._timeout_s)
        except Refused as error:
            if "already open" not in error.what:
                raise
            # A trainer that was killed in the middle of a sync has left its bracket open. Nobody
            # else will ever close it, and the server refuses all weights until then.
            engine.call("POST", "/end_weight_update", {}, timeout_s=self._timeout_s)
            engine.call("POST", "/begin_weight_update", {}, timeout_s=self._timeout_s)
        self._bracketed.append(engine)

    def weights_changed(self) -> None:
        """Make the servers report a version that means "incomplete", before any weight changes."""
        # Before, not after: if the trainer dies between the two, a server with half of an update
        # must not report the old version.
        if not self._changing:
            self._changing = True
            self.set_version(f"{self._version} (incomplete)")

    def end_of_changes(self) -> None:
        """Close the brackets and forget cached prefixes. The last byte is in place by then."""
        while self._bracketed:
            self._bracketed.pop().call("POST", "/end_weight_update", {}, timeout_s=self._timeout_s)
        # Once more. Nothing may survive that was cached while the weights changed.
        self._forget_prefixes()

    def close(self) -> None:
        """Set the version and let requests continue.

        Raises:
            EngineError: A server reports another version afterwards.
        """
        # The version comes first: a response that is sampled right after the pause must carry it.
        if self._changing:
            self.set_version(self._version)
        self._changing = False
        if self._paused:
            self._post("/continue_generation", {})
            self._paused = False
        # SGLang answers "success" to more than it does, so the result is asked for.
        for engine in self.engines:
            reported = model_info(engine, self._timeout_s)["weight_version"]
            if reported != self._version:
                raise EngineError(
                    f"the server reports weight version {reported!r} after the update to "
                    f"{self._version!r}",
                    where=engine.url,
                    remedy="read the log of the server, then sync again",
                )

    def abandon(self) -> bool:
        """End the session after an error, without an error of its own.

        Servers whose weights are untouched continue with them. The others stay paused and answer no
        request.

        Returns:
            Whether servers hold a mixture of two versions.
        """
        timeout_s = min(self._timeout_s, _CLEANING_TIMEOUT_S)

        def release(engine: SGLangEngine) -> None:
            # The server may be the one that has failed. The error that led here must reach the
            # caller, and not the errors of the tidying up.
            with contextlib.suppress(EngineError):
                if engine in self._bracketed:
                    engine.call("POST", "/end_weight_update", {}, timeout_s=timeout_s)
                if self._paused and not self._changing:
                    engine.call("POST", "/continue_generation", {}, timeout_s=timeout_s)
                elif self._changing:
                    # The server stays paused. Clients that wait for an answer are told so at once,
                    # instead of at their timeout.
                    engine.call("POST", "/abort_request", {"abort_all": True}, timeout_s=timeout_s)

        with contextlib.suppress(EngineError):
            # At most two calls for each server, and a margin.
            on_all(self.engines, release, 3 * timeout_s)
        self._bracketed.clear()
        mixture = self._changing
        self._paused = False
        self._changing = False
        return mixture

    def set_version(self, version: str) -> None:
        """Make every server report this weight version."""
        # By default SGLang also aborts all requests here. Those that are only paused must continue.
        self._post("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def _forget_prefixes(self) -> None:
        # With "finish" the update itself does it (flushed_by_update).
        if self._running == "finish":
            return
        kept = self._running in ("pause", "keep")
        # Aborted requests are gone soon, so SGLang may wait for them. Kept requests stay, and
        # waiting for them is of no use.
        patience_s = 0 if kept else _FLUSH_PATIENCE_S
        for engine, info in zip(self.engines, self._infos, strict=True):
            if kept and info.get("disable_radix_cache"):
                continue
            try:
                engine.call("POST", f"/flush_cache?timeout={patience_s}", timeout_s=self._timeout_s)
            except EngineError as error:
                raise EngineError(
                    "the server cannot delete cached prefixes of the old weights while it "
                    f"processes requests ({error.what})",
                    where=engine.url,
                    limit=f"sync.running_requests must not be {self._running} here",
                    remedy='set sync.running_requests = "abort", or '
                    "sglang.extra_args.disable_radix_cache = true",
                ) from None

    def _ask(self) -> list[dict[str, Any]]:
        return self._all(
            lambda engine: dict(engine.call("GET", "/server_info", timeout_s=self._timeout_s))
        )

    def _post(self, path: str, body: dict[str, Any]) -> None:
        self._all(lambda engine: engine.call("POST", path, body, timeout_s=self._timeout_s))

    def _all(self, call: Any) -> list[Any]:
        # Each call has its own timeout. The margin lets its error arrive, which says more than the
        # timeout of the wait for all of them.
        return on_all(self.engines, call, self._timeout_s + _CLEANING_TIMEOUT_S)


def _numbers(version: str) -> tuple[int, ...]:
    """Return (0, 5, 17) for 0.5.17.post1."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
