"""Checkpoints to resume a training from: bit for bit on the layout that wrote them, to rounding on
any other.

    checkpoints/step-000012/    published by renaming step-000012.tmp, so a folder of this name is complete
        trainer.json            step, layout, the caller's state, size and checksum of every file
        rng-00000.json, ...     generator states of each rank
        everything else         weights and optimizer state as megatron.core.dist_checkpointing writes them (torch_dist)
    checkpoints/latest          name of the newest folder, for people and other tools
    checkpoints/step-000012.damaged     set aside because a file is not what was written; removed when the next checkpoint is published

Nothing in these files belongs to a layout: weights are tensors of the whole model, of which each
rank reads its part, and so is the optimizer's state (lopd.megatron.checkpoints.optimizer_state).
Only the generators' states do; under another layout they start from the seed (they matter for
dropout alone).

What is ours is JSON. Megatron-Core's format is not free of pickle: ``.metadata`` and sharded
objects are pickles, ``common.pt`` is a torch.save of plain values (read with weights_only). So load
only checkpoints that this tool wrote; nothing else ever points it at a folder.
"""

from __future__ import annotations

import base64
import contextlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from lopd.artifacts import (
    fsync_folder,
    publish_bytes,
    publish_json,
    remove_folder,
    sha256_json,
    storage_errors,
)
from lopd.errors import TrainingError
from lopd.megatron.checkpoints import optimizer_state
from lopd.megatron.checkpoints.writing import Writing, crc32, fsync_and_sum
from lopd.megatron.ranks import parallel
from lopd.megatron.weights.architecture import Architecture

