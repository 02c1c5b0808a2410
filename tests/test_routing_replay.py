"""A run that keeps the sampler's experts and replays them: what servers are started with and asked
for, what the artifacts hold, and what lopd check refuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lopd import checks, pipeline
from lopd.config import Config, SGLangSection, load_config
from lopd.records import Response
from lopd.stages.context import StageContext
from lopd.stages.order import stage_named
from lopd.stages.training import TrainingJob
from lopd.stages.training_data import load_samples
from sglang_rollout.requests.routed import RouterShape
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest
from sglang_rollout.servers.shared_gpus import training_settings
from tests.models import write_qwen3_dense
from tests.stand_ins import CONFIG, Engine, StandIns, write_project

STAGES = ("demonstrate", "sft", "rollout", "score")
KEPT = "rollout.routed_experts=true"
REPLAYED = "distill.routing_replay=true"
# Of the example's student.
ROUTER = RouterShape(num_layers=3, num_experts=8, experts_per_token=2)


@dataclass
class Routed(Engine):
    """Answers with experts where it is asked for them."""

    asked: list[RouterShape | None] = field(default_factory=list)

    def generate(
        self,
        requests: Iterable[SamplingRequest],
        params: SamplingParams,
        *,
        version: str | None = None,
    ) -> Iterator[Response]:
        self.asked.append(params.router)
        for response in super().generate(requests, params, version=version):
            if params.router is None:
                yield response
                continue
            positions = len(response.prompt_ids) + len(response.token_ids) - 1
            first = np.arange(positions * 3).reshape(positions, 3, 1) % 8
            experts = np.concatenate([first, (first + 3) % 8], -1).astype(np.int16)
            yield replace(response, routed_experts=experts)


@dataclass
class Servers(StandIns):
    """Remembers the settings that each role's servers would be started with."""

    settings: dict[str, SGLangSection] = field(default_factory=dict)

    @contextlib.contextmanager
    def serve(self, context: StageContext, role: str, model: Path) -> Iterator[Engine]:
        self.settings[f"{context.stage.name}/{role}"] = context._settings_of(role)
        with super().serve(context, role, model) as engine:
            yield engine


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Servers:
    made = Servers(engine=Routed())
    made.install(monkeypatch)
    return made


def run(tmp_path: Path, *overrides: str) -> Config:
    config = load_config(write_project(tmp_path), [*overrides])
    pipeline.run(config, STAGES)
    return config


def test_the_experts_go_from_the_servers_to_the_trainer(tmp_path: Path, servers: Servers) -> None:
    config = run(tmp_path, KEPT, REPLAYED)
    engine = servers.engine
    assert isinstance(engine, Routed)
    assert engine.asked == [None, ROUTER], "the teacher's demonstrations need none"
    started = {
        name: settings.extra_args.get("enable_return_routed_experts", False)
        for name, settings in servers.settings.items()
    }
    assert started == {
        "demonstrate/teacher": False,
        "rollout/student": True,
        "score/teacher": False,
    }
    for stage in ("rollout", "score"):
        schema = pq.read_schema(sorted((config.run.dir / stage).glob("shard-*.parquet"))[0])
        assert "routed_experts" in schema.names, stage
    data = config.run.dir / "score"
    job = TrainingJob("distill", config, data, data, data, "checkpoint", 1, 0)
    assert job.replays_routing
    for sample in load_samples(job):
        assert sample.routed_experts is not None
        assert sample.routed_experts.shape == (len(sample), 3, 2)
    # The servers of a refresh are those of the training.
    asked = training_settings(config).extra_args
    assert asked["enable_return_routed_experts"] is True
    colocated = load_config(tmp_path / "config.toml", [KEPT, "sync.colocate=true"])
    assert training_settings(colocated).extra_args == {
        "enable_return_routed_experts": True,
        "enable_memory_saver": True,
    }


def test_without_the_knobs_nothing_is_asked_and_nothing_kept(
    tmp_path: Path, servers: Servers
) -> None:
    config = run(tmp_path)
    engine = servers.engine
    assert isinstance(engine, Routed)
    assert engine.asked == [None, None]
    assert all(not settings.extra_args for settings in servers.settings.values())
    schema = pq.read_schema(sorted((config.run.dir / "score").glob("shard-*.parquet"))[0])
    assert "routed_experts" not in schema.names
    assert training_settings(config) == config.sglang


def test_another_choice_makes_other_rollouts(tmp_path: Path, servers: Servers) -> None:
    config = run(tmp_path)
    context = StageContext(config, stage_named("rollout"))
    kept = load_config(tmp_path / "config.toml", [KEPT])
    assert context.inputs != StageContext(kept, stage_named("rollout")).inputs


def findings(config: Config) -> list[str]:
    return [
        str(finding)
        for name, finding in checks.check(config)
        if name == "routing" and not isinstance(finding, str)
    ]


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        ([REPLAYED], "the rollouts do not keep the experts"),
        (
            [
                KEPT,
                REPLAYED,
                "distill.recompute=full",
                "distill.parallel.ranks=2",
                "distill.parallel.pipeline=2",
            ],
            "cannot be used together with several pipeline stages",
        ),
        ([KEPT, REPLAYED, "distill.megatron.moe_router_fusion=true"], "chooses by itself"),
    ],
)
def test_what_lopd_check_refuses(tmp_path: Path, overrides: list[str], fragment: str) -> None:
    path = write_project(tmp_path)
    assert findings(load_config(path, [])) == []
    assert findings(load_config(path, [KEPT, REPLAYED, "distill.recompute=full"])) == []
    (found,) = findings(load_config(path, overrides))
    assert fragment in found
    assert "\n" not in found


def test_a_student_without_experts(tmp_path: Path) -> None:
    write_qwen3_dense(tmp_path / "student")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "config.toml").write_text(CONFIG)
    config = load_config(tmp_path / "config.toml", [KEPT, REPLAYED])
    found = findings(config)
    assert [finding.partition(" = true, but ")[0] for finding in found] == [
        "rollout.routed_experts: rollout.routed_experts",
        "distill.routing_replay: distill.routing_replay",
    ]
    assert all("the student has no experts" in finding for finding in found)


def test_a_given_cache_must_have_the_column(tmp_path: Path, servers: Servers) -> None:
    config = run(tmp_path)
    given = f"distill.cache={config.run.dir / 'score'}"
    (found,) = findings(load_config(tmp_path / "config.toml", [given, REPLAYED]))
    assert "the cache has no column routed_experts" in found
    kept = load_config(tmp_path / "config.toml", [KEPT, f"run.dir={tmp_path / 'kept'}"])
    pipeline.run(kept, STAGES)
    given = f"distill.cache={kept.run.dir / 'score'}"
    assert findings(load_config(tmp_path / "config.toml", [given, REPLAYED])) == []


def test_a_megatron_table_may_not_switch_the_replay_on(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    config = load_config(path, ["distill.megatron.moe_enable_routing_replay=true"])
    found = [str(one) for name, one in checks.check(config) if name == "megatron"]
    assert any("moe_enable_routing_replay" in one and "routing_replay" in one for one in found)
