"""Server and trainer in turns on the same memory: the order of calls, against a fake server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lopd.errors import EngineError
from sglang_rollout.weight_sync.colocation import Colocation
from tests.sglang.weight_syncing import UpdatedFake, receiver, send, tensors


class Watched(UpdatedFake):
    """A fake server that keeps account of the memory and writes every event into one list with the trainer's."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.held = {"kv_cache", "weights", "cuda_graph"}

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path in ("/release_memory_occupation", "/resume_memory_occupation"):
            self.events.append(f"{path[1:7].rstrip('_')} {' '.join(body['tags'])}")
            self.held = self.held - {*body["tags"]} if "release" in path else self.held | {*body["tags"]}
            return 200, {}
        if path == "/update_weights_from_tensor":
            assert "weights" in self.held
            self.events.append("weights sent")
        return super()._answer(path, body)


class Trainer:
    def __init__(self, fake: Watched) -> None:
        self._fake, self.held = fake, {"weights", "optimizer"}

    def offload_optimizer(self) -> None:
        self.held -= {"optimizer"}
        self._fake.events.append("optimizer out")

    def offload_weights(self) -> None:
        self.held -= {"weights"}
        self._fake.events.append("trainer's weights out")

    def reload(self) -> None:
        self.held = {"weights", "optimizer"}
        self._fake.events.append("trainer in")
        assert not self._fake.held, "both at once do not fit"


@pytest.fixture
def fake(student_dir: Path) -> Iterator[Watched]:
    with Watched() as running:
        running.model_path = str(student_dir)
        yield running


def test_the_order_around_a_sync(fake: Watched, student_dir: Path, tmp_path: Path) -> None:
    engine = fake.engine()
    trainer = Trainer(fake)
    to = receiver("tensor", engine, tmp_path, student_dir, verify="off")
    turns = Colocation([engine], trainer, barrier=lambda: None)
    for version in ("v1", "v2"):
        turns.to_trainer()
        assert (fake.held, trainer.held) == (set(), {"weights", "optimizer"})

        def push(version: str = version) -> None:
            assert (fake.held, trainer.held) == ({"weights"}, {"weights"})  # the peak of a sync
            send(to, version, tensors(student_dir))

        turns.to_server(push)
        assert (fake.held, trainer.held) == ({"kv_cache", "weights", "cuda_graph"}, set())
        assert fake.weight_version == version
    one = [
        "releas kv_cache weights cuda_graph",
        *("trainer in", "optimizer out", "resume weights", "weights sent", "trainer's weights out", "resume kv_cache cuda_graph"),
    ]
    assert fake.events == ["optimizer out", "trainer's weights out", *one, *one]


def test_a_turn_is_not_taken_twice(fake: Watched) -> None:
    turns = Colocation([fake.engine()], Trainer(fake), barrier=lambda: None)
    with pytest.raises(EngineError, match="server's turn already"):
        turns.to_server(lambda: None)


def test_a_server_that_does_not_release_keeps_the_trainer_out(fake: Watched) -> None:
    trainer = Trainer(fake)
    turns = Colocation([fake.engine()], trainer, barrier=lambda: None)
    fake.refuse["/flush_cache"] = "2 requests are running"
    with pytest.raises(EngineError, match="2 requests are running"):
        turns.to_trainer()
    assert trainer.held == set()