SCHEMA_VERSION = 2
LATEST = "latest"
DAMAGED = ".damaged"
_ABOUT = "trainer.json"
_NAME = re.compile(r"step-(\d{6,})")
# Since 0.18 Megatron-Core asks who writes an asynchronous save, and its default, "nvrx", needs the
# package nvidia-resiliency-ext. Here a thread writes (lopd.megatron.checkpoints.writing).
_WRITER = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a checkpoint holds: the wrapped model (for its weights) and Megatron's optimizer with
    its state created.
    """

    module: Any  # GPTModel, or Float16Module around it
    architecture: Architecture
    optimizer: Any  # MegatronOptimizer

    def weights(self) -> dict[str, Any]:
        sharded: dict[str, Any] = self.module.sharded_state_dict(
            metadata={"singleton_local_shards": False, "dp_cp_group": parallel.data_context_group()}
        )
        return sharded


class Checkpoints:
    """The checkpoints of one training. Every method is collective: each rank calls it, on a file
    system that all ranks share.
    """

    def __init__(
        self, folder: Path, *, keep: int, layout: Mapping[str, Any], background: bool = False
    ) -> None:
        """keep: how many of the newest stay. layout: sizes of parallelism, dtype and layers.
        Removes what a kill left half written.

        background: save returns as soon as the state is copied to host memory, and a thread writes
        the copy (lopd.megatron.checkpoints.writing).
        """
        self._folder, self._keep, self._layout, self._background = (
            folder,
            keep,
            dict(layout),
            background,
        )
        self._pending: Writing | None = None
        self._about: dict[str, Any] = {}  # of the pending one
        if parallel.rank() == 0 and folder.is_dir():
            for path in folder.iterdir():
                if path.suffix in (".tmp", ".removing", ".partial"):
                    remove_folder(path) if path.is_dir() else path.unlink()
        parallel.barrier()

    def newest(self, before: int | None = None) -> Path | None:
        """The newest checkpoint, or the newest of fewer steps than ``before``; None: there is none."""
        found = torch.full((1,), -1, dtype=torch.int64, device=parallel.device())
        if parallel.rank() == 0:
            found[0] = max(
                (step for step, _ in self._published() if before is None or step < before),
                default=-1,
            )
        dist.broadcast(found, src=0)
        return None if found.item() < 0 else self._folder / _name(int(found.item()))

    def save(self, step: int, trained: Trained, state: Mapping[str, Any]) -> None:
        """Publishes a checkpoint after ``step`` updates; with background set begins to, which the
        next save, publish_written or finish completes.

        state: the caller's, anything JSON can hold. ArtifactError, TrainingError: it, or the one
        begun before, cannot be written.
        """
        self.finish()
        target = self._folder / _name(step)
        partial = target.with_name(target.name + ".tmp")
        if parallel.rank() == 0:
            remove_folder(partial)
            with storage_errors(partial):
                partial.mkdir(parents=True)
        parallel.barrier()
        with _explained(partial):
            optimizer = optimizer_state.sharded(
                trained.module, trained.architecture, trained.optimizer
            )
            sharded = {"model": trained.weights(), "optimizer": optimizer}
            request = dist_checkpointing.save(
                sharded, str(partial), async_sharded_save=True, **_WRITER
            )
            publish_json(partial / f"rng-{parallel.rank():05d}.json", _rng_state())
        assert request is not None
        self._pending = Writing(partial, request, background=self._background)
        frozen = json.loads(
            json.dumps(state)
        )  # the caller goes on counting in it while this is written
        self._about = {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "layout": self._layout,
            "state": frozen,
        }
        if not self._background:
            self.finish()

    def publish_written(self) -> None:
        """Publishes the checkpoint that is being written in the background if every rank has
        written its part; else does nothing. Collective.
        """
        if self._pending is not None and self._pending.is_written_everywhere():
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, if there is one, and publishes it.
        Collective. ArtifactError, TrainingError: it cannot be written.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        partial = pending.folder
        target = partial.with_suffix("")
        with _explained(partial):
            sums = pending.complete()
        files = _fsync_and_sum(partial, sums)
        if parallel.rank() == 0:
            about = {**self._about, "files": files}
            publish_json(partial / _ABOUT, {**about, "sha256": sha256_json(about)})
            remove_folder(target)
            partial.rename(target)
            fsync_folder(self._folder)
            publish_bytes(self._folder / LATEST, f"{target.name}\n".encode())
            for _, path in sorted(self._published())[: -self._keep]:
                remove_folder(path)
            for path in self._folder.glob(f"*{DAMAGED}"):
                remove_folder(path)
        parallel.barrier()

    def load_newest(
        self, trained: Trained, note: Callable[[str], None]
    ) -> tuple[int, dict[str, Any]] | None:
        """Puts the newest undamaged checkpoint in place; (step, the caller's state), or None: there
        is none.

        One with a file that is missing, cut short or changed is set aside and the one before it is
        taken: no figure of the training changes by that, only
        steps are repeated. note: told so in a line, on rank 0; also of a checkpoint of another
        layout.
        TrainingError: every checkpoint is damaged, or the newest is of another schema or dtype or
        cannot be read.
        """
        newest = path = self.newest()
        problems: list[tuple[Path, str]] = []
        while path is not None and (problem := _problem(path)) is not None:
            problems.append((path, problem))
            path = self.newest(before=_step(path))
        if path is None:
            if newest is None:
                return None
            what = "; ".join(f"{folder.name}/{problem}" for folder, problem in problems)
            raise TrainingError(
                f"every checkpoint is damaged: {what}",
                where=str(self._folder),
                remedy="remove this folder to begin the training anew",
            )
        if parallel.rank() == 0:
            for folder, problem in problems:
                remove_folder(folder.with_name(folder.name + DAMAGED))
                folder.rename(folder.with_name(folder.name + DAMAGED))
                note(
                    f"checkpoint {folder.name} is damaged ({problem}) and set aside as {folder.name}{DAMAGED}; going on from {path.name}"
                )
            if problems:
                publish_bytes(self._folder / LATEST, f"{path.name}\n".encode())
        return self._load(path, trained, note)

    def _load(
        self, path: Path, trained: Trained, note: Callable[[str], None]
    ) -> tuple[int, dict[str, Any]]:
        about = _about(path)
        layout: Mapping[str, Any] = {"layers": "local", **about["layout"]}
        self._check(path, about["schema_version"], layout)
        differing = _differing(layout, self._layout)
        try:
            loaded = dist_checkpointing.load({"model": trained.weights()}, str(path))
            trained.module.load_state_dict(loaded["model"])
            sizes = {key: layout[key] for key in ("tensor", "expert_tensor")}
            optimizer_state.load(
                trained.module, trained.architecture, trained.optimizer, path, **sizes
            )
        except (
            CheckpointException,
            CheckpointingException,
            OSError,
            RuntimeError,
            KeyError,
            ValueError,
        ) as error:
            remedy = "remove this folder: the one before it is used"
            raise TrainingError(
                f"checkpoint cannot be read ({_reason(error)})", where=str(path), remedy=remedy
            ) from error
        if not differing:
            _restore_rng(
                json.loads((path / f"rng-{parallel.rank():05d}.json").read_text(encoding="utf-8"))
            )
        elif parallel.rank() == 0:
            changes = ", ".join(
                f"{key} {layout.get(key)} -> {self._layout.get(key)}" for key in differing
            )
            note(
                f"checkpoint {path.name} is of another layout ({changes}): weights and optimizer state go on, equal to rounding"
            )
        parallel.barrier()
        return int(about["step"]), about["state"]

    def _published(self) -> list[tuple[int, Path]]:
        if not self._folder.is_dir():
            return []
        return [
            (_step(path), path) for path in self._folder.iterdir() if _NAME.fullmatch(path.name)
        ]

    def _check(self, path: Path, schema: int, layout: Mapping[str, Any]) -> None:
        where = str(path)
        if schema != SCHEMA_VERSION:
            remedy = "use the version that wrote it, or remove the folder of checkpoints"
            raise TrainingError(
                f"checkpoint of schema {schema}",
                where=where,
                limit=f"schema {SCHEMA_VERSION}",
                remedy=remedy,
            )
        for key in ("dtype", "layers"):
            theirs, ours = layout[key], self._layout[key]
            if theirs != ours:
                raise TrainingError(
                    f"checkpoint was written with {key} = {theirs}",
                    where=where,
                    limit=f"this run has {ours}",
                    remedy="use the same",
                )


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]


# ---- what was written is what is read ---------------------------------------------------------------------------------------------------------------


def _about(path: Path) -> dict[str, Any]:
    """trainer.json. ValueError: it is not what was written."""
    about: dict[str, Any] = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
    if about.pop("sha256", None) != sha256_json(about):
        raise ValueError("checksum differs")
    return about


def _fsync_and_sum(folder: Path, known: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """{name: [size, CRC-32]} of every file, each made durable and read back by the rank that wrote
    it. Collective; on every rank. known: this rank's so far.

    A CRC because it notices every single flipped bit and all but one in four billion other changes,
    three times faster than a cryptographic hash: against somebody who wants to deceive a hash next
    to the files would not help either.
    """
    mine = dict(known)
    for path in folder.iterdir():
        written_by = re.fullmatch(r"__(\d+)_\d+\.distcp|rng-(\d+)\.json", path.name)
        if (
            path.name not in known
            and (int(written_by[1] or written_by[2]) if written_by else 0) == parallel.rank()
        ):
            mine[path.name] = fsync_and_sum(path)
    if parallel.rank() == 0:
        fsync_folder(folder)
    return {
        name: figures for part in parallel.gather_objects(mine) for name, figures in part.items()
    }


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint's files ("file: ..."), the same on every rank; None: nothing.
    Collective: each rank reads its share of the files.
    """
    mine = None
    try:
        files = _about(path)["files"]
        for name in sorted(files)[parallel.rank() :: parallel.world_size()]:
            mine = mine or _file_problem(path / name, *files[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        mine = f"{_ABOUT}: {error}"
    return next((problem for problem in parallel.gather_objects(mine) if problem is not None), None)


def _file_problem(path: Path, size: int, crc: int) -> str | None:
    if not path.is_file():
        return f"{path.name}: missing"
    if path.stat().st_size != size:
        return f"{path.name}: {path.stat().st_size} bytes instead of {size}"
    return None if crc32(path) == crc else f"{path.name}: checksum differs"


@contextlib.contextmanager
def _explained(partial: Path) -> Iterator[None]:
    """Says of a failed save that it was one, and why. Megatron's writers and torch.save have errors
    of their own for a full disk.
    """
    remedy = "free space and run again"
    try:
        with storage_errors(partial):
            yield
    except (CheckpointException, CheckpointingException) as error:  # a writer of some rank failed
        raise TrainingError(
            f"checkpoint cannot be written ({_reason(error)})", where=str(partial), remedy=remedy
        ) from error
    except RuntimeError as error:  # torch.save on a full disk tells no more than "iostream error"
        if "iostream" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise TrainingError(
            f"checkpoint cannot be written ({_reason(error)})", where=str(partial), remedy=remedy
        ) from error


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: Megatron and torch wrap a writer's error several times."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[-1][:300] if str(error).strip() else type(error).__name__


# ---- generators -----------------------------------------------------------------------------------------------------------------------------------


def _rng_state() -> dict[str, Any]:
    """States of torch's generators and of Megatron's tracker (dropout differs between tensor
    ranks).
    """
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "cpu": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "tracker": {name: _encode(state) for name, state in tracker.items()},
    }


def _restore_rng(saved: Mapping[str, Any]) -> None:
    torch.set_rng_state(_decode(saved["cpu"]))
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(saved["cuda"]))
    tensor_parallel.get_cuda_rng_tracker().set_states(
        {name: _decode(state) for name, state in saved["tracker"].items()}
    )


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
