"""Models of one tokenizer with unequal numbers of rows: lopd check says what is true, responses are
cut before an id that another model lacks, and nothing scores or trains on such an id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lopd import cache, checks
from lopd.cache.reader import CacheReader
from lopd.config import ForwardSection, load_config
from lopd.errors import DataError
from lopd.megatron.scoring.scorer import MegatronScorer
from lopd.records import Response, float32, int32
from lopd.stages.training import TrainingJob
from lopd.stages.training_data import load_samples
from lopd.stages.vocabulary import num_shared_ids, within_ids
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest
from sglang_rollout.requests.scoring import ScoreRequest
from tests.cache.rollouts import publish_cache, some_responses
from tests.checking import wrong
from tests.stand_ins import Engine, Lopd, StandIns, command, write_project

ROWS = 32  # of the example's models, whose tokenizer has as many tokens


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_project(tmp_path)


def resize(folder: Path, rows: int) -> None:
    """As resize_token_embeddings does it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more = torch.full((rows - ROWS, tensors[name].shape[1]), 0.01)
        tensors[name] = torch.cat([tensors[name], more])
    save_file(tensors, path, metadata={"format": "pt"})
    edit_json(folder / "config.json", vocab_size=rows)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def said(config: Path, *overrides: str) -> str:
    return "\n".join(map(str, checks.tokenizers(load_config(config, overrides))))


# ---- what lopd check says ----


@pytest.mark.parametrize(("role", "other"), [("teacher", "student"), ("student", "teacher")])
def test_check_says_the_rows_of_each_and_why_it_is_fine(
    config: Path, role: str, other: str
) -> None:
    resize(config.parent / role, 1040)
    assert wrong(config) == []
    line = said(config)
    assert f"{role} 1,040" in line
    assert f"{other} 32" in line
    assert "tokens of the tokenizer: 32. This is fine: every token has a row in each model" in line
    assert "A response is cut before an id from 32 on" in line
    assert num_shared_ids(load_config(config)) == ROWS


def test_the_control_equal_rows(config: Path) -> None:
    line = said(config)
    assert "teacher 32, student 32; tokens of the tokenizer: 32. Every token has a row" in line
    assert "fine" not in line


def test_teachers_of_domains_count(config: Path) -> None:
    teacher = config.parent / "teacher"
    other = config.parent / "other"
    other.symlink_to(teacher)
    assert "teachers.register 32" in said(config, f"models.teachers.register={other}")


def test_a_model_with_fewer_rows_than_tokens_is_wrong_in_each_role(config: Path) -> None:
    edit_json(config.parent / "student" / "config.json", vocab_size=31)
    found = wrong(config)
    assert any("the tokenizer of the student has 32 tokens" in line for line in found)
    assert "fine" not in said(config)


def test_an_end_token_that_another_model_has_no_row_for(config: Path) -> None:
    resize(config.parent / "teacher", 40)
    edit_json(config.parent / "teacher" / "generation_config.json", eos_token_id=[2, 35])
    line = said(config)
    assert "the end token 35 of the teacher has no row in the embeddings of every model" in line
    assert "below vocab_size of the student: 32" in line


# ---- responses ----


def response(*ids: int) -> Response:
    return Response("p", 0, int32([5, 6]), int32(ids), float32([-0.5] * len(ids)), "stop", "v")


def test_a_response_is_cut_before_an_id_that_not_all_models_know(
    capsys: pytest.CaptureFixture[str],
) -> None:
    routed = np.zeros((4, 1, 2), np.int16)
    whole = response(7, 8, 2)
    cut, same = within_ids(
        [replace(response(7, 32, 2), routed_experts=routed), whole], ROWS, title="rollouts"
    )
    assert cut.token_ids.tolist() == [7]
    assert len(cut.sampling_logprobs) == 1
    assert cut.finish_reason == "length"
    assert cut.routed_experts is not None
    assert len(cut.routed_experts) == 2
    assert same is whole
    assert "rollouts: 1 responses were cut before a token id from 32 on" in capsys.readouterr().out
    assert [*within_ids([whole], ROWS, title="rollouts")] == [whole]
    assert capsys.readouterr().out == ""


def test_a_response_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(DataError, match=r"\('p', 0\) begins with token 33; limit: below 32"):
        [*within_ids([response(33, 2)], ROWS, title="rollouts")]


class Wandering(Engine):
    """Each response has one id past the rows of the example's models."""

    def generate(
        self,
        requests: Iterable[SamplingRequest],
        params: SamplingParams,
        *,
        version: str | None = None,
    ) -> Iterator[Response]:
        for one in super().generate(requests, params, version=version):
            yield replace(one, token_ids=int32([*one.token_ids[:5], 35, *one.token_ids[6:]]))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_run_in_which_one_model_has_more_rows(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], role: str
) -> None:
    resize(config.parent / role, 40)
    StandIns(engine=Wandering()).install(monkeypatch)
    lopd: Lopd = command(monkeypatch, capsys)
    shown = lopd("run", config).succeeded().out
    assert "responses were cut before a token id from 32 on" in shown
    run = config.parent / "run"
    for stage in ("demonstrate", "rollout", "score"):
        rows = [one for one, _ in cache.read_rows(run / stage)]
        assert {len(one.token_ids) for one in rows} == {5}
        assert max(int(one.token_ids.max()) for one in rows) < ROWS


# ---- artifacts with an id that a model has no row for ----


def spoiled(folder: Path, where: str, token: int) -> Path:
    responses = some_responses(20)
    ids = getattr(responses[7], where).copy()
    ids[0] = token
    responses[7] = replace(responses[7], **{where: ids})
    publish_cache(folder, responses)
    return folder


def job(config: Path, data: Path) -> TrainingJob:
    return TrainingJob("distill", load_config(config), data, data, data, "checkpoint", 1, 0)


@pytest.mark.parametrize("where", ["prompt_ids", "token_ids"])
def test_training_refuses_an_id_past_the_students_rows(
    config: Path, tmp_path: Path, where: str
) -> None:
    spoiled(tmp_path / "a", where, ROWS)
    with pytest.raises(DataError, match=f"has token 32 in {where}"):
        load_samples(job(config, tmp_path / "a"))
    spoiled(tmp_path / "b", where, ROWS - 1)
    assert len(load_samples(job(config, tmp_path / "b"))) == 20


def test_a_negative_id_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"response \('p7', 0\) has token -1 in token_ids"):
        CacheReader(spoiled(tmp_path / "a", "token_ids", -1)).require_ids_below(32, "the model")


def test_check_names_a_given_cache_and_given_demonstrations(config: Path, tmp_path: Path) -> None:
    given = spoiled(tmp_path / "a", "token_ids", ROWS)
    for override in (f"distill.cache={given}", f"sft.demonstrations={given}"):
        found = wrong(config, override)
        assert any(
            "has token 32 in token_ids, for which the student has no row; limit: at least 0" in line
            for line in found
        )
    right = spoiled(tmp_path / "b", "token_ids", ROWS - 1)
    for override in (f"distill.cache={right}", f"sft.demonstrations={right}"):
        assert not any("has token" in line for line in wrong(config, override))


def test_the_scorer_in_megatron_refuses_an_id_past_its_rows(config: Path, tmp_path: Path) -> None:
    scorer = MegatronScorer(config.parent / "teacher", ForwardSection(), folder=tmp_path)
    with pytest.raises(
        DataError, match=r"token 32 past the rows of the model; limit: .* has 32 rows"
    ):
        next(scorer.score([ScoreRequest("p", 0, int32([5, 32]), int32([7, 2]))]))
