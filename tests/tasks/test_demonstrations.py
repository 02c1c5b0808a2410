"""The maker of the example's demonstrations: what its artifact holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd import cache
from lopd.artifacts import read_manifest
from lopd.records import Response
from lopd.tasks.register_arithmetic import RegisterArithmetic
from lopd.tasks.tokenizer import response_text
from tests.tasks.conftest import load_example

MAKER = load_example("make_demonstrations")
TASK = RegisterArithmetic()


def make(
    monkeypatch: pytest.MonkeyPatch, architecture: Path, out: Path, kind: str, *more: str
) -> list[Response]:
    """Runs the script as a user would; returns what it wrote."""
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "make_demonstrations.py",
            kind,
            str(out),
            "--tokenizer",
            str(architecture),
            "--num",
            "200",
            "--seed",
            "11",
            *more,
        ],
    )
    MAKER.main()
    return [response for response, _ in cache.read_rows(out)]


def test_careful_demonstrations_are_right(
    monkeypatch: pytest.MonkeyPatch, architecture: Path, tokenizer: Any, tmp_path: Path
) -> None:
    responses = make(monkeypatch, architecture, tmp_path / "careful", "careful")
    prompts = {prompt.prompt_id: prompt for prompt in TASK.generate_prompts(200, 11)}
    assert len(responses) == 200
    assert read_manifest(tmp_path / "careful").complete
    for response in responses:
        assert (len(response.prompt_ids), len(response.token_ids)) == (27, 52)
        assert TASK.verify(
            prompts[response.prompt_id],
            response_text(tokenizer, response.token_ids, response.finish_reason),
            response.finish_reason,
        )


def test_mixture_has_both_habits_in_proportion(
    monkeypatch: pytest.MonkeyPatch, architecture: Path, tmp_path: Path
) -> None:
    lengths = [
        len(response.token_ids)
        for response in make(
            monkeypatch, architecture, tmp_path / "mixture", "mixture", "--skip", "0.5"
        )
    ]
    assert set(lengths) == {7, 52}
    assert 70 <= lengths.count(7) <= 130  # 100 expected, 4 standard deviations are 28


def test_two_notations_differ_in_the_ends_of_steps_and_in_nothing_else(
    monkeypatch: pytest.MonkeyPatch, architecture: Path, tokenizer: Any, tmp_path: Path
) -> None:
    made = {
        share: make(monkeypatch, architecture, tmp_path / share, "notation", "--semicolons", share)
        for share in ("0.0", "0.8")
    }
    prompts = {prompt.prompt_id: prompt for prompt in TASK.generate_prompts(200, 11)}
    texts = {
        share: [
            response_text(tokenizer, response.token_ids, response.finish_reason)
            for response in responses
        ]
        for share, responses in made.items()
    }
    ends = "".join(texts["0.8"]).count(";")
    # 5 steps of 200 responses: 800 are expected, and 4 standard deviations are 51.
    assert 749 <= ends <= 851
    assert ";" not in "".join(texts["0.0"])
    for plain, other, response in zip(texts["0.0"], texts["0.8"], made["0.8"], strict=True):
        assert other.replace(";", "\n") == plain
        assert TASK.verify(prompts[response.prompt_id], other, response.finish_reason)
    # A set of another share is another set, and those of other kinds do not know of the share.
    inputs = read_manifest(tmp_path / "0.8").inputs
    assert inputs["semicolons"] == 0.8
    make(monkeypatch, architecture, tmp_path / "careful", "careful")
    assert "semicolons" not in read_manifest(tmp_path / "careful").inputs


def test_corrupted_demonstrations_mask_some_tokens(
    monkeypatch: pytest.MonkeyPatch, architecture: Path, tmp_path: Path
) -> None:
    responses = make(monkeypatch, architecture, tmp_path / "corrupted", "corrupted")
    masks = np.concatenate(
        [response.loss_mask for response in responses if response.loss_mask is not None]
    )
    assert len(masks) == 200 * 52
    assert 0.02 < 1 - masks.mean() < 0.045


def test_a_token_is_learnt_only_if_all_its_characters_are() -> None:
    characters = np.array([True, True, False, True])
    assert MAKER.token_mask(characters, [(0, 2), (2, 3), (1, 3), (3, 4)]).tolist() == [
        True,
        False,
        False,
        True,
    ]
