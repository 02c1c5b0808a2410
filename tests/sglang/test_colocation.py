"""Server and trainer in turns on the same memory: the order of calls, against a fake server and a
real one on a CPU.
"""

from __future__ import annotations

import importlib.machinery
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lopd.config import Config, load_config
from lopd.errors import ConfigError, EngineError
from sglang_rollout.cpu.memory import MemoryOfTags
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.servers.server import SGLangServer
from sglang_rollout.servers.shared_gpus import colocation_problems, training_settings
from sglang_rollout.weight_sync import Colocation
from tests.limits import apart, within
from tests.sglang.conftest import settings
from tests.sglang.test_parity import MAX_DIFFERENCE
from tests.sglang.weight_syncing import UpdatedFake, receiver, send, tensors, worst_difference
from tests.stand_ins import CONFIG


class Watched(UpdatedFake):
    """A fake server that keeps account of the memory and writes every event into one list with the
    trainer's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.held = {"kv_cache", "weights", "cuda_graph"}

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path in ("/release_memory_occupation", "/resume_memory_occupation"):
            self.events.append(f"{path[1:7].rstrip('_')} {' '.join(body['tags'])}")
            self.held = (
                self.held - {*body["tags"]} if "release" in path else self.held | {*body["tags"]}
            )
            return 200, {}
        if path == "/update_weights_from_tensor":
            assert "weights" in self.held
            self.events.append("weights sent")
        return super()._answer(path, body)


class Trainer:
    def __init__(self, fake: Watched) -> None:
        self._fake = fake
        self.held = {"weights", "optimizer"}

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


def turns_of(fake: Watched, trainer: Trainer) -> Colocation:
    turns = Colocation([fake.engine()], barrier=lambda: None)
    turns.to_trainer()  # the trainer is built in its own turn
    turns.attach_trainer(trainer)
    return turns


RELEASE = "releas kv_cache weights cuda_graph"
SYNC = (
    "optimizer out",
    "resume weights",
    "weights sent",
    "trainer's weights out",
    "resume kv_cache cuda_graph",
)


def test_the_order_around_a_sync(fake: Watched, student_dir: Path, tmp_path: Path) -> None:
    trainer = Trainer(fake)
    turns = turns_of(fake, trainer)
    to = receiver("tensor", fake.engine(), tmp_path, student_dir, verify="off")
    for version in ("v1", "v2"):
        assert (fake.held, trainer.held) == (set(), {"weights", "optimizer"})
        with turns.to_server():
            assert (fake.held, trainer.held) == ({"weights"}, {"weights"})  # the peak of a sync
            send(to, version, tensors(student_dir))
        assert (fake.held, trainer.held) == ({"kv_cache", "weights", "cuda_graph"}, set())
        assert fake.weight_version == version
        turns.to_trainer()
        turns.to_trainer()  # it has it
    assert fake.events == [RELEASE, *(*SYNC, RELEASE, "trainer in") * 2]


def test_room_for_a_third_program(fake: Watched, student_dir: Path, tmp_path: Path) -> None:
    """The teacher, between the student's responses and the next step; or before any, where a
    resumed training lacks scores.
    """
    trainer = Trainer(fake)
    turns = turns_of(fake, trainer)
    turns.to_nobody()
    assert (fake.held, trainer.held) == (set(), set())
    turns.to_trainer()
    with turns.to_server():
        send(
            receiver("tensor", fake.engine(), tmp_path, student_dir, verify="off"),
            "v1",
            tensors(student_dir),
        )
    turns.to_nobody()
    turns.to_nobody()
    assert (fake.held, trainer.held) == (set(), set())
    turns.to_trainer()
    assert fake.events == [
        RELEASE,
        "optimizer out",
        "trainer's weights out",
        "trainer in",
        *SYNC,
        RELEASE,
        "trainer in",
    ]


def test_a_turn_is_not_taken_twice(fake: Watched) -> None:
    turns = Colocation([fake.engine()], barrier=lambda: None)
    with (
        pytest.raises(EngineError, match="the server already holds the GPU memory"),
        turns.to_server(),
    ):
        pass
    with pytest.raises(AssertionError, match="the server has the memory"):
        turns.attach_trainer(Trainer(fake))


def test_a_server_that_does_not_release_keeps_the_trainer_out(
    fake: Watched, student_dir: Path, tmp_path: Path
) -> None:
    trainer = Trainer(fake)
    turns = turns_of(fake, trainer)
    with turns.to_server():
        send(
            receiver("tensor", fake.engine(), tmp_path, student_dir, verify="off"),
            "v1",
            tensors(student_dir),
        )
    fake.refuse["/flush_cache"] = "2 requests are running"
    with pytest.raises(EngineError, match="2 requests are running"):
        turns.to_trainer()
    assert trainer.held == set()


@pytest.fixture(scope="module")
def giving(student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    """A real server that gives its memory back, on a CPU through sglang_rollout.cpu.memory."""
    own = settings(extra_args={"enable_memory_saver": True})
    with SGLangServer(
        student_dir, own, log=tmp_path_factory.mktemp("giving") / "server.log"
    ) as server:
        yield SGLangEngine(server.url, server.api_key, own, server=server)


def no_trainer(recorded: list[str]) -> Any:
    out = partial(recorded.append, "out")
    back = partial(recorded.append, "in")
    return SimpleNamespace(offload_optimizer=out, offload_weights=lambda: None, reload=back)


@pytest.mark.parametrize("transport", ["tensor", "disk"])
def test_a_real_server_takes_the_calls(
    transport: str,
    giving: SGLangEngine,
    student_dir: Path,
    other_dir: Path,
    tmp_path: Path,
) -> None:
    """Its memory is empty in the trainer's turn. What comes after a resume it serves, verified."""
    recorded: list[str] = []
    turns = Colocation([giving], barrier=lambda: None)
    turns.to_trainer()
    turns.attach_trainer(no_trainer(recorded))
    to = receiver(transport, giving, tmp_path, student_dir)
    try:
        for version, folder in (("other", other_dir), ("again", student_dir)):
            with turns.to_server():
                send(to, version, tensors(folder))
            within(worst_difference(giving, folder), MAX_DIFFERENCE)
            turns.to_trainer()
        assert recorded == ["out", "in"] * 2
    finally:
        if turns.holder == "trainer":
            with turns.to_server():
                send(
                    receiver(transport, giving, tmp_path, student_dir),
                    "whole",
                    tensors(student_dir),
                )


