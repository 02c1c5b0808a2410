"""Server and trainer on the same GPUs (sync.colocate): what that asks of the configuration. The
turns themselves: sglang_rollout.weight_sync.colocation.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from lopd.config import Config, SGLangSection
from lopd.errors import ConfigError


def training_settings(config: Config) -> SGLangSection:
    """How the student's servers are run while it is trained, and asked.

    Where they share its GPUs they can give memory back. One that dies is then not started again,
    because what it would need is the trainer's, and nobody waits for it: the same command goes on.
    """
    if not config.sync.colocate:
        return config.sglang
    more = {**config.sglang.extra_args, "enable_memory_saver": True}
    return config.sglang.model_copy(
        update={"extra_args": more, "restarts": 0, "outage_timeout_s": 0.0}
    )


def colocation_problems(config: Config, *, on_gpu: bool | None) -> Iterator[ConfigError]:
    """Why server and trainer cannot take turns as configured; nothing where they need not. on_gpu:
    of this machine; None: it will be another.

    On a CPU they can, for a trial: sglang_rollout.cpu.memory stands for torch_memory_saver.
    """
    if not config.sync.colocate:
        return
    away = "set sync.colocate=false"
    if on_gpu and importlib.util.find_spec("torch_memory_saver") is None:
        yield ConfigError(
            "torch_memory_saver is not installed",
            where="sync.colocate",
            remedy=f"pip install torch-memory-saver, or {away}",
        )
    if config.sglang.student_urls:
        what = "only servers that lopd starts, on this machine, make room for the trainer"
        yield ConfigError(
            what,
            where="sglang.student_urls",
            limit="none, with sync.colocate",
            remedy=f"leave them out, or {away}",
        )
    if config.distill.parallel.nodes > 1:
        what = f"distill.parallel.nodes = {config.distill.parallel.nodes}: the servers are on the first machine alone"
        yield ConfigError(what, where="sync.colocate", limit="1 node", remedy=away)
    if config.distill.refresh.is_on and config.distill.refresh.keep_teacher:
        what = "distill.refresh.keep_teacher keeps the teacher's server on the GPUs that student and trainer take turns with"
        yield ConfigError(
            what,
            where="sync.colocate",
            limit="keep_teacher = false",
            remedy=f"set distill.refresh.keep_teacher=false, or {away}",
        )
