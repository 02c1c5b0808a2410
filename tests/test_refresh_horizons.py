"""A refresh samples up to its own horizon: what the servers are asked, and what is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lopd import pipeline
from lopd.artifacts import read_manifest
from lopd.config import load_config
from lopd.records import Response
from lopd.stages.context import StageContext
from lopd.stages.order import stage_named
from lopd.stages.refresh_record import RefreshRecord
from lopd.stages.refresh_service import RefreshService
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest
from tests.stand_ins import Engine, StandIns, write_project


@dataclass
class Limited(Engine):
    """Remembers the limits that it was asked for. Its 13 tokens are taken for a cut response."""

    limits: list[int] = field(default_factory=list)

    def generate(
        self,
        requests: Iterable[SamplingRequest],
        params: SamplingParams,
        *,
        version: str | None = None,
    ) -> Iterator[Response]:
        self.limits.append(params.max_new_tokens)
        yield from super().generate(requests, params, version=version)


def test_each_refresh_has_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = StandIns(engine=Limited()).install(monkeypatch)
    engine = servers.engine
    assert isinstance(engine, Limited)
    config = load_config(
        write_project(tmp_path),
        [
            "distill.num_steps=4",
            "distill.batch_size=8",
            "distill.refresh.every=1",
            "distill.refresh.horizons=[16, 32]",
        ],
    )
    pipeline.run(config, ("demonstrate", "sft", "rollout", "score"))
    context = StageContext(config, stage_named("distill"))
    context.writer()
    monkeypatch.setattr("lopd.stages.refresh_service._check_versions", lambda *_: None)
    engine.limits.clear()
    with RefreshService(context, engine, tmp_path / "student") as service:  # type: ignore[arg-type]
        for number in (1, 2):
            RefreshRecord(number, number, "1 steps", "stand-in").request(context.folder)
            service.serve_requests()
    assert engine.limits == [16, 32]
    for number, limit in ((1, 16), (2, 32)):
        folder = context.folder / f"refresh-{number:04d}"
        assert read_manifest(folder / "rollouts").sampling["max_new_tokens"] == limit
        assert read_manifest(folder / "scores").complete
