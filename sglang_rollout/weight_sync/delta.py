"""Tensors that have not changed since the servers got them need not be sent again: frozen routers
and embeddings, or whole models between close syncs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.server_side.fingerprints import fingerprint
from sglang_rollout.weight_sync.interface import Bucket, model_info


class Unchanged:
    """Remembers the fingerprint of every tensor that the servers have; changed() leaves out those
    that are the same.

    Everything is sent where a server reports another version than the one that was committed last:
    it was restarted, or got its weights elsewhere.
    """

    def __init__(self) -> None:
        self._version = ""
        self._held: dict[str, int] = {}
        self._sent: dict[str, int] = {}

    def begin(self, engines: Sequence[SGLangEngine], timeout_s: float) -> None:
        self._sent = {}
        if any(
            model_info(engine, timeout_s)["weight_version"] != self._version for engine in engines
        ):
            self._held = {}

    def changed(self, bucket: Bucket, known: Mapping[str, int | None]) -> Bucket:
        """What must be sent of the bucket. known: fingerprints that somebody has computed already."""
        result = []
        for name, tensor in bucket:
            now = known.get(name)
            if now is None:
                now = fingerprint(tensor.detach())
            if self._held.pop(name, None) != now:
                result.append((name, tensor))
            self._sent[name] = now
        return result

    def commit(self, version: str) -> None:
        self._held, self._version = self._sent, version
