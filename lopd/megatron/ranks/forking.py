"""The process that forks a training's ranks once it has done their imports.

``python -m lopd.megatron.ranks.forking`` imports what a rank of sft or distill needs and then reads
one line of JSON (Order) from stdin: what to run. It does for one machine without GPUs what torchrun
does, and saves time there: imports take a rank four seconds of a processor, and here they are done
once, and before anybody waits for them. A GPU's driver does not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Mapping, Sequence

from lopd.processes import die_with_parent

# What both trainings import, and what an evaluation at a weight sync imports on rank 0.
IMPORTS = (
    "transformers.models.auto.tokenization_auto",
    "lopd.megatron.ranks.torchrun",
    "lopd.stages.training_rank",
    "lopd.stages.held_out",
    "lopd.stages.refresh_requester",
)
# Seconds in which the other ranks may still report why they fail, after the first one has failed.
_LAST_WORDS_S = 0.5


def main() -> int:
    """Import, wait for the order, run its ranks, and return the exit code."""
    # Here and not in the ranks: the imports are done once, and the forked ranks share them.
    for name in IMPORTS:
        importlib.import_module(name)
    line = sys.stdin.readline()
    # The parent closes the pipe where it needs no ranks any more.
    if not line:
        return 0
    order = json.loads(line)
    # Objects that exist now are never collected, so the ranks do not copy their memory.
    gc.freeze()
    store, port = fork_store()
    number = int(order["ranks"])
    ranks: list[int] = []
    for rank in range(number):
        child = os.fork()
        if child == 0:
            # A rank has exactly the environment of its order, and nothing that this process was
            # started with.
            os.environ.clear()
            os.environ |= {**order["environment"], **rank_environment(rank, number, port)}
            return _become_rank(order["module"], order["args"], store_parent=os.getppid())
        ranks.append(child)
    # What is left dies with this process (die_with_parent), and so does the store.
    return _watch(ranks, {store})


def rank_environment(rank: int, number: int, port: int) -> dict[str, str]:
    """Return the variables by which torchrun tells a rank its place."""
    place = {
        # The names that torchrun gives to its processes, so that a rank need not know who started
        # it.
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": number,
        "LOCAL_WORLD_SIZE": number,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    return {
        **{name: str(value) for name, value in place.items()},
        "MASTER_ADDR": "127.0.0.1",
        # The store exists already: rank 0 must not open one.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def fork_store() -> tuple[int, int]:
    """Return the process of the ranks' store, and its port."""
    from lopd.megatron.ranks.torchrun import open_store

    # A process of its own: the store has threads, and a process with threads must not fork.
    read_end, write_end = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        die_with_parent(parent)
        store = open_store()
        os.write(write_end, f"{store.port}\n".encode())
        while True:
            signal.pause()
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        return child, int(pipe.readline())


def _become_rank(module: str, args: Sequence[str], *, store_parent: int) -> int:
    """Run a module as ``python -m`` does, in a process that was just forked."""
    die_with_parent(store_parent)
    # For ps. SGLang depends on this package and names its processes in the same way.
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle").setproctitle(
            " ".join([sys.executable, "-u", "-m", module, *args])
        )
    import torch

    # torch has read the variable when it was imported, in the process that was forked.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def _watch(ranks: Sequence[int], others: set[int]) -> int:
    """Wait for all ranks and return 0, or 1 soon after the first one has failed."""
    left = set(ranks)
    deadline: float | None = None
    while left and (deadline is None or time.monotonic() < deadline):
        # Any child: which rank ends first cannot be known.
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            time.sleep(0.01)
            continue
        if child in others:
            raise RuntimeError("the store of the ranks has ended")
        left.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            sys.stderr.write(f"rank {ranks.index(child)} {_ending(code)}\n")
            # The others get a moment to report errors of their own, which may be the cause of this
            # one.
            deadline = deadline or time.monotonic() + _LAST_WORDS_S
    return 0 if deadline is None else 1


def _ending(code: int) -> str:
    if code > 0:
        return f"ended with code {code}"
    return f"was ended by {signal.Signals(-code).name}"


def order_line(
    module: str, args: Sequence[str], ranks: int, environment: Mapping[str, str]
) -> bytes:
    """Return the line that this program reads: what to run, on how many ranks, and in what
    environment.
    """
    order = {
        "module": module,
        "args": list(args),
        "ranks": ranks,
        "environment": dict(environment),
    }
    return json.dumps(order).encode() + b"\n"


if __name__ == "__main__":
    sys.exit(main())
