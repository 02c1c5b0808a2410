"""Hugging Face checkpoint folders on disk: reading slices of tensors, writing shards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from safetensors import SafetensorError, safe_open

from lopd.errors import ArtifactError
from lopd.megatron.weights.architecture import Architecture
from lopd.megatron.weights.checkpoint_files import INDEX, SINGLE, inspect_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

# Files that are copied beside the weights. They are data only, never code.
COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Files of a checkpoint that are mapped into memory at a time. The pages that were read count as
# memory of the process until the file is closed.
MAX_OPEN = 2


class CheckpointReader:
    """The tensors of a checkpoint, read slice by slice: ``reader.tensor(name)[0:4, :]``."""

    def __init__(self, folder: Path, arch: Architecture) -> None:
        """Open a checkpoint and hold its index, its headers and its architecture together.

        Raises:
            ArtifactError: What inspect_checkpoint finds first. It says how many faults there are.
        """
        found = inspect_checkpoint(folder, arch)
        if found.problems:
            first, *others = found.problems
            more = f" (and {len(others)} more: lopd check shows all)" if others else ""
            raise ArtifactError(
                first.what + more, where=first.where, limit=first.limit, remedy=first.remedy
            )
        self._folder = folder
        # The open files, the newest last.
        self._files: dict[str, Any] = {}
        self._file_of = found.file_of

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            self._close_oldest()

    def tensor(self, name: str) -> Any:
        """Return a tensor that is read when it is sliced, and only where it is sliced."""
        return self._open(self._file_of[name]).get_slice(name)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._folder / file
            # The tensors are read in the order of the layers, and shards follow that order. So a
            # file that was closed is rarely opened again.
            while len(self._files) >= MAX_OPEN:
                self._close_oldest()
            try:
                opened: Any = safe_open(path, framework="pt")
                self._files[file] = opened.__enter__()
            except (SafetensorError, OSError) as error:
                raise ArtifactError(
                    f"the file is damaged ({error})",
                    where=str(path),
                    remedy="copy the file again from its source",
                ) from None
        return self._files[file]

    def _close_oldest(self) -> None:
        # A dictionary keeps the order of insertion.
        oldest = next(iter(self._files))
        self._files.pop(oldest).__exit__(None, None, None)


class CheckpointWriter:
    """Writes a checkpoint folder that appears complete, or not at all.

    Tensors are added in order and written shard by shard. The folder is published when the context
    is left without an error.
    """

    def __init__(self, folder: Path, *, source: Path, shard_bytes: int) -> None:
        """Prepare a writer. Nothing is written before the context is entered.

        Args:
            folder: Where the checkpoint goes. An older folder of that name is replaced.
            source: The Hugging Face folder from which the configuration and the tokenizer come.
            shard_bytes: The size of a safetensors file at most. A single tensor may be larger.
        """
        self._folder = folder
        self._source = source
        self._shard_bytes = shard_bytes
        # Beside the target, so that a rename publishes it. Hidden, so that nobody takes it for a
        # checkpoint.
        self._partial = folder.with_name(f".{folder.name}.partial")
        # The tensors of the shard that is being collected.
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        # The names of the tensors in each shard that has been written.
        self._shards: list[list[str]] = []
        self._dtypes: set[str] = set()

    def __enter__(self) -> Self:
        with self._reporting_failures():
            # A process that was killed may have left a part.
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A block that failed leaves no checkpoint, and no half of one.
        if kind is None:
            with self._reporting_failures():
                self._publish()
        else:
            shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor. A shard is written as soon as the tensor does not fit into it any more.

        Raises:
            ArtifactError: The shard cannot be written.
        """
        num_bytes = tensor.numel() * tensor.element_size()
        # A shard ends before it becomes too large. A tensor that is larger than a shard has one of
        # its own.
        if self._pending and self._pending_bytes + num_bytes > self._shard_bytes:
            with self._reporting_failures():
                self._write_shard()
        # On the CPU, so that a shard that is being collected takes no memory of the GPU.
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += num_bytes
        self._total_bytes += num_bytes
        self._dtypes.add(str(tensor.dtype).removeprefix("torch."))

    @contextlib.contextmanager
    def _reporting_failures(self) -> Iterator[None]:
        try:
            yield
        # safetensors has an error of its own for a full disk.
        except (OSError, SafetensorError) as error:
            # The part is removed at once, because a full disk needs the space.
            shutil.rmtree(self._partial, ignore_errors=True)
            raise ArtifactError(
                f"cannot be written ({error})",
                where=str(self._folder),
                remedy="free disk space, or choose another folder",
            ) from error

    def _write_shard(self) -> None:
        # The final names hold the number of shards, which is known only at the end.
        path = self._partial / f"shard-{len(self._shards)}"
        # Imported here, because it imports torch, and the reader above does not need it.
        from safetensors.torch import save_file

        save_file(self._pending, path, metadata={"format": "pt"})
        _sync(path)
        self._shards.append(list(self._pending))
        self._pending = {}
        self._pending_bytes = 0

    def _publish(self) -> None:
        """Name the shards, write what stands beside them, and put the folder in its place."""
        if self._pending:
            self._write_shard()
        self._name_shards()
        config = json.loads((self._source / "config.json").read_text(encoding="utf-8"))
        # The base model may have been stored in another format than the student was trained in.
        for key in {"dtype", "torch_dtype"} & config.keys():
            (config[key],) = self._dtypes
        self._write_json("config.json", config)
        for name in COPIED_FILES:
            # No model has all of them.
            if (self._source / name).is_file():
                shutil.copyfile(self._source / name, self._partial / name)
                _sync(self._partial / name)
        # The names of the files are part of the folder, so it is forced to disk as well.
        _sync(self._partial)
        self._replace()

    def _name_shards(self) -> None:
        """Give the shards the names that transformers looks for, with an index if needed."""
        count = len(self._shards)
        names = [SINGLE]
        if count != 1:
            numbers = range(1, count + 1)
            names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in numbers]
        for number, name in enumerate(names):
            # The names have the number of files in them, which is known only now.
            (self._partial / f"shard-{number}").rename(self._partial / name)
        # A single file needs no index.
        if count > 1:
            weight_map = {
                tensor: name
                for name, tensors in zip(names, self._shards, strict=True)
                for tensor in tensors
            }
            metadata = {"total_size": self._total_bytes}
            self._write_json(INDEX, {"metadata": metadata, "weight_map": weight_map})

    def _replace(self) -> None:
        """Put the finished folder into the place of an older one."""
        # A folder that has content cannot be replaced by one rename. The older one is moved aside
        # first, and removed only when the new one stands in its place.
        old = self._folder.with_name(f".{self._folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self._folder.exists():
            self._folder.rename(old)
        self._partial.rename(self._folder)
        _sync(self._folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _write_json(self, name: str, content: Any) -> None:
        path = self._partial / name
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _sync(path)


def _sync(path: Path) -> None:
    """Force a file or a folder to disk."""
    # A folder cannot be opened for writing, and fsync does not need that.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
