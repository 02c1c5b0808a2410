"""Several servers of one model behind the interface of an engine, and the start of our own, at the
same time.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lopd.config import SGLangSection
from sglang_rollout.requests.client import OtherWeights, SGLangEngine
from sglang_rollout.servers.server import SGLangServer


class SGLangFleet(SGLangEngine):
    """Several servers of the same weights. Streams spread over them; a call that changes something
    goes to each, one that asks, to the first.

    url, api_key and server are those of the first; engines has one engine for each server.
    """

    def __init__(self, engines: Sequence[SGLangEngine]) -> None:
        first = engines[0]
        super().__init__(
            first.url,
            first.api_key,
            first.settings,
            server=first.server,
            vocab_size=first.vocab_size,
        )
        self._engines = tuple(engines)

    @property
    def engines(self) -> tuple[SGLangEngine, ...]:
        return self._engines

    def check_alive(self) -> None:
        """EngineError where one of them is ours, dead, and will not be started again."""
        for engine in self._engines:
            engine.check_alive()

    def model_info(self) -> dict[str, Any]:
        """What the first says of its model. OtherWeights: another has another weight version."""
        first, *others = (engine.model_info() for engine in self._engines)
        for engine, info in zip(self._engines[1:], others, strict=True):
            if info["weight_version"] != first["weight_version"]:
                raise OtherWeights(
                    f"weight version {info['weight_version']!r}, where {self.url} has {first['weight_version']!r}",
                    where=engine.url,
                    remedy="put the same weights into all servers",
                )
        return first

    def flush_cache(self) -> None:
        """Forget every cached prefix, on each. EngineError while requests are running."""
        self._on_each(lambda engine: engine.flush_cache())

    def health(self) -> bool:
        """True where each generates a token within ten seconds."""
        return all(engine.health() for engine in self._engines)

    def call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Any:
        """GET: the first's answer. Else each is called, one after the other, and the last one's
        answer returned.
        """
        for engine in self._engines[:1] if method == "GET" else self._engines:
            answer = engine.call(method, path, body, timeout_s=timeout_s)
        return answer

    def _on_each(self, work: Callable[[SGLangEngine], None]) -> None:
        with ThreadPoolExecutor(len(self._engines)) as pool:
            for done in [pool.submit(work, engine) for engine in self._engines]:
                done.result()


def fleet_of(engines: Sequence[SGLangEngine]) -> SGLangEngine:
    """One engine for all of these."""
    return engines[0] if len(engines) == 1 else SGLangFleet(engines)


@contextmanager
def serve(
    model_dir: Path,
    settings: SGLangSection,
    *,
    log: Path,
    name: str,
    tell: Callable[[str], None] | None = None,
) -> Iterator[SGLangEngine]:
    """settings.replicas servers of a checkpoint, started at the same time, as long as the block
    lasts. EngineError: one does not start.

    With several, their logs are numbered and key and weights_file are shared, so that whoever knows
    the first can reach all.
    """
    number, api_key = settings.replicas, secrets.token_urlsafe(32)
    logs = (
        [log]
        if number == 1
        else [log.with_name(f"{log.stem}-{replica}{log.suffix}") for replica in range(number)]
    )
    weights_file = log.with_name(f"{log.name}.weights.json")
    servers = [
        SGLangServer(
            model_dir,
            settings,
            log=path,
            name=name,
            replica=replica,
            weights_file=weights_file,
            api_key=api_key,
            tell=tell,
        )
        for replica, path in enumerate(logs)
    ]
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
        _start(servers)
        yield fleet_of(
            [SGLangEngine(server.url, api_key, settings, server=server) for server in servers]
        )


def _start(servers: Sequence[SGLangServer]) -> None:
    """Start them at the same time; where one fails, the others need not go on."""
    with ThreadPoolExecutor(len(servers)) as pool:
        starts = [pool.submit(server.start) for server in servers]
        try:
            for start in as_completed(starts):
                start.result()
        except BaseException:
            for server in servers:
                server.stop()
            raise
