"""Refreshes with several teachers: each scores its own domain, in the order in which the responses
were sampled; a killed refresh starts no teacher twice; a foreign one is refused before training.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lopd import pipeline
from lopd.artifacts import read_manifest
from lopd.cache.checks import check_cache
from lopd.config import Config, load_config
from lopd.errors import ConsistencyError, EngineError
from lopd.records import TeacherScores, float32
from lopd.stages.context import StageContext
from lopd.stages.order import stage_named
from lopd.stages.refresh_record import RefreshRecord
from lopd.stages.refresh_service import RefreshService
from lopd.stages.training import TrainingJob
from lopd.stages.training_data import load_samples
from sglang_rollout.requests.scoring import ScoreRequest
from tests.stand_ins import Engine, contents
from tests.test_domains import DOMAINS, STAGES, Servers, config, findings, weights

__all__ = ["config"]  # a fixture

OVERRIDES = ("distill.num_steps=6", "distill.batch_size=8", "distill.refresh.every=2")
SCORE_OF = {"teacher": -0.1, "code_teacher": -0.2, "math_teacher": -0.3, "model": -9.0}
FOLDER_OF = {"math": "math_teacher", "code": "code_teacher", "chat": "teacher"}


@dataclass
class Own(Engine):
    """Every model has a score of its own."""

    score_of_all: float = 0.0

    def score(self, requests: Iterable[ScoreRequest], *, top_k: int = 0) -> Iterator[TeacherScores]:
        for score in super().score(requests, top_k=top_k):
            own = float32(np.full(len(score.teacher_logprobs), self.score_of_all))
            yield replace(score, teacher_logprobs=own)


@dataclass
class OwnServers(Servers):
    @contextlib.contextmanager
    def serve(self, context: StageContext, role: str, model: Path) -> Iterator[Engine]:
        with super().serve(context, role, model) as engine:
            assert isinstance(engine, Own)
            engine.score_of_all = SCORE_OF[model.name]
            yield engine


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> OwnServers:
    made = OwnServers(engine=Own())
    made.install(monkeypatch)
    # The stand-in says the same version whatever is asked of it.
    monkeypatch.setattr("lopd.stages.refresh_service._check_versions", lambda *_: None)
    return made


def refreshing(config: Config, tmp_path: Path, *more: str) -> Config:
    """The same run with refreshes, as far as the score stage."""
    with_refreshes = load_config(tmp_path / "config.toml", [*OVERRIDES, *more])
    pipeline.run(with_refreshes, STAGES)
    return with_refreshes


def distill_stage(config: Config) -> StageContext:
    context = StageContext(config, stage_named("distill"))
    context.writer()
    return context


def refresh(context: StageContext, engine: Engine, tmp_path: Path, number: int = 1) -> Path:
    with RefreshService(context, engine, tmp_path / "student") as service:  # type: ignore[arg-type]
        RefreshRecord(number, 2 * number, "2 steps", "stand-in").request(context.folder)
        service.serve_requests()
    return context.folder / f"refresh-{number:04d}"


def domain_of(prompt_id: str) -> str:
    return DOMAINS[int(prompt_id.removeprefix("roll")) % 3]


def test_each_teacher_scores_its_own_domain_in_the_order_of_sampling(
    config: Config, servers: OwnServers, tmp_path: Path
) -> None:
    with_refreshes = refreshing(config, tmp_path)
    own = weights(config)
    servers.models.clear()
    folder = refresh(distill_stage(with_refreshes), servers.engine, tmp_path)
    assert servers.models == ["teacher", "code_teacher", "math_teacher"], "one after the other"
    shards = sorted(path.name for path in (folder / "scores").glob("shard-*.parquet"))
    assert len(shards) == 2
    for name in shards:
        scores = pq.read_table(folder / "scores" / name)
        keys = scores.select(["prompt_id", "token_ids"]).to_pylist()
        rollouts = pq.read_table(folder / "rollouts" / name)
        assert keys == rollouts.select(["prompt_id", "token_ids"]).to_pylist()
        domains = [domain_of(prompt_id) for prompt_id in scores.column("prompt_id").to_pylist()]
        assert len(set(domains)) > 1, "one shard has rows of several teachers"
        assert scores.column("teacher").to_pylist() == [own[domain] for domain in domains]
        for domain, row in zip(domains, scores.column("teacher_logprobs").to_pylist(), strict=True):
            assert row == pytest.approx([SCORE_OF[FOLDER_OF[domain]]] * len(row))
    assert [str(finding) for finding in check_cache(folder / "scores")[0]] == []
    manifest = read_manifest(folder / "scores")
    assert manifest.lineage["consistent"] is True
    assert sorted(manifest.lineage["by_domain"]) == ["", "code", "math"]
    assert sorted(path.name for path in folder.iterdir()) == ["rollouts", "scores", "seconds.json"]
    # The index of a teacher in the loss is the same before a refresh and after it.
    run = with_refreshes.run.dir
    names: list[dict[str, int | None]] = []
    for data in (run / "score", folder / "scores"):
        job = TrainingJob("distill", with_refreshes, run / "distill", data, run, "checkpoint", 6, 0)
        samples = load_samples(job)
        assert all(sample.key is not None for sample in samples)
        names.append({domain_of(sample.key[0]): sample.teacher_index for sample in samples})  # type: ignore[index]
    assert names[0] == names[1]
    assert len(set(names[0].values())) == 3


def test_a_teacher_without_prompts_in_a_refresh_is_not_started(
    config: Config, servers: OwnServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_refreshes = refreshing(config, tmp_path)
    monkeypatch.setattr(
        "lopd.stages.refresh_service.next_prompts",
        lambda num_prompts, step, count, config: [3 * place for place in range(min(count, 10))],
    )
    servers.models.clear()
    folder = refresh(distill_stage(with_refreshes), servers.engine, tmp_path)
    assert servers.models == ["math_teacher"]
    assert [str(finding) for finding in check_cache(folder / "scores")[0]] == []


def test_a_killed_refresh_starts_no_teacher_twice(
    config: Config, servers: OwnServers, tmp_path: Path
) -> None:
    with_refreshes = refreshing(config, tmp_path)
    context = distill_stage(with_refreshes)
    whole = contents(refresh(context, servers.engine, tmp_path) / "scores", "shard-*.parquet")
    again = distill_stage(refreshing(config, tmp_path, f"run.dir={tmp_path / 'again'}"))
    # 16 responses are sampled and then scored. The numbers end each teacher in its middle.
    servers.models.clear()
    for killed_after in (18, 6, 7):
        servers.engine.answered = 0
        servers.engine.fail_after = (killed_after, EngineError("killed"))
        with pytest.raises(EngineError, match="killed"):
            refresh(again, servers.engine, tmp_path)
    servers.engine.fail_after = None
    folder = refresh(again, servers.engine, tmp_path)
    assert contents(folder / "scores", "shard-*.parquet") == whole
    order = [name for name, _ in itertools.groupby(servers.models)]
    assert order == ["teacher", "code_teacher", "math_teacher"], "no finished one is started again"
    assert len(servers.models) > len(order), "some were killed in their middle"
    assert not (folder / "scores-by-domain").exists()


def test_a_foreign_teacher_of_one_domain_is_refused_before_the_training(
    config: Config, servers: OwnServers, tmp_path: Path
) -> None:
    with_refreshes = refreshing(config, tmp_path)
    context = distill_stage(with_refreshes)
    RefreshService(context, servers.engine, tmp_path / "student")  # type: ignore[arg-type]
    # The code teacher scores mathematics, whose demonstrations it has not made.
    folder = config.models.teachers["code"]
    swapped = load_config(
        tmp_path / "config.toml", [*OVERRIDES, f'models.teachers.math="{folder}"']
    )
    with pytest.raises(ConsistencyError, match="is not the teacher of the student's demonstration"):
        RefreshService(
            StageContext(swapped, stage_named("distill")),
            servers.engine,  # type: ignore[arg-type]
            tmp_path / "student",
        )


def test_what_lopd_check_says(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    assert findings(load_config(path, [*OVERRIDES])) == []
    kept = findings(load_config(path, [*OVERRIDES, "distill.refresh.keep_teacher=true"]))
    assert "keep_teacher and models.teachers cannot be used together" in kept[0]
