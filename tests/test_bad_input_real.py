"""Bad input met by a real SGLang server and by real ranks, through the real command: one line, exit
code 2, and what was published stays.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lopd.stages import distill, sft
from lopd.stages.training import train_on_ranks
from tests.pipeline.running import Command
from tests.stand_ins import Lopd, Result, StandIns, command, contents, states, write_project


@pytest.fixture
def lopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lopd:
    return command(monkeypatch, capsys)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns().install(monkeypatch)


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """The config of a project nobody has run."""
    return write_project(tmp_path)


def spoil_weights(folder: Path) -> None:
    """One NaN, as a broken training or a bad disk would leave it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.q_norm.weight"][0] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_server_that_does_not_start(fresh: Path, lopd: Lopd) -> None:
    # text, as it should be, but not JSON: only the server finds that out
    overrides = "sglang.extra_args.json_model_override_args=abacus"
    line = lopd("run", fresh, overrides).refused(
        "the teacher server did not start", "JSONDecodeError", "remedy: "
    )
    assert "/run/demonstrate/sglang-teacher.log: " in line, "it says where to read on"


def test_a_server_whose_log_probabilities_are_nan_is_refused(fresh: Path, lopd: Lopd) -> None:
    spoil_weights(fresh.parent / "teacher")
    lopd("run", fresh).refused(
        "response probe#0",
        "log-probability nan at token 0",
        "limit: a number that is at most 0",
        "the checkpoint is damaged",
    )
    assert not list((fresh.parent / "run" / "demonstrate").glob("*.parquet")), (
        "none of it was published"
    )


def test_a_server_that_dies(fresh: Path) -> None:
    sizes = (
        "prompts.sft.num_prompts=2000",
        "demonstrate.shard_size=16",
        "sglang.max_running_requests=8",
        "sglang.restarts=0",
    )
    running = Command("run", fresh.parent / "run", sizes, config=fresh)
    shards = fresh.parent / "run" / "demonstrate"
    running.wait_until(lambda: len(list(shards.glob("*.parquet"))) >= 2, "two shards are published")
    published = contents(shards, "*.parquet")
    running.kill_child("sglang_rollout.servers.launch")
    finished = running.wait()
    Result(finished.code, finished.stdout, finished.stderr).refused(
        "the teacher server died", "the same command"
    )
    assert contents(shards, "*.parquet").items() >= published.items()
    assert running.ends_completely()


def test_sft_of_a_student_with_nan_stops_with_the_step(
    fresh: Path, lopd: Lopd, started: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_weights(fresh.parent / "student")
    monkeypatch.setattr(sft, "train_on_ranks", train_on_ranks)
    lopd("run", fresh).refused(
        "step 1: loss is nan, on rank 0", "the weights were not updated", "remedy: "
    )
    assert started.served == ["teacher"]
    assert not (fresh.parent / "run" / "sft" / "model").exists()


def test_distill_of_a_student_with_nan_stops_with_the_step(
    fresh: Path, lopd: Lopd, started: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_weights(fresh.parent / "student")  # the stand-in for SFT hands it on
    monkeypatch.setattr(distill, "train_on_ranks", train_on_ranks)
    lopd("run", fresh).refused("step 1: loss is nan, on rank 0", "the weights were not updated")
    assert {
        name: state for name, state in states(lopd, fresh).items() if state == "done"
    }.keys() == {"demonstrate", "sft", "rollout", "score"}
    assert started.trained == ["sft"]
