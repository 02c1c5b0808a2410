"""Run a function on several ranks under torchrun over gloo, from a test, and get back what each
rank returned.

    from tests.megatron.launch import run_ranks

    def body(folder: str, tensor: int) -> dict[str, float]:
        parallel.initialize(...)
        return {"loss": 1.25}  # anything JSON can hold

    def test_it(tmp_path):
        results = run_ranks(body, 2, folder=str(tmp_path), tensor=2)  # [rank 0's, rank 1's]

The body stands at the top level of an importable module, such as tests/megatron/test_parity.py.
Arguments and results travel as JSON (a float64 keeps its bits; tensors go as lists or through a
file). An exception or a dead rank raises RanksFailed with the end of the log; a hang ends after
timeout_s. Process groups are the body's business: ``lopd.megatron.ranks.parallel.initialize`` reads
torchrun's environment. Ranks are forked by a process that has done the imports
(tests.megatron.forking); where env asks for an environment of their own, torchrun starts them, for
6 to 10 s.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from lopd.processes import GuardedProcess, die_with_parent, last_lines

ROOT = Path(__file__).resolve().parents[2]
HANGS_S = 500.0  # what takes so long hangs; the longest body takes half a minute on a quiet machine


class RanksFailed(AssertionError):
    """A rank raised, died or hung; the message ends with the log's last lines."""


def run_ranks(
    body: Callable[..., Any],
    num_ranks: int,
    *,
    threads: int = 1,
    timeout_s: float = HANGS_S,
    env: Mapping[str, str] | None = None,
    **arguments: Any,
) -> list[Any]:
    """Call body(**arguments) on num_ranks processes of one CPU thread each (or threads); the list
    of their results, by rank. RanksFailed on any failure.
    """
    with tempfile.TemporaryDirectory(prefix="lopd-ranks-") as name:
        folder = Path(name)
        (folder / "call.json").write_text(
            json.dumps(
                {"module": body.__module__, "function": body.__qualname__, "arguments": arguments}
            )
        )
        if env is None and not Path("/dev/nvidiactl").exists():  # CUDA does not go through a fork
            code = _FORKS.run(folder, num_ranks, threads, timeout_s)
        else:
            code = _torchrun(
                ["--module", "lopd.megatron.ranks.launch", "tests.megatron.launch", str(folder)],
                num_ranks,
                folder / "log",
                threads,
                timeout_s,
                env,
            )
        results = [folder / f"rank{rank}.json" for rank in range(num_ranks)]
        if code != 0 or not all(path.exists() for path in results):
            ending = (
                f"did not end within {timeout_s:.0f} s"
                if code is None
                else f"ended with code {code}"
            )
            raise RanksFailed(
                "\n".join(
                    [
                        f"{body.__module__}:{body.__qualname__} on {num_ranks} ranks {ending}",
                        *_end_of_log(folder / "log"),
                    ]
                )
            )
        return [json.loads(path.read_text()) for path in results]


def run_script(
    script: Path,
    num_ranks: int,
    *arguments: str,
    threads: int = 1,
    timeout_s: float = HANGS_S,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a python script on num_ranks ranks; its output, or RanksFailed."""
    with tempfile.TemporaryDirectory(prefix="lopd-ranks-") as name:
        log = Path(name) / "log"
        code = _torchrun([str(script), *arguments], num_ranks, log, threads, timeout_s, env or {})
        text = log.read_text(errors="replace")
        if code != 0:
            ending = (
                f"did not end within {timeout_s:.0f} s"
                if code is None
                else f"ended with code {code}"
            )
            raise RanksFailed(
                "\n".join([f"{script} on {num_ranks} ranks {ending}", *_end_of_log(log)])
            )
        return text


def _torchrun(
    command: list[str],
    num_ranks: int,
    log: Path,
    threads: int,
    timeout_s: float,
    env: Mapping[str, str],
) -> int | None:
    """Exit code, or None where it was still running after timeout_s and was stopped."""
    environment = {**_environment(), "OMP_NUM_THREADS": str(threads), **env}
    # lopd's own torchrun holds its store's port from the start: one that is chosen here could be
    # another program's before it is bound.
    launcher = [
        sys.executable,
        "-m",
        "lopd.megatron.ranks.torchrun",
        f"--nproc-per-node={num_ranks}",
        "--max-restarts=0",
    ]
    with log.open("wb") as output:
        process = GuardedProcess([*launcher, *command], env=environment, output=output, cwd=ROOT)
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.stop(grace_s=2.0)


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }


class _Forks:
    """The process that forks ranks: started when first asked, and anew where it, or a question of
    it, came to a bad end.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None

    def run(self, folder: Path, num_ranks: int, threads: int, timeout_s: float) -> int | None:
        """Return the exit code, or None if the ranks were stopped because timeout_s had passed."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {
            "folder": str(folder),
            "num_ranks": num_ranks,
            "threads": threads,
            "timeout_s": timeout_s,
            "environment": _environment(),
        }
        answer = ""
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            answer = self._process.stdout.readline()
        finally:
            if not answer:
                self._end()
        if not answer:
            assert self._log is not None
            self._log.seek(0)
            raise RanksFailed(
                "the process that forks ranks ended:\n"
                f"{self._log.read().decode(errors='replace')[-3000:]}"
            )
        code: int | None = json.loads(answer)
        return code

    def _start(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "tests.megatron.forking"]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process lives
        self._process = subprocess.Popen(
            command,
            env=_environment(),
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )

    def _end(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None


_FORKS = _Forks()


def _end_of_log(log: Path) -> list[str]:
    """What the ranks said last, without torchrun's own report on them."""
    lines = last_lines(log, 400)
    report = next(
        (
            number
            for number, line in enumerate(lines)
            if "torch/distributed/elastic" in line and "failed (exitcode" in line
        ),
        len(lines),
    )
    return (lines[:report] or lines)[-40:]


def call(folder: Path) -> None:
    """On a rank: the call in folder/call.json; its result into folder/rankN.json."""
    asked = json.loads((folder / "call.json").read_text())
    function = getattr(importlib.import_module(asked["module"]), asked["function"])
    result = function(**asked["arguments"])
    path = folder / f"rank{os.environ['RANK']}.json"
    path.write_text(json.dumps(result))


if __name__ == "__main__":
    call(Path(sys.argv[1]))
