"""What the tests of weight sync share: receivers of every transport, tensors of a folder, and a
fake server that takes updates.
"""

from __future__ import annotations

import datetime
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.distributed import distributed_c10d

from lopd.config import SyncSection
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.scoring import ScoreRequest
from sglang_rollout.weight_sync import WeightReceiver, build_receiver
from sglang_rollout.weight_sync.disk import DiskWeightReceiver
from tests.sglang.conftest import sampling_requests
from tests.sglang.fake_server import FakeServer
from tests.sglang.test_parity import HuggingFace

TRANSPORTS = ("disk", "tensor", "distributed")
Named = list[tuple[str, torch.Tensor]]


def tensors(folder: Path) -> Named:
    return sorted(load_file(folder / "model.safetensors").items())


def buckets(named: Named, size: int = 64) -> Iterator[Named]:
    for start in range(0, len(named), size):
        yield named[start : start + size]


def receiver(
    transport: str, engine: SGLangEngine, folder: Path, template: Path, **settings: Any
) -> WeightReceiver:
    fields: dict[str, Any] = {"transport": transport, "timeout_s": 120.0, **settings}
    section = SyncSection(**fields)
    return build_receiver(section, [engine], folder=folder, template_dir=template)


def lose_patience(to: Any, timeout_s: float) -> None:
    """Wait until all that was sent has arrived. After that, limit each answer to timeout_s."""
    if not isinstance(to, DiskWeightReceiver):
        to._await_sent()
    for group in list(distributed_c10d._world.pg_group_ranks):  # of a transport by broadcast
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)
    to._timeout_s = to._session._timeout_s = timeout_s


def send(to: WeightReceiver, version: str, named: Named, *, size: int = 64) -> None:
    """All of one sync; abandoned where it fails."""
    try:
        to.begin(version)
        for bucket in buckets(named, size):
            to.receive(bucket)
        to.commit()
    except BaseException:
        to.abandon()
        raise


def worst_difference(engine: SGLangEngine, folder: Path, count: int = 4) -> float:
    """Return the largest difference of the server's scores from Hugging Face with that folder."""
    reference = HuggingFace(folder)
    items = [
        ScoreRequest(r.prompt_id, 0, r.prompt_ids[:4], r.prompt_ids[4:])
        for r in sampling_requests(count)
    ]
    expected = {item.key: reference.logprobs(item.prompt_ids, item.token_ids) for item in items}
    return max(
        float(np.abs(score.teacher_logprobs - expected[score.key]).max())
        for score in engine.score(items)
    )


class UpdatedFake(FakeServer):
    """A fake server that takes updates of weights. refuse: path -> message of its refusal; info:
    more of /server_info.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refuse: dict[str, str] = {}
        self.info: dict[str, Any] = {"tp_size": 1, "disable_radix_cache": False}
        self.paused = False

    @property
    def updates(self) -> list[str]:
        """The paths called, without questions."""
        return [
            path.partition("?")[0]
            for path, _ in self.calls
            if path not in ("/server_info", "/model_info", "/weights_checker")
        ]

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        path = urllib.parse.urlsplit(path).path
        if path in self.refuse:
            return 400, {"success": False, "message": self.refuse[path]}
        if path == "/server_info":
            return 200, {"version": self.version, **self.info}
        if path in ("/pause_generation", "/continue_generation"):
            self.paused = path == "/pause_generation"
            return 200, {}
        if path == "/update_weight_version":
            self.weight_version = body["new_version"]
            return 200, {"success": True}
        if path in ("/update_weights_from_tensor", "/flush_cache", "/abort_request"):
            return 200, {"success": True}
        return super()._answer(path, body)
