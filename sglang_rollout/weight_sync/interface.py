"""What every transport of weights offers, and the bookkeeping they share: which tensors a version
must have, and what a sync cost.
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

Bucket: TypeAlias = "list[tuple[str, Tensor]]"  # full tensors under their Hugging Face names
T = TypeVar("T")
_POLL_S = 0.1


class WeightReceiver(Protocol):
    """Takes one set of weights: begin, any number of buckets, commit; abandon instead of commit
    where something failed on the way.

    No request is answered with a mixture of two versions. Through a folder the old weights serve
    until commit; the other transports change the weights in place, so the server holds requests
    back from the first bucket until commit. A bucket's tensors must stay as they are until the next
    receive or commit has returned: they may be on their way until then. EngineError from any of the
    calls: the server died, refused, was silent for the timeout, or a tensor is not the served
    model's.
    """

    report: SyncReport

    def begin(self, version: str) -> None: ...

    def receive(self, bucket: Bucket) -> None: ...

    def commit(self) -> None: ...

    def abandon(self) -> None: ...


@dataclass
class SyncReport:
    """What the newest sync did. extra_bytes: memory that the transport itself needed at most in
    this process, beyond the bucket it was given.
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
        """One line for the log."""
        unchanged = (
            f" ({self.num_tensors - self.sent_tensors} of {self.num_tensors} tensors unchanged)"
            if self.sent_tensors < self.num_tensors
            else ""
        )
        verified = f", {self.verified_tensors} tensors verified" if self.verified_tensors else ""
        memory = f", {self.extra_bytes / 2**20:.0f} MiB of extra memory"
        return f"{self.sent_bytes / 2**20:.0f} MiB by {self.transport} in {self.seconds:.2f} s{unchanged}{memory}{verified}"


class Inventory:
    """Holds a version against the tensors that the served model has: none missing, none twice, none
    of another shape.

    SGLang looks at none of this: a tensor that never comes keeps its old values without a word, and
    one of another shape may end the server.
    """

    def __init__(self, template_dir: Path, where: str) -> None:
        """template_dir: a checkpoint with the tensors that every version has. EngineError: it
        cannot be read.
        """
        self.shapes, self._where = tensor_shapes(template_dir), where
        self._version, self._seen = "", set[str]()
        self._served = {template_dir.resolve()}  # folders whose tensors are known to be these

    def begin(self, version: str) -> None:
        self._version, self._seen = version, set()

    def take(self, bucket: Bucket) -> None:
        """EngineError: a tensor the model does not have, has twice, or has in another shape."""
        for name, tensor in bucket:
            expected = self.shapes.get(name)
            if expected is None:
                raise self._refusal(f"tensor {name} is not in the served model")
            if tuple(tensor.shape) != expected:
                raise self._refusal(
                    f"tensor {name} has shape {list(tensor.shape)}, the served model's has {list(expected)}"
                )
            if name in self._seen:
                raise self._refusal(f"tensor {name} came twice")
            self._seen.add(name)

    def check_complete(self) -> None:
        """EngineError: tensors are missing."""
        missing = sorted(self.shapes.keys() - self._seen)
        if missing:
            raise self._refusal(f"{len(missing)} tensors never came, {missing[0]} first")

    def check_served(self, engines: Sequence[SGLangEngine], timeout_s: float) -> None:
        """EngineError unless every server serves a model of exactly these tensors."""
        for engine in engines:
            folder = Path(model_info(engine, timeout_s)["model_path"]).resolve()
            if folder not in self._served:
                check_same_tensors(self.shapes, folder)
                self._served.add(folder)

    def _refusal(self, what: str) -> EngineError:
        return EngineError(
            f"{what} (weight version {self._version})",
            where=self._where,
            remedy="only the weights of the served architecture can be exchanged",
        )


def model_info(engine: SGLangEngine, timeout_s: float) -> dict[str, Any]:
    """What a server says of its model, soon: the engine's own call waits as long as for a response."""
    return dict(engine.call("GET", "/model_info", timeout_s=timeout_s))


def await_servers(engines: Sequence[SGLangEngine], timeout_s: float) -> None:
    """Until each answers, as while it is started again. EngineError: one does not within timeout_s."""
    deadline = time.monotonic() + timeout_s
    for engine in engines:
        while True:
            try:
                model_info(engine, timeout_s)
                break
            except EngineError:
                engine.check_alive()
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def started(call: Callable[[], T], *, at_exit: bool = False) -> Future[T]:
    """The call in a thread of its own. A daemon: where a call is given up, its thread must not keep
    the process from ending.

    at_exit: the process ends after it, for a call that must not be broken off and ends by itself.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="weight-sync", daemon=not at_exit).start()
    return future


def finished(futures: Mapping[str, Future[T]], timeout_s: float) -> list[T]:
    """Results of all, as soon as one has failed its error, and after timeout_s EngineError with
    what was waited for.
    """
    done, waiting = wait(futures.values(), timeout=timeout_s, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
    if waiting:
        late = ", ".join(name for name, future in futures.items() if future in waiting)
        raise EngineError(
            f"no answer within {timeout_s:g} s: {late}",
            limit="sync.timeout_s",
            remedy="see the server's log: is it stopped or very slow?",
        )
    return [future.result() for future in futures.values()]


def on_all(
    engines: Sequence[SGLangEngine], call: Callable[[SGLangEngine], T], timeout_s: float
) -> list[T]:
    """The call on every engine at once, results in order. EngineError: the first failure, or one is
    silent for timeout_s.
    """
    return finished({engine.url: started(partial(call, engine)) for engine in engines}, timeout_s)
