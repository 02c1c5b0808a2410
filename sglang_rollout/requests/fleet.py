"""Several servers of one model behind the interface of one engine, and the start of our own."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lopd.config import SGLangSection
from sglang_rollout.requests.client import OtherWeights, SGLangEngine
from sglang_rollout.servers.server import SGLangServer


class SGLangFleet(SGLangEngine):
    """Several servers of the same weights.

    Streams spread over all servers. A call that changes something goes to each server, and a call
    that only asks goes to the first. The attributes url, api_key and server are those of the first.
    """

    def __init__(self, engines: Sequence[SGLangEngine]) -> None:
        # The base class speaks with one server. What it asks of a model, such as its vocabulary,
        # any of them can answer.
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
        """Raise EngineError if a server of ours is dead and will not be started again."""
        for engine in self._engines:
            engine.check_alive()

    def model_info(self) -> dict[str, Any]:
        """Return the first server's description of its model.

        Raises:
            OtherWeights: Another server has another weight version.
        """
        # The caller takes the answer for all servers, so they must agree.
        first, *others = (engine.model_info() for engine in self._engines)
        for engine, info in zip(self._engines[1:], others, strict=True):
            if info["weight_version"] != first["weight_version"]:
                raise OtherWeights(
                    f"this server has weight version {info['weight_version']!r}, but "
                    f"{self.url} has {first['weight_version']!r}",
                    where=engine.url,
                    remedy="load the same weights into all servers",
                )
        return first

    def flush_cache(self) -> None:
        """Make every server forget its cached prefixes.

        Raises:
            EngineError: A server has running requests.
        """
        self._on_each(lambda engine: engine.flush_cache())

    def health(self) -> bool:
        """Return whether each server generates a token within ten seconds."""
        # Each of them must: a stream spreads over all servers, so one that is ill delays it.
        return all(engine.health() for engine in self._engines)

    def call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Any:
        """Call the first server with GET, or each server in turn with another method.

        Returns:
            The answer of the server that was called last.
        """
        # One after the other: the URL in an error then tells up to which server the change has
        # come.
        for engine in self._engines[:1] if method == "GET" else self._engines:
            answer = engine.call(method, path, body, timeout_s=timeout_s)
        return answer

    def _on_each(self, call: Callable[[SGLangEngine], None]) -> None:
        with ThreadPoolExecutor(len(self._engines)) as pool:
            # All are started before the first is awaited.
            for done in [pool.submit(call, engine) for engine in self._engines]:
                done.result()


def fleet_of(engines: Sequence[SGLangEngine]) -> SGLangEngine:
    """Return one engine for all of these."""
    # One server needs no pool of threads, and its errors keep their plain form.
    return engines[0] if len(engines) == 1 else SGLangFleet(engines)


class OwnServers:
    """sglang.replicas servers of one checkpoint that lopd runs on this machine.

    They share a key and the file with the newest weights.
    """

    def __init__(
        self,
        model_dir: str | Path,
        settings: SGLangSection,
        *,
        log: str | Path,
        name: str,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            model_dir: The folder of the Hugging Face checkpoint.
            settings: The section [sglang].
            log: The log of the server. Several servers have numbered logs beside it.
            name: The name of the servers in errors and progress lines.
            tell: A function that gets one line about each restart.
        """
        log = Path(log)
        number = settings.replicas
        # The key and the weights file are shared. A process that knows those of the first server,
        # such as a rank of the trainer, can then reach all of them.
        self._api_key = secrets.token_urlsafe(32)
        self._settings = settings
        logs = [log]
        # Each server has a log of its own: the lines of several would be mixed, and a cause of
        # death would be lost among them.
        if number > 1:
            logs = [log.with_name(f"{log.stem}-{replica}{log.suffix}") for replica in range(number)]
        self._servers = [
            SGLangServer(
                Path(model_dir),
                settings,
                log=path,
                name=name,
                replica=replica,
                weights_file=log.with_name(f"{log.name}.weights.json"),
                api_key=self._api_key,
                tell=tell,
            )
            for replica, path in enumerate(logs)
        ]

    @property
    def ready(self) -> bool:
        """Return whether each server runs and has been healthy since its start."""
        return all(server.ready() for server in self._servers)

    def start(self) -> SGLangEngine:
        """Start the servers at the same time, and return one engine for all of them.

        Raises:
            EngineError: A server does not start. Then all of them are ended.
        """
        # At the same time: each start waits a minute and more for its model, most of it idle.
        with ThreadPoolExecutor(len(self._servers)) as pool:
            starts = [pool.submit(server.start) for server in self._servers]
            try:
                # As they end, not in order: the first failure must be seen at once.
                for start in as_completed(starts):
                    start.result()
            except BaseException:
                # The pool waits for all its threads. Without this the others would still be
                # loading for minutes before the error appears.
                self.stop()
                raise
        engines = [
            SGLangEngine(server.url, self._api_key, self._settings, server=server)
            for server in self._servers
        ]
        return fleet_of(engines)

    def adopt(self, model_dir: Path, name: str) -> None:
        """Count the servers as started with this checkpoint, whose weights they have by now."""
        for server in self._servers:
            server.adopt(model_dir, name)

    def stop(self) -> None:
        """End the servers, also while they start. A second call does nothing."""
        for server in self._servers:
            server.stop()


@contextmanager
def serve(
    model_dir: str | Path,
    settings: SGLangSection,
    *,
    log: str | Path,
    name: str,
    tell: Callable[[str], None] | None = None,
) -> Iterator[SGLangEngine]:
    """Run servers of a checkpoint as long as the block lasts. The arguments are OwnServers'.

    Yields:
        One engine for all servers.

    Raises:
        EngineError: A server does not start.
    """
    servers = OwnServers(model_dir, settings, log=log, name=name, tell=tell)
    try:
        yield servers.start()
    finally:
        servers.stop()
