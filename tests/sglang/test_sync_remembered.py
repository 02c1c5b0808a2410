"""What a sync leaves behind for whoever restarts a dead server, and a sync into a server that is being started again."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from lopd.config import SGLangSection, SyncSection
from lopd.errors import EngineError
from lopd.stages import sync
from sglang_rollout.supervision import remember_weights, remembered_weights
from sglang_rollout.weight_sync.interface import await_servers
from tests.sglang.fake_server import FakeServer


class Receiver:
    report = None

    def begin(self, version: str) -> None: ...

    def receive(self, bucket: list[Any]) -> None: ...

    def commit(self) -> None: ...

    def abandon(self) -> None: ...


def push(transport: Literal["disk", "tensor", "distributed"], file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "build_receiver", lambda *_, **__: Receiver())
    trainer: Any = SimpleNamespace(export=lambda bucket_bytes: iter([[]]))
    engine: Any = SimpleNamespace(engines=[], settings=SGLangSection())
    settings = SyncSection(transport=transport, verify="off")
    weights = sync.StudentWeights(trainer, [], settings, engine, folder=file.parent / "sync", template=file.parent, weights_file=str(file))
    weights.push("step-4")


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_weights_in_no_folder_replace_older_ones(transport: Literal["tensor", "distributed"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that comes back then has its first ones, and not others that were put in between."""
    remember_weights(tmp_path / "weights.json", tmp_path / "step-2", "step-2")
    push(transport, tmp_path / "weights.json", monkeypatch)
    assert remembered_weights(tmp_path / "weights.json") is None
    assert "step-4" in (tmp_path / "weights.json").read_text()  # progress, for whoever counts deaths


def test_by_disk_the_receiver_itself_remembers_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push("disk", tmp_path / "weights.json", monkeypatch)
    assert remembered_weights(tmp_path / "weights.json") is None


def test_a_server_that_is_being_started_again_is_waited_for() -> None:
    with FakeServer() as first:
        engine = first.engine()
    with pytest.raises(EngineError, match="is the server running"):
        await_servers([engine], 0.0)
    back: list[FakeServer] = []
    port = int(engine.url.rpartition(":")[2])

    def start() -> None:
        back.append(FakeServer(port).__enter__())

    timer = threading.Timer(0.5, start)
    timer.start()
    try:
        await_servers([engine], 60.0)
        assert back
    finally:
        timer.join()
        back[0].__exit__()
