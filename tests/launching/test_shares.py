"""Workers that share a stage publish, together, file for file what one command publishes; whoever
is lost is made up for.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lopd.errors import EngineError
from lopd.pipeline import locked
from tests.stand_ins import Engine, Lopd, StandIns, command, contents, states, write_project

SHARDS = "shard-*.parquet"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_project(tmp_path)


@pytest.fixture
def lopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lopd:
    return command(monkeypatch, capsys)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns().install(monkeypatch)


def shards(config: Path, stage: str, run: str = "run") -> dict[str, str]:
    return contents(config.parent / run / stage, SHARDS)


def test_together_they_publish_what_one_command_publishes(
    lopd: Lopd, started: StandIns, config: Path
) -> None:
    for stage in ("demonstrate", "sft", "rollout", "score"):
        lopd(stage, config, "run.dir=alone").succeeded()
    alone = {stage: shards(config, stage, "alone") for stage in ("demonstrate", "rollout", "score")}
    for stage in ("demonstrate", "sft", "rollout", "score"):
        if stage != "sft":
            lopd(stage, config, "--shards", "1/2").succeeded()
            assert list(shards(config, stage)) == ["shard-00001.parquet"]
            assert states(lopd, config)[stage] == "partial"
            lopd(stage, config, "--shards", "0/2").succeeded()
            assert shards(config, stage) == alone[stage]
            assert states(lopd, config)[stage] == "partial", "workers complete nothing"
            started.served.clear()
        lopd(stage, config).succeeded()
        assert states(lopd, config)[stage] == "done"
        assert started.served == [], "the command that completes a stage needs no server"
    manifests = [
        json.loads((config.parent / run / "score/manifest.json").read_text())
        for run in ("alone", "run")
    ]
    assert manifests[0]["shards"] == manifests[1]["shards"]


def test_what_a_lost_worker_left_is_made_up_for(
    lopd: Lopd, started: StandIns, config: Path
) -> None:
    lopd("demonstrate", config, "run.dir=alone").succeeded()
    lopd("demonstrate", config, "--shards", "0/3").succeeded()
    started.engine = Engine(fail_after=(3, EngineError("the server died", remedy="run again")))
    lopd("demonstrate", config, "--shards", "1/3").refused("the server died")
    started.engine = Engine()
    lopd("demonstrate", config).succeeded()
    assert started.engine.answered == 16, "two of three shards of 8"
    assert shards(config, "demonstrate") == shards(config, "demonstrate", "alone")
    assert not list((config.parent / "run").rglob("*.partial"))


def test_a_worker_with_nothing_left_to_do_starts_no_server(
    lopd: Lopd, started: StandIns, config: Path
) -> None:
    lopd("demonstrate", config, "--shards", "0/2").succeeded()
    started.served.clear()
    lopd("demonstrate", config, "--shards", "0/2").succeeded()
    assert not started.started
    lopd("demonstrate", config).succeeded()
    lopd("demonstrate", config, "--shards", "1/2").succeeded()
    assert states(lopd, config)["demonstrate"] == "done"


def test_another_workers_file_at_work_is_left_alone(
    lopd: Lopd, started: StandIns, config: Path
) -> None:
    lopd("demonstrate", config, "--shards", "0/2").succeeded()
    at_work = config.parent / "run/demonstrate/shard-00001.parquet.abcd.partial"
    at_work.write_bytes(b"half")
    lopd("demonstrate", config, "--shards", "0/2").succeeded()
    assert at_work.exists()
    lopd("demonstrate", config).succeeded()
    assert not at_work.exists()


def test_changed_knobs_move_the_former_shards_aside_once(
    lopd: Lopd, started: StandIns, config: Path
) -> None:
    lopd("demonstrate", config, "--shards", "0/2").succeeded()
    former = shards(config, "demonstrate")
    for index in (1, 0):
        lopd(
            "demonstrate", config, "demonstrate.temperature=0.5", "--shards", f"{index}/2"
        ).succeeded()
    assert len(shards(config, "demonstrate")) == 3
    kept = list((config.parent / "run/superseded").iterdir())
    assert [contents(folder, SHARDS) for folder in kept] == [former]


def test_workers_share_the_run_directory_with_workers_alone(
    lopd: Lopd, started: StandIns, config: Path
) -> None:
    with locked(config.parent / "run", shared=True):
        lopd("demonstrate", config, "--shards", "0/2").succeeded()
        lopd("demonstrate", config).refused("in use by process")
    with locked(config.parent / "run"):
        lopd("demonstrate", config, "--shards", "1/2").refused("in use by process")


@pytest.mark.parametrize("text", ["2/2", "1", "one/2", "auto/2", "-1/2"])
def test_a_share_that_is_none_is_refused(
    lopd: Lopd, started: StandIns, config: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    lopd("demonstrate", config, f"--shards={text}").refused("--shards")
    assert not started.started
