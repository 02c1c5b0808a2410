"""Server and trainer on the same GPUs, in turns: who holds the memory when, around every sync.

SGLang gives memory back by ``/release_memory_occupation`` and takes it again by ``/resume_memory_occupation``, by kind: weights, keys and values (kv_cache),
CUDA graphs. It needs ``enable_memory_saver`` among sglang.extra_args, and releases only while it has nothing to do. What has been released has lost its
contents: weights must be sent again after a resume, so a release of weights without a sync afterwards serves garbage.

The order keeps the peak at one side's all plus the other's weights: gradients and optimizer state leave before the server's weights come back, and the
trainer's weights leave before the cache of keys and values does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from lopd.errors import EngineError
from sglang_rollout.client import SGLangEngine
from sglang_rollout.weight_sync.interface import on_all

_ALL = ["kv_cache", "weights", "cuda_graph"]
Turn = Literal["server", "trainer"]


class Offloadable(Protocol):
    """A trainer whose parts can leave the GPU for the host and come back; every rank calls these together."""

    def offload_optimizer(self) -> None:
        """Gradients and optimizer state to the host."""

    def offload_weights(self) -> None:
        """The model to the host; it has been exported by then."""

    def reload(self) -> None:
        """All of it back."""


class Colocation:
    """Whose turn it is. Begins with the server's; to_trainer and to_server take turns. EngineError: the server refuses, or a turn is taken twice.

    engines: on the rank that talks to the servers; empty on the others. barrier: all ranks wait for each other: one rank's memory is not free because
    another's is.
    """

    def __init__(self, engines: Sequence[SGLangEngine], trainer: Offloadable, *, barrier: Callable[[], None], timeout_s: float = 300.0) -> None:
        self._engines, self._trainer, self._barrier, self._timeout_s = tuple(engines), trainer, barrier, timeout_s
        self.turn: Turn = "server"
        trainer.offload_optimizer()
        trainer.offload_weights()
        barrier()

    def to_trainer(self) -> None:
        """After the last response has come: the server gives everything back, then the trainer comes in."""
        self._take("trainer")
        self._post("/flush_cache?timeout=10", None)  # a release asserts that the server is idle, and ends it where it is not
        self._post("/release_memory_occupation", {"tags": _ALL})
        self._barrier()
        self._trainer.reload()
        self._barrier()

    def to_server(self, push: Callable[[], None]) -> None:
        """After the last training step: push (push_weights, by transport "tensor" on GPUs) is called when both sides hold their weights and little else."""
        self._take("server")
        self._trainer.offload_optimizer()
        self._barrier()
        self._post("/resume_memory_occupation", {"tags": ["weights"]})
        self._barrier()
        push()
        self._trainer.offload_weights()
        self._barrier()
        self._post("/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]})
        self._barrier()

    def _take(self, turn: Turn) -> None:
        if self.turn == turn:
            raise EngineError(f"it is the {turn}'s turn already", where="co-located mode")
        self.turn = turn

    def _post(self, path: str, body: dict[str, list[str]] | None) -> None:
        if self._engines:
            on_all(self._engines, lambda engine: engine.call("POST", path, body, timeout_s=self._timeout_s), self._timeout_s + 10)
