"""Worker processes that compute what may never end: asked by lines of JSON, killed by their own
process group when a limit passes, and replaced.

The limit is of CPU seconds, kept by the kernel inside the worker (a profiling timer whose signal
ends the process, also in the middle of one big-integer power), so that a busy machine does not turn
right answers into wrong ones; _WALL times as many seconds of the clock are the bound from outside.
A worker whose parent is gone ends at one of the two, or, when it is idle, at the end of its input.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from lopd.errors import DataError
from lopd.tasks.verdicts import num_cores

_WALL = 5.0
_START_S = 120.0  # to import what it needs, on a busy machine
_ENVIRONMENT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "HOME",
    "TMPDIR",
    "SYSTEMROOT",
)  # no tokens and keys go along


class WorkerTimeoutError(Exception):
    """The job passed its limit; the worker was killed."""


class WorkerDiedError(Exception):
    """The worker ended in the middle of the job: memory, or a crash."""


class _Worker:
    def __init__(self, module: str, limit_s: float, memory_mb: int) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                module,
                json.dumps({"limit_s": limit_s, "wall_s": _WALL * limit_s, "memory_mb": memory_mb}),
            ],
            env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._wall_s = _WALL * limit_s
        self._pending = b""
        try:
            self._answer(_START_S)
        except (WorkerTimeoutError, WorkerDiedError):
            code = self.kill()
            raise DataError(
                f"a verifier's worker did not start (exit code {code})",
                where=module,
                remedy=f"see: {sys.executable} -m {module}",
            ) from None

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise WorkerDiedError from None
        return self._answer(self._wall_s)

    def _answer(self, patience_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + patience_s
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise WorkerTimeoutError
            read = os.read(descriptor, 65536)
            if not read:
                if self._process.wait(10) in (-signal.SIGPROF, -signal.SIGALRM, -signal.SIGXCPU):
                    raise WorkerTimeoutError
                raise WorkerDiedError
            self._pending += read
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> int:
        """Ends the worker's whole group, and only that."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        return code


class WorkerPool:
    """At most ``size`` workers, started when they are needed. ask() may be called from any thread;
    it waits for a free one.
    """

    def __init__(
        self, module: str, *, limit_s: float, memory_mb: int, size: int | None = None
    ) -> None:
        self._module, self._limit_s, self._memory_mb = module, limit_s, memory_mb
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(size or num_cores()):
            self._free.put(None)
        atexit.register(self.close)

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's answer. WorkerTimeoutError, WorkerDiedError: it was replaced; the run goes
        on.
        """
        worker = self._free.get()
        try:
            worker = worker or _Worker(self._module, self._limit_s, self._memory_mb)
            return worker.ask(job)
        except BaseException:
            if worker is not None:
                worker.kill()
            worker = None
            raise
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """Ends the workers that are idle."""
        workers = []
        with contextlib.suppress(queue.Empty):
            while True:
                workers.append(self._free.get_nowait())
        for worker in workers:
            if worker is not None:
                worker.kill()
            self._free.put(None)


@lru_cache(maxsize=8)
def pool(module: str, limit_s: float, memory_mb: int) -> WorkerPool:
    """The one pool of this module with these limits."""
    return WorkerPool(module, limit_s=limit_s, memory_mb=memory_mb)


def serve(compute: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """What a worker's module runs: answers each line of its input with one line, under its limits."""
    settings = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    memory = settings["memory_mb"] * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it has nothing to write
    output = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr  # what libraries print is no answer
    output.write("{}\n")
    output.flush()
    for line in sys.stdin:
        signal.setitimer(
            signal.ITIMER_PROF, settings["limit_s"]
        )  # default action of both signals: the kernel ends this process
        signal.setitimer(signal.ITIMER_REAL, settings["wall_s"])
        try:
            answer: Mapping[str, Any] = compute(json.loads(line))
        except (MemoryError, RecursionError) as error:
            answer = {"failed": type(error).__name__}
        text = json.dumps(answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        output.write(text + "\n")
        output.flush()
