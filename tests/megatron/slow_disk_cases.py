"""What the ranks of test_slow_disk.py run: the last act of a training on a disk slower than a
collective may last.
"""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from lopd.errors import ArtifactError, LopdError
from lopd.megatron.ranks import parallel
from lopd.megatron.weights import hf_files
from lopd.megatron.weights.transfer import save_hf
from tests.megatron.trainer_cases import settings_of, trainer_of

COLLECTIVE_S = 8.0
SHARD_S = 12.0  # of writing one file


def write_slowly(model: str, folder: str) -> dict[str, Any]:
    trainer = trainer_of(model, settings_of({"expert": 2}))
    publish = hf_files.CheckpointWriter._publish

    def publish_slowly(self: Any) -> None:
        time.sleep(SHARD_S)
        publish(self)

    hf_files.CheckpointWriter._publish = publish_slowly  # type: ignore[method-assign]
    result: dict[str, Any] = {"waited": _told(trainer, model, Path(folder) / "slow")}
    hf_files.CheckpointWriter._publish = _full  # type: ignore[method-assign]
    result["full"] = _told(trainer, model, Path(folder) / "full")
    hf_files.CheckpointWriter._publish = publish  # type: ignore[method-assign]
    dist.barrier()
    _set_pg_timeout(datetime.timedelta(seconds=COLLECTIVE_S))
    if parallel.rank() == 0:  # the control: the other rank waits in a collective
        time.sleep(SHARD_S)
        return result
    try:
        dist.barrier()
    except RuntimeError:
        result["control"] = "the other rank was given up"
    return result


def _told(trainer: Any, model: str, folder: Path) -> str:
    """What this rank is told when the model is written."""
    dist.barrier()
    _set_pg_timeout(datetime.timedelta(seconds=COLLECTIVE_S))
    try:
        save_hf(trainer.export(), folder, source=Path(model), shard_bytes=2**30)
    except LopdError as error:
        return str(error)
    finally:
        _set_pg_timeout(datetime.timedelta(seconds=600))
    return "published" if (folder / "config.json").exists() else "nothing there"


def _full(self: Any) -> None:
    raise ArtifactError("cannot be written (no space)", where=str(self._folder))
