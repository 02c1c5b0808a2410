"""After a sync without a folder, whoever restarts a dead server learns that it must not come back with older weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from lopd.config import SyncSection
from lopd.errors import EngineError
from lopd.stages import sync
from sglang_rollout.supervision import remembered_weights


class Receiver:
    report = None

    def begin(self, version: str) -> None: ...

    def receive(self, bucket: list[Any]) -> None: ...

    def commit(self) -> None: ...

    def abandon(self) -> None: ...


def push(transport: Literal["disk", "tensor", "distributed"], file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "build_receiver", lambda *_, **__: Receiver())
    trainer: Any = SimpleNamespace(export=lambda bucket_bytes: iter([[]]))
    engine: Any = SimpleNamespace(engines=[])
    settings = SyncSection(transport=transport, verify="off")
    weights = sync.StudentWeights(trainer, [], settings, engine, folder=file.parent / "sync", template=file.parent, weights_file=str(file))
    weights.push("step-4")


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_weights_in_no_folder_are_said_to_be_so(transport: Literal["tensor", "distributed"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(transport, tmp_path / "weights.json", monkeypatch)
    with pytest.raises(EngineError, match="weights step-4 are in no folder"):
        remembered_weights(tmp_path / "weights.json")


def test_by_disk_the_receiver_itself_remembers_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push("disk", tmp_path / "weights.json", monkeypatch)
    assert remembered_weights(tmp_path / "weights.json") is None
