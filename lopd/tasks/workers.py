"""Worker processes for computations that may never end.

A worker is asked by lines of JSON. If a limit passes, its process group is killed and another
worker takes its place.

The limit is of CPU seconds. The kernel keeps it inside the worker: a profiling timer whose signal
ends the process, also in the middle of one power of big integers. So a busy machine does not turn
right answers into wrong ones. From outside the bound is _WALL times as many seconds of the clock. A
worker whose parent is gone ends at one of the two, or, if it is idle, at the end of its input.
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

# Seconds of the clock for one CPU second.
_WALL = 5.0
# Seconds in which a worker must have imported what it needs, on a busy machine.
_START_S = 120.0
# The variables that a worker gets. Tokens and keys are not among them.
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
)


class WorkerTimeoutError(Exception):
    """The job passed its limit, and the worker was killed."""


class WorkerDiedError(Exception):
    """The worker ended in the middle of the job, by too much memory or a crash."""


class _Worker:
    def __init__(self, module: str, limit_s: float, memory_mb: int) -> None:
        # The worker is imported by its name and not forked: this process has threads.
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        settings = {"limit_s": limit_s, "wall_s": _WALL * limit_s, "memory_mb": memory_mb}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(settings)],
            env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._wall_s = _WALL * limit_s
        self._pending = b""
        # A worker's first line says that it is ready. Its imports do not count as a job.
        try:
            self._answer(_START_S)
        except (WorkerTimeoutError, WorkerDiedError):
            # Its own message goes to stderr, which is closed here: the remedy runs the module by
            # hand.
            code = self.kill()
            raise DataError(
                f"a verifier's worker did not start (exit code {code})",
                where=module,
                remedy=f"run {sys.executable} -m {module} to see the reason",
            ) from None

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply to one job. After an exception the worker cannot be asked again."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            # The worker has closed its input: it ended between two jobs.
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
            # The end of the output is the end of the worker. Its signal says whether a limit has
            # ended it.
            if not read:
                if self._process.wait(10) in (-signal.SIGPROF, -signal.SIGALRM, -signal.SIGXCPU):
                    raise WorkerTimeoutError
                raise WorkerDiedError
            # A reply longer than the pipe comes in several parts.
            self._pending += read
        # A worker answers one job at a time, so nothing can be left behind the line.
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> int:
        """Kill the worker's own process group, and return the exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # Always waited for, or a dead child would stay as a zombie.
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        return code


class WorkerPool:
    """A number of workers that are started when they are needed.

    Args:
        module: The module that a worker runs. Its main function calls ``serve``.
        limit_s: CPU seconds of one job.
        memory_mb: MB of memory of one worker.
        size: The most workers at once. None means one per CPU core.
    """

    def __init__(
        self, module: str, *, limit_s: float, memory_mb: int, size: int | None = None
    ) -> None:
        self._module = module
        self._limit_s = limit_s
        self._memory_mb = memory_mb
        # Every entry is a place: an idle worker, or None where none has been started. The last one
        # that was given back is taken first, so that few jobs start few workers.
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(size or num_cores()):
            self._free.put(None)
        # Idle workers would end by themselves, but later than this process.
        atexit.register(self.close)

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply to one job. Any thread may call this; it waits for a free worker.

        Raises:
            WorkerTimeoutError: The job passed its limit.
            WorkerDiedError: The worker ended. In both cases another one takes its place.
        """
        worker = self._free.get()
        try:
            worker = worker or _Worker(self._module, self._limit_s, self._memory_mb)
            return worker.ask(job)
        except BaseException:
            # Also after an interrupt: the worker may still compute, and its late reply would be
            # taken for that of the next job.
            if worker is not None:
                worker.kill()
            worker = None
            raise
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """End the workers that are idle."""
        workers = []
        # Workers that are busy are not in the queue. They end with this process.
        with contextlib.suppress(queue.Empty):
            while True:
                workers.append(self._free.get_nowait())
        for worker in workers:
            if worker is not None:
                worker.kill()
            # The place stays, so the pool can be used again.
            self._free.put(None)


@lru_cache(maxsize=8)
def pool(module: str, limit_s: float, memory_mb: int) -> WorkerPool:
    """Return the only pool of this module with these limits."""
    return WorkerPool(module, limit_s=limit_s, memory_mb=memory_mb)


def serve(compute: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Answer each line of the input with one line, under the limits. A worker's module runs this.

    Args:
        compute: Returns the reply to one job. Both are JSON objects.
    """
    # The limits come as an argument: they must hold before the first line is read.
    settings = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    memory = settings["memory_mb"] * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # It has no files to write.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # Replies go to a copy of the output, so that what libraries print is not taken for one.
    output = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr
    output.write("{}\n")
    output.flush()
    for line in sys.stdin:
        # Nothing handles these two signals, so the kernel ends this process. A handler of Python
        # would run only after the current operation.
        signal.setitimer(signal.ITIMER_PROF, settings["limit_s"])
        signal.setitimer(signal.ITIMER_REAL, settings["wall_s"])
        try:
            answer: Mapping[str, Any] = compute(json.loads(line))
        except (MemoryError, RecursionError) as error:
            # The job failed, but the process is sound and can be asked again.
            answer = {"failed": type(error).__name__}
        # Still under the limits: a reply may be a number of a million digits.
        text = json.dumps(answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        output.write(text + "\n")
        output.flush()
