"""Runs commands of lopd for an example, and knows what they have cost."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from lopd.processes import die_with_parent

# The option number of prctl(2) in <linux/prctl.h>.
_PR_SET_CHILD_SUBREAPER = 36
# How long the last processes of a command may take to end.
_PATIENCE_S = 30.0


def adopt_orphans() -> None:
    """Make this process the parent of processes that outlive the one that started them."""
    # A server may outlive the process that started it for a moment. It then becomes a child of
    # this process, and its processor time is not lost.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run_measured(
    command: Sequence[str | Path],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> float:
    """Run a command to its end, with its output in a log. It ends with this process.

    Args:
        command: The program and its arguments.
        log: The file that the output is appended to.
        env: The complete environment. None means ours.
        cwd: The working directory. None means ours.

    Returns:
        The processor seconds of all its processes, those of servers and ranks included.

    Raises:
        subprocess.CalledProcessError: The command failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    before = _children_seconds()
    with log.open("a", encoding="utf-8") as output:
        output.write(f"$ {' '.join(map(str, command))}\n")
        output.flush()
        subprocess.run(
            command,
            check=True,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=cwd,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    # Processes that their parents did not wait for come to this process, which then knows their
    # times too.
    deadline = time.monotonic() + _PATIENCE_S
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.05)
    return _children_seconds() - before


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def begin_with_copies(run_dir: Path, stages: Sequence[Path]) -> None:
    """Begin a run with finished stages of other runs: whole, or not at all.

    Args:
        run_dir: The folder of the run. What is there is removed.
        stages: The folders of the stages. The record of the configuration is that of the first
            one's run.
    """
    partial_dir = run_dir.with_name(f"{run_dir.name}.partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    for stage in stages:
        shutil.copytree(stage, partial_dir / stage.name)
    shutil.copy2(stages[0].parent / "config.json", partial_dir)
    shutil.rmtree(run_dir, ignore_errors=True)
    partial_dir.rename(run_dir)
