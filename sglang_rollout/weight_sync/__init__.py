"""New weights for running servers: one interface and three transports (docs/weight_sync.md)."""

from __future__ import annotations

from sglang_rollout.weight_sync.building import build_receiver
from sglang_rollout.weight_sync.colocation import Colocation, SeparateMemory
from sglang_rollout.weight_sync.disk import (
    DiskWeightReceiver,
    load_folder,
    update_weights_from_disk,
)
from sglang_rollout.weight_sync.distributed import DistributedWeightReceiver
from sglang_rollout.weight_sync.interface import Bucket, SyncReport, WeightReceiver
from sglang_rollout.weight_sync.tensor import TensorWeightReceiver
from sglang_rollout.weight_sync.verification import Probe, ScoreVerification, TensorVerification

__all__ = [
    "Bucket",
    "Colocation",
    "DiskWeightReceiver",
    "DistributedWeightReceiver",
    "Probe",
    "ScoreVerification",
    "SeparateMemory",
    "SyncReport",
    "TensorVerification",
    "TensorWeightReceiver",
    "WeightReceiver",
    "build_receiver",
    "load_folder",
    "update_weights_from_disk",
]
