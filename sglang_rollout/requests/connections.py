"""The asynchronous side of an engine, for the life of one stream.

It holds the connections to one or several servers, repeats requests, waits for servers that are
away, and aborts what is cancelled. Three kinds of failure are different:

- The server cannot be reached, because it is being restarted. The request waits for it or goes to
  another server, and nothing is counted.
- The request failed: overload, timeout, abort, or a lost connection to a server that is still
  there. The request is repeated, sglang.retries times.
- The server refuses. That is an error at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp
import orjson

from lopd.errors import EngineError
from sglang_rollout.requests.sampling import SamplingRequest
from sglang_rollout.requests.scoring import ScoreRequest

if TYPE_CHECKING:
    from lopd.config import SGLangSection
    from sglang_rollout.servers.server import SGLangServer

# The pause before a repetition, in seconds. It doubles from time to time up to the maximum.
_BACKOFF_S = 0.2
_MAX_BACKOFF_S = 10.0
_CONNECT_TIMEOUT_S = 5.0
_ABORT_TIMEOUT_S = 2.0
# SGLang closes a connection that was idle for 5 s. A request must not meet that moment.
_KEEP_ALIVE_S = 3.0
# The pause between two attempts to reach a server that is away.
_PROBE_INTERVAL_S = 0.1
_MAX_PROBE_INTERVAL_S = 1.0
# 499: SGLang has aborted the request, for example for a weight sync.
_RETRIED_STATUS = frozenset({408, 429, 499, 500, 502, 503, 504})
# Outages that one request may meet on servers that this process does not restart. The request
# itself may be what ends them, and nobody else counts these deaths.
_MAX_OUTAGES = 10
# The server that had a prompt last may have this many requests more open than the idlest one, of
# the size of the request that is sent.
_SHARED_PREFIX_SLACK = 4
_PROMPTS_REMEMBERED = 4096


class Endpoint(Protocol):
    """What a connection needs to know about one server. SGLangEngine is an endpoint."""

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
    """A set of connections that sends each request to one of the servers until it is answered."""

    def __init__(self, engines: Sequence[Endpoint]) -> None:
        self._servers = [_ServerConnection(engine) for engine in engines]
        self._retries = engines[0].settings.retries
        # Random, because several streams and processes may use one server.
        self._stream_name = secrets.token_hex(6)
        self._numbers = itertools.count()
        # Checksum of a prompt -> the server that had it last. The latest stands at the end.
        self._last_server: dict[int, _ServerConnection] = {}

    async def __aenter__(self) -> Connections:
        for server in self._servers:
            server.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(server.close() for server in self._servers))

    async def generate(
        self, request: SamplingRequest | ScoreRequest, payload: Callable[[str], dict[str, Any]]
    ) -> dict[str, Any]:
        """POST /generate for one sequence; the rest is as in generate_all."""
        answers = await self.generate_all((request,), lambda names: payload(names[0]))
        return answers[0]

    async def generate_all(
        self,
        requests: Sequence[SamplingRequest | ScoreRequest],
        payload: Callable[[list[str]], dict[str, Any]],
    ) -> list[dict[str, Any]]:
        """POST /generate for sequences, and repeat it after outages, overload and aborts.

        Args:
            requests: The sequences that are sent in one request.
            payload: Makes the body for an id of each sequence.

        Returns:
            The answer for each sequence.

        Raises:
            EngineError: The server refuses, or the request has failed too often.
        """
        failures = 0
        outages = 0
        # A checksum keeps the table of prompts small. Two prompts with the same one only lose a
        # cached prefix.
        prompt = zlib.crc32(requests[0].shared_ids.tobytes())
        while True:
            server = await self._choose(prompt, len(requests))
            # Each attempt has names of its own: SGLang refuses an id that it still knows, and the
            # previous attempt may still run there.
            names = [f"{self._stream_name}-{next(self._numbers)}" for _ in requests]
            outages_before = server.num_outages
            try:
                return await server.generate(payload(names), len(names))
            except asyncio.CancelledError:
                await server.abort(names)
                raise
            except _RetryableError as error:
                if error.lost:
                    server.look_for_server()
                await asyncio.sleep(min(_BACKOFF_S * 2**failures, _MAX_BACKOFF_S))
                # After the pause, in which the watcher has had time to notice a death.
                server.engine.check_alive()
                # A lost connection is an outage only if the server was away afterwards. Where it
                # still accepts connections, the request itself may be the cause, so it counts.
                if error.lost and (error.refused or server.num_outages > outages_before):
                    failures = 0
                    outages += 1
                else:
                    failures += 1
                # The watcher of our own servers counts deaths itself and gives up by itself.
                too_many_outages = outages > _MAX_OUTAGES and server.engine.server is None
                if failures > self._retries or too_many_outages:
                    raise EngineError(
                        f"request {requests[0].key} failed {max(failures, outages)} times; "
                        f"at last: {error}",
                        where=server.engine.url,
                        limit=f"at most sglang.retries = {self._retries} retries",
                        remedy="read the log of the server",
                    ) from None

    async def _choose(self, prompt: int, num_sequences: int) -> _ServerConnection:
        """Return the server for a request, and wait while none can be reached.

        It is the server that had the prompt last, unless that one is much busier than the idlest.
        """
        while True:
            reachable = [server for server in self._servers if server.outage is None]
            if reachable:
                idlest = min(reachable, key=lambda server: server.num_open)
                # The server that had the prompt last has its prefix in the cache. But a queue in
                # front of it costs more than another computation of the prefix.
                chosen = idlest
                slack = _SHARED_PREFIX_SLACK * num_sequences
                last = self._last_server.pop(prompt, None)
                if last in reachable and last.num_open <= idlest.num_open + slack:
                    chosen = last
                # pop() and this assignment put the prompt at the end, so the first entry of the
                # table is the one that was used the longest time ago.
                self._last_server[prompt] = chosen
                if len(self._last_server) > _PROMPTS_REMEMBERED:
                    del self._last_server[next(iter(self._last_server))]
                return chosen
            outages = [server.outage for server in self._servers if server.outage is not None]
            done, _ = await asyncio.wait(outages, return_when=asyncio.FIRST_COMPLETED)
            for outage in done:
                # result() raises what has ended the search for this server.
                outage.result()


class _ServerConnection:
    """The connections to one server, and whether the server can be reached."""

    def __init__(self, engine: Endpoint) -> None:
        self.engine = engine
        # In sequences.
        self.num_open = 0
        self.num_outages = 0
        # The search for the server, while it cannot be reached.
        self.outage: asyncio.Task[None] | None = None

    def open(self) -> None:
        settings = self.engine.settings
        self._session = aiohttp.ClientSession(
            headers={**self.engine.headers, "Content-Type": "application/json"},
            # limit=0 means no limit. The stream bounds how many requests are open.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(
                total=settings.request_timeout_s, sock_connect=_CONNECT_TIMEOUT_S
            ),
        )

    async def close(self) -> None:
        # The search for a lost server may continue for outage_timeout_s, and nobody needs it any
        # more.
        if self.outage is not None:
            self.outage.cancel()
            await asyncio.gather(self.outage, return_exceptions=True)
        await self._session.close()

    async def generate(self, body: dict[str, Any], num_sequences: int) -> list[dict[str, Any]]:
        """Make one POST /generate.

        Raises:
            _RetryableError: Another attempt may succeed.
            EngineError: No other attempt would.
        """
        answered = False
        server = self.engine.server
        self.num_open += num_sequences
        # The watcher of our own server learns from this whether the server hangs.
        if server is not None:
            server.activity.begin()
        try:
            answers = await self._generate(body, num_sequences)
            answered = True
            return answers
        finally:
            # Also for a cancelled request. Otherwise a server without any request would seem to be
            # silent for ever.
            self.num_open -= num_sequences
            if server is not None:
                server.activity.end(answered=answered)

    async def _generate(self, body: dict[str, Any], num_sequences: int) -> list[dict[str, Any]]:
        status, content = await self._post("/generate", body)
        # The server works, but not on this request: it is overloaded, or has aborted it.
        if status in _RETRIED_STATUS:
            raise _RetryableError(f"HTTP {status}: {message_of(content)}")
        if status != 200:
            raise self.engine.refusal("/generate", status, content)
        answer = parsed(content)
        # SGLang answers with a list where it was sent one.
        answers = answer if isinstance(answer, list) else [answer]
        is_generation = all(isinstance(one, dict) and "meta_info" in one for one in answers)
        if not is_generation or len(answers) != num_sequences:
            raise EngineError(
                "the answer of /generate is not a generation for each sequence",
                where=self.engine.url,
                remedy="check whether this is the address of an SGLang server",
            )
        for one in answers:
            # SGLang reports an abort with HTTP 200 as well, together with the tokens so far. They
            # must not pass for a response.
            finish_reason = one["meta_info"]["finish_reason"]
            if finish_reason["type"] == "abort":
                message = finish_reason.get("message", "no reason given")
                raise _RetryableError(f"aborted: {message}")
        return answers

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        # Token ids are written as the arrays that they are.
        data = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        try:
            async with self._session.post(self.engine.url + path, data=data) as reply:
                return reply.status, await reply.read()
        # The order matters: aiohttp's errors of a connection are subclasses of the later ones.
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _RetryableError(f"no connection ({error})", lost=True, refused=True) from None
        except TimeoutError:
            timeout_s = self.engine.settings.request_timeout_s
            raise _RetryableError(
                f"no answer within sglang.request_timeout_s = {timeout_s:g}"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            what = f"the connection was lost ({type(error).__name__} {error})"
            raise _RetryableError(what, lost=True) from None

    async def abort(self, names: Sequence[str]) -> None:
        """Tell the server to forget sequences.

        By itself SGLang looks for lost clients only every few seconds, and generates for nobody
        until then.
        """
        # The stream is being closed. An abort that fails must not hide the reason.
        with contextlib.suppress(_RetryableError, TimeoutError, asyncio.CancelledError):
            posts = (self._post("/abort_request", {"rid": name}) for name in names)
            await asyncio.wait_for(asyncio.gather(*posts), _ABORT_TIMEOUT_S)

    def look_for_server(self) -> None:
        """Hold further requests back until the server accepts a connection."""
        # One search serves all requests that have lost the server.
        if self.outage is None:
            self.outage = asyncio.ensure_future(self._look())
            self.outage.add_done_callback(self._found)

    def _found(self, outage: asyncio.Task[None]) -> None:
        self.outage = None
        if not outage.cancelled():
            # This marks the error as seen, or asyncio would print a warning. A request that waits
            # for the search gets the error. If none waits, the next request finds it by itself.
            outage.exception()

    async def _look(self) -> None:
        began = time.monotonic()
        pause = _PROBE_INTERVAL_S
        while not await self._accepts():
            # Only the first failed attempt makes it an outage. Where the server accepts at once,
            # only the connection was lost.
            if pause == _PROBE_INTERVAL_S:
                self.num_outages += 1
            waited = time.monotonic() - began
            limit = self.engine.settings.outage_timeout_s
            if waited > limit:
                raise EngineError(
                    f"the server could not be reached for {waited:.0f} s",
                    where=self.engine.url,
                    limit=f"at most sglang.outage_timeout_s = {limit:g}",
                    remedy="check whether the server is running; raise sglang.outage_timeout_s "
                    "if the server needs more time to start",
                )
            await asyncio.sleep(pause)
            # Short at first, because most outages are short. Longer later, so that a server that
            # starts is left in peace.
            pause = min(pause * 1.5, _MAX_PROBE_INTERVAL_S)

    async def _accepts(self) -> bool:
        self.engine.check_alive()
        # The port of a server may accept connections before the server is healthy. For our own
        # server it is known when that is.
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


class _RetryableError(Exception):
    """A failure that the same request may not meet again.

    Attributes:
        lost: The connection broke, or there was none.
        refused: There was no connection at all.
    """

    def __init__(self, what: str, *, lost: bool = False, refused: bool = False) -> None:
        super().__init__(what)
        self.lost = lost
        self.refused = refused


def parsed(content: bytes) -> Any:
    """Return parsed JSON, or the text where it is no JSON."""
    try:
        return orjson.loads(content)
    except ValueError:
        return content.decode("utf-8", "replace")


def message_of(content: bytes) -> str:
    """Return SGLang's own error message.

    SGLang has several shapes: {"error": {"message": ...}}, {"error": ...}, {"message": ...}, text.
    """
    answer = parsed(content)
    if isinstance(answer, dict):
        # SGLang's own routes and its OpenAI routes write their errors in different forms.
        error = answer.get("error", answer)
        answer = error.get("message", error) if isinstance(error, dict) else error
    return str(answer)[:500]
