"""SGLangEngine: sampling and scoring on one server, over HTTP. Synchronous generators outside,
asyncio inside.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
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
from sglang_rollout.requests.streaming import Work, stream
from sglang_rollout.servers.launch import KEY_VARIABLE
from sglang_rollout.servers.server import SGLangServer
from sglang_rollout.servers.weights_file import check_not_given_up

_REPEATABLE = frozenset(
    {"/update_weights_from_disk", "/flush_cache"}
)  # doing it twice is doing it once
_POLL_S, _NOTICED_S = 0.05, 1.0  # a death is noticed by then

Q = TypeVar("Q", SamplingRequest, ScoreRequest)
A = TypeVar("A")


class OtherWeights(EngineError):
    """A server has other weights than it must answer with: it was started again. Send them again,
    then ask again.
    """


class Refused(EngineError):
    """A server has answered, and the answer is no."""


class SGLangEngine:
    """Samples and scores on the server at url.

    server: given where this process runs it, so that its death is noticed at once and explained.
    weights_file: of a server that another process of lopd's runs, which says beside it that it will
    not be started again. vocab_size: of its model; absent: asked where needed.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        settings: SGLangSection,
        *,
        server: SGLangServer | None = None,
        weights_file: Path | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.url, self.api_key, self.settings, self.server = (
            url.rstrip("/"),
            api_key,
            settings,
            server,
        )
        self._weights_file = weights_file
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.vocab_size = vocab_size

    @property
    def engines(self) -> tuple[SGLangEngine, ...]:
        """One for each server."""
        return (self,)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)

    # --- streams -----------------------------------------------------------------------------------------------------------------------------------

    def generate(
        self,
        requests: Iterable[SamplingRequest],
        params: SamplingParams,
        *,
        version: str | None = None,
    ) -> Iterator[Response]:
        """Sample every request; responses come as they finish, in any order. sampling_logprobs are
        at temperature 1.

        version: of the weights that must answer. OtherWeights: others did, as after a restart of a
        server whose newest weights are in no folder. EngineError: the server died, refuses, or
        answers what it must not. DataError: a prompt that fills the context.
        """
        if params.min_p > 0 and self.settings.deterministic:
            raise ConfigError(
                f"min_p = {params.min_p} with sglang.deterministic: SGLang's seeded sampling cannot do it",
                remedy="set min_p = 0 or sglang.deterministic = false",
            )

        urls = ", ".join(engine.url for engine in self.engines)
        rescore = (
            params.temperature != 1 and self.server is None
        )  # a server of ours gives log-probabilities at temperature 1 by itself
        vocabulary = self._served_vocab_size() if rescore else 0

        async def sample(calls: Connections, request: SamplingRequest) -> Response:
            allowed = new_tokens_allowed(request, params, self.settings.context_length)
            answer = await calls.generate(
                request, lambda name: generate_payload(request, params, allowed, name)
            )
            response = read_response(request, params, allowed, answer)
            if version is not None and response.weight_version != version:
                raise OtherWeights(
                    f"a response of the weights {response.weight_version}, where {version} were asked",
                    where=urls,
                )
            return (
                await self._at_temperature_one(calls, response, vocabulary) if rescore else response
            )

        yield from self._stream(requests, sample)

    def score(
        self, requests: Iterable[ScoreRequest], *, vocab_size: int | None = None, top_k: int = 0
    ) -> Iterator[TeacherScores]:
        """Score every response; scores come as they finish, in any order. vocab_size: of the model;
        absent: from its config.json.

        top_k: also give so many of the likeliest tokens at the place of each response token
        (TeacherScores.top).

        EngineError: the server died, returns other ids than it was sent, or values no model gives
        (lopd's checks). DataError: too long, or empty.
        """
        vocabulary = vocab_size if vocab_size is not None else self._served_vocab_size()

        async def rate(calls: Connections, request: ScoreRequest) -> TeacherScores:
            scoring.check_scorable(request, self.settings.context_length)
            answer = await calls.generate(
                request, lambda name: scoring.score_payload(request, name, top_k)
            )
            return scoring.read_scores(request, answer, vocabulary, top_k)

        yield from self._stream(requests, rate)

    async def _at_temperature_one(
        self, calls: Connections, response: Response, vocab_size: int
    ) -> Response:
        """The response with log-probabilities at temperature 1, asked of the same server: those of
        sampling are of logits / temperature.

        Only for a server that others started: SGLANG_RETURN_ORIGINAL_LOGPROB, set for ours, makes
        this second pass needless.
        """
        request = ScoreRequest(
            response.prompt_id, response.sample_index, response.prompt_ids, response.token_ids
        )
        answer = await calls.generate(request, lambda name: scoring.score_payload(request, name))
        return Response(
            prompt_id=response.prompt_id,
            sample_index=response.sample_index,
            prompt_ids=response.prompt_ids,
            token_ids=response.token_ids,
            sampling_logprobs=scoring.read_logprobs(request, answer, vocab_size),
            finish_reason=response.finish_reason,
            weight_version=response.weight_version,
        )

    def _stream(
        self, requests: Iterable[Q], work: Callable[[Connections, Q], Awaitable[A]]
    ) -> Iterator[A]:
        @asynccontextmanager
        async def open_work() -> AsyncIterator[Work[Q, A]]:
            async with Connections(self.engines) as calls:
                yield lambda request: work(calls, request)

        return stream(
            requests,
            open_work,
            in_flight=self.settings.max_in_flight * len(self.engines),
            watch=self.check_alive,
        )

    def check_alive(self) -> None:
        """EngineError where the server is one of lopd's, its process has ended, and it will not be
        started again.
        """
        if self.server is not None:
            self.server.check()
        elif self._weights_file is not None:
            check_not_given_up(self._weights_file)

    # --- single calls ------------------------------------------------------------------------------------------------------------------------------

    def model_info(self) -> dict[str, Any]:
        """What the server says of its model: model_path, weight_version, architectures."""
        return dict(self.call("GET", "/model_info"))

    def server_version(self) -> tuple[int, ...]:
        """SGLang's version as numbers, asked of the server."""
        text = str(self.call("GET", "/server_info")["version"])
        return tuple(int(part) for part in re.findall(r"\d+", text)[:3])

    def flush_cache(self) -> None:
        """Forget every cached prefix. EngineError while requests are running."""
        self.call("POST", "/flush_cache")

    def health(self) -> bool:
        """True where the server generates a token within ten seconds."""
        try:
            with self._client(httpx.Timeout(10.0)) as client:
                return (
                    client.post(
                        "/generate",
                        json={"input_ids": [0], "sampling_params": {"max_new_tokens": 1}},
                    ).status_code
                    == 200
                )
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
        """One call: the parsed JSON of the answer, or its text. EngineError: no connection,
        timeout, refusal, or a dead server.

        Where this process runs the server and starts it again after a death, a call that can be
        repeated waits for that and is.
        """
        while True:
            try:
                with self._client(
                    httpx.Timeout(timeout_s or self.settings.request_timeout_s, connect=5.0)
                ) as client:
                    reply = client.request(method, path, json=body)
                break
            except httpx.TransportError as error:
                lost = not isinstance(error, httpx.TimeoutException)
                if not (lost and (method == "GET" or path in _REPEATABLE) and self._restarted()):
                    self.check_alive()
                    raise EngineError(
                        f"{path}: {type(error).__name__} {error}".rstrip(),
                        where=self.url,
                        remedy="is the server running?",
                    ) from None
        if reply.status_code != 200:
            raise self.refusal(path, reply.status_code, reply.content)
        return parsed(reply.content)

    def _restarted(self) -> bool:
        """True once a server of this process that was found dead is back; False where it is not
        ours, or was never away. EngineError: it stays dead.
        """
        if self.server is None:
            return False
        began = time.monotonic()
        while self.server.ready():
            if time.monotonic() - began > _NOTICED_S:
                return False
            time.sleep(_POLL_S)
        while not self.server.ready():
            self.check_alive()
            time.sleep(_POLL_S)
        return True

    def refusal(self, path: str, status: int, content: bytes) -> EngineError:
        """An HTTP error as something a user can act on."""
        key = f"the key is not this server's (of one that lopd did not start it comes from the environment variable {KEY_VARIABLE})"
        remedies = {
            401: key,
            403: key,
            404: "is this an SGLang server of a supported version (0.5.17 and later)?",
        }
        return Refused(
            f"{path} was refused with HTTP {status}: {message_of(content)}",
            where=self.url,
            remedy=remedies.get(status, ""),
        )

    def _client(self, timeout: httpx.Timeout) -> httpx.Client:
        tls = self.url.startswith(
            "https:"
        )  # without it, loading all certificates would cost every call 50 ms for nothing
        return httpx.Client(
            base_url=self.url, headers=self.headers, timeout=timeout, trust_env=False, verify=tls
        )

    def _served_vocab_size(self) -> int:
        if self.vocab_size is None:
            config = Path(self.model_info()["model_path"]) / "config.json"
            try:
                self.vocab_size = int(json.loads(config.read_text(encoding="utf-8"))["vocab_size"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise EngineError(
                    f"vocab_size is not to be read ({error})",
                    where=str(config),
                    remedy="give score() the vocab_size",
                ) from None
        return self.vocab_size
