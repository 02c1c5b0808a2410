"""Weights by way of a folder that the servers can read. Safest: the old weights serve until the new
ones are all there, and a restarted server finds them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import save_file

from lopd.errors import EngineError
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.servers.weights_file import remember_weights
from sglang_rollout.weight_sync.interface import Bucket, Inventory, SyncReport, nbytes, on_all
from sglang_rollout.weight_sync.session import RunningRequests, UpdateSession
from sglang_rollout.weight_sync.verification import TensorVerification

_INDEX = "model.safetensors.index.json"


class DiskWeightReceiver:
    """A folder for each version, published by rename, then loaded by the servers and the former one
    removed.

    folder: holds the versions. template_dir: the checkpoint whose config, tokenizer, tensor names
    and shapes they share. remember: told the folder and the version once the servers have them,
    before the former folder goes. Extra memory: one copy of a bucket where it lies on a GPU, else
    what the page cache takes.
    """

    def __init__(
        self,
        engines: Sequence[SGLangEngine],
        folder: Path,
        template_dir: Path,
        *,
        running_requests: RunningRequests = "finish",
        timeout_s: float = 300.0,
        verification: TensorVerification | None = None,
        remember: Callable[[Path, str], None] | None = None,
    ) -> None:
        self.report = SyncReport("disk")
        self._engines, self._folder, self._template_dir, self._timeout_s = (
            tuple(engines),
            folder,
            template_dir,
            timeout_s,
        )
        self._inventory = Inventory(template_dir, str(folder))
        self._session = UpdateSession(self._engines, running_requests, timeout_s)
        self._verification, self._remember = verification, remember
        self._version, self._began = "", 0.0
        self._files: dict[str, str] = {}  # tensor -> file
        self._num_buckets = 0

    def begin(self, version: str) -> None:
        """Start a version; one that was begun and never committed is forgotten."""
        assert Path(version).name == version, f"{version!r} is no plain folder name"
        self._began, self.report = time.perf_counter(), SyncReport("disk", version)
        self._version, self._files, self._num_buckets = version, {}, 0
        self._inventory.begin(version)
        if self._verification is not None:
            self._verification.begin(self._engines, self._template_dir)
        for rest in self._folder.glob(".*.partial"):
            shutil.rmtree(rest, ignore_errors=True)
        try:
            self._partial.mkdir(parents=True)
            for source in self._template_dir.iterdir():
                if source.is_file() and source.suffix != ".safetensors" and source.name != _INDEX:
                    shutil.copyfile(source, self._partial / source.name)
        except OSError as error:
            raise self._not_written(error) from None

    def receive(self, bucket: Bucket) -> None:
        """Write a bucket. EngineError: a tensor the model does not have, has twice, or has in
        another shape; or the folder cannot be written.
        """
        assert self._version, "begin() first"
        self._inventory.take(bucket)
        if not bucket:
            return
        name = f"model-{self._num_buckets:05d}.safetensors"
        self._num_buckets += 1
        tensors = {
            tensor_name: tensor.detach().contiguous().cpu() for tensor_name, tensor in bucket
        }
        if self._verification is not None:
            for tensor_name, tensor in bucket:
                self._verification.expect(tensor_name, tensor)
        try:
            save_file(tensors, self._partial / name, metadata={"format": "pt"})
        except (
            OSError,
            RuntimeError,
        ) as error:  # safetensors has an exception of its own for a full disk, which is a RuntimeError of Rust's
            raise self._not_written(error) from None
        self._files.update(dict.fromkeys(tensors, name))
        size = nbytes(tensors.values())
        self.report.num_tensors += len(tensors)
        self.report.sent_tensors += len(tensors)
        self.report.num_bytes += size
        self.report.sent_bytes += size
        copied = sum(
            tensor.numel() * tensor.element_size()
            for name, tensor in bucket
            if tensors[name].data_ptr() != tensor.data_ptr()
        )
        self.report.extra_bytes = max(self.report.extra_bytes, copied)

    def commit(self) -> None:
        """Load the version into the servers and see that they report it. EngineError: tensors are
        missing, or as load_folder.
        """
        assert self._version, "begin() first"
        # a server would keep the old values of what is missing without a word
        self._inventory.check_complete()
        target = self._folder / self._version
        try:
            (self._partial / _INDEX).write_text(
                json.dumps({"metadata": {}, "weight_map": self._files}), encoding="utf-8"
            )
            shutil.rmtree(target, ignore_errors=True)
            os.rename(self._partial, target)
        except OSError as error:
            raise self._not_written(error) from None
        self._inventory.check_served(self._engines, self._timeout_s)
        self._load(target)
        if self._remember is not None:
            self._remember(target, self._version)
        for other in self._folder.iterdir():
            if other != target and other.is_dir():
                shutil.rmtree(other, ignore_errors=True)
        self._version = ""
        self.report.seconds = time.perf_counter() - self._began

    def abandon(self) -> None:
        """Forget what was begun. The servers go on with what they have."""
        if self._version:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._version = ""

    def _load(self, target: Path) -> None:
        self._session.open(self._version, in_place=False)
        try:
            update_from_folder(self._session, target, self._version, timeout_s=self._timeout_s)
            self._session.end_of_changes()
            if self._verification is not None:
                self._verify(self._verification)
            self._session.close()
        except EngineError:
            self._session.abandon()
            raise

    def _verify(self, verification: TensorVerification) -> None:
        try:
            self.report.verified_tensors = verification.check(self._engines)
        except EngineError:
            with contextlib.suppress(
                EngineError
            ):  # the servers have them already: at least nobody shall take them for this version
                self._session.set_version(f"{self._version} (not verified)")
            raise

    @property
    def _partial(self) -> Path:
        return self._folder / f".{self._version}.partial"

    def _not_written(self, error: Exception) -> EngineError:
        return EngineError(
            f"weight version {self._version} cannot be written ({error})",
            where=str(self._folder),
            remedy="free space there, or use another folder",
        )


def update_weights_from_disk(
    engine: SGLangEngine, model_dir: Path, *, version: str, timeout_s: float = 300.0
) -> None:
    """Serve the weights of another checkpoint of the same architecture on each server of the
    engine.

    Running requests end first, and cached prefixes are forgotten. A server that lopd starts again
    will have these weights.

    Args:
        engine: The engine of one server or of a fleet.
        model_dir: The folder of the Hugging Face checkpoint.
        version: The weight version that the servers report from then on.
        timeout_s: The longest time in seconds that one server may need.

    Raises:
        EngineError: As load_folder.
    """
    load_folder(engine.engines, model_dir, version, timeout_s=timeout_s)
    if engine.server is not None:
        remember_weights(engine.server.weights_file, model_dir, version)


def load_folder(
    engines: Sequence[SGLangEngine],
    model_dir: Path,
    version: str,
    *,
    running_requests: RunningRequests = "finish",
    timeout_s: float = 300.0,
) -> None:
    """Have servers serve another checkpoint of the same architecture, cached prefixes forgotten.

    EngineError: other tensors than the served model's, or a server refuses (its message is given),
    is silent for timeout_s, or reports another version. In the first two cases it serves the
    weights it had.
    """
    Inventory(model_dir, str(model_dir)).check_served(engines, timeout_s)
    session = UpdateSession(engines, running_requests, timeout_s)
    session.open(version, in_place=False)
    try:
        update_from_folder(session, model_dir, version, timeout_s=timeout_s)
        session.end_of_changes()
        session.close()
    except EngineError:
        session.abandon()
        raise


def update_from_folder(
    session: UpdateSession, model_dir: Path, version: str, *, timeout_s: float
) -> None:
    """The bare call, to be made within an open session."""
    body = {
        "model_path": str(model_dir.resolve()),
        "weight_version": version,
        "abort_all_requests": False,
    }
    flushed = dict(zip(session.engines, session.flushed_by_update, strict=True))

    def update(engine: SGLangEngine) -> None:
        engine.call(
            "POST",
            "/update_weights_from_disk",
            {**body, "flush_cache": flushed[engine]},
            timeout_s=timeout_s,
        )

    on_all(session.engines, update, timeout_s + 10)
