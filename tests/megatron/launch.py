"""Run a function on several ranks under torchrun over gloo, from a test, and get back what each rank returned.

    from tests.megatron.launch import run_ranks

    def body(folder: str, tensor: int) -> dict[str, float]:      # top level of an importable module, e.g. tests/megatron/test_parity.py
        parallel.initialize(...)
        return {"loss": 1.25}                                     # anything JSON can hold

    def test_it(tmp_path):
        results = run_ranks(body, 2, folder=str(tmp_path), tensor=2)   # [rank 0's, rank 1's]

Arguments and results travel as JSON (a float64 keeps its bits; tensors go as lists or through a file). An exception or a dead rank raises RanksFailed with
the end of the log; a hang ends after timeout_s. Process groups are the body's business: ``lopd.megatron.parallel.initialize`` reads torchrun's environment.
One launch costs 6 to 10 s of imports, so do several checks in one body.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lopd.processes import GuardedProcess, last_lines

ROOT = Path(__file__).resolve().parents[2]
HANGS_S = 500.0  # what takes so long hangs; the longest body takes half a minute on a quiet machine


class RanksFailed(AssertionError):
    """A rank raised, died or hung; the message ends with the log's last lines."""


def run_ranks(
    body: Callable[..., Any], num_ranks: int, *, threads: int = 1, timeout_s: float = HANGS_S, env: Mapping[str, str] | None = None, **arguments: Any
) -> list[Any]:
    """Call body(**arguments) on num_ranks processes of one CPU thread each (or threads); the list of their results, by rank. RanksFailed on any failure."""
    with tempfile.TemporaryDirectory(prefix="lopd-ranks-") as name:
        folder = Path(name)
        (folder / "call.json").write_text(json.dumps({"module": body.__module__, "function": body.__qualname__, "arguments": arguments}))
        code = _torchrun(["--module", "lopd.megatron.launch", "tests.megatron.launch", str(folder)], num_ranks, folder / "log", threads, timeout_s, env or {})
        results = [folder / f"rank{rank}.json" for rank in range(num_ranks)]
        if code != 0 or not all(path.exists() for path in results):
            ending = f"did not end within {timeout_s:.0f} s" if code is None else f"ended with code {code}"
            raise RanksFailed("\n".join([f"{body.__module__}:{body.__qualname__} on {num_ranks} ranks {ending}", *_end_of_log(folder / "log")]))
        return [json.loads(path.read_text()) for path in results]


def run_script(script: Path, num_ranks: int, *arguments: str, threads: int = 1, timeout_s: float = HANGS_S, env: Mapping[str, str] | None = None) -> str:
    """Run a python script on num_ranks ranks; its output, or RanksFailed."""
    with tempfile.TemporaryDirectory(prefix="lopd-ranks-") as name:
        log = Path(name) / "log"
        code = _torchrun([str(script), *arguments], num_ranks, log, threads, timeout_s, env or {})
        text = log.read_text(errors="replace")
        if code != 0:
            ending = f"did not end within {timeout_s:.0f} s" if code is None else f"ended with code {code}"
            raise RanksFailed("\n".join([f"{script} on {num_ranks} ranks {ending}", *_end_of_log(log)]))
        return text


def _torchrun(command: list[str], num_ranks: int, log: Path, threads: int, timeout_s: float, env: Mapping[str, str]) -> int | None:
    """Exit code, or None where it was still running after timeout_s and was stopped."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
        **env,
    }
    # lopd's own torchrun holds its store's port from the start: one that is chosen here could be another program's before it is bound.
    launcher = [sys.executable, "-m", "lopd.megatron.torchrun", f"--nproc-per-node={num_ranks}", "--max-restarts=0"]
    with log.open("wb") as output:
        process = GuardedProcess([*launcher, *command], env=environment, output=output, cwd=ROOT)
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.stop(grace_s=2.0)


def _end_of_log(log: Path) -> list[str]:
    """What the ranks said last, without torchrun's own report on them."""
    lines = last_lines(log, 400)
    report = next((number for number, line in enumerate(lines) if "torch/distributed/elastic" in line and "failed (exitcode" in line), len(lines))
    return (lines[:report] or lines)[-40:]


def _main(folder: Path) -> None:
    call = json.loads((folder / "call.json").read_text())
    function = getattr(importlib.import_module(call["module"]), call["function"])
    result = function(**call["arguments"])
    path = folder / f"rank{os.environ['RANK']}.json"
    path.write_text(json.dumps(result))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
