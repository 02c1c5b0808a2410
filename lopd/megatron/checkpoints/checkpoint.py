"""Checkpoints to resume a training from.

On the layout that wrote it a checkpoint resumes bit for bit, on any other one up to rounding.

    checkpoints/step-000012/    published by a rename from step-000012.tmp: it is complete
        trainer.json            step, layout, the caller's state, size and checksum of every file
        rng-00000.json, ...     the states of the generators of each rank
        everything else         weights and optimizer state, as dist_checkpointing of Megatron-Core
                                writes them (torch_dist)
    checkpoints/latest          the name of the newest folder, for people and other tools
    checkpoints/step-000012.damaged
                                set aside because a file is not what was written; removed when the
                                next checkpoint is published

The files belong to no layout. Weights are tensors of the whole model, of which each rank reads its
part, and so is the optimizer's state (lopd.megatron.checkpoints.optimizer_state). Of a training of
adapters both are those of the adapters, since no other weight changes. Only the states of the
generators belong to a layout. Under another one the generators start from the seed, which matters
for dropout alone.

Our own files are JSON. Megatron-Core's format uses pickle: ``.metadata`` and sharded objects are
pickles, ``common.pt`` is a torch.save of plain values (read with weights_only). So load only
checkpoints that this tool wrote. Nothing else in lopd ever reads a checkpoint folder.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from lopd.artifacts import (
    fsync_folder,
    publish_bytes,
    publish_json,
    remove_folder,
    sha256_json,
    storage_errors,
)
from lopd.config import LoraSection
from lopd.errors import TrainingError
from lopd.megatron.checkpoints import optimizer_state
from lopd.megatron.checkpoints.failures import READ_ERRORS, explain_failed_save, innermost_reason
from lopd.megatron.checkpoints.generators import generator_states, restore_generators
from lopd.megatron.checkpoints.integrity import ABOUT, problem_of, read_about, sum_files
from lopd.megatron.checkpoints.writing import Writing
from lopd.megatron.ranks import parallel
from lopd.megatron.weights.architecture import Architecture

# It is raised when the form of the files changes, and another version is refused by its number.
SCHEMA_VERSION = 2
LATEST = "latest"
DAMAGED = ".damaged"
_NAME = re.compile(r"step-(\d{6,})")
# Since 0.18 Megatron-Core asks who writes an asynchronous save. Its default, "nvrx", needs the
# package nvidia-resiliency-ext. Here a thread writes (lopd.megatron.checkpoints.writing).
_WRITER = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a checkpoint holds."""

    # A GPTModel, or the Float16Module around it.
    module: Any
    architecture: Architecture
    # Megatron-Core's optimizer. Its state must exist.
    optimizer: Any
    # The adapters, if they alone are trained.
    lora: LoraSection

    def sharded(self) -> dict[str, Any]:
        """Return weights and optimizer state as Megatron-Core's sharded tensors."""
        optimizer = optimizer_state.sharded(
            self.module, self.architecture, self.optimizer, self.lora
        )
        return {"model": self.weights(), "optimizer": optimizer}

    def load(self, path: Path, **sizes: int) -> None:
        """Read weights and optimizer state of a checkpoint. Collective.

        Args:
            path: The folder of the checkpoint.
            sizes: Those that optimizer_state.load takes.
        """
        # The weights come first: an optimizer without float32 weights of its own takes the model's.
        if self.lora.is_on:
            optimizer_state.load_adapters(self.module, self.architecture, self.lora, path, **sizes)
        else:
            loaded = dist_checkpointing.load({"model": self.weights()}, str(path))
            self.module.load_state_dict(loaded["model"])
        optimizer_state.load(
            self.module, self.architecture, self.optimizer, self.lora, path, **sizes
        )

    def weights(self) -> dict[str, Any]:
        """Return the trained weights as Megatron-Core's sharded tensors."""
        if self.lora.is_on:
            # The frozen weights are in the folder that the training began from.
            return {**optimizer_state.sharded_adapters(self.module, self.architecture, self.lora)}
        # Megatron-Core takes the group to choose which of the ranks with the same weights writes.
        sharded: dict[str, Any] = self.module.sharded_state_dict(
            metadata={"singleton_local_shards": False, "dp_cp_group": parallel.data_context_group()}
        )
        return sharded


