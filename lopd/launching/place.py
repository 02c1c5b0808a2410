"""Which part of a job this process is: which worker of an array, or which node of several.

A cluster says so by environment variables, and each cluster has its own. Slurm has the index of an
array and the number of a node, Kubernetes the index of a pod in its job, SkyPilot the rank of a
node. ``--shards auto/4`` and ``--node auto/2`` read them. ``--shards 1/4`` and ``--node 1/2`` give
the number themselves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from lopd.artifacts import Share
from lopd.errors import ConfigError

# The first variable that is set to a number counts. In a Slurm array of single tasks SLURM_NODEID
# is always 0, so it must not be read for a worker. PET_NODE_RANK is Kubeflow's.
_WORKER = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "PET_NODE_RANK", "SKYPILOT_NODE_RANK")
_NODE = ("SLURM_NODEID", "PET_NODE_RANK", "JOB_COMPLETION_INDEX", "SKYPILOT_NODE_RANK")


def read_share(text: str, environment: Mapping[str, str] = os.environ) -> Share:
    """Return the part of a stage that a worker makes.

    Args:
        text: ``1/4`` for the second of four workers, or ``auto/4`` for the one that the cluster
            gives.
        environment: The environment variables.

    Raises:
        ConfigError: The text is neither, or no cluster gives the number.
    """
    index, count = _read(text, "--shards", _WORKER, environment)
    return Share(index, count)


def read_node(text: str, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the number of this machine, and the number of machines.

    Args:
        text: ``1/2`` for the second of two machines, or ``auto/2`` for the one that the cluster
            gives.
        environment: The environment variables.

    Raises:
        ConfigError: The text is neither, or no cluster gives the number.
    """
    return _read(text, "--node", _NODE, environment)


def _read(
    text: str, option: str, names: Sequence[str], environment: Mapping[str, str]
) -> tuple[int, int]:
    index, _, count = text.partition("/")
    # The number of parts is always given: a cluster knows it under yet other names.
    if index == "auto":
        # Only a number counts: a variable may have another text outside a job.
        index = next(
            (environment[name] for name in names if environment.get(name, "").isdigit()), ""
        )
        if not index:
            raise ConfigError(
                f"{option} {text}: no variable of a cluster gives the number of this process",
                where="environment",
                limit=f"one of {', '.join(names)}",
                remedy=f"write the number into the option, for example {option} 0/{count or 2}",
            )
    # isdigit refuses signs and spaces too.
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(
            f"{option} {text!r:.40} is not a part of a whole",
            where="command line",
            limit="i/n, where i is at least 0 and below n",
            remedy=f"write for example {option} 0/2",
        )
    return int(index), int(count)
