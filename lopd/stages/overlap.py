"""What a command keeps or prepares between stages, where they may overlap (``run.overlap``).

A server's start costs imports and a warm-up; another model of the same architecture costs only its
weights. So the server of one stage serves the next one too, and the first start happens in the
background. The ranks of the next training do their imports while a stage samples or scores.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.config import Config, SGLangSection, TrainSection
from lopd.devices import num_gpus
from lopd.errors import EngineError
from lopd.megatron.ranks.launch import prepare_ranks
from lopd.megatron.ranks.standby import STANDBY

if TYPE_CHECKING:
    from sglang_rollout.requests.client import SGLangEngine
    from sglang_rollout.requests.fleet import OwnServers

# Keys of config.json that say who wrote the file, or how it is stored, and not what the model is.
_NOT_ARCHITECTURE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
# What a server calls the weights that it was started with. A stage must not see in its responses
# whether its server was started for it or kept: the same shards follow from either.
_FIRST_VERSION = "default"
# A stage that serves a model -> the training that comes next.
_NEXT_TRAINING = {"demonstrate": "sft", "rollout": "distill", "score": "distill"}


def architecture_of(model: Path) -> dict[str, Any]:
    """Return what SGLang builds a model from, without its weights."""
    # Weights can be sent to a running server, but its shape is fixed when it starts.
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if key not in _NOT_ARCHITECTURE}


def overlaps(config: Config) -> bool:
    """Return whether servers and ranks may wait, or work, while others work."""
    # A server and a rank take the same GPUs, from the first one on. One that waits would hold
    # memory that the other needs, so on GPUs nothing overlaps.
    return config.run.overlap and num_gpus() == 0


@dataclass
class _Running:
    """Servers, and what they serve."""

    servers: OwnServers
    # The engine, as soon as the servers are healthy.
    engine: Future[SGLangEngine]
    settings: SGLangSection
    architecture: dict[str, object]
    # The checkpoint that the stages have asked for last. Ranks may have sent others since.
    model: Path
    # Whether the servers still have the weights of their start.
    untouched: bool = True


class Overlap:
    """A context manager that owns the kept server and waiting ranks, and ends them at its end."""

    def __init__(self, stages: Collection[str]) -> None:
        """
        Args:
            stages: The stages that the command runs.
        """
        self._stages = stages
        self._running: _Running | None = None
        self._in_use = False
        self._tell: Callable[[str], None] = lambda line: None
        # One thread is enough: there is one kept server.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="server-start")

    def __enter__(self) -> Overlap:
        return self

    def __exit__(self, *error: object) -> None:
        self.end_server()
        STANDBY.close()
        self._pool.shutdown()

    @property
    def has_server(self) -> bool:
        return self._running is not None

    def end_server(self) -> None:
        """End the kept server, also while it starts. A second call does nothing."""
        if self._running is not None:
            self._running.servers.stop()
            self._running = None

    def prepare_server(
        self,
        model: Path,
        settings: SGLangSection,
        *,
        log: Path,
        name: str,
        tell: Callable[[str], None],
    ) -> None:
        """Begin to start a server and return at once. ``serve`` waits for it.

        The arguments are those of sglang_rollout.requests.fleet.serve.
        """
        # Imported here: the ranks of a training import this file and start no server.
        from sglang_rollout.requests.fleet import OwnServers

        self.end_server()
        self._tell = tell
        servers = OwnServers(
            # The stage that uses the server last is told of a restart.
            model,
            settings,
            log=log,
            name=name,
            tell=lambda line: self._tell(line),
        )
        architecture = architecture_of(model)
        try:
            engine = self._pool.submit(servers.start)
            self._running = _Running(servers, engine, settings, architecture, model)
        # A Ctrl-C between the two lines: nobody else would end a server that is not kept yet.
        except BaseException:
            servers.stop()
            raise

    def prepare_ranks_after(self, stage: str, config: Config) -> None:
        """Let the ranks of the training that follows a stage do their imports."""
        training = _NEXT_TRAINING.get(stage)
        if training in self._stages:
            self.prepare_ranks(config.distill if training == "distill" else config.sft)

    def prepare_ranks(self, settings: TrainSection) -> None:
        """Let the ranks of a training do their imports."""
        prepare_ranks(settings)

    @contextlib.contextmanager
    def serve(
        self,
        model: Path,
        settings: SGLangSection,
        *,
        log: Path,
        name: str,
        tell: Callable[[str], None],
    ) -> Iterator[SGLangEngine]:
        """Serve a model as long as the block lasts, by the kept server if it can.

        The arguments are those of sglang_rollout.requests.fleet.serve.

        Yields:
            One engine for all servers.

        Raises:
            EngineError: A server does not start.
        """
        if self._in_use:
            # A refresh serves the teacher beside the student.
            from sglang_rollout.requests.fleet import serve

            with serve(model, settings, log=log, name=name, tell=tell) as other:
                yield other
            return
        self._tell = tell
        engine = self._given(model, settings, name)
        if engine is None:
            self.prepare_server(model, settings, log=log, name=name, tell=tell)
            engine = self._started().engine.result()
        # From here on ranks may sync weights into it, which this process does not see.
        self._started().untouched = False
        self._in_use = True
        try:
            yield engine
        except BaseException:
            # Requests may be under way, or half of the weights changed.
            self.end_server()
            raise
        finally:
            self._in_use = False

    def _given(self, model: Path, settings: SGLangSection, name: str) -> SGLangEngine | None:
        """Return the kept server's engine with this model, or None where another must start."""
        from sglang_rollout.weight_sync import update_weights_from_disk

        running = self._running
        # Stages may want other settings, such as a longer context. A server cannot change them.
        if running is None or running.settings != settings:
            return None
        if running.architecture != architecture_of(model):
            return None
        # A start that fails would fail again, so its error is the stage's error.
        engine = running.engine.result()
        if not (running.untouched and running.model == model):
            # A server that has just died or is being started again is not worth waiting for.
            if not running.servers.ready:
                return None
            try:
                update_weights_from_disk(engine, model, version=_FIRST_VERSION, like=running.model)
            except EngineError as error:
                self._tell(f"the server is started anew, because it did not take {model} ({error})")
                return None
        # From now on a restart gives this model, and errors name it.
        running.servers.adopt(model, name)
        running.model = model
        return engine

    def _started(self) -> _Running:
        assert self._running is not None, "prepare_server() has made it"
        return self._running
