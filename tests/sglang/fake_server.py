"""A small HTTP server that speaks SGLang's /generate, for the failures a real server does not
produce on demand.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lopd.config import SGLangSection
from sglang_rollout.requests.client import SGLangEngine
from tests.sglang.answers import LOGPROB, STOP_ID, VOCAB_SIZE, generation, sequences

__all__ = ["KEY", "LOGPROB", "STOP_ID", "VOCAB_SIZE", "FakeServer", "reserved_port"]
KEY = "the-key"
_PATIENCE_S = 120.0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # With the default of 5, a burst of connections waits a second until TCP asks again.
    request_queue_size = 128


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that no other program gets and on which nothing listens but a FakeServer(port), as
    long as there is one.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def events(answer: dict[str, Any]) -> bytes:
    """Return an answer as SGLang streams it: each event has all tokens so far."""
    ids = answer["output_ids"]
    parts = [{**answer, "output_ids": ids[:stop]} for stop in range(1, len(ids) + 1)]
    for part in parts[:-1]:
        part["meta_info"] = {**answer["meta_info"], "finish_reason": None}
    lines = [f"data: {json.dumps(part)}\n\n" for part in parts]
    return "".join([*lines, "data: [DONE]\n\n"]).encode()


class FakeServer:
    """Answers like SGLang. Set the attributes to make it fail; read calls and most_at_once to see
    what it was asked.
    """

    def __init__(self, port: int = 0) -> None:
        self.delay_s = 0.0
        self.answering = threading.Event()  # while cleared, requests to /generate wait
        self.answering.set()
        # HTTP statuses for the next requests to /generate. A 0 drops the connection.
        self.failures: list[int] = []
        self.change: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer
        self.version = "0.5.17"
        self.model_info: dict[str, Any] = {}  # more of what it says of its model and of itself
        self.server_info: dict[str, Any] = {"skip_tokenizer_init": True}
        self.tokens: list[int] = []  # of any text
        self.weight_version = "default"
        self.model_path = ""
        self.refuse_update = ""
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._connections: list[socket.socket] = []
        self._changed = threading.Condition()
        self._server = _Server(("127.0.0.1", port), self._handler())
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in self._connections:  # a server that has ended answers on none
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.answering.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def engine(self, *, key: str = KEY, **settings: Any) -> SGLangEngine:
        return SGLangEngine(
            self.url,
            key,
            SGLangSection(
                **{"max_in_flight": 8, "context_length": 128, "outage_timeout_s": 60, **settings}
            ),
        )

    def paths(self, path: str) -> list[dict[str, Any]]:
        """The bodies that were sent to one path."""
        return [body for called, body in self.calls if called == path]

    def until_open(self, count: int) -> None:
        """Waits until so many requests to /generate are open at the same time."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._at_once >= count, _PATIENCE_S), (
                f"{self._at_once} of {count} requests are open"
            )

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/generate":
            with self._changed:
                failure = self.failures.pop(0) if self.failures else None
            time.sleep(self.delay_s)
            self.answering.wait(_PATIENCE_S)
            if failure is not None:
                return failure, {"error": {"message": "as told"}}
            found = [self.change(generation(one, self.weight_version)) for one in sequences(body)]
            return 200, found if isinstance(body.get("rid"), list) else found[0]
        if path == "/server_info":
            return 200, {"version": self.version, **self.server_info}
        if path == "/tokenize":
            return 200, {"tokens": self.tokens}
        if path == "/model_info":
            return 200, {
                "weight_version": self.weight_version,
                "model_path": self.model_path,
                **self.model_info,
            }
        if path == "/update_weights_from_disk":
            if self.refuse_update:
                return 400, {"success": False, "message": self.refuse_update}
            self.weight_version = body["weight_version"]
        elif path not in (
            "/abort_request",
            "/flush_cache",
            "/continue_generation",
            "/begin_weight_update",
            "/end_weight_update",
        ):
            return 404, {"detail": "Not Found"}
        return 200, {"success": True}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                fake._connections.append(self.connection)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}")
                with fake._changed:
                    fake.calls.append((self.path, body))
                    if self.path == "/generate":
                        fake._at_once += 1
                        fake.most_at_once = max(fake.most_at_once, fake._at_once)
                        fake._changed.notify_all()
                try:
                    status, answer = (
                        (401, {"error": "Unauthorized"})
                        if self.headers["Authorization"] != f"Bearer {KEY}"
                        else fake._answer(self.path, body)
                    )
                finally:
                    if self.path == "/generate":
                        with fake._changed:
                            fake._at_once -= 1
                if status == 0:
                    self.close_connection = True
                    return
                data = json.dumps(answer).encode()
                if body.get("stream") and status == 200:
                    data = events(answer)
                with contextlib.suppress(ConnectionError):  # the client may have left
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        return Handler
