"""Whether a run fits a node, and if not, why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lopd.config import Config
from lopd.planning.hardware import Node
from lopd.planning.memory import MemoryUse
from lopd.planning.stages import TRAINED, ranks_of_a_node

_GIB = 2**30
_TIB = 2**40


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a stage does not fit.

    Attributes:
        stage: The stage, or "disk".
        what: What is over the limit, and its largest term, in words.
        is_count: Whether it is the number of GPUs that is too small, not their memory.
    """

    stage: str
    what: str
    is_count: bool = False


def find_problems(
    config: Config, memory: Mapping[str, MemoryUse], disk: Mapping[str, float], node: Node
) -> list[Problem]:
    """Return all problems of a run on a node.

    Args:
        config: The configuration.
        memory: Memory by stage.
        disk: Bytes on disk by what takes them.
        node: The machine.
    """
    found: list[Problem] = []
    # All problems are collected. A user who sees one at a time would plan again and again.
    for stage, use in memory.items():
        found += _stage_problems(config, stage, use, node)
    # The disk is one for the whole run: nothing is removed between stages.
    needed = sum(disk.values())
    if needed > node.disk:
        over = f"{needed / _TIB:.2f} TiB of {node.disk / _TIB:.2f}"
        term, size = _largest(disk)
        found.append(Problem("disk", f"{over}; largest term: {term}, {size / _TIB:.2f} TiB"))
    return found


def _stage_problems(config: Config, stage: str, use: MemoryUse, node: Node) -> Iterator[Problem]:
    if stage in TRAINED:
        # A training over several nodes is planned for one of them.
        gpus = ranks_of_a_node(getattr(config, stage))
    else:
        gpus = int(use.figures["gpus"])
    # The GPUs of one machine. The other nodes of a training are taken to be the same.
    if gpus > node.num_gpus:
        yield Problem(stage, f"needs {gpus} GPUs, the node has {node.num_gpus}", is_count=True)
    if use.gpu_total > node.gpu.memory:
        # The largest term is where a smaller setting helps most, so the line ends with it.
        over = f"{use.gpu_total / _GIB:.1f} GiB of a GPU's {node.gpu.memory / _GIB:.1f}"
        term, size = _largest(use.gpu)
        yield Problem(stage, f"{over}; largest term: {term}, {size / _GIB:.1f} GiB")
    # A server without room for one whole sequence would cut off responses, or start none.
    length = config.sglang.context_length
    if "kv_tokens" in use.figures and use.figures["kv_tokens"] < length:
        yield Problem(
            stage,
            f"KV cache for {use.figures['kv_tokens']:,.0f} tokens, "
            f"one sequence of sglang.context_length needs {length:,}",
        )
    if use.host_total > node.host_memory:
        over = f"{use.host_total / _GIB:.0f} GiB of the machine's {node.host_memory / _GIB:.0f}"
        term, size = _largest(use.host)
        yield Problem(stage, f"{over}; largest term: {term}, {size / _GIB:.0f} GiB")


def _largest(terms: Mapping[str, float]) -> tuple[str, float]:
    """Return the largest term, which is where a user can save most."""
    return max(terms.items(), key=lambda term: term[1])
