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
    folder: str | Path,
    template_dir: str | Path,
    weights_file: str | Path | None = None,
) -> WeightReceiver:
    """Return the receiver for the servers of these engines.

    Args:
        settings: The section [sync].
        engines: One engine for each server.
        folder: The folder for the versions of a transport by disk.
        template_dir: A checkpoint with the tensors of the model.
        weights_file: The weights file of servers that lopd runs. A sync by disk records there what
            a restarted server must serve. The other transports record that the newest weights are
            in no folder, and use it to have servers restarted that a failed sync has left with half
            of an update.

    Raises:
        ConfigError: sync.verify is "scores". A receiver sees tensors only, and that verification
            needs the trainer's own scores (ScoreVerification, after the sync).
    """
    folder = Path(folder)
    template_dir = Path(template_dir)
    weights_file = Path(weights_file) if weights_file is not None else None
    if settings.verify == "scores":
        raise ConfigError(
            'a receiver cannot verify with "scores": it has no scores of the trainer',
            where="sync.verify",
            limit='"tensors" or "off"',
            remedy='set sync.verify = "off" and use ScoreVerification after each sync',
        )
    verification = None
    # None is the default. Where it should be "scores", the caller has decided that already.
    if settings.verify in (None, "tensors"):
        verification = TensorVerification(timeout_s=settings.timeout_s)
    if settings.transport == "disk":
        return _by_disk(settings, engines, folder, template_dir, weights_file, verification)
    return _in_place(settings, engines, template_dir, weights_file, verification)


def _by_disk(
    settings: SyncSection,
    engines: Sequence[SGLangEngine],
    folder: Path,
    template_dir: Path,
    weights_file: Path | None,
    verification: TensorVerification | None,
) -> WeightReceiver:
    """Return the receiver that writes a folder and has the servers load it."""
    # A folder is loaded by one call, so requests can finish with the old weights first. A folder
    # must have all tensors, so there is no delta. And a call that fails leaves no half of an
    # update, so nothing has to be restarted.
    remember_folder = partial(remember_weights, weights_file) if weights_file else None
    return DiskWeightReceiver(
        engines,
        folder,
        template_dir,
        running_requests=settings.running_requests or "finish",
        timeout_s=settings.timeout_s,
        verification=verification,
        remember=remember_folder,
    )


def _in_place(
    settings: SyncSection,
    engines: Sequence[SGLangEngine],
    template_dir: Path,
    weights_file: Path | None,
    verification: TensorVerification | None,
) -> WeightReceiver:
    """Return the receiver that changes the tensors inside the running servers."""
    # In place the weights change over many calls. Requests must be paused for all of them, and a
    # failure in between leaves a server with a mixture, which only a restart or another sync
    # repairs.
    restart = partial(ask_for_restart, weights_file) if weights_file else None
    remember_version = partial(remember_unsaved_weights, weights_file) if weights_file else None
    # Only a broadcast needs an address. Shared memory needs none.
    receiver = (
        TensorWeightReceiver
        if settings.transport == "tensor"
        else partial(DistributedWeightReceiver, host=settings.host)
    )
    return receiver(
        engines,
        template_dir,
        running_requests=settings.running_requests or "pause",
        timeout_s=settings.timeout_s,
        verification=verification,
        unchanged=Unchanged() if settings.delta else None,
        ask_for_restart=restart,
        remember=remember_version,
    )
