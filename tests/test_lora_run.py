"""Adapters in a run: they are part of the artifacts of trainings and of the export, and of what is
verified; without them nothing of a run looks otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lopd import pipeline
from lopd.artifacts import read_manifest
from lopd.config import load_config
from lopd.stages import distill, evaluate, sft
from lopd.stages.adapter_folder import CONFIG, WEIGHTS, save_adapter
from lopd.stages.training import TrainingJob
from tests.stand_ins import Lopd, StandIns, command, flip_bit, states, write_project

LORA = "distill.lora.rank=4"
# An evaluation takes most of the time, and is the same as without adapters.
QUICK = "evaluate.enabled=false"
TENSORS = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 8)}


class Ranks(StandIns):
    """Write adapters beside the model where they are asked for, as the real ranks do."""

    def train(self, job: TrainingJob, *arguments: Any, **named: Any) -> dict[str, Any]:
        result = super().train(job, *arguments, **named)
        if job.settings.lora.is_on:
            save_adapter(TENSORS.items(), job.adapter, lora=job.settings.lora, base=job.initial)
        return result


@pytest.fixture
def lopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lopd:
    ranks = Ranks()
    ranks.install(monkeypatch)
    for stage in (sft, distill, evaluate):
        monkeypatch.setattr(stage, "train_on_ranks", ranks.train)
    return command(monkeypatch, capsys)


def files_of(folder: Path) -> set[str]:
    return {shard.name for shard in read_manifest(folder).shards}


def test_adapters_are_published_verified_and_exported(lopd: Lopd, tmp_path: Path) -> None:
    config = write_project(tmp_path)
    run = tmp_path / "run"
    pipeline.run(load_config(config, [LORA, QUICK]))
    both = {f"adapter/{CONFIG}", f"adapter/{WEIGHTS}"}
    assert both <= files_of(run / "distill")
    assert not both & files_of(run / "sft"), "its training has no adapters"
    assert {f"model/{name}" for name in both} <= files_of(run / "export")
    exported = run / "export" / "model"
    for name in (CONFIG, WEIGHTS):
        source = run / "distill" / "adapter" / name
        assert (exported / "adapter" / name).read_bytes() == source.read_bytes()
        assert not (exported / name).exists(), "PEFT would add it to weights that have it already"
    card = (exported / "README.md").read_text()
    assert "trained by LoRA (rank 4, alpha 32, " in card
    written = json.loads((exported / "adapter" / CONFIG).read_text())
    assert written["base_model_name_or_path"] == "sft/model"
    # A changed adapter is noticed as a changed weight is.
    flip_bit(run / "distill" / "adapter" / WEIGHTS)
    lopd("distill", config, LORA, QUICK).refused(WEIGHTS)


def test_without_a_rank_the_stage_runs_again_and_has_none(lopd: Lopd, tmp_path: Path) -> None:
    config = write_project(tmp_path)
    pipeline.run(load_config(config, [LORA, QUICK]))
    found = states(lopd, config, QUICK)
    assert found["sft"] == found["score"] == "done"
    assert found["distill"] != "done"
    pipeline.run(load_config(config, [QUICK]))
    assert not (tmp_path / "run" / "distill" / "adapter").exists()
    assert not (tmp_path / "run" / "export" / "model" / "adapter").exists()
    assert "LoRA" not in (tmp_path / "run" / "export" / "model" / "README.md").read_text()


def test_an_adapter_replaces_an_older_one_and_the_rest_of_a_killed_one(tmp_path: Path) -> None:
    settings = load_config(write_project(tmp_path), [LORA]).distill.lora
    folder = tmp_path / "adapter"
    (tmp_path / ".adapter.partial").mkdir()
    (tmp_path / ".adapter.partial" / WEIGHTS).write_bytes(b"cut short")
    sizes = []
    for count in (1, 3):
        tensors = {f"{number}": torch.ones(4) for number in range(count)}
        save_adapter(tensors.items(), folder, lora=settings, base=tmp_path)
        sizes.append((folder / WEIGHTS).stat().st_size)
    assert sizes[0] < sizes[1]
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert not (tmp_path / ".adapter.partial").exists()
