"""Which tensors have changed since the servers got them.

Tensors that are the same need not be sent again: frozen routers and embeddings, or most of a model
between two syncs with few steps between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.server_side.fingerprints import fingerprints, method_for
from sglang_rollout.weight_sync.interface import Bucket, model_info


class Unchanged:
    """A record of the fingerprint (hash) of every tensor that the servers have."""

    def __init__(self) -> None:
        self._version = ""
        # Tensor -> its fingerprints: of the last committed version, and of the version being sent.
        self._held: dict[str, tuple[int, ...]] = {}
        self._sent: dict[str, tuple[int, ...]] = {}

    def begin(self, engines: Sequence[SGLangEngine], timeout_s: float) -> None:
        """Start a version.

        Args:
            engines: One engine for each server.
            timeout_s: The longest time in seconds that a server may take to answer.
        """
        self._sent = {}
        # A server with another version was restarted or got its weights elsewhere. Nothing is known
        # about its tensors, so all of them are sent.
        if any(
            model_info(engine, timeout_s)["weight_version"] != self._version for engine in engines
        ):
            self._held = {}

    def changed(self, bucket: Bucket, known: Mapping[str, tuple[int, ...]]) -> Bucket:
        """Return those tensors of the bucket that must be sent.

        Args:
            bucket: Full tensors, by name.
            known: Fingerprints that the verification of this sync has already computed.
        """
        # Where the server rounds, the verification has the number of the rounded tensor. What is
        # compared here is the tensor itself.
        missing = [tensor.detach() for name, tensor in bucket if name not in known]
        dtypes = [tensor.dtype for tensor in missing]
        method = method_for(bucket[0][1].device) if bucket else "xxh3"
        computed = iter(fingerprints(missing, dtypes, method))
        result = []
        for name, tensor in bucket:
            now = known[name] if name in known else (next(computed),)
            # pop(), not get(): if this sync fails after the tensor was sent, the servers no longer
            # have the old value, and the next sync must send the tensor again.
            if self._held.pop(name, None) != now:
                result.append((name, tensor))
            self._sent[name] = now
        return result

    def commit(self, version: str) -> None:
        """Record that the servers have all tensors of this version."""
        # Only now: until the commit it is not known whether the servers have what was sent.
        self._held = self._sent
        self._version = version
