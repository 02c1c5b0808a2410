"""SGLangEngine: sampling and scoring on one server, over HTTP.

Callers see synchronous generators. Inside, asyncio keeps many requests open at once.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from lopd.config import SGLangSection
from lopd.errors import ConfigError, EngineError
from lopd.records import Response, TeacherScores
from sglang_rollout.requests import scoring
from sglang_rollout.requests.connections import Connections, message_of, parsed
from sglang_rollout.requests.sampling import (
    SamplingParams,
    SamplingRequest,
    generate_payload,
    new_tokens_allowed,
    read_response,
)
from sglang_rollout.requests.scoring import ScoreRequest
from sglang_rollout.requests.streaming import Handler, stream
from sglang_rollout.requests.turns import Turns, sample_turns
from sglang_rollout.servers.launch import KEY_VARIABLE
from sglang_rollout.servers.server import SGLangServer
from sglang_rollout.servers.weights_file import check_not_given_up

# A second call has no further effect. /update_weights_from_tensor and the broadcasts are not among
# them: a restarted server has other weights than the previous buckets went into.
_REPEATABLE = frozenset({"/update_weights_from_disk", "/flush_cache"})
_POLL_S = 0.05
# The watcher notices a death within this time.
_NOTICED_S = 1.0
_CONNECT_TIMEOUT_S = 5.0
_HEALTH_TIMEOUT_S = 10.0

Q = TypeVar("Q")
A = TypeVar("A")


class OtherWeights(EngineError):
    """A server has other weights than it should answer with, because it was started again.

    The caller must send the weights again and then repeat its requests.
    """


class Refused(EngineError):
    """A server has answered a request with a refusal."""


class SGLangEngine:
    """Samples and scores on the server at one URL.

    Attributes:
        url: The base URL without a slash at its end.
        headers: The HTTP headers of every request.
        vocab_size: The vocabulary of the served model, or None before it was needed.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        settings: SGLangSection,
        *,
        server: SGLangServer | None = None,
        weights_file: str | Path | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """
        Args:
            url: The base URL of the server.
            api_key: The server's key, or "" for a server without one.
            settings: The section [sglang].
            server: The server, where this process runs it. Its death is then noticed at once and
                explained.
            weights_file: The weights file of a server that another process of lopd runs. That
                process records there that it will not start the server again.
            vocab_size: The vocabulary of the served model. The default is to ask when needed.
        """
        weights_file = Path(weights_file) if weights_file is not None else None
        # A user may write the URL with a slash, and paths begin with one.
        self.url = url.rstrip("/")
        self.api_key = api_key
        self.settings = settings
        self.server = server
        self._weights_file = weights_file
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.vocab_size = vocab_size

    @property
    def engines(self) -> tuple[SGLangEngine, ...]:
        """One engine for each server."""
        return (self,)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        # The search for a lost server opens a plain connection, which takes no URL.
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)

    def generate(
        self,
        requests: Iterable[SamplingRequest],
        params: SamplingParams,
        *,
        version: str | None = None,
        turns: Turns | None = None,
    ) -> Iterator[Response]:
        """Sample every request and yield the responses as they finish, in any order.

        The sampling_logprobs of a response are at temperature 1, whatever the sampling temperature.

        Args:
            requests: The prompts to sample responses for.
            params: The sampling parameters.
            version: The weight version that the servers must have.
            turns: How responses of several turns are made. None: a response has one turn.

        Raises:
            OtherWeights: A response carries another weight version, after a restart of a server
                whose newest weights are in no folder.
            EngineError: The server died, refuses, or gives an impossible answer.
            DataError: A prompt fills the context.
        """
        if params.min_p > 0 and self.settings.deterministic:
            raise ConfigError(
                f"min_p = {params.min_p} cannot be used with sglang.deterministic: "
                "SGLang's seeded sampling has no min_p",
                remedy="set min_p = 0 or sglang.deterministic = false",
            )
        # A response does not tell which of the servers gave it, so an error names all of them.
        urls = ", ".join(engine.url for engine in self.engines)
        # A server without our environment gives log-probabilities of logits / temperature. SGLang
        # computes those at temperature 1 only under SGLANG_RETURN_ORIGINAL_LOGPROB, which is set
        # for the servers that lopd starts. The others are asked a second time.
        rescore = params.temperature != 1 and self.server is None
        vocabulary = self._served_vocab_size() if rescore else 0

        # The vocabulary is asked for once, before the stream, and not by each of its requests.
        async def sample(calls: Connections, request: SamplingRequest) -> Response:
            allowed = new_tokens_allowed(request, params, self.settings.context_length)
            return await sample_turns(request, turns, allowed, partial(sample_turn, calls))

        async def sample_turn(
            calls: Connections, request: SamplingRequest, allowed: int
        ) -> Response:
            answer = await calls.generate(
                request, lambda name: generate_payload(request, params, allowed, name)
            )
            response = read_response(request, params, allowed, answer)
            # Checked for each response: the server may be restarted between any two of them.
            if version is not None and response.weight_version != version:
                raise OtherWeights(
                    f"a response has the weight version {response.weight_version}, but {version} "
                    "was requested",
                    where=urls,
                )
            if rescore:
                return await self._at_temperature_one(calls, response, vocabulary)
            return response

        yield from self._stream(requests, sample)

    def score(
        self, requests: Iterable[ScoreRequest], *, vocab_size: int | None = None, top_k: int = 0
    ) -> Iterator[TeacherScores]:
        """Score every response and yield the scores as they finish, in any order.

        Args:
            requests: The responses to score.
            vocab_size: The vocabulary of the model. The default is that of its config.json.
            top_k: The number of likeliest tokens to return for each response token
                (TeacherScores.top), or 0 for none.

        Raises:
            EngineError: The server died, returns other ids than it was sent, or returns values that
                no model gives (sglang_rollout.requests.checks).
            DataError: A sequence is too long, its prompt or response is empty, or the model has no
                row for a token.
        """
        # Two checks need the size: one for the id that SGLang returns as 0 (scoring.LAST_ID_ECHO),
        # and one for a teacher that guesses uniformly.
        vocabulary = vocab_size if vocab_size is not None else self._served_vocab_size()

        async def score(
            calls: Connections, requests: Sequence[ScoreRequest]
        ) -> list[TeacherScores]:
            # A request that the model cannot score is refused here, where the error can name the
            # response.
            for request in requests:
                scoring.check_scorable(request, self.settings.context_length, vocabulary)
            answers = await calls.generate_all(
                requests, lambda names: scoring.score_payload(requests, names, top_k)
            )
            return [
                scoring.read_scores(request, answer, vocabulary, top_k)
                for request, answer in zip(requests, answers, strict=True)
            ]

        # Responses to one prompt go to the server together, which then computes the prompt once.
        groups = scoring.together(requests, self.settings.max_in_flight)
        for found in self._stream(groups, score, weigh=len):
            yield from found

    async def _at_temperature_one(
        self, calls: Connections, response: Response, vocab_size: int
    ) -> Response:
        """Return the response with log-probabilities at temperature 1, from scoring it."""
        request = ScoreRequest(
            response.prompt_id, response.sample_index, response.prompt_ids, response.token_ids
        )
        # Any of the servers may answer: all of them have the same weights.
        answer = await calls.generate(
            request, lambda name: scoring.score_payload([request], [name])
        )
        return Response(
            prompt_id=response.prompt_id,
            sample_index=response.sample_index,
            prompt_ids=response.prompt_ids,
            token_ids=response.token_ids,
            # Without the test for a uniform guess, which is for teachers: a student may know
            # nothing.
            sampling_logprobs=scoring.read_logprobs(request, answer, vocab_size),
            finish_reason=response.finish_reason,
            weight_version=response.weight_version,
        )

    def _stream(
        self,
        requests: Iterable[Q],
        handle: Callable[[Connections, Q], Awaitable[A]],
        weigh: Callable[[Q], int] = lambda _: 1,
    ) -> Iterator[A]:
        @asynccontextmanager
        async def open_handler() -> AsyncIterator[Handler[Q, A]]:
            # One set of connections for the whole stream: a new connection for each request would
            # cost a handshake each time.
            async with Connections(self.engines) as calls:
                yield lambda request: handle(calls, request)

        return stream(
            requests,
            open_handler,
            # The limit is for each server, so that more servers get more requests.
            in_flight=self.settings.max_in_flight * len(self.engines),
            watch=self.check_alive,
            weigh=weigh,
        )

    def check_alive(self) -> None:
        """Check that the server runs or will be started again.

        A server that lopd did not start always passes.

        Raises:
            EngineError: The process of the server has ended and is not started again.
        """
        # The owner of the process knows of its death at once. Other processes only see what it
        # writes.
        if self.server is not None:
            self.server.check()
        # The watcher of another process leaves its verdict beside the weights file.
        elif self._weights_file is not None:
            check_not_given_up(self._weights_file)

    def model_info(self) -> dict[str, Any]:
        """Return the server's own description of its model.

        The keys are model_path, weight_version, architectures and more.
        """
        return dict(self.call("GET", "/model_info"))

    def server_version(self) -> tuple[int, ...]:
        """Return the version of the server's SGLang as numbers."""
        text = str(self.call("GET", "/server_info")["version"])
        # (0, 5, 17) for 0.5.17.post1.
        return tuple(int(part) for part in re.findall(r"\d+", text)[:3])

    def flush_cache(self) -> None:
        """Make the server forget every cached prefix.

        Raises:
            EngineError: Requests are running. SGLang refuses then.
        """
        self.call("POST", "/flush_cache")

    def health(self) -> bool:
        """Return whether the server generates a token within ten seconds."""
        # SGLang's own health check is content with any sign of the scheduler. A token shows that
        # the model computes.
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1}}
        try:
            with self.http_client(httpx.Timeout(_HEALTH_TIMEOUT_S)) as client:
                return client.post("/generate", json=body).status_code == 200
        except httpx.TransportError:
            return False

    def call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Any:
        """Make one call and return the parsed JSON of the answer, or its text.

        If this process runs the server and starts it again after a death, a call that can be
        repeated waits for the restart and is repeated.

        Args:
            method: "GET" or "POST".
            path: The path on the server.
            body: The JSON body.
            timeout_s: The longest time in seconds. The default is sglang.request_timeout_s.

        Raises:
            EngineError: There is no connection, no answer in time, or a dead server.
            Refused: The server answers with an HTTP error.
        """
        # Connecting gets a limit of its own: a long request is usual, and a long connection attempt
        # is a lost host.
        timeout = httpx.Timeout(
            timeout_s or self.settings.request_timeout_s, connect=_CONNECT_TIMEOUT_S
        )
        while True:
            try:
                # A client for each attempt: after a restart its connections would be dead.
                with self.http_client(timeout) as client:
                    reply = client.request(method, path, json=body)
                break
            except httpx.TransportError as error:
                # After a timeout the server may still be doing what it was asked, so the call is
                # not repeated. After a lost connection _restarted() finds out whether the process
                # that had the call is gone.
                lost = not isinstance(error, httpx.TimeoutException)
                repeatable = method == "GET" or path in _REPEATABLE
                if not (lost and repeatable and self._restarted()):
                    self.check_alive()
                    raise EngineError(
                        f"{path}: {type(error).__name__} {error}".rstrip(),
                        where=self.url,
                        remedy="check whether the server is running",
                    ) from None
        if reply.status_code != 200:
            raise self.refusal(path, reply.status_code, reply.content)
        return parsed(reply.content)

    def _restarted(self) -> bool:
        """Wait for the restart of a server that this process runs.

        Returns:
            True once the server is back. False if it is not ours or was never away.
        """
        if self.server is None:
            return False
        began = time.monotonic()
        # The connection can be lost before the watcher has noticed the death. A server that stays
        # ready for this long has lost only the connection.
        while self.server.ready():
            if time.monotonic() - began > _NOTICED_S:
                return False
            time.sleep(_POLL_S)
        while not self.server.ready():
            # Raises once the watcher has given up, so this loop ends.
            self.check_alive()
            time.sleep(_POLL_S)
        return True

    def refusal(self, path: str, status: int, content: bytes) -> EngineError:
        """Return an HTTP error as something that a user can act on.

        Args:
            path: The path that was called.
            status: The HTTP status.
            content: The body of the answer.
        """
        wrong_key = (
            "the key is not this server's; the key of a server that lopd did not start comes from "
            f"the environment variable {KEY_VARIABLE}"
        )
        # SGLang's message says what it refuses. Only for these does a user need to know more.
        remedies = {
            401: wrong_key,
            403: wrong_key,
            404: "is this an SGLang server of a supported version (0.5.17 and later)?",
        }
        return Refused(
            f"{path} was refused with HTTP {status}: {message_of(content)}",
            where=self.url,
            remedy=remedies.get(status, ""),
        )

    def http_client(self, timeout: httpx.Timeout) -> httpx.Client:
        """Return a client for plain calls to the server."""
        # With verify=True httpx loads all certificates, which costs every call 50 ms. Plain http
        # needs none of them.
        tls = self.url.startswith("https:")
        return httpx.Client(
            base_url=self.url, headers=self.headers, timeout=timeout, trust_env=False, verify=tls
        )

    def _served_vocab_size(self) -> int:
        if self.vocab_size is None:
            # SGLang reports the folder of its model, but not the size of the vocabulary.
            config = Path(self.model_info()["model_path"]) / "config.json"
            try:
                self.vocab_size = int(json.loads(config.read_text(encoding="utf-8"))["vocab_size"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise EngineError(
                    f"vocab_size cannot be read ({error})",
                    where=str(config),
                    remedy="pass vocab_size to score()",
                ) from None
        return self.vocab_size
