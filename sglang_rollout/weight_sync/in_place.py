"""The part that the transports by tensor and by broadcast share.

Both change a server's weights bucket by bucket, while the server holds requests back.
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
    """A WeightReceiver whose servers' weights change from the first bucket on.

    A transport implements _send(). It also implements _open_transport() and _detach_transport()
    where it has something to open and close, and _await_sent() where _send() leaves something under
    way.
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
        """
        Args:
            engines: One engine for each server.
            template_dir: A checkpoint with the names and shapes of the tensors.
            running_requests: What happens to running requests.
            timeout_s: The longest time in seconds that one call to a server may take.
            verification: Compares the servers' weights with those that were sent.
            unchanged: Leaves out tensors that the servers have already.
            ask_for_restart: A function that restarts servers after a failed sync, which may have
                left them with half of an update.
            remember: A function that is told the version once the servers have it. The weights are
                in no folder.
        """
        assert running_requests != "finish", "between two buckets new requests would meet a mixture"
        self.report = SyncReport(self.transport)
        self._engines = tuple(engines)
        self._template_dir = template_dir
        self._timeout_s = timeout_s
        self._inventory = Inventory(template_dir, f"weight sync ({self.transport})")
        self._session = UpdateSession(self._engines, running_requests, timeout_s)
        self._verification = verification
        self._unchanged = unchanged
        self._ask_for_restart = ask_for_restart
        self._remember = remember
        self._began = 0.0
        # The end of what the previous sync had opened. It runs beside the training.
        self._closing: Future[None] | None = None

    def begin(self, version: str) -> None:
        """Hold requests back and open the transport.

        Raises:
            EngineError: A server refuses, or serves another architecture.
        """
        self._began = time.perf_counter()
        self.report = SyncReport(self.transport, version)
        # Only one transport may be open at a time.
        if self._closing is not None:
            self._closing.result()
        self._inventory.begin(version)
        # All that can refuse stands before the session. An error then leaves servers that have not
        # been paused, and nothing has to be undone.
        self._inventory.check_served(self._engines, self._timeout_s)
        if self._verification is not None:
            self._verification.begin(self._engines, self._template_dir)
        if self._unchanged is not None:
            self._unchanged.begin(self._engines, self._timeout_s)
        self._session.open(version, in_place=True)
        # The transport opens after the pause, when the schedulers have nothing else to do.
        try:
            self._open_transport()
        except EngineError:
            self.abandon()
            raise

    def receive(self, bucket: Bucket) -> None:
        """Send a bucket.

        Its tensors must stay unchanged until the next receive() or commit() has returned.

        Raises:
            EngineError: A tensor is not the served model's, or a server fails. A failure of a
                server may appear only at the next call.
        """
        # First of all: a tensor of a wrong shape may end a server that gets it.
        self._inventory.take(bucket)
        self.report.num_tensors += len(bucket)
        self.report.num_bytes += nbytes(tensor for _, tensor in bucket)
        changed = bucket
        if self._unchanged is not None:
            # The fingerprints decide what is sent, so here they must be computed first.
            known = self._expect(bucket)
            changed = self._unchanged.changed(bucket, known)
        if changed:
            # A server that dies during the send must already report that it is incomplete.
            self._session.weights_changed()
            self._send(changed)
            self.report.sent_tensors += len(changed)
            self.report.sent_bytes += nbytes(tensor for _, tensor in changed)
        if self._unchanged is None:
            # _send() returns while the servers take the bucket. The fingerprints are computed in
            # that time, and cost the sync next to nothing.
            self._expect(bucket)

    def commit(self) -> None:
        """Have the servers answer with the new weights.

        Raises:
            EngineError: Tensors are missing, the servers' weights differ from what was sent, or a
                server fails.
        """
        # A server would keep the old values of missing tensors without a message.
        self._inventory.check_complete()
        self._await_sent()
        # Only the next sync waits for the transport to close. The process must not end in the
        # middle of it (at_exit), or a server could be left waiting in the group.
        self._closing = started(self._detach_transport(), at_exit=True)
        # If there was nothing to send (sync.delta), the version is new all the same.
        self._session.weights_changed()
        self._session.end_of_changes()
        # Verified while the servers are still paused: nobody gets an answer of wrong weights.
        if self._verification is not None:
            self.report.verified_tensors = self._verification.check(self._engines)
        self._session.close()
        # Both are told last. If they were told of a version that then fails, a restarted server
        # would pass for one that has it, and the next delta would leave tensors out.
        if self._remember is not None:
            self._remember(self.report.version)
        if self._unchanged is not None:
            self._unchanged.commit(self.report.version)
        self.report.seconds = time.perf_counter() - self._began

    def abandon(self) -> None:
        """Give the sync up, without an error.

        Servers whose weights are untouched continue. The others hold a mixture of two versions.
        They stay paused and report an incomplete version until a sync succeeds, or they are started
        again by ask_for_restart.
        """
        # The transport first: a server that waits in a broadcast hears no other call.
        self._detach_transport()()
        if self._session.abandon() and self._ask_for_restart is not None:
            self._ask_for_restart()

    def _open_transport(self) -> None:
        """Open what the buckets go through."""

    def _send(self, bucket: Bucket) -> None:
        raise NotImplementedError

    def _await_sent(self) -> None:
        """Wait for what _send() may have left under way."""

    def _detach_transport(self) -> Callable[[], None]:
        """Give up what _open_transport() has opened, and return the function that closes it.

        That function may run in any thread. It ends within the timeout and raises nothing. This
        method is called twice where commit() fails.
        """
        return lambda: None

    def _expect(self, bucket: Bucket) -> dict[str, tuple[int, ...]]:
        """Compute the fingerprints that the servers must have, and return those of the tensors."""
        return {} if self._verification is None else self._verification.expect(bucket)
