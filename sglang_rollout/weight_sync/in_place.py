"""What the transports share that change a server's weights while it holds requests back, bucket by
bucket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar

from lopd.errors import EngineError
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.weight_sync.delta import Unchanged
from sglang_rollout.weight_sync.interface import Bucket, Inventory, SyncReport, nbytes, started
from sglang_rollout.weight_sync.session import RunningRequests, UpdateSession
from sglang_rollout.weight_sync.verification import TensorVerification


class InPlaceReceiver:
    """The servers' weights change from the first bucket on; requests are held back from begin until
    commit.

    template_dir: a checkpoint with the names and shapes of the tensors. ask_for_restart: of servers
    that a failed sync has left with half of it. remember: told the version once the servers have
    it, in no folder. A transport adds _send, and _join and _leave where it has something to open
    and close.
    """

    transport: ClassVar[str]

    def __init__(
        self,
        engines: Sequence[SGLangEngine],
        template_dir: Path,
        *,
        running_requests: RunningRequests = "pause",
        timeout_s: float = 300.0,
        verification: TensorVerification | None = None,
        unchanged: Unchanged | None = None,
        ask_for_restart: Callable[[], None] | None = None,
        remember: Callable[[str], None] | None = None,
    ) -> None:
        assert running_requests != "finish", "between two buckets new requests would meet a mixture"
        self.report = SyncReport(self.transport)
        self._engines, self._template_dir, self._timeout_s = tuple(engines), template_dir, timeout_s
        self._inventory = Inventory(template_dir, f"weight sync ({self.transport})")
        self._session = UpdateSession(self._engines, running_requests, timeout_s)
        self._verification, self._unchanged, self._ask_for_restart, self._remember = (
            verification,
            unchanged,
            ask_for_restart,
            remember,
        )
        self._began = 0.0
        self._left: Future[None] | None = None  # what the sync before had opened is being closed

    def begin(self, version: str) -> None:
        """Hold requests back. EngineError: a server refuses, or serves another architecture."""
        self._began, self.report = time.perf_counter(), SyncReport(self.transport, version)
        if self._left is not None:
            self._left.result()
        self._inventory.begin(version)
        self._inventory.check_served(self._engines, self._timeout_s)
        if self._verification is not None:
            self._verification.begin(self._engines, self._template_dir)
        if self._unchanged is not None:
            self._unchanged.begin(self._engines, self._timeout_s)
        self._session.open(version, in_place=True)
        try:
            self._join()
        except EngineError:
            self.abandon()
            raise

    def receive(self, bucket: Bucket) -> None:
        """Send a bucket; its tensors must stay as they are until the next receive or commit has
        returned. EngineError: a tensor is not the model's, or a server fails, which may come out at
        the next call.
        """
        self._inventory.take(bucket)
        self.report.num_tensors += len(bucket)
        self.report.num_bytes += nbytes(tensor for _, tensor in bucket)
        changed, known = bucket, {}
        if self._unchanged is not None:
            known = self._expect(bucket)
            changed = self._unchanged.changed(bucket, known)
        if changed:
            self._session.weights_changed()
            self._send(changed)
            self.report.sent_tensors += len(changed)
            self.report.sent_bytes += nbytes(tensor for _, tensor in changed)
        if self._unchanged is None:
            self._expect(bucket)  # while the servers take it

    def commit(self) -> None:
        """Have the servers answer with the new weights. EngineError: tensors are missing, the
        servers' differ from what was sent, or a server fails.
        """
        self._inventory.check_complete()
        self._settle()
        self._left = started(self._leave(), at_exit=True)  # nobody waits for it but the next sync
        # of a sync that had nothing to send the version is new all the same
        self._session.weights_changed()
        self._session.end_of_changes()
        if self._verification is not None:
            self.report.verified_tensors = self._verification.check(self._engines)
        self._session.close()
        if self._remember is not None:
            self._remember(self.report.version)
        if self._unchanged is not None:
            self._unchanged.commit(self.report.version)
        self.report.seconds = time.perf_counter() - self._began

    def abandon(self) -> None:
        """Servers whose weights were not touched go on. The others hold a mixture: they stay paused
        and report an incomplete version until a sync succeeds, or are started again where somebody
        can.
        """
        self._leave()()
        if self._session.abandon() and self._ask_for_restart is not None:
            self._ask_for_restart()

    def _join(self) -> None:
        """Open what buckets go through."""

    def _send(self, bucket: Bucket) -> None:
        raise NotImplementedError

    def _settle(self) -> None:
        """Wait for what _send may have left under way."""

    def _leave(self) -> Callable[[], None]:
        """Give up what _join has opened: what this returns closes it, in any thread, within the
        timeout, without an error. Called twice where commit fails.
        """
        return lambda: None

    def _expect(self, bucket: Bucket) -> dict[str, int | None]:
        if self._verification is None:
            return {}
        return {name: self._verification.expect(name, tensor) for name, tensor in bucket}
