"""What stages share where they overlap: one server for models of one architecture, ended whatever
happens, and its responses do not tell whether it was kept.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lopd.config import SGLangSection
from lopd.errors import EngineError
from lopd.megatron.ranks.standby import STANDBY
from lopd.stages import overlap as overlap_file
from lopd.stages.overlap import Overlap, overlaps

SETTINGS = SGLangSection()


class Servers:
    """Stand-ins for OwnServers that note what happens to them."""

    made: list[Servers]

    def __init__(self, model: Path, settings: SGLangSection, **about: Any) -> None:
        self.model = model
        self.tell = about["tell"]
        self.events = [f"made for {model.name}"]
        self.ready = True
        self.stopped = threading.Event()
        type(self).made.append(self)

    def start(self) -> Servers:
        if self.model.name == "broken":
            raise EngineError("the server did not start", where="log")
        if self.model.name == "slow":
            # As a start that only stop() ends.
            assert self.stopped.wait(60)
            raise EngineError("the server was stopped", where="log")
        return self

    def adopt(self, model: Path, name: str) -> None:
        self.events.append(f"counts as {name} with {model.name}")

    def stop(self) -> None:
        if not self.stopped.is_set():
            self.events.append("stopped")
        self.stopped.set()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Servers]]:
    Servers.made = []
    monkeypatch.setattr("sglang_rollout.requests.fleet.OwnServers", Servers)

    def update(engine: Servers, model: Path, *, version: str, like: Path) -> None:
        if model.name == "refused":
            raise EngineError("other tensors", where=str(model))
        engine.events.append(f"{version}: {model.name} like {like.name}")

    monkeypatch.setattr("sglang_rollout.weight_sync.update_weights_from_disk", update)
    yield Servers.made
    assert all(servers.stopped.is_set() for servers in Servers.made), "none is left"


@pytest.fixture
def model(tmp_path: Path) -> Any:
    def make(name: str, layers: int = 2) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
        return folder

    return make


def about(model: Path, role: str = "student") -> dict[str, Any]:
    return {"log": model / "log", "name": role, "tell": lambda line: None}


def test_one_server_serves_the_models_of_several_stages(made: list[Servers], model: Any) -> None:
    teacher, student = model("teacher"), model("student")
    with Overlap(()) as overlap:
        overlap.prepare_server(teacher, SETTINGS, **about(teacher, "teacher"))
        for role, one in (("teacher", teacher), ("student", student), ("teacher", teacher)):
            with overlap.serve(one, SETTINGS, **about(one, role)):
                assert not made[0].stopped.is_set()
    # The first use finds the weights of the start; no later one may trust what is there, because
    # ranks may have sent others. The version is always that of a server that was just started.
    assert [servers.events for servers in made] == [
        [
            "made for teacher",
            "counts as teacher with teacher",
            "default: student like teacher",
            "counts as student with student",
            "default: teacher like student",
            "counts as teacher with teacher",
            "stopped",
        ]
    ]


@pytest.mark.parametrize("reason", ["architecture", "settings", "death", "refusal"])
def test_another_server_starts_where_the_kept_one_does_not_fit(
    made: list[Servers], model: Any, reason: str
) -> None:
    first = model("first")
    second = model("refused" if reason == "refusal" else "second", reason == "architecture")
    (second / "config.json").write_text(
        json.dumps({"num_hidden_layers": 3 if reason == "architecture" else 2})
    )
    settings = SGLangSection(context_length=77) if reason == "settings" else SETTINGS
    with Overlap(()) as overlap:
        with overlap.serve(first, SETTINGS, **about(first)):
            pass
        made[0].ready = reason != "death"
        with overlap.serve(second, settings, **about(second)):
            assert made[0].stopped.is_set(), "two of them may not fit into memory"
    assert [servers.model for servers in made] == [first, second]


def test_an_error_in_a_stage_ends_the_server(made: list[Servers], model: Any) -> None:
    one = model("one")
    with Overlap(()) as overlap:
        with pytest.raises(RuntimeError), overlap.serve(one, SETTINGS, **about(one)):
            raise RuntimeError("requests are under way")
        assert made[0].stopped.is_set()
        assert not overlap.has_server


def test_a_start_that_failed_in_the_background_is_the_error_of_the_stage_that_needs_it(
    made: list[Servers], model: Any
) -> None:
    broken = model("broken")
    with Overlap(()) as overlap:
        overlap.prepare_server(broken, SETTINGS, **about(broken))
        with (
            pytest.raises(EngineError, match="did not start"),
            overlap.serve(broken, SETTINGS, **about(broken)),
        ):
            pass


def test_a_command_that_ends_during_a_start_ends_the_start(made: list[Servers], model: Any) -> None:
    slow = model("slow")
    # As where a prompt turns out to be wrong while the server starts.
    with Overlap(()) as overlap:
        overlap.prepare_server(slow, SETTINGS, **about(slow))
    assert made[0].stopped.is_set()


def test_a_second_model_at_the_same_time_has_a_server_of_its_own(
    made: list[Servers], model: Any
) -> None:
    student, teacher = model("student"), model("teacher")
    with Overlap(()) as overlap, overlap.serve(student, SETTINGS, **about(student)):
        with overlap.serve(teacher, SETTINGS, **about(teacher)):
            assert [servers.stopped.is_set() for servers in made] == [False, False]
        assert [servers.stopped.is_set() for servers in made] == [False, True]


@pytest.mark.parametrize(
    ("stages", "stage", "prepared"),
    [
        ({"demonstrate", "sft"}, "demonstrate", ["sft"]),
        ({"demonstrate"}, "demonstrate", []),
        ({"score", "distill"}, "score", ["distill"]),
        ({"sft", "distill", "evaluate"}, "evaluate", []),
    ],
)
def test_only_ranks_that_the_command_needs_wait(
    stages: set[str],
    stage: str,
    prepared: list[str],
    monkeypatch: pytest.MonkeyPatch,
    load_example: Any,
) -> None:
    config = load_example()
    found: list[Any] = []
    monkeypatch.setattr(overlap_file, "prepare_ranks", found.append)
    with Overlap(stages) as overlap:
        overlap.prepare_ranks_after(stage, config)
    assert found == [getattr(config, name) for name in prepared]
    assert STANDBY.take(1) is None


def test_nothing_overlaps_on_gpus_or_where_the_knob_says_no(
    monkeypatch: pytest.MonkeyPatch, load_example: Any
) -> None:
    monkeypatch.setattr(overlap_file, "num_gpus", lambda: 0)
    assert overlaps(load_example())
    assert not overlaps(load_example("run.overlap=false"))
    # A server that waits would hold memory that the trainer needs.
    monkeypatch.setattr(overlap_file, "num_gpus", lambda: 8)
    assert not overlaps(load_example())


@pytest.fixture
def load_example() -> Any:
    from lopd.config import load_config

    example = Path(__file__).parents[1] / "examples" / "tiny_moe.toml"
    return lambda *overrides: load_config(example, list(overrides))
