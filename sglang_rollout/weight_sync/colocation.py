"""Server and trainer on the same GPUs: who holds the memory when, around every sync.

SGLang gives memory back by ``/release_memory_occupation`` and takes it again by
``/resume_memory_occupation``, by kind: weights, keys and values (kv_cache), CUDA graphs. It needs
``enable_memory_saver``. What has been released has lost its contents. So weights must be sent again
after a resume: a server that is released and resumed without a sync serves garbage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

from lopd.errors import EngineError
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.weight_sync.interface import on_all

# SGLang's names of the kinds of memory.
_ALL_TAGS = ["kv_cache", "weights", "cuda_graph"]
# Seconds that SGLang waits for its last requests to end before it refuses to flush its cache.
_FLUSH_PATIENCE_S = 10
_ANSWER_MARGIN_S = 10
Holder = Literal["server", "trainer", "nobody"]


class Offloadable(Protocol):
    """A trainer whose parts can be moved from the GPU to the host and back.

    All ranks call the same method at the same time.
    """

    def offload_optimizer(self) -> None:
        """Move the gradients and the optimizer state to the host."""

    def offload_weights(self) -> None:
        """Move the model to the host. It has been exported by then."""

    def reload(self) -> None:
        """Move everything back to the GPU."""


class SeparateMemory:
    """Server and trainer keep their memory, because there is room for both.

    Each has devices of its own, or both fit on the same devices. The methods do nothing, so that a
    training loop is the same with and without sync.colocate.
    """

    shares = False

    def attach_trainer(self, trainer: Offloadable) -> None: ...

    def to_trainer(self) -> None: ...

    def to_nobody(self) -> None: ...

    @contextlib.contextmanager
    def to_server(self) -> Iterator[None]:
        yield


class Colocation(SeparateMemory):
    """Hands the memory of shared GPUs over between server and trainer.

    At first the server holds it, because it has just been started. Every rank of the trainer has a
    Colocation and calls the same method at the same time.

    Attributes:
        holder: The one who holds the GPU memory now.
    """

    shares = True

    def __init__(
        self,
        engines: Sequence[SGLangEngine],
        *,
        barrier: Callable[[], None],
        timeout_s: float = 300.0,
    ) -> None:
        """
        Args:
            engines: The servers, on the rank that talks to them. Empty on the other ranks.
            barrier: A function in which all ranks wait for each other.
            timeout_s: The longest time in seconds that one call to a server may take.
        """
        self._engines = tuple(engines)
        # One rank's memory is not free because another's is. Without a barrier after each step, the
        # server could take memory on a GPU whose rank is still moving its parts.
        self._barrier = barrier
        self._timeout_s = timeout_s
        self._trainer: Offloadable | None = None
        self.holder: Holder = "server"

    def attach_trainer(self, trainer: Offloadable) -> None:
        """Name the trainer, which was built while it held the memory."""
        assert self.holder == "trainer", "the server has the memory"
        self._trainer = trainer

    def to_trainer(self) -> None:
        """Give the memory to the trainer. The last response has come by then.

        Raises:
            EngineError: The server refuses to release its memory.
        """
        # The server releases first. In the other order both would hold everything at once.
        if self.holder == "server":
            self._release_server()
        # Before attach_trainer() there is nothing to move back: the trainer is yet to be built.
        if self.holder != "trainer" and self._trainer is not None:
            self._trainer.reload()
            self._barrier()
        self.holder = "trainer"

    def to_nobody(self) -> None:
        """Free the memory for a third program, such as the teacher's server.

        Raises:
            EngineError: The server refuses to release its memory.
        """
        if self.holder == "server":
            self._release_server()
        # A trainer that is not attached yet has taken no memory that could be given back.
        elif self.holder == "trainer" and self._trainer is not None:
            self._trainer.offload_optimizer()
            self._trainer.offload_weights()
            self._barrier()
        self.holder = "nobody"

    @contextlib.contextmanager
    def to_server(self) -> Iterator[None]:
        """Give the memory to the server. The block must send the weights.

        In the block both sides hold their weights and little else. After the block the server can
        answer.

        Raises:
            EngineError: The server holds the memory already, or it refuses.
        """
        if self.holder == "server":
            raise EngineError(
                "the server already holds the GPU memory",
                where="sync.colocate",
                remedy="call to_trainer() before the next sync",
            )
        assert self.holder == "trainer", "only a trainer on the device has weights to send"
        trainer = self._trainer
        assert trainer is not None, "attach_trainer() first"
        # Set before the first step: if a step fails, the memory is neither side's alone, and the
        # next to_trainer() must make the server release.
        self.holder = "server"
        # The order keeps the peak low, at one side's whole memory plus the other side's weights.
        # Gradients and optimizer state leave before the server's weights come back. The trainer's
        # weights leave before the server's keys and values come back.
        trainer.offload_optimizer()
        self._barrier()
        # The weights alone: keys and values would not fit beside the trainer's weights yet.
        self._resume(["weights"])
        self._barrier()
        yield
        trainer.offload_weights()
        self._barrier()
        self._resume(["kv_cache", "cuda_graph"])
        self._barrier()

    def _release_server(self) -> None:
        # SGLang asserts that it is idle when it releases, and the assertion ends the server. A
        # flush is refused while requests run, so it finds that out without harm.
        self._call(f"/flush_cache?timeout={_FLUSH_PATIENCE_S}", None)
        self._call("/release_memory_occupation", {"tags": _ALL_TAGS})
        self._barrier()

    def _resume(self, tags: list[str]) -> None:
        self._call("/resume_memory_occupation", {"tags": tags})

    def _call(self, path: str, body: dict[str, list[str]] | None) -> None:
        # Only the rank that talks to the servers has engines. The others wait in the barrier.
        if self._engines:
            on_all(
                self._engines,
                lambda engine: engine.call("POST", path, body, timeout_s=self._timeout_s),
                self._timeout_s + _ANSWER_MARGIN_S,
            )
