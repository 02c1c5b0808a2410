"""Which part of a job this process is: which worker of an array, which node of several. Standard
library only.

A cluster tells it by environment variables, each by its own: Slurm by the index of an array and the
number of a node, Kubernetes by the index of a pod in its job, SkyPilot by the rank of a node.
``--shards auto/4`` and ``--node auto`` read them; ``--shards 1/4`` and ``--node 1/2`` say it
outright.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from lopd.artifacts import Share
from lopd.errors import ConfigError

_WORKER = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "PET_NODE_RANK", "SKYPILOT_NODE_RANK")
_NODE = ("SLURM_NODEID", "PET_NODE_RANK", "JOB_COMPLETION_INDEX", "SKYPILOT_NODE_RANK")


def read_share(text: str, environment: Mapping[str, str] = os.environ) -> Share:
    """``1/4`` or ``auto/4``: the second of four workers, or the one that the cluster says.
    ConfigError: neither.
    """
    index, count = _read(text, "--shards", _WORKER, environment)
    return Share(index, count)


def read_node(text: str, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """``1/2`` or ``auto/2``: (number of this machine, of how many). ConfigError: neither."""
    return _read(text, "--node", _NODE, environment)


def _read(
    text: str, option: str, names: Sequence[str], environment: Mapping[str, str]
) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if index == "auto":
        index = next(
            (environment[name] for name in names if environment.get(name, "").isdigit()), ""
        )
        if not index:
            remedy = f"say it outright, for example {option} 0/{count or 2}"
            raise ConfigError(
                f"{option} {text}: no cluster tells which one this is",
                where="environment",
                limit=f"one of {', '.join(names)}",
                remedy=remedy,
            )
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(
            f"{option} {text!r:.40}",
            where="command line",
            limit="i/n with 0 <= i < n",
            remedy=f"write for example {option} 0/2",
        )
    return int(index), int(count)
