"""Weights by way of a folder that the servers can read.

This is the safest transport. The old weights serve until the new ones are all there, and a
restarted server finds the newest ones in the folder.
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
from sglang_rollout.server_side.checkpoint import check_same_tensors
from sglang_rollout.servers.weights_file import remember_weights
from sglang_rollout.weight_sync.interface import Bucket, Inventory, SyncReport, nbytes, on_all
from sglang_rollout.weight_sync.session import RunningRequests, UpdateSession
from sglang_rollout.weight_sync.verification import TensorVerification

_INDEX = "model.safetensors.index.json"
# Each call to a server has its own timeout. The wait for all of them lasts this much longer.
_ANSWER_MARGIN_S = 10


class DiskWeightReceiver:
    """A WeightReceiver that writes a folder for each version and has the servers load it.

    A folder is published by a rename once it is complete. After the load the previous folder is
    removed. The extra memory is one copy of a bucket where the bucket lies on a GPU, and otherwise
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
        """
        Args:
            engines: One engine for each server.
            folder: The folder that holds the versions.
            template_dir: A checkpoint. The versions share its configuration, tokenizer, tensor
                names and shapes.
            running_requests: What happens to running requests.
            timeout_s: The longest time in seconds that one call to a server may take.
            verification: Compares the servers' weights with those that were sent.
            remember: A function that is told the folder and the version once the servers have them.
        """
        self.report = SyncReport("disk")
        self._engines = tuple(engines)
        self._folder = folder
        self._template_dir = template_dir
        self._timeout_s = timeout_s
        self._inventory = Inventory(template_dir, str(folder))
        self._session = UpdateSession(self._engines, running_requests, timeout_s)
        self._verification = verification
        self._remember = remember
        self._version = ""
        self._began = 0.0
        # Tensor -> the file of this version that holds it.
        self._files: dict[str, str] = {}
        self._num_buckets = 0

    def begin(self, version: str) -> None:
        """Start a version. A version that was begun and never committed is forgotten.

        Raises:
            EngineError: The folder cannot be written, or a server cannot report fingerprints.
        """
        # The version becomes the name of a folder and must not lead out of the one for versions.
        assert Path(version).name == version, f"{version!r} is no plain folder name"
        self._began = time.perf_counter()
        self.report = SyncReport("disk", version)
        self._version = version
        self._files = {}
        self._num_buckets = 0
        self._inventory.begin(version)
        if self._verification is not None:
            self._verification.begin(self._engines, self._template_dir)
        # A process that was killed in the middle of a sync has left its half of a version.
        for rest in self._folder.glob(".*.partial"):
            shutil.rmtree(rest, ignore_errors=True)
        try:
            self._partial.mkdir(parents=True)
            self._copy_template()
        except OSError as error:
            raise self._not_written(error) from None

    def _copy_template(self) -> None:
        """Copy the configuration and the tokenizer, but neither tensors nor their index."""
        for source in self._template_dir.iterdir():
            if source.is_file() and source.suffix != ".safetensors" and source.name != _INDEX:
                shutil.copyfile(source, self._partial / source.name)

    def receive(self, bucket: Bucket) -> None:
        """Write a bucket as one file.

        Raises:
            EngineError: A tensor is not the model's, or the folder cannot be written.
        """
        assert self._version, "begin() first"
        self._inventory.take(bucket)
        if not bucket:
            return
        # A file for each bucket: how many there will be is not known before the last one.
        file_name = f"model-{self._num_buckets:05d}.safetensors"
        self._num_buckets += 1
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in bucket}
        if self._verification is not None:
            # From the tensors themselves and not from the copies: the fingerprints are then
            # computed where the tensors lie, on a GPU if they can be.
            self._verification.expect(bucket)
        try:
            save_file(tensors, self._partial / file_name, metadata={"format": "pt"})
        # On a full disk safetensors raises its own exception. It comes from Rust and is a
        # RuntimeError, not an OSError.
        except (OSError, RuntimeError) as error:
            raise self._not_written(error) from None
        # For the index, which tells a reader where each tensor is.
        self._files.update(dict.fromkeys(tensors, file_name))
        size = nbytes(tensors.values())
        self.report.num_tensors += len(tensors)
        self.report.sent_tensors += len(tensors)
        self.report.num_bytes += size
        self.report.sent_bytes += size
        # A contiguous tensor on the CPU is not copied by the line above.
        copied = sum(
            tensor.numel() * tensor.element_size()
            for name, tensor in bucket
            if tensors[name].data_ptr() != tensor.data_ptr()
        )
        self.report.extra_bytes = max(self.report.extra_bytes, copied)

    def commit(self) -> None:
        """Load the version into the servers and check that they report it.

        Raises:
            EngineError: Tensors are missing, the folder cannot be written, or as load_folder().
        """
        assert self._version, "begin() first"
        # A server would keep the old values of missing tensors without a message.
        self._inventory.check_complete()
        target = self._folder / self._version
        try:
            # SGLang and transformers find the file of a tensor by this index.
            index = {"metadata": {}, "weight_map": self._files}
            (self._partial / _INDEX).write_text(json.dumps(index), encoding="utf-8")
            # A version that failed before may stand there already, and a rename needs an empty
            # place. The rename is the publication: a server that starts at this moment sees either
            # no folder of this version or all of it.
            shutil.rmtree(target, ignore_errors=True)
            os.rename(self._partial, target)
        except OSError as error:
            raise self._not_written(error) from None
        # Asked at every commit: a server of the user's may have got another model since the last
        # one, and SGLang would answer "success" to tensors of other shapes.
        self._inventory.check_served(self._engines, self._timeout_s)
        self._load(target)
        # In this order: the record names the new folder before the previous one goes. A server that
        # dies between the two still finds the folder that the record names.
        if self._remember is not None:
            self._remember(target, self._version)
        # One version is enough for a restart, and each is as large as the model.
        for other in self._folder.iterdir():
            if other != target and other.is_dir():
                shutil.rmtree(other, ignore_errors=True)
        self._version = ""
        self.report.seconds = time.perf_counter() - self._began

    def abandon(self) -> None:
        """Forget the version that was begun. The servers continue with the weights they have."""
        if self._version:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._version = ""

    def _load(self, target: Path) -> None:
        self._session.open(self._version, in_place=False)
        try:
            update_from_folder(self._session, target, self._version, timeout_s=self._timeout_s)
            self._session.end_of_changes()
            # Before close(): with the modes that pause, nobody gets an answer of wrong weights.
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
            # The servers have these weights already, and with "finish" they answer with them.
            # Nobody must take the answers for answers of this version.
            with contextlib.suppress(EngineError):
                self._session.set_version(f"{self._version} (not verified)")
            raise

    @property
    def _partial(self) -> Path:
        """The folder of the version while it is being written."""
        return self._folder / f".{self._version}.partial"

    def _not_written(self, error: Exception) -> EngineError:
        return EngineError(
            f"weight version {self._version} cannot be written ({error})",
            where=str(self._folder),
            remedy="delete files in this folder, or use a folder on another disk",
        )


