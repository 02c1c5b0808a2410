"""Ranks for tests.megatron.launch, forked by one process that has done their imports: these cost
every rank four seconds of a processor, most bodies less.

``python -m tests.megatron.forking`` serves one client: a line of JSON on stdin asks for ranks (see
``run``), a line on stdout says with which code they ended (null: they hung). It ends with its stdin
or its parent, and the ranks with it. Nothing of torch runs before a fork, so a rank begins as after
its imports. What forked ranks share and torchrun's do not is the seed of Python's hashes: the order
of a set of names may differ between real ranks.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from lopd.megatron.ranks.forking import fork_store, rank_environment
from lopd.processes import die_with_parent

IMPORTS = (
    "pytest",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "tests.megatron.parity_cases",
    "tests.megatron.trainer_cases",
    "tests.models",
    "lopd.megatron.checkpoints.checkpoint",
    "lopd.megatron.weights.transfer",
    "lopd.stages.training_data",
)

NAMED_WITHIN_S = 30


def run(
    folder: str, num_ranks: int, threads: int, timeout_s: float, environment: Mapping[str, str]
) -> int | None:
    """The call in folder/call.json on so many ranks: 0, or the first failure's code as waitpid has
    it; None where they were ended after timeout_s.
    """
    store, port = fork_store()
    children = [
        _fork_rank(
            Path(folder), threads, {**environment, **rank_environment(rank, num_ranks, port)}
        )
        for rank in range(num_ranks)
    ]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    failed_at = 0.0
    try:
        while len(codes) < num_ranks:
            for child in children:
                if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0] == child:
                    codes[child] = ended[1]
            failed = next((code for code in codes.values() if code), 0)
            failed_at = failed_at or (time.monotonic() if failed else 0.0)
            # The other ranks may still have something to report about the failure.
            if failed and time.monotonic() > failed_at + 0.5:
                return failed
            if time.monotonic() > deadline:
                return None
            time.sleep(0.01)
        return next((code for code in codes.values() if code), 0)
    finally:
        for child in [store, *(child for child in children if child not in codes)]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _fork_rank(folder: Path, threads: int, environment: Mapping[str, str]) -> int:
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        die_with_parent(parent)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ |= environment
        import torch

        torch.set_num_threads(threads)
        from tests.megatron.launch import call

        call(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _other_threads() -> dict[str, str]:
    """Return the names of this process's threads, by id, without the first one and jemalloc's."""
    names: dict[str, str] = {}
    for path in Path("/proc/self/task").iterdir():
        # A thread may end between the two reads.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            names[path.name] = (path / "comm").read_text().strip()
    first = str(os.getpid())
    return {key: name for key, name in names.items() if key != first and name != "jemalloc_bg_thd"}


def main() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    # A thread of jemalloc bears the process's name until it has first run and named itself.
    deadline = time.monotonic() + NAMED_WITHIN_S
    while (threads := _other_threads()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads, (
        f"a fork would lose {threads}; only jemalloc, which pyarrow brings, knows of forks"
    )
    gc.freeze()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(**json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