class Checkpoints:
    """The checkpoints of one training.

    Every method is collective: each rank calls it. All ranks must share the file system.
    """

    def __init__(
        self, folder: Path, *, keep: int, layout: Mapping[str, Any], background: bool = False
    ) -> None:
        """Remove the incomplete files of a training that was killed.

        Args:
            folder: The folder of all checkpoints of the training.
            keep: How many of the newest checkpoints stay.
            layout: The sizes of parallelism, the dtype, the kind of layers and the adapters.
            background: Whether save returns as soon as the state is copied to host memory, and a
                thread writes the copy (lopd.megatron.checkpoints.writing).
        """
        self._folder = folder
        self._keep = keep
        self._layout = dict(layout)
        self._background = background
        # The save that is not published yet, and its trainer.json without the files.
        self._pending: Writing | None = None
        self._about: dict[str, Any] = {}
        # What is not published yet has one of these suffixes. After a kill it is worthless. It is
        # removed now, because nothing else would ever remove it.
        if parallel.rank() == 0 and folder.is_dir():
            for path in folder.iterdir():
                if path.suffix in (".tmp", ".removing", ".partial"):
                    remove_folder(path) if path.is_dir() else path.unlink()
        # No rank may begin a save while rank 0 still removes folders of the same names.
        parallel.barrier()

    def newest(self, before: int | None = None) -> Path | None:
        """Return the newest checkpoint, or None if there is none.

        Args:
            before: If given, only checkpoints of fewer steps count.
        """
        # Rank 0 looks and tells the others. A network file system may show them another listing.
        step = torch.full((1,), -1, dtype=torch.int64, device=parallel.device())
        if parallel.rank() == 0:
            steps = [step for step, _ in self._published() if before is None or step < before]
            step[0] = max(steps, default=-1)
        dist.broadcast(step, src=0)
        return None if step.item() < 0 else self._folder / _name(int(step.item()))

    def save(self, step: int, trained: Trained, state: Mapping[str, Any]) -> None:
        """Publish a checkpoint.

        In the background it only begins to. The next save, publish_written or finish completes it.

        Args:
            step: The number of updates made.
            trained: The model and the optimizer to save.
            state: The caller's state: anything that JSON can hold.

        Raises:
            ArtifactError: The checkpoint, or the one begun before, cannot be written.
            TrainingError: The checkpoint, or the one begun before, cannot be written.
        """
        # One save at a time. A second copy of the state might not fit into host memory, and the
        # checkpoints must be published in the order of their steps.
        self.finish()
        partial = self._folder / f"{_name(step)}.tmp"
        if parallel.rank() == 0:
            remove_folder(partial)
            with storage_errors(partial):
                partial.mkdir(parents=True)
        # The other ranks write into the folder.
        parallel.barrier()
        with explain_failed_save(partial):
            # It plans the save, with collectives, and writes nothing yet.
            request = dist_checkpointing.save(
                trained.sharded(), str(partial), async_sharded_save=True, **_WRITER
            )
            publish_json(partial / f"rng-{parallel.rank():05d}.json", generator_states())
        assert request is not None
        self._pending = Writing(partial, request, background=self._background)
        self._about = {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "layout": self._layout,
            # A copy: the caller continues to count in its state while the checkpoint is written.
            "state": json.loads(json.dumps(state)),
        }
        if not self._background:
            self.finish()

    def publish_written(self) -> None:
        """Publish the checkpoint that is being written in the background, if it is written.

        It does nothing unless every rank has written its part.
        """
        # The ranks decide together: publishing is collective, and one rank may be slower.
        if self._pending is not None and self._pending.is_written_everywhere():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and publish it.

        Raises:
            ArtifactError: The checkpoint cannot be written.
            TrainingError: The checkpoint cannot be written.
        """
        if self._pending is None:
            return
        pending = self._pending
        # It is forgotten first. After an error the next call must not publish what is left of it.
        self._pending = None
        with explain_failed_save(pending.folder):
            sums = pending.complete()
        # Every file is durable before the folder gets its name. Otherwise a power failure could
        # leave a folder of that name with empty files.
        files = sum_files(pending.folder, sums)
        if parallel.rank() == 0:
            self._publish(pending.folder, files)
        # No rank may continue before the checkpoint is there: it could end the training, or look
        # for the newest one.
        parallel.barrier()

    def _publish(self, partial: Path, files: Mapping[str, list[int]]) -> None:
        """Give a written checkpoint its name, then remove older ones. On rank 0 alone."""
        target = partial.with_suffix("")
        about = {**self._about, "files": files}
        publish_json(partial / ABOUT, {**about, "sha256": sha256_json(about)})
        # A training that went back to an older checkpoint writes the same step again.
        remove_folder(target)
        # The rename is the moment at which the checkpoint exists. The fsync keeps it over a power
        # failure; only then may older ones go.
        partial.rename(target)
        fsync_folder(self._folder)
        publish_bytes(self._folder / LATEST, f"{target.name}\n".encode())
        # Older ones go last. A kill before this line leaves one too many, never one too few.
        for _, path in sorted(self._published())[: -self._keep]:
            remove_folder(path)
        # A new checkpoint is whole, so the training no longer depends on what was damaged.
        for path in self._folder.glob(f"*{DAMAGED}"):
            remove_folder(path)

    def load_newest(
        self, trained: Trained, note: Callable[[str], None]
    ) -> tuple[int, dict[str, Any]] | None:
        """Load the newest undamaged checkpoint.

        A checkpoint with a file that is missing, cut short or changed is set aside, and the one
        before it is used. That changes no figure of the training; it only repeats steps.

        Args:
            trained: The model and the optimizer that take the state.
            note: A function that is called on rank 0 with a line about each damaged checkpoint, and
                about a checkpoint of another layout.

        Returns:
            The number of updates made and the caller's state, or None if there is no checkpoint.

        Raises:
            TrainingError: Every checkpoint is damaged, or the newest is of another schema or dtype,
                or it cannot be read.
        """
        newest = self.newest()
        path = newest
        problems: list[tuple[Path, str]] = []
        # From the newest back to the first that is whole. All files are verified before any is
        # loaded: a load that fails in the middle leaves a model of old and new weights.
        while path is not None and (problem := problem_of(path)) is not None:
            problems.append((path, problem))
            path = self.newest(before=_step(path))
        if path is None:
            if newest is None:
                return None
            # To begin anew is the user's decision: it may throw away days of training.
            what = "; ".join(f"{folder.name}/{problem}" for folder, problem in problems)
            raise TrainingError(
                f"every checkpoint is damaged: {what}",
                where=str(self._folder),
                remedy="remove this folder: the training then starts from step 0",
            )
        if parallel.rank() == 0 and problems:
            self._set_aside(problems, path, note)
        return self._load(path, trained, note)

    def _set_aside(
        self, problems: list[tuple[Path, str]], path: Path, note: Callable[[str], None]
    ) -> None:
        # They are kept under another name, so that somebody can look at them, and that the next
        # start does not read all of their files again.
        for folder, problem in problems:
            aside = folder.with_name(folder.name + DAMAGED)
            remove_folder(aside)
            folder.rename(aside)
            note(
                f"checkpoint {folder.name} is damaged ({problem}) and set aside as {aside.name}; "
                f"the training continues from {path.name}"
            )
        publish_bytes(self._folder / LATEST, f"{path.name}\n".encode())

    def _load(
        self, path: Path, trained: Trained, note: Callable[[str], None]
    ) -> tuple[int, dict[str, Any]]:
        about = read_about(path)
        # Checkpoints from before Transformer Engine's layers or adapters were supported do not name
        # theirs.
        layout: Mapping[str, Any] = {"layers": "local", "lora": "none", **about["layout"]}
        _require_same_format(path, about["schema_version"], layout, self._layout)
        try:
            trained.load(path, **{key: layout[key] for key in ("tensor", "expert_tensor")})
        except READ_ERRORS as error:
            raise TrainingError(
                f"the checkpoint cannot be read ({innermost_reason(error)})",
                where=str(path),
                remedy="remove this folder: the training then continues from the one before it",
            ) from error
        changes = _changes(layout, self._layout)
        if not changes:
            # The generators come last, so that nothing after them draws a number.
            rng = (path / f"rng-{parallel.rank():05d}.json").read_text(encoding="utf-8")
            restore_generators(json.loads(rng))
        elif parallel.rank() == 0:
            note(
                f"checkpoint {path.name} is of another layout ({', '.join(changes)}): "
                "weights and optimizer state continue, equal up to rounding"
            )
        # No rank may train on while another one still reads. A later save could remove this
        # checkpoint under it.
        parallel.barrier()
        return int(about["step"]), about["state"]

    def _published(self) -> list[tuple[int, Path]]:
        if not self._folder.is_dir():
            return []
        paths = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]
        return [(_step(path), path) for path in paths]


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _require_same_format(
    path: Path, schema: int, theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> None:
    # Before anything is read: what the other keys mean depends on the version.
    if schema != SCHEMA_VERSION:
        raise TrainingError(
            f"the checkpoint has schema version {schema}",
            where=str(path),
            limit=f"exactly {SCHEMA_VERSION}",
            remedy="use the version of lopd that wrote this checkpoint, or remove the folder of "
            "checkpoints",
        )
    # Another dtype has other optimizer state, and other layers have other names of weights. Other
    # adapters have other shapes, and with another alpha they would be another model.
    for key in ("dtype", "layers", "lora"):
        if theirs[key] != ours[key]:
            raise TrainingError(
                f"the checkpoint was written with {key} = {theirs[key]}",
                where=str(path),
                limit=f"exactly {key} = {ours[key]}, as in this run",
                remedy=f"use the same {key} as the checkpoint, or remove the folder of checkpoints",
            )


def _changes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return what differs between two layouts, in words."""
    keys = sorted({*theirs, *ours})
    return [
        f"{key} {theirs.get(key)} -> {ours.get(key)}"
        for key in keys
        if theirs.get(key) != ours.get(key)
    ]
