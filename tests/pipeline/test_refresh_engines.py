"""Slow: refreshes whose scores come from ranks of Megatron-Core, and refreshes by two servers of
the student (fake ones).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from lopd.artifacts import read_manifest
from lopd.cache.reader import CacheReader
from lopd.errors import EngineError
from lopd.records import Response, TeacherScores
from lopd.stages import distill
from lopd.stages.context import StageContext
from lopd.stages.refresh_record import RefreshRecord
from lopd.stages.refresh_service import RefreshService
from sglang_rollout.requests.fleet import fleet_of
from tests.limits import apart, within
from tests.megatron.test_scorer import of_transformers
from tests.pipeline.running import files
from tests.pipeline.test_refresh import Distill, asked, assert_same_result, config_of, copied
from tests.sglang.fake_server import FakeServer
from tests.stand_ins import scored_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
BY_MEGATRON = (
    "score.engine=megatron",
    "score.entropy=true",
    (
        "score.forward={dtype='float32', timeout_s=100, max_tokens_per_microbatch=256, "
        "parallel={ranks=2, tensor=2, expert=2}}"
    ),
)


@pytest.fixture(scope="module")
def scored_by_megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As test_refresh.scored, but that the teacher's ranks score; demonstrations and rollouts are
    stand-ins', the scores are real.
    """
    with scored_project(tmp_path_factory.mktemp("refreshing"), config_of, *BY_MEGATRON) as folder:
        return folder


@pytest.fixture(scope="module")
def refreshed(scored_by_megatron: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copied(scored_by_megatron, tmp_path_factory.mktemp("refreshed") / "project")
    Distill(folder, *BY_MEGATRON).succeeds()
    return folder


def fresh_rows(folder: Path) -> list[tuple[Response, TeacherScores]]:
    """Of both refreshes."""
    rows: list[tuple[Response, TeacherScores]] = []
    for made in read_manifest(folder / "run" / "distill").extra["refreshes"]:
        for response, scores in CacheReader(
            folder / "run" / "distill" / f"refresh-{made['number']:04d}" / "scores"
        ).scored_rows():
            assert scores is not None
            rows.append((response, scores))
    return rows


def perturbed(teacher: Path, folder: Path) -> Path:
    """The teacher with one weight matrix one percent larger."""
    folder.mkdir()
    (folder / "config.json").write_bytes((teacher / "config.json").read_bytes())
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_megatron_scores_what_the_student_has_written_anew(refreshed: Path, tmp_path: Path) -> None:
    """Log-probabilities and entropies are transformers', to 1e-5; a teacher with one matrix a
    percent larger is far off. No server of a teacher runs.
    """
    rows = fresh_rows(refreshed)
    assert len(rows) == 8 + 4
    requests: list[Any] = [response for response, _ in rows]
    expected, others = (
        of_transformers(model, requests)
        for model in (
            refreshed / "teacher",
            perturbed(refreshed / "teacher", tmp_path / "perturbed"),
        )
    )
    far = []
    for response, scores in rows:
        logprobs, entropies = (values.numpy() for values in expected[response.key])
        assert scores.entropy is not None
        within(np.abs(scores.teacher_logprobs - logprobs).max(), 1e-5)
        within(np.abs(scores.entropy - entropies).max(), 1e-5)
        far.append(np.abs(scores.teacher_logprobs - others[response.key][0].numpy()).max())
    apart(max(far), 1e-4)
    assert {line["role"] for line in asked(refreshed)} == {"student"}
    assert read_manifest(refreshed / "run" / "distill").extra["refreshes"][0]["rows"] == 8
    assert not list((refreshed / "run" / "distill").glob("megatron-*.heartbeats"))


def test_ranks_of_the_teacher_that_live_on_beside_the_trainer_change_nothing(
    scored_by_megatron: Path, refreshed: Path, tmp_path: Path
) -> None:
    folder = copied(scored_by_megatron, tmp_path / "project")
    screen = Distill(folder, *BY_MEGATRON, "distill.refresh.keep_teacher=true").succeeds()
    assert_same_result(folder, refreshed)
    assert screen.count("starting 2 ranks of Megatron-Core") == 1
    assert (refreshed / "output.txt").read_text().count("starting 2 ranks of Megatron-Core") == 2


@pytest.mark.parametrize("hold", ["scores-1", ""], ids=["amid scoring", "as its ranks start"])
def test_killed_while_megatron_scores_ends_as_one_never_killed(
    hold: str, scored_by_megatron: Path, refreshed: Path, tmp_path: Path
) -> None:
    folder = copied(scored_by_megatron, tmp_path / "project")
    stage = folder / "run" / "distill"
    begun = Distill(folder, *BY_MEGATRON, hold=hold)
    if hold:
        begun.kill_when_held()
        assert [path.name for path in stage.glob("refresh-*/scores/shard-*")] == [
            "shard-00000.parquet"
        ]
    else:
        begun.kill_when((stage / "megatron-teacher.log").exists)
    published = files(stage, "refresh-*/**/*.parquet")
    Distill(folder, *BY_MEGATRON).succeeds()
    assert published.items() <= files(stage, "refresh-*/**/*.parquet").items(), (
        "nothing published is made again"
    )
    assert_same_result(folder, refreshed)


def test_two_servers_of_the_student_make_what_one_makes(
    scored_by_megatron: Path, refreshed: Path, tmp_path: Path
) -> None:
    """To the bit: both get the weights of every refresh and sync. Which of them is asked what
    follows from prefixes and from how fast they are.
    """
    folder = copied(scored_by_megatron, tmp_path / "project")
    Distill(folder, *BY_MEGATRON, "sglang.replicas=2").succeeds()
    assert_same_result(folder, refreshed)
    for replica in (0, 1):
        done = [line for line in asked(folder) if line["replica"] == replica]
        assert [line["weights"] for line in done if "weights" in line] == [
            "step-2",
            "step-4",
            "step-5",
        ]


def test_a_server_that_was_left_with_other_weights_is_not_sampled(
    scored_by_megatron: Path, tmp_path: Path
) -> None:
    folder = copied(scored_by_megatron, tmp_path / "project")
    context = StageContext(config_of(folder, *BY_MEGATRON), distill.STAGE)
    context.writer()
    with FakeServer() as current, FakeServer() as left:
        service = RefreshService(
            context, fleet_of([current.engine(), left.engine()]), folder / "run" / "sft" / "model"
        )
        current.weight_version = "step-2"
        RefreshRecord(1, 2, "2 steps", version="step-2").request(context.folder)
        with pytest.raises(EngineError, match=r"weight version 'default', but .* has 'step-2'"):
            service.serve_requests()
        assert not current.paths("/generate") + left.paths("/generate")
