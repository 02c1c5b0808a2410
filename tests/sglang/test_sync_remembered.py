"""What a sync leaves behind for whoever restarts a dead server, a sync into a server that is being
started again, and which syncs are repeated.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from lopd.config import SGLangSection, SyncSection
from lopd.errors import EngineError
from lopd.stages import sync
from lopd.stages.sync import MAX_SENDS
from sglang_rollout.servers.weights_file import remember_weights, remembered_weights
from sglang_rollout.weight_sync.interface import await_servers
from tests.sglang.fake_server import FakeServer
from tests.sglang.weight_syncing import Named, UpdatedFake, buckets, tensors


class Receiver:
    report = None

    def begin(self, version: str) -> None: ...

    def receive(self, bucket: list[Any]) -> None: ...

    def commit(self) -> None: ...

    def abandon(self) -> None: ...


def push(
    transport: Literal["disk", "tensor", "distributed"], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "build_receiver", lambda *_, **__: Receiver())
    trainer: Any = SimpleNamespace(export=lambda bucket_bytes: iter([[]]))
    engine: Any = SimpleNamespace(engines=[], settings=SGLangSection())
    settings = SyncSection(transport=transport, verify="off")
    weights = sync.StudentWeights(
        trainer,
        [],
        settings,
        engine,
        folder=file.parent / "sync",
        template=file.parent,
        weights_file=file,
    )
    weights.push("step-4")


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_weights_in_no_folder_replace_older_ones(
    transport: Literal["tensor", "distributed"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that comes back then has its first ones, and not others that were put in between."""
    remember_weights(tmp_path / "weights.json", tmp_path / "step-2", "step-2")
    push(transport, tmp_path / "weights.json", monkeypatch)
    assert remembered_weights(tmp_path / "weights.json") is None
    # The file still records the progress, for readers that count deaths.
    assert "step-4" in (tmp_path / "weights.json").read_text()


def test_by_disk_the_receiver_itself_remembers_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push("disk", tmp_path / "weights.json", monkeypatch)
    assert remembered_weights(tmp_path / "weights.json") is None


class Trained:
    """Exports the weights of a folder; at times a server is started again meanwhile, which then has
    its first weights.
    """

    def __init__(self, model: Path, fake: UpdatedFake, weights_file: Path, restarts: int) -> None:
        self._model = model
        self._fake = fake
        self._file = weights_file
        self._restarts = restarts
        self.num_exports = self.num_gathered = 0
        self._start(1)

    def _start(self, number: int) -> None:
        """As its owner does (sglang_rollout.servers.supervision)."""
        self._file.with_name(f"{self._file.name}.0.starts").write_text(str(number))
        self._fake.weight_version = "default"

    def export(self, *, bucket_bytes: int) -> Iterator[Named]:
        self.num_exports += 1
        named = tensors(self._model)
        for bucket in buckets(named, 20):
            yield bucket
            self.num_gathered += len(bucket)
        if self.num_exports <= self._restarts:
            self._start(self.num_exports + 1)


@pytest.fixture
def fake(student_dir: Path) -> Iterator[UpdatedFake]:
    with UpdatedFake() as running:
        running.model_path = str(student_dir)
        yield running


def trained(
    fake: UpdatedFake, model: Path, folder: Path, restarts: int = 0
) -> tuple[Trained, sync.StudentWeights, list[str]]:
    said: list[str] = []
    trainer: Any = Trained(model, fake, folder / "weights.json", restarts)
    settings = SyncSection(transport="tensor", verify="off")
    engine = fake.engine()
    file = folder / "weights.json"
    weights = sync.StudentWeights(
        trainer,
        [],
        settings,
        engine,
        folder=folder / "sync",
        template=model,
        weights_file=file,
        print_line=said.append,
    )
    return trainer, weights, said


def test_a_server_that_came_back_during_a_sync_is_sent_all_of_it_again(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path
) -> None:
    """It has taken part of it with its former process, and answers every call: only that it is
    another process tells.
    """
    trainer, weights, said = trained(fake, student_dir, tmp_path, restarts=2)
    weights.push("step-4")
    assert (trainer.num_exports, fake.weight_version, fake.paused) == (3, "step-4", False)
    line = (
        f"a sync of step-4 has lost the server at {fake.url} (it was started again meanwhile); "
        "the weights are sent again"
    )
    assert said == [line, line]
    weights.push("step-6")
    assert (trainer.num_exports, fake.weight_version, len(said)) == (4, "step-6", 2)


def test_a_server_that_never_takes_it_whole_is_an_error(
    fake: UpdatedFake, student_dir: Path, tmp_path: Path
) -> None:
    trainer, weights, said = trained(fake, student_dir, tmp_path, restarts=99)
    with pytest.raises(EngineError, match=r"a sync of step-4 has lost the server .*, 5 times"):
        weights.push("step-4")
    assert (trainer.num_exports, len(said)) == (MAX_SENDS, MAX_SENDS - 1)


def test_a_refusal_is_not_repeated(fake: UpdatedFake, student_dir: Path, tmp_path: Path) -> None:
    """Nobody was lost: the same would be refused again. All ranks have gathered to the end all the
    same, where rank 0 says what was refused.
    """
    trainer, weights, said = trained(fake, student_dir, tmp_path)
    fake.refuse["/update_weights_from_tensor"] = "shape mismatch"
    with pytest.raises(EngineError, match="refused with HTTP 400: shape mismatch"):
        weights.push("step-4")
    assert (trainer.num_exports, trainer.num_gathered, said) == (1, len(tensors(student_dir)), [])
    assert not list(tmp_path.glob("*.end"))


def test_a_server_that_is_being_started_again_is_waited_for() -> None:
    with FakeServer() as first:
        engine = first.engine()
    with pytest.raises(EngineError, match="check whether the server is running"):
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