def test_weights_that_nobody_sends_again_are_lost(
    giving: SGLangEngine, student_dir: Path, tmp_path: Path
) -> None:
    """The control of the test above: a server that kept its memory would answer as before."""
    turns = Colocation([giving], barrier=lambda: None)
    turns.to_trainer()
    turns.attach_trainer(no_trainer([]))
    with turns.to_server():
        pass
    with pytest.raises(EngineError, match="log-probability nan"):
        worst_difference(giving, student_dir)
    turns.to_trainer()
    with turns.to_server():
        send(receiver("tensor", giving, tmp_path, student_dir), "whole", tensors(student_dir))
    assert worst_difference(giving, student_dir) <= MAX_DIFFERENCE


def test_what_is_given_back_is_empty_until_it_is_taken_again() -> None:
    memory = MemoryOfTags()
    with memory.region("weights"):
        kept = torch.nn.Parameter(torch.empty(1000).normal_(), requires_grad=False)
        table = torch.arange(10)  # not a parameter: on a GPU it would be in host memory
        assert torch.ones(500).sum() == 500  # of no use afterwards: not remembered
    before = kept.clone()
    outside = torch.ones(10)
    assert memory.held_bytes("weights") == 4000
    memory.pause("weights")
    assert memory.held_bytes("weights") == kept.untyped_storage().nbytes() == 0
    memory.resume("weights")
    assert memory.held_bytes("weights") == 4000
    assert kept.isnan().all()
    kept.copy_(before)
    assert torch.equal(kept, before)
    assert torch.equal(outside, torch.ones(10))
    assert torch.equal(table, torch.arange(10))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("transport", ["tensor", "disk"])
def test_a_server_on_a_gpu_gives_its_memory_back(
    transport: str, student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    own = settings(
        mem_fraction=0.3, max_total_tokens=None, extra_args={"enable_memory_saver": True}
    )
    trainer = SimpleNamespace(
        offload_optimizer=lambda: None, offload_weights=lambda: None, reload=lambda: None
    )
    free: list[int] = []

    def measure() -> None:
        free.append(torch.cuda.mem_get_info()[0])

    with SGLangServer(student_dir, own, log=tmp_path / "server.log") as server:
        engine = SGLangEngine(server.url, server.api_key, own, server=server)
        turns = Colocation([engine], barrier=lambda: None)
        measure()
        turns.to_trainer()
        measure()
        turns.attach_trainer(trainer)
        with turns.to_server():
            send(receiver(transport, engine, tmp_path, student_dir), "other", tensors(other_dir))
        measure()
        within(worst_difference(engine, other_dir), 1e-3)
        apart(worst_difference(engine, student_dir), 1e-2)
    assert free[1] - free[0] > 0.2 * torch.cuda.mem_get_info()[1]  # most of its keys and values
    assert abs(free[2] - free[0]) < 0.05 * torch.cuda.mem_get_info()[1]


# ---- what it asks of the configuration ----


def config_of(folder: Path, *overrides: str) -> Config:
    (folder / "config.toml").write_text(CONFIG)
    return load_config(
        folder / "config.toml", ["sync.transport=tensor", "sync.colocate=true", *overrides]
    )


def test_servers_can_give_memory_back_and_are_not_started_again(tmp_path: Path) -> None:
    settings = training_settings(
        config_of(
            tmp_path,
            "sglang.restarts=3",
            "sglang.extra_args={schedule_policy='lpm', enable_memory_saver=false}",
        )
    )
    assert settings.extra_args == {"schedule_policy": "lpm", "enable_memory_saver": True}
    assert (settings.restarts, settings.outage_timeout_s) == (0, 0)
    apart = config_of(tmp_path, "sync.colocate=false")
    assert training_settings(apart) == apart.sglang
    assert not [*colocation_problems(apart, on_gpu=False)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "torch_memory_saver"),
        (["sglang.student_urls=['http://127.0.0.1:1']"], "only servers that lopd starts"),
        (["distill.parallel={ranks=4, nodes=2}"], "the servers run only on the first machine"),
        (
            ["distill.refresh={every=2, keep_teacher=true}"],
            "keeps the teacher's server on the GPUs",
        ),
    ],
    ids=["no memory saver", "servers of others", "nodes", "kept teacher"],
)
def test_what_cannot_take_turns(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, *overrides)
    installed = importlib.machinery.ModuleSpec("torch_memory_saver", None) if overrides else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed)
    [problem] = colocation_problems(config, on_gpu=True)
    assert message in str(problem)
    on_cpu = [*colocation_problems(config, on_gpu=False)]
    assert len(on_cpu) == bool(overrides), "a CPU needs no torch_memory_saver"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("sync.transport=distributed", "NCCL does not broadcast"),
        ("sync.delta=true", "has no weights"),
    ],
)
def test_transports_that_cannot(overrides: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, overrides)
