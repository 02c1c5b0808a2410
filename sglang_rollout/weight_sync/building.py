"""The receiver that a configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lopd.config import SyncSection
from lopd.errors import ConfigError
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.servers.weights_file import (
    ask_for_restart,
    remember_unsaved_weights,
    remember_weights,
)
from sglang_rollout.weight_sync.delta import Unchanged
from sglang_rollout.weight_sync.disk import DiskWeightReceiver
from sglang_rollout.weight_sync.distributed import DistributedWeightReceiver
from sglang_rollout.weight_sync.interface import WeightReceiver
from sglang_rollout.weight_sync.tensor import TensorWeightReceiver
from sglang_rollout.weight_sync.verification import TensorVerification


def build_receiver(
    settings: SyncSection,
    engines: Sequence[SGLangEngine],
    *,
    folder: Path,
    template_dir: Path,
    weights_file: Path | None = None,
) -> WeightReceiver:
    """For the servers of these engines. folder: where a transport by disk may put versions.
    template_dir: a checkpoint with the model's tensors.

    weights_file: of the servers (sglang_rollout.servers.supervision): where a disk sync remembers
    what a restarted one must serve, and the others that the newest weights are in no folder, so
    that a restarted one has its first ones, under their version. The others also have servers
    started again that a failed sync has left with half of it.

    ConfigError: verify = "scores", which needs the trainer's own: a receiver sees tensors only
    (sglang_rollout.weight_sync.verification.ScoreVerification, after the sync).
    """
    if settings.verify == "scores":
        what, limit = (
            'a receiver cannot verify by "scores": it has none of the trainer\'s',
            "tensors, off",
        )
        raise ConfigError(
            what,
            where="sync.verify",
            limit=limit,
            remedy='set "off" and use ScoreVerification after each sync',
        )
    verification = (
        TensorVerification(timeout_s=settings.timeout_s)
        if settings.verify in (None, "tensors")
        else None
    )
    if settings.transport == "disk":
        return DiskWeightReceiver(
            engines,
            folder,
            template_dir,
            running_requests=settings.running_requests or "finish",
            timeout_s=settings.timeout_s,
            verification=verification,
            remember=partial(remember_weights, weights_file) if weights_file is not None else None,
        )
    in_place = (
        TensorWeightReceiver
        if settings.transport == "tensor"
        else partial(DistributedWeightReceiver, host=settings.host)
    )
    return in_place(
        engines,
        template_dir,
        running_requests=settings.running_requests or "pause",
        timeout_s=settings.timeout_s,
        verification=verification,
        unchanged=Unchanged() if settings.delta else None,
        ask_for_restart=partial(ask_for_restart, weights_file)
        if weights_file is not None
        else None,
        remember=partial(remember_unsaved_weights, weights_file)
        if weights_file is not None
        else None,
    )
