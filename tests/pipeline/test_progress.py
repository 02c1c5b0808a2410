"""lopd status says which step or shard a stage is at, from what is on disk."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lopd import pipeline
from lopd.artifacts import MANIFEST
from lopd.config import Config, load_config
from lopd.report.overview import shown_state
from lopd.stages.context import StageContext
from lopd.stages.order import stage_named
from lopd.stages.progress import progress_of
from tests.stand_ins import StandIns, write_project


def context_of(run_dir: Path, stage: str) -> StageContext:
    models = SimpleNamespace(student=Path("s"), teacher=Path("t"))
    config = SimpleNamespace(
        run=SimpleNamespace(dir=run_dir),
        models=models,
        evaluate=SimpleNamespace(equal_compute_baseline=True),
        sft=SimpleNamespace(num_steps=7),
        distill=SimpleNamespace(num_steps=7),
    )
    (run_dir / stage).mkdir(parents=True, exist_ok=True)
    return StageContext(cast(Any, config), stage_named(stage))


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def lines(*rows: tuple[str, str, int]) -> str:
    return "".join(
        json.dumps({"kind": kind, "stage": stage, "step": step}) + "\n"
        for kind, stage, step in rows
    )


@pytest.mark.parametrize("stage", ["sft", "distill"])
def test_a_training_says_its_step(tmp_path: Path, stage: str) -> None:
    context = context_of(tmp_path, stage)
    (tmp_path / "metrics.jsonl").write_text(lines(("train", stage, 6)), encoding="utf-8")
    assert str(progress_of(context)) == "step 0 of 7", "without a job, what is planned"
    (tmp_path / "metrics.jsonl").unlink()
    write(tmp_path / stage / "job.json", {"num_steps": 8})
    assert str(progress_of(context)) == "step 0 of 8"
    # An evaluation and another training are no steps of this one, and the last line is cut.
    metrics = lines(("train", stage, 3), ("train", stage, 4), ("eval", stage, 7), ("train", "x", 6))
    (tmp_path / "metrics.jsonl").write_text(metrics + '{"kind": "train", "st', encoding="utf-8")
    assert str(progress_of(context)) == "step 4 of 8"


def test_only_the_end_of_long_metrics_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lopd.report.metrics._END_BYTES", 120)
    context = context_of(tmp_path, "sft")
    write(tmp_path / "sft/job.json", {"num_steps": 900})
    (tmp_path / "metrics.jsonl").write_text(
        lines(*(("train", "sft", step) for step in range(1, 801))), encoding="utf-8"
    )
    assert str(progress_of(context)) == "step 800 of 900"


@pytest.mark.parametrize("stage", ["demonstrate", "rollout", "score"])
def test_sampling_and_scoring_say_their_shards(tmp_path: Path, stage: str) -> None:
    context = context_of(tmp_path, stage)
    for index in range(2):
        (tmp_path / stage / f"shard-0000{index}.parquet").touch()
    assert progress_of(context) is None, "an artifact of an older version says no total"
    write(tmp_path / stage / "expected.json", {"shards": 8})
    (tmp_path / stage / "shard-00002.parquet.partial").touch()
    assert str(progress_of(context)) == "shard 2 of 8"
    (tmp_path / stage / "expected.json").write_text("[", encoding="utf-8")
    assert progress_of(context) is None


def test_an_evaluation_says_its_part(tmp_path: Path) -> None:
    context = context_of(tmp_path, "evaluate")
    folder = tmp_path / "evaluate"
    write(folder / "sft_longer/job.json", {"num_steps": 9})
    (tmp_path / "metrics.jsonl").write_text(lines(("train", "sft_longer", 3)), encoding="utf-8")
    assert str(progress_of(context)) == "sft_longer: step 3 of 9"
    write(folder / "answers-base" / MANIFEST, {"complete": True})
    write(folder / "answers-sft" / MANIFEST, {"complete": False})
    assert str(progress_of(context)) == "answers: model 1 of 5"
    write(folder / "scores-base" / MANIFEST, {"complete": True})
    write(folder / "scores-sft" / MANIFEST, {"complete": True})
    assert str(progress_of(context)) == "scores: model 2 of 5"


def test_the_table_shows_progress_in_place_of_partial() -> None:
    row = {"state": "partial", "progress": {"text": "step 4 of 8"}}
    assert shown_state(row) == "step 4 of 8"
    assert shown_state({"state": "partial", "progress": None}) == "partial"


# ---- beside a run that moves files ----


@pytest.fixture
def one_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A project whose first stage is done, by stand-ins, and of which status shows that stage."""
    project = write_project(tmp_path)
    StandIns().install(monkeypatch)
    config = load_config(project)
    pipeline.run(config, ["demonstrate"])
    monkeypatch.setattr(pipeline, "STAGES", (stage_named("demonstrate"),))
    return config


def test_a_stage_that_is_moved_between_two_readings_is_looked_at_again(
    one_stage: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = one_stage.run.dir / "demonstrate"
    [before] = pipeline.status(one_stage)
    assert before["state"] == "done"
    read = pipeline.inspect

    def inspect(context: StageContext) -> Any:
        found = read(context)
        if folder.exists():
            folder.rename(folder.with_name("superseded"))
        return found

    monkeypatch.setattr(pipeline, "inspect", inspect)
    assert [row["state"] for row in pipeline.status(one_stage)] == ["absent"]
    # The control: with one look the stage that was moved passes for a damaged one.
    folder.with_name("superseded").rename(folder)
    monkeypatch.setattr(pipeline, "_LOOKS", 1)
    assert [row["state"] for row in pipeline.status(one_stage)] == ["damaged"]


def test_a_file_that_vanishes_for_good_is_damage_and_not_the_end_of_status(
    one_stage: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def gone(context: StageContext) -> Any:
        looks.append(context)
        raise FileNotFoundError("shard-00000.parquet\nis gone")

    monkeypatch.setattr(pipeline, "inspect", gone)
    [row] = json.loads(json.dumps(pipeline.status(one_stage)))
    assert (row["state"], row["note"]) == ("damaged", "shard-00000.parquet is gone")
    assert len({id(context) for context in looks}) == len(looks) == 3
