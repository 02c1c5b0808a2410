"""Server and trainer on the same GPUs, in turns: who holds the memory when, around every sync.

SGLang gives memory back by ``/release_memory_occupation`` and takes it again by
``/resume_memory_occupation``, by kind: weights, keys and values (kv_cache), CUDA graphs. It needs
``enable_memory_saver``, and releases only while it has nothing to do. What has been released has
lost its contents: weights must be sent again after a resume, so a release of weights without a sync
afterwards serves garbage.

The order keeps the peak at one side's all plus the other's weights: gradients and optimizer state
leave before the server's weights come back, and the trainer's weights leave before the cache of
keys and values does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

from lopd.errors import EngineError
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.weight_sync.interface import on_all

_ALL = ["kv_cache", "weights", "cuda_graph"]
Turn = Literal["server", "trainer", "nobody"]


class Offloadable(Protocol):
    """A trainer whose parts can leave the GPU for the host and come back; every rank calls these
    together.
    """

    def offload_optimizer(self) -> None:
        """Gradients and optimizer state to the host."""

    def offload_weights(self) -> None:
        """The model to the host; it has been exported by then."""

    def reload(self) -> None:
        """All of it back."""


class Apart:
    """Server and trainer do not make room for each other: each has devices of its own, or there is
    room for both. The server keeps its weights.
    """

    shares = False

    def admit(self, trainer: Offloadable) -> None: ...

    def to_trainer(self) -> None: ...

    def to_nobody(self) -> None: ...

    @contextlib.contextmanager
    def to_server(self) -> Iterator[None]:
        yield


class Colocation(Apart):
    """Whose turn it is; at first the server's, which has just been started. Every rank has one and
    calls it together. EngineError: the server refuses, or a server that has its turn is given it
    again.

    engines: on the rank that talks to the servers; empty on the others. barrier: all ranks wait for
    each other: one rank's memory is not free because another's is.
    """

    shares = True

    def __init__(
        self,
        engines: Sequence[SGLangEngine],
        *,
        barrier: Callable[[], None],
        timeout_s: float = 300.0,
    ) -> None:
        self._engines, self._barrier, self._timeout_s = tuple(engines), barrier, timeout_s
        self._trainer: Offloadable | None = None
        self.turn: Turn = "server"

    def admit(self, trainer: Offloadable) -> None:
        """The trainer that was built in its turn, on what the server had left."""
        assert self.turn == "trainer", "the server has the memory"
        self._trainer = trainer

    def to_trainer(self) -> None:
        """After the last response has come: the server gives everything back, then the trainer
        comes in.
        """
        if self.turn == "server":
            self._release()
        if self.turn != "trainer" and self._trainer is not None:
            self._trainer.reload()
            self._barrier()
        self.turn = "trainer"

    def to_nobody(self) -> None:
        """Room for a third program, such as the teacher's server."""
        if self.turn == "server":
            self._release()
        elif self.turn == "trainer" and self._trainer is not None:
            self._trainer.offload_optimizer()
            self._trainer.offload_weights()
            self._barrier()
        self.turn = "nobody"

    @contextlib.contextmanager
    def to_server(self) -> Iterator[None]:
        """After the last training step. In the block, which sends the weights, both sides hold
        theirs and little else; after it the server answers.
        """
        if self.turn == "server":
            raise EngineError("it is the server's turn already", where="sync.colocate")
        assert self.turn == "trainer", "only a trainer on the device has weights to send"
        trainer = self._trainer
        assert trainer is not None, "admit() first"
        self.turn = "server"
        trainer.offload_optimizer()
        self._barrier()
        self._post("/resume_memory_occupation", ["weights"])
        self._barrier()
        yield
        trainer.offload_weights()
        self._barrier()
        self._post("/resume_memory_occupation", ["kv_cache", "cuda_graph"])
        self._barrier()

    def _release(self) -> None:
        self._call(
            "/flush_cache?timeout=10", None
        )  # a release asserts that the server is idle, and ends it where it is not
        self._post("/release_memory_occupation", _ALL)
        self._barrier()

    def _post(self, path: str, tags: list[str]) -> None:
        self._call(path, {"tags": tags})

    def _call(self, path: str, body: dict[str, list[str]] | None) -> None:
        if self._engines:
            on_all(
                self._engines,
                lambda engine: engine.call("POST", path, body, timeout_s=self._timeout_s),
                self._timeout_s + 10,
            )
