"""One answer, token by token as it is sampled, for a person who reads along."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Generator, Iterator

import httpx

from lopd.errors import EngineError
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.connections import message_of
from sglang_rollout.requests.sampling import (
    SamplingParams,
    SamplingRequest,
    generate_payload,
    new_tokens_allowed,
)

# As in client.py: connecting is quick or fails, whatever an answer takes.
_CONNECT_TIMEOUT_S = 5.0


def stream_tokens(
    engine: SGLangEngine, request: SamplingRequest, params: SamplingParams
) -> Generator[list[int], None, None]:
    """Sample one request and yield the new token ids as they come.

    Unlike SGLangEngine.generate() it neither repeats a failed request nor asks for
    log-probabilities. A generator that is closed early aborts the request.

    Raises:
        EngineError: The server died, refuses, or aborts the request.
        DataError: The prompt fills the context.
    """
    allowed = new_tokens_allowed(request, params, engine.settings.context_length)
    # A name of our own, because only a named request can be aborted.
    name = f"live-{secrets.token_hex(6)}"
    body = generate_payload(request, params, allowed, name)
    # A person reads the text alone.
    body |= {"stream": True, "return_logprob": False}
    timeout = httpx.Timeout(engine.settings.request_timeout_s, connect=_CONNECT_TIMEOUT_S)
    try:
        with (
            engine.http_client(timeout) as client,
            client.stream("POST", "/generate", json=body) as reply,
        ):
            if reply.status_code != 200:
                raise engine.refusal("/generate", reply.status_code, reply.read())
            yield from _new_tokens(reply.iter_lines(), engine.url)
    except httpx.TransportError as error:
        # The death of the server explains more than the lost connection that it caused.
        engine.check_alive()
        what = f"the connection was lost ({type(error).__name__} {error})".rstrip()
        raise EngineError(what, where=engine.url, remedy="ask again") from None
    except (GeneratorExit, KeyboardInterrupt):
        # The reader has left. By itself SGLang looks for lost clients only every few seconds.
        with contextlib.suppress(EngineError):
            engine.call("POST", "/abort_request", {"rid": name}, timeout_s=_CONNECT_TIMEOUT_S)
        raise


def _new_tokens(lines: Iterator[str], url: str) -> Iterator[list[int]]:
    """Yield what each event of a streamed answer adds. An event has all tokens so far."""
    seen = 0
    for line in lines:
        # Events are apart by blank lines, and the last one is [DONE].
        if not line.startswith("data: {"):
            continue
        answer = json.loads(line.removeprefix("data: "))
        # The status is sent before the first token, so a later failure comes as an event.
        reason = answer.get("meta_info", {}).get("finish_reason") or {}
        if "error" in answer or reason.get("type") == "abort":
            told = reason.get("message") or message_of(json.dumps(answer).encode())
            raise EngineError(
                f"the request was aborted: {told}",
                where=url,
                remedy="ask again; if it is aborted again, read the server's log",
            )
        ids = answer["output_ids"]
        yield ids[seen:]
        seen = len(ids)
