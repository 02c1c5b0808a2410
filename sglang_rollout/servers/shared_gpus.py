"""What sync.colocate, server and trainer on the same GPUs, asks of the configuration.

sglang_rollout.weight_sync.colocation moves the memory itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from lopd.config import Config, SGLangSection
from lopd.errors import ConfigError

# The field of SGLang's ServerArgs without which a server keeps no choices of its routers.
ROUTED_EXPERTS_ARGUMENT = "enable_return_routed_experts"


def student_settings(config: Config) -> SGLangSection:
    """Return the settings of the student's servers that make rollouts."""
    if not config.rollout.routed_experts:
        return config.sglang
    # A teacher without experts would not start with it, so it is of these servers alone.
    extra_args = {**config.sglang.extra_args, ROUTED_EXPERTS_ARGUMENT: True}
    return config.sglang.model_copy(update={"extra_args": extra_args})


def training_settings(config: Config) -> SGLangSection:
    """Return the settings of the student's servers while the student is trained.

    With sync.colocate the servers can give their memory back, and a server that dies is not started
    again.
    """
    settings = student_settings(config)
    if not config.sync.colocate:
        return settings
    # With this argument SGLang allocates weights and cache so that they can be given back and taken
    # again.
    extra_args = {**settings.extra_args, "enable_memory_saver": True}
    # A restarted server takes its memory at once, but at that moment the memory may be the
    # trainer's. So there is no restart, and no client waits for one (outage_timeout_s = 0): the
    # stage ends, and the same command continues from the newest checkpoint.
    changes = {"extra_args": extra_args, "restarts": 0, "outage_timeout_s": 0.0}
    return settings.model_copy(update=changes)


def colocation_problems(config: Config, *, on_gpu: bool | None) -> Iterator[ConfigError]:
    """Yield the reasons why server and trainer cannot share GPUs as configured.

    Nothing is yielded without sync.colocate. A CPU needs no extra package: there
    sglang_rollout.cpu.memory replaces torch_memory_saver.

    Args:
        config: The whole configuration.
        on_gpu: Whether this machine has a GPU. None means that the run is for another machine.
    """
    if not config.sync.colocate:
        return
    off = "set sync.colocate=false"
    # Only the machine that will run can be searched for the package.
    if on_gpu and importlib.util.find_spec("torch_memory_saver") is None:
        yield ConfigError(
            "torch_memory_saver is not installed",
            where="sync.colocate",
            remedy=f"run pip install torch-memory-saver, or {off}",
        )
    # lopd starts its servers with the memory saver (training_settings). Whether others have it is
    # not known.
    if config.sglang.student_urls:
        yield ConfigError(
            "only servers that lopd starts on this machine can give GPU memory to the trainer",
            where="sglang.student_urls",
            limit="no URL in sglang.student_urls with sync.colocate",
            remedy=f"remove the URLs, or {off}",
        )
    # The trainer's ranks on another machine would wait for GPUs that no server there gives back.
    nodes = config.distill.parallel.nodes
    if nodes > 1:
        yield ConfigError(
            f"distill.parallel.nodes = {nodes} is too large: the servers run only on the "
            "first machine",
            where="sync.colocate",
            limit="exactly 1",
            remedy=off,
        )
    # Two sides take turns on the GPUs, and a kept teacher would be a third one that never leaves.
    if config.distill.refresh.is_on and config.distill.refresh.keep_teacher:
        yield ConfigError(
            "distill.refresh.keep_teacher keeps the teacher's server on the GPUs that student and "
            "trainer share",
            where="sync.colocate",
            limit="exactly keep_teacher = false",
            remedy=f"set distill.refresh.keep_teacher=false, or {off}",
        )