def update_weights_from_disk(
    engine: SGLangEngine,
    model_dir: Path,
    *,
    version: str,
    like: Path | None = None,
    timeout_s: float = 300.0,
) -> None:
    """Serve the weights of another checkpoint of the same architecture on each server.

    Running requests end first, and cached prefixes are forgotten. A server that lopd starts again
    will have these weights.

    Args:
        engine: The engine of one server or of a fleet.
        model_dir: The folder of the Hugging Face checkpoint.
        version: The weight version that the servers report from then on.
        like: A checkpoint of the served model. None: the folder that the servers name, which may
            be gone after a weight sync.
        timeout_s: The longest time in seconds that one server may need.

    Raises:
        EngineError: For the same reasons as load_folder().
    """
    load_folder(engine.engines, model_dir, version, like=like, timeout_s=timeout_s)
    # Only after the load: a server that dies during it must come back with the weights it had.
    if engine.server is not None:
        remember_weights(engine.server.weights_file, model_dir, version)


def load_folder(
    engines: Sequence[SGLangEngine],
    model_dir: Path,
    version: str,
    *,
    running_requests: RunningRequests = "finish",
    like: Path | None = None,
    timeout_s: float = 300.0,
) -> None:
    """Make servers serve another checkpoint of the same architecture.

    Cached prefixes are forgotten.

    Args:
        engines: One engine for each server.
        model_dir: The folder of the Hugging Face checkpoint.
        version: The weight version that the servers report from then on.
        running_requests: What happens to running requests.
        like: As for update_weights_from_disk().
        timeout_s: The longest time in seconds that one server may need.

    Raises:
        EngineError: The checkpoint has other tensors than the served model, or a server refuses.
            The servers then have their old weights. Or a server is silent for timeout_s or reports
            another version.
    """
    # Before the session: a folder of another model must not pause a server at all.
    inventory = Inventory(model_dir, str(model_dir))
    if like is None:
        inventory.check_served(engines, timeout_s)
    else:
        check_same_tensors(inventory.shapes, like)
    session = UpdateSession(engines, running_requests, timeout_s)
    session.open(version, in_place=False)
    # Without abandon() a server that refuses would stay paused, with clients waiting for it.
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
    """Make the call that loads a folder, on all servers of an open session."""
    body = {
        "model_path": str(model_dir.resolve()),
        # SGLang sets the version together with the weights, so no answer has one without the other.
        "weight_version": version,
        # The session has dealt with running requests already.
        "abort_all_requests": False,
    }
    flushed = dict(zip(session.engines, session.flushed_by_update, strict=True))

    def update(engine: SGLangEngine) -> None:
        full_body = {**body, "flush_cache": flushed[engine]}
        engine.call("POST", "/update_weights_from_disk", full_body, timeout_s=timeout_s)

    on_all(session.engines, update, timeout_s + _ANSWER_MARGIN_S)
