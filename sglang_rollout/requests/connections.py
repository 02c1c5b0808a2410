"""The asynchronous side of an engine for the life of one stream: connections to one or several
servers, retries, outages, and the abort of what is cancelled.

Three kinds of failure are told apart. The server cannot be reached (it is being restarted): wait
for it, or ask another one; nothing is counted. The request failed (overload, timeout, abort, a lost
connection to a server that is still there): repeat it, sglang.retries times. The server refuses: an
error at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
import time
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp

from lopd.errors import EngineError
from sglang_rollout.requests.sampling import SamplingRequest
from sglang_rollout.requests.scoring import ScoreRequest

if TYPE_CHECKING:
    from lopd.config import SGLangSection
    from sglang_rollout.servers.server import SGLangServer

_BACKOFF_S, _MAX_BACKOFF_S = 0.2, 10.0
_CONNECT_TIMEOUT_S, _ABORT_TIMEOUT_S = 5.0, 2.0
_KEEP_ALIVE_S = (
    3.0  # SGLang closes a connection that was idle for 5; a request must not meet that moment
)
_LOOK_EVERY_S, _MAX_LOOK_EVERY_S = 0.1, 1.0
_RETRIED_STATUS = frozenset(
    {408, 429, 499, 500, 502, 503, 504}
)  # 499: aborted, for a weight sync say
_MAX_OUTAGES = (
    10  # that one request meets on servers that nobody here restarts: it may be what ends them
)
_SHARED_PREFIX_SLACK = (
    4  # requests by which the server that has the prompt may be busier than the idlest one
)
_PROMPTS_REMEMBERED = 4096


class Endpoint(Protocol):
    """What a connection needs to know of one server. SGLangEngine is one."""

    url: str
    headers: dict[str, str]
    settings: SGLangSection
    server: SGLangServer | None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""

    def check_alive(self) -> None:
        """Raise EngineError where the server has ended and will not be started again."""

    def refusal(self, path: str, status: int, content: bytes) -> EngineError:
        """Return the error for an answer of the server that is not HTTP 200."""


class Connections:
    """Sends each request to one of the servers until it is answered."""

    def __init__(self, engines: Sequence[Endpoint]) -> None:
        self._lines = [_Line(engine) for engine in engines]
        self._retries = engines[0].settings.retries
        self._stream_name = secrets.token_hex(6)
        self._numbers = itertools.count()
        self._last: dict[int, _Line] = {}  # prompt -> where it went, the latest at the end

    async def __aenter__(self) -> Connections:
        for line in self._lines:
            line.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(line.close() for line in self._lines))

    async def generate(
        self, request: SamplingRequest | ScoreRequest, payload: Callable[[str], dict[str, Any]]
    ) -> dict[str, Any]:
        """POST /generate, repeated after outages, overload and aborts. payload: the body for a
        request id. EngineError: given up, or refused.
        """
        failures = outages = 0
        prompt = zlib.crc32(request.prompt_ids.tobytes())
        while True:
            line = await self._choose(prompt)
            name, outages_before = f"{self._stream_name}-{next(self._numbers)}", line.num_outages
            try:
                return await line.generate(payload(name))
            except asyncio.CancelledError:
                await line.abort(name)
                raise
            except _Failed as error:
                if error.lost:
                    line.look_for_server()
                await asyncio.sleep(min(_BACKOFF_S * 2**failures, _MAX_BACKOFF_S))
                line.engine.check_alive()
                if error.lost and (error.refused or line.num_outages > outages_before):
                    failures, outages = 0, outages + 1
                else:
                    failures += 1
                if failures > self._retries or (
                    outages > _MAX_OUTAGES and line.engine.server is None
                ):
                    raise EngineError(
                        f"request {request.key} failed {max(failures, outages)} times; at last: {error}",
                        where=line.engine.url,
                        limit=f"sglang.retries = {self._retries}",
                        remedy="read the server's log",
                    ) from None

    async def _choose(self, prompt: int) -> _Line:
        """The server that had the prompt last and so has its prefix cached, where it is not much
        busier than the idlest; else that one. Waits while none can be reached.
        """
        while True:
            reachable = [line for line in self._lines if line.outage is None]
            if reachable:
                least, last = (
                    min(reachable, key=lambda line: line.num_open),
                    self._last.pop(prompt, None),
                )
                line = (
                    last
                    if last in reachable and last.num_open <= least.num_open + _SHARED_PREFIX_SLACK
                    else least
                )
                self._last[prompt] = line
                if len(self._last) > _PROMPTS_REMEMBERED:
                    del self._last[next(iter(self._last))]
                return line
            outages = [line.outage for line in self._lines if line.outage is not None]
            done, _ = await asyncio.wait(outages, return_when=asyncio.FIRST_COMPLETED)
            for outage in done:
                outage.result()  # raises what ended the search


class _Line:
    """The connections to one server, and whether it can be reached."""

    def __init__(self, engine: Endpoint) -> None:
        self.engine = engine
        self.num_open = self.num_outages = 0
        self.outage: asyncio.Task[None] | None = None  # while the server is looked for

    def open(self) -> None:
        settings = self.engine.settings
        self._session = aiohttp.ClientSession(
            headers={**self.engine.headers, "Content-Type": "application/json"},
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=_KEEP_ALIVE_S
            ),  # the stream bounds how many are open
            timeout=aiohttp.ClientTimeout(
                total=settings.request_timeout_s, sock_connect=_CONNECT_TIMEOUT_S
            ),
        )

    async def close(self) -> None:
        if self.outage is not None:
            self.outage.cancel()
            await asyncio.gather(self.outage, return_exceptions=True)
        await self._session.close()

    async def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """One POST /generate. _Failed: it may be worth another try. EngineError: it is not."""
        answered, activity = (
            False,
            self.engine.server.activity if self.engine.server is not None else None,
        )
        self.num_open += 1
        if activity is not None:
            activity.begin()
        try:
            status, content = await self._post("/generate", body)
            if status in _RETRIED_STATUS:
                raise _Failed(f"HTTP {status}: {message_of(content)}")
            if status != 200:
                raise self.engine.refusal("/generate", status, content)
            answer = parsed(content)
            if not isinstance(answer, dict) or "meta_info" not in answer:
                raise EngineError(
                    "/generate answered something that is no generation",
                    where=self.engine.url,
                    remedy="is this an SGLang server?",
                )
            if answer["meta_info"]["finish_reason"]["type"] == "abort":
                raise _Failed(
                    f"aborted: {answer['meta_info']['finish_reason'].get('message', 'no reason given')}"
                )
            answered = True
            return answer
        finally:
            self.num_open -= 1
            if activity is not None:
                activity.end(answered=answered)

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        try:
            async with self._session.post(
                self.engine.url + path, data=json.dumps(body, separators=(",", ":")).encode()
            ) as reply:
                return reply.status, await reply.read()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _Failed(f"no connection ({error})", lost=True, refused=True) from None
        except TimeoutError:
            raise _Failed(
                f"no answer within sglang.request_timeout_s = {self.engine.settings.request_timeout_s:g}"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Failed(
                f"the connection was lost ({type(error).__name__} {error})", lost=True
            ) from None

    async def abort(self, name: str) -> None:
        """Tell the server to forget a request; by itself it looks for lost clients only every few
        seconds.
        """
        with contextlib.suppress(_Failed, TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(self._post("/abort_request", {"rid": name}), _ABORT_TIMEOUT_S)

    # --- outages -----------------------------------------------------------------------------------------------------------------------------------

    def look_for_server(self) -> None:
        """Hold further requests back until the server accepts a connection."""
        if self.outage is None:
            self.outage = asyncio.ensure_future(self._look())
            self.outage.add_done_callback(self._found)

    def _found(self, outage: asyncio.Task[None]) -> None:
        self.outage = None
        if not outage.cancelled():
            # whoever waits has it; where nobody does, the next request finds out by itself
            outage.exception()

    async def _look(self) -> None:
        began, pause = time.monotonic(), _LOOK_EVERY_S
        while not await self._accepts():
            if pause == _LOOK_EVERY_S:
                self.num_outages += 1
            waited, limit = time.monotonic() - began, self.engine.settings.outage_timeout_s
            if waited > limit:
                raise EngineError(
                    f"the server could not be reached for {waited:.0f} s", where=self.engine.url, limit=f"sglang.outage_timeout_s = {limit:g}",
                    remedy="is the server running? where it takes longer to start, raise sglang.outage_timeout_s",
                )  # fmt: skip
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _MAX_LOOK_EVERY_S)

    async def _accepts(self) -> bool:
        self.engine.check_alive()
        if self.engine.server is not None and not self.engine.server.ready():
            return False
        try:
            _, writer = await asyncio.wait_for(
                asyncio.open_connection(*self.engine.address), _CONNECT_TIMEOUT_S
            )
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True


class _Failed(Exception):
    """A failure that the same request may not meet again. lost: the connection broke; refused:
    there was none.
    """

    def __init__(self, what: str, *, lost: bool = False, refused: bool = False) -> None:
        super().__init__(what)
        self.lost, self.refused = lost, refused


def parsed(content: bytes) -> Any:
    """JSON, or the text where it is none."""
    try:
        return json.loads(content)
    except ValueError:
        return content.decode("utf-8", "replace")


def message_of(content: bytes) -> str:
    """SGLang's own words, from whichever of its shapes of error this is."""
    answer = parsed(content)
    if isinstance(answer, dict):
        error = answer.get("error", answer)
        answer = error.get("message", error) if isinstance(error, dict) else error
    return str(answer)[:500]
