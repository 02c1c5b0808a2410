"""Hugging Face checkpoint folders on disk: reading slices, writing shards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lopd.errors import ArtifactError
from lopd.megatron.weights.architecture import Architecture
from lopd.megatron.weights.hf_mapping import hf_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What is copied beside the weights: data only, never code.
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# files of a checkpoint that are mapped at a time: pages that were read count as memory of the
# process until the file is closed
MAX_OPEN = 2
IGNORED = (
    "rotary_emb.inv_freq",
)  # buffers that old checkpoints carry; they follow from the config


class CheckpointReader:
    """Tensors of a checkpoint, read slice by slice: ``reader.tensor(name)[0:4, :]``.

    ArtifactError when opened: files missing or damaged, tensors that the architecture wants and the
    checkpoint lacks, or the other way round, other shapes.
    """

    def __init__(self, folder: Path, arch: Architecture) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}  # open ones, the newest last
        self._place = self._index()
        wanted = hf_shapes(arch)
        missing = [name for name in wanted if name not in self._place]
        unknown = [
            name for name in self._place if name not in wanted and not name.endswith(IGNORED)
        ]
        if arch.tied_embeddings:
            unknown = [name for name in unknown if name != "lm_head.weight"]
        if missing or unknown:
            what = "; ".join(
                f"{len(names)} tensors {verb}, e.g. {names[0]}"
                for names, verb in ((missing, "missing"), (unknown, "unknown"))
                if names
            )
            raise ArtifactError(
                what,
                where=str(folder),
                remedy=f"give a complete {arch.family} checkpoint of the shape its config.json says",
            )
        for name, shape in wanted.items():
            found = tuple(self.tensor(name).get_shape())
            if found != shape:
                raise ArtifactError(
                    f"{name} has shape {found}, config.json says {shape}", where=str(folder)
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            self._close_oldest()

    def tensor(self, name: str) -> Any:
        """A tensor that is read where it is sliced."""
        return self._open(self._place[name]).get_slice(name)

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name."""
        path = self._folder / INDEX
        if path.exists():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ArtifactError(f"cannot be read ({error})", where=str(path)) from None
        return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._folder / file
            if not path.is_file():
                raise ArtifactError(
                    "no such file",
                    where=str(path),
                    remedy="give the folder of a Hugging Face checkpoint with safetensors",
                )
            while len(self._files) >= MAX_OPEN:
                self._close_oldest()
            try:
                self._files[file] = safe_open(path, framework="pt").__enter__()  # type: ignore[no-untyped-call]
            except (SafetensorError, OSError) as error:
                raise ArtifactError(
                    f"damaged ({error})", where=str(path), remedy="copy it again from where it came"
                ) from None
        return self._files[file]

    def _close_oldest(self) -> None:
        self._files.pop(next(iter(self._files))).__exit__(None, None, None)


class CheckpointWriter:
    """Writes a checkpoint folder that appears at once and complete, or not at all.

    Tensors are added in order and written shard by shard; leaving the context without an error
    publishes. ArtifactError where something cannot be written.
    """

    def __init__(self, folder: Path, *, source: Path, shard_bytes: int) -> None:
        self._folder, self._source, self._shard_bytes = folder, source, shard_bytes
        self._partial = folder.with_name(f".{folder.name}.partial")
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []
        self._dtypes: set[str] = set()

    def __enter__(self) -> Self:
        with self._writing():
            shutil.rmtree(self._partial, ignore_errors=True)  # left by a process that was killed
            self._partial.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            with self._writing():
                self._publish()
        else:
            shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        num_bytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + num_bytes > self._shard_bytes:
            with self._writing():
                self._write_shard()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += num_bytes
        self._total_bytes += num_bytes
        self._dtypes.add(str(tensor.dtype).removeprefix("torch."))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise ArtifactError(
                f"cannot be written ({error})",
                where=str(self._folder),
                remedy="free disk space or choose another folder",
            ) from error

    def _write_shard(self) -> None:
        path = self._partial / f"shard-{len(self._shards)}"
        save_file(self._pending, path, metadata={"format": "pt"})
        _sync(path)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _publish(self) -> None:
        if self._pending:
            self._write_shard()
        count = len(self._shards)
        names = (
            [SINGLE]
            if count == 1
            else [
                f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
            ]
        )
        for number, name in enumerate(names):
            (self._partial / f"shard-{number}").rename(self._partial / name)
        if count > 1:
            weight_map = {
                tensor: name
                for name, tensors in zip(names, self._shards, strict=True)
                for tensor in tensors
            }
            self._write_json(
                INDEX, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            )
        config = json.loads((self._source / "config.json").read_text(encoding="utf-8"))
        for key in (
            {"dtype", "torch_dtype"} & config.keys()
        ):  # the base may have been stored in another format than the student was trained in
            (config[key],) = self._dtypes
        self._write_json("config.json", config)
        for name in COPIED:
            if (self._source / name).is_file():
                shutil.copyfile(self._source / name, self._partial / name)
                _sync(self._partial / name)
        _sync(self._partial)
        self._replace()

    def _replace(self) -> None:
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
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
