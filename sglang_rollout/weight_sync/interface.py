"""What every transport of weights offers, and what the transports share.

The shared part is the inventory (which tensors a version must have), the report (what a sync cost),
and calls to several servers at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from lopd.errors import EngineError
from sglang_rollout.server_side.checkpoint import check_same_tensors, tensor_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from sglang_rollout.requests.client import SGLangEngine

# Full tensors under their Hugging Face names.
Bucket: TypeAlias = "list[tuple[str, Tensor]]"
T = TypeVar("T")
_POLL_S = 0.1
_MIB = 2**20


class WeightReceiver(Protocol):
    """Puts one set of weights into the servers.

    The calls are begin(), any number of receive(), and commit(). After an error the last call is
    abandon() instead of commit().

    No request is answered with a mixture of two versions. The transport by disk leaves the old
    weights in place until commit(). The other transports change the weights in place, so the
    servers hold requests back from begin() until commit().

    The tensors of a bucket must stay unchanged until the next receive() or commit() has returned,
    because they may be on their way until then.

    Every call raises EngineError where a server died, refused or was silent for the timeout, or
    where a tensor is not the served model's.
    """

    report: SyncReport

    def begin(self, version: str) -> None: ...

    def receive(self, bucket: Bucket) -> None: ...

    def commit(self) -> None: ...

    def abandon(self) -> None: ...


@dataclass
class SyncReport:
    """What the newest sync did.

    Attributes:
        num_tensors: The tensors of the version. sent_tensors may be fewer (sync.delta).
        num_bytes: The bytes of all tensors of the version.
        extra_bytes: The most memory that the transport needed in this process, beyond the bucket
            that it was given.
        verified_tensors: The tensors whose fingerprints were compared on every server.
        seconds: The time from begin() to the end of commit().
    """

    transport: str
    version: str = ""
    num_tensors: int = 0
    num_bytes: int = 0
    sent_tensors: int = 0
    sent_bytes: int = 0
    extra_bytes: int = 0
    verified_tensors: int = 0
    seconds: float = 0.0

    def line(self) -> str:
        """Return one line for the log."""
        sent = f"{self.sent_bytes / _MIB:.0f} MiB by {self.transport} in {self.seconds:.2f} s"
        # With sync.delta the tensors that did not change are counted and not sent.
        num_unchanged = self.num_tensors - self.sent_tensors
        unchanged = ""
        if num_unchanged > 0:
            unchanged = f" ({num_unchanged} of {self.num_tensors} tensors unchanged)"
        memory = f", {self.extra_bytes / _MIB:.0f} MiB of extra memory"
        verified = f", {self.verified_tensors} tensors verified" if self.verified_tensors else ""
        return f"{sent}{unchanged}{memory}{verified}"


class Inventory:
    """Compares the tensors of a version with those of the served model.

    None may be missing, come twice or have another shape. SGLang checks none of this: a tensor that
    never comes keeps its old values without a message, and a tensor of another shape may end the
    server.
    """

    def __init__(self, template_dir: Path, where: str) -> None:
        """
        Args:
            template_dir: A checkpoint with the tensors that every version has.
            where: What the errors name as the place.

        Raises:
            EngineError: The checkpoint cannot be read.
        """
        # From a folder of this machine: the trainer's side must know the tensors before any server
        # is asked.
        self.shapes = tensor_shapes(template_dir)
        self._where = where
        self._version = ""
        self._seen = set[str]()
        # Folders whose tensors are known to be these. A server reports its folder at every sync,
        # and the headers of its files need to be read only once.
        self._served = {template_dir.resolve()}

    def begin(self, version: str) -> None:
        """Forget the tensors of the previous version."""
        self._version = version
        self._seen = set()

    def take(self, bucket: Bucket) -> None:
        """Check the tensors of a bucket and count them as received.

        Raises:
            EngineError: The served model does not have a tensor, has it in another shape, or the
                tensor comes for the second time.
        """
        for name, tensor in bucket:
            expected = self.shapes.get(name)
            if expected is None:
                raise self._refusal(f"tensor {name} is not in the served model")
            # Buckets have full tensors, so the shape is that of the checkpoint and never that of a
            # shard.
            if tuple(tensor.shape) != expected:
                raise self._refusal(
                    f"tensor {name} has shape {list(tensor.shape)}, the served model's has "
                    f"{list(expected)}"
                )
            # The second one would replace the first without a message.
            if name in self._seen:
                raise self._refusal(f"tensor {name} came twice")
            self._seen.add(name)

    def check_complete(self) -> None:
        """Raise EngineError if tensors are missing."""
        # Sorted, so that the same mistake gives the same message on every run.
        missing = sorted(self.shapes.keys() - self._seen)
        if missing:
            raise self._refusal(f"{len(missing)} tensors never came, {missing[0]} first")

    def check_served(self, engines: Sequence[SGLangEngine], timeout_s: float) -> None:
        """Raise EngineError unless every server serves a model of exactly these tensors."""
        for engine in engines:
            # The folder of its start, or of its last update through a folder.
            folder = Path(model_info(engine, timeout_s)["model_path"]).resolve()
            if folder not in self._served:
                check_same_tensors(self.shapes, folder)
                self._served.add(folder)

    def _refusal(self, what: str) -> EngineError:
        return EngineError(
            f"{what} (weight version {self._version})",
            where=self._where,
            remedy="start another server for this model: a server accepts only weights of its "
            "own architecture",
        )


def model_info(engine: SGLangEngine, timeout_s: float) -> dict[str, Any]:
    """Return a server's description of its model within timeout_s.

    The engine's own model_info() waits as long as for a response, which may be hours.
    """
    return dict(engine.call("GET", "/model_info", timeout_s=timeout_s))


def await_servers(engines: Sequence[SGLangEngine], timeout_s: float) -> None:
    """Wait until each server answers, for example while it is started again.

    Args:
        engines: One engine for each server.
        timeout_s: The longest wait in seconds, for all servers together.

    Raises:
        EngineError: A server does not answer in time, or will not be started again.
    """
    # Servers start at the same time, so to wait for one after the other takes no longer.
    deadline = time.monotonic() + timeout_s
    for engine in engines:
        while True:
            try:
                model_info(engine, timeout_s)
                break
            except EngineError:
                # The owner's reason comes before the deadline: it says more than a timeout.
                engine.check_alive()
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def started(call: Callable[[], T], *, at_exit: bool = False) -> Future[T]:
    """Run a call in a thread of its own and return its future.

    Args:
        call: The function to run.
        at_exit: Whether the process must wait for the call before it ends. For a call that must not
            be broken off and that ends by itself.
    """
    # Not a ThreadPoolExecutor: the process waits for all threads of a pool before it ends. A call
    # that was given up, to a server that never answers, would keep it alive.
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = call()
        # The thread that waits for the future must get every error, or it would wait until the
        # timeout.
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    # A daemon thread ends with the process, whatever it waits for.
    threading.Thread(target=run, name="weight-sync", daemon=not at_exit).start()
    return future


def finished(futures: Mapping[str, Future[T]], timeout_s: float) -> list[T]:
    """Wait for all futures and return their results in order.

    Args:
        futures: The futures by the name that an error gives them.
        timeout_s: The longest wait in seconds.

    Raises:
        Exception: The error of the first future that fails, as soon as it has failed.
        EngineError: The time is over. The message names what was waited for.
    """
    # At the first failure the wait ends: the others may be waiting for the one that has failed, as
    # in a broadcast, and their timeouts would only hide its message.
    done, waiting = wait(futures.values(), timeout=timeout_s, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
    if waiting:
        late = ", ".join(name for name, future in futures.items() if future in waiting)
        raise EngineError(
            f"these servers did not answer within {timeout_s:g} s: {late}",
            limit=f"at most sync.timeout_s = {timeout_s:g}",
            remedy="read the log of the server; if it is only slow, raise sync.timeout_s",
        )
    # All have ended. Their results come in the order of the mapping.
    return [future.result() for future in futures.values()]


def on_all(
    engines: Sequence[SGLangEngine], call: Callable[[SGLangEngine], T], timeout_s: float
) -> list[T]:
    """Make a call on every engine at the same time and return the results in order.

    Raises:
        EngineError: The first failure, or a server is silent for timeout_s seconds.
    """
    return finished({engine.url: started(partial(call, engine)) for engine in engines}, timeout_s)
