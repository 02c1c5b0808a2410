"""Lightning OPD 2.0: a planted style is taken away, planted evidence stays, folds never share a
prompt, and in-sample fitting would leak.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd import cache
from lopd.artifacts import ArtifactWriter
from lopd.cache.checks import check_cache
from lopd.cache.merging import merge
from lopd.cache.residualise import fold_of, residualise
from lopd.cache.row_checks import RESIDUALISED
from lopd.cache.style import Settings, StyleTables, prepare, surprisal_edges
from lopd.errors import ArtifactError, LopdError
from lopd.records import Response, float32, int32
from tests.cache.rollouts import (
    SAMPLING,
    TEACHER,
    VOCABULARY,
    publish_cache,
    scores_of,
    some_responses,
)
from tests.stand_ins import Result, command

STYLE_TOKENS = {7: 0.8, 11: -0.6, 20: 0.5}
OPENING = 0.7  # nats that the foreign teacher adds to whatever opens a response, first tenth


def planted(
    count: int = 1500, seed: int = 0
) -> tuple[list[Response], list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Responses, the teacher's log-probabilities, and the style and evidence in them. Evidence: 2%
    of tokens, +-2.5 nats, by prompt alone.
    """
    rng = np.random.default_rng(seed)
    responses = []
    teacher = []
    styles = []
    evidences = []
    for index in range(count):
        length = int(rng.integers(30, 60))
        tokens = rng.integers(3, 32, length)
        # Values this low keep every sum with style and evidence below 0.
        sampling = -4.0 - rng.exponential(1.0, length)
        style = np.array([STYLE_TOKENS.get(int(token), 0.0) for token in tokens]) + OPENING * (
            np.arange(length) < length / 10
        )
        evidence = np.where(rng.random(length) < 0.02, rng.choice([-2.5, 2.5], length), 0.0)
        responses.append(
            Response(
                f"p{index // 2}",
                index % 2,
                int32([5, 6]),
                int32(tokens),
                float32(sampling),
                "length",
                "0",
            )
        )
        teacher.append(float32(sampling + style + evidence))
        styles.append(style)
        evidences.append(evidence)
    return responses, teacher, styles, evidences


def corrected(folder: Path) -> np.ndarray:
    rows = list(cache.read_rows(folder))
    return np.concatenate(
        [scores - response.sampling_logprobs for response, scores in rows if scores is not None]
    )


def test_the_tables_recover_the_planted_style(tmp_path: Path) -> None:
    responses, teacher, _, _ = planted()
    publish_cache(tmp_path / "a", responses, teacher, shard_size=400)
    about = residualise(tmp_path / "a", tmp_path / "b", Settings()).extra["residualisation"]
    mean = np.mean([row["bias"] for row in about["tokens"] if row["token_id"] not in STYLE_TOKENS])
    found = {row["token_id"]: row["bias"] - mean for row in about["tokens"]}
    for token, style in STYLE_TOKENS.items():
        assert found[token] == pytest.approx(style, abs=0.05)
    assert max(abs(value) for token, value in found.items() if token not in STYLE_TOKENS) < 0.05
    assert {row["token_id"] for row in about["tokens"][:3]} == set(STYLE_TOKENS), (
        "the table shows the most moving ones first"
    )
    bias = np.array(about["context"]["bias"], dtype=float)
    weight = np.array(about["context"]["share"])
    by_position = np.nansum(bias * weight, axis=1) / weight.sum(1)
    assert by_position[0] - np.mean(by_position[1:]) == pytest.approx(OPENING, abs=0.05)


def test_style_goes_and_evidence_stays(tmp_path: Path) -> None:
    responses, teacher, styles, evidences = planted()
    publish_cache(tmp_path / "a", responses, teacher, shard_size=400)
    style = np.concatenate(styles)
    evidence = np.concatenate(evidences)
    share = {}
    errors = {}
    for token_share in (0.5, 1.0):
        out = tmp_path / str(token_share)
        effect = residualise(tmp_path / "a", out, Settings(token_share=token_share)).extra[
            "residualisation"
        ]["effect"]
        after = corrected(out)
        marked = evidence != 0
        kept = (after * np.sign(evidence))[marked]
        assert kept.mean() == pytest.approx(2.5, abs=0.1), "evidence is whole"
        shifted = (
            np.isin(
                np.concatenate([response.token_ids for response in responses]), list(STYLE_TOKENS)
            )
            & ~marked
            & (style > 0)
        )
        share[token_share] = after[shifted].mean() / style[shifted].mean()
        errors[token_share] = np.sqrt(((after - evidence) ** 2).mean())
        assert effect["share_over_1_nat_before"] == pytest.approx(
            (
                np.abs(
                    np.concatenate(teacher)
                    - np.concatenate([r.sampling_logprobs for r in responses])
                )
                > 1
            ).mean()
        )
        assert effect["share_over_1_nat_after"] == pytest.approx(
            (np.abs(after) > 1).mean(), abs=1e-4
        )
        assert effect["share_over_1_nat_after"] < effect["share_over_1_nat_before"]
        assert abs(effect["mean_after"]) < 0.005
    assert share[1.0] < 0.25, (
        "the token table alone takes a style of tokens away, but for the opening"
    )
    assert share[0.5] == pytest.approx(0.5, abs=0.1), (
        "by the paper's formula half of it: each table has weight 1/2"
    )
    uncorrected = np.sqrt((style**2).mean())
    assert max(errors.values()) < 0.8 * uncorrected, (
        "closer to the evidence than without a correction"
    )


def test_a_style_seen_by_both_tables_is_taken_away_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    responses = []
    teacher = []
    for index in range(600):
        # Token 7 always comes first, in the first tenth.
        tokens = np.concatenate([[7, 7], rng.integers(8, 32, 18)])
        sampling = -3.0 - rng.exponential(0.5, 20)
        responses.append(
            Response(f"p{index}", 0, int32([5]), int32(tokens), float32(sampling), "length", "0")
        )
        teacher.append(float32(sampling + 1.2 * (tokens == 7) + rng.normal(0, 0.1, 20)))
    publish_cache(tmp_path / "a", responses, teacher, shard_size=200)
    effect = residualise(tmp_path / "a", tmp_path / "b", Settings()).extra["residualisation"][
        "effect"
    ]
    after = corrected(tmp_path / "b").reshape(600, 20)
    assert after[:, :2].mean() == pytest.approx(0, abs=0.03), (
        "of 1.2; smoothing leaves 1 part in 49"
    )
    assert after[:, 2:].mean() == pytest.approx(0, abs=0.03)
    assert effect["share_over_1_nat_before"] == pytest.approx(0.1, abs=0.01)
    assert effect["share_over_1_nat_after"] == 0


def test_folds_never_share_a_prompt() -> None:
    folds = defaultdict(set)
    for index in range(4000):
        folds[fold_of(f"p{index // 4}", Settings())].add(f"p{index // 4}")
    assert sorted(folds) == [0, 1, 2, 3, 4]
    assert sum(len(prompts) for prompts in folds.values()) == 1000
    assert all(160 < len(prompts) < 240 for prompts in folds.values())
    assert [fold_of(f"p{index}", Settings()) for index in range(50)] != [
        fold_of(f"p{index}", Settings(seed=1)) for index in range(50)
    ]


def test_a_tokens_own_fold_has_no_say() -> None:
    settings = Settings(folds=2, position_bins=1, surprisal_bins=1, smoothing=0.0)
    ids = np.array([3, 4, 3, 4])
    sampling = np.full(4, -1.0)
    teacher = sampling + np.array([1.0, 1.0, 5.0, 7.0])  # fold 0, then fold 1
    tokens = prepare(ids, teacher, sampling, np.array([2, 2]), np.array([0, 1]), settings)
    tables = StyleTables(settings, 8)
    tables.add(tokens)
    assert tables.bias(tokens) == pytest.approx([0.5 * 5 + 0.5 * 6, 0.5 * 7 + 0.5 * 6, 1.0, 1.0])
    assert tables.bias(tokens, cross_fitted=False) == pytest.approx(
        [0.5 * 3 + 0.5 * 3.5, 0.5 * 4 + 0.5 * 3.5] * 2
    )


def test_small_and_unseen_cells_take_the_mean() -> None:
    settings = Settings(folds=2, position_bins=1, surprisal_bins=1, smoothing=1.0, token_share=1.0)
    tokens = prepare(
        np.array([3, 4]),
        np.array([2.0, -1.0]) - 1,
        np.full(2, -1.0),
        np.array([1, 1]),
        np.array([0, 1]),
        settings,
    )
    tables = StyleTables(settings, 8)
    tables.add(tokens)
    assert tables.bias(tokens) == pytest.approx([-1.0, 2.0]), (
        "neither token is seen in the other fold: its mean"
    )
    assert tables.bias(tokens, cross_fitted=False) == pytest.approx(
        [(2 + 0.5) / 2, (-1 + 0.5) / 2]
    ), "one response against one that speaks for the mean"


def test_every_response_has_weight_one() -> None:
    settings = Settings(folds=2, position_bins=1, surprisal_bins=1, smoothing=0.0, token_share=0.0)
    deviation = np.array([*[1.0] * 9, 5.0])  # a long response and a short one, both in fold 0
    tokens = prepare(
        np.full(10, 3),
        deviation - 1,
        np.full(10, -1.0),
        np.array([9, 1]),
        np.array([0, 0]),
        settings,
    )
    tables = StyleTables(settings, 8)
    tables.add(tokens)
    assert tables.bias(tokens, cross_fitted=False) == pytest.approx(np.full(10, 3.0)), (
        "(1 + 5) / 2, not 14 / 10"
    )


def test_in_sample_fitting_takes_evidence_away_where_cross_fitting_does_not(tmp_path: Path) -> None:
    """Every prompt speaks of its own thing, a token that no other prompt has; what the teacher
    knows about it is evidence.
    """
    rng = np.random.default_rng(0)
    responses = []
    teacher = []
    evidence = []
    for index in range(25):
        tokens = np.where(np.arange(20) % 4 == 0, 7 + index, rng.integers(3, 7, 20))
        sampling = -4.0 - rng.exponential(0.2, 20)
        known = np.where(tokens == 7 + index, 2.0 if index % 2 else -2.0, 0.0)
        responses.append(
            Response(f"p{index}", 0, int32([5]), int32(tokens), float32(sampling), "length", "0")
        )
        teacher.append(float32(sampling + known))
        evidence.append(known)
    settings = Settings(smoothing=0.05, token_share=1.0)
    publish_cache(tmp_path / "a", responses, teacher)
    effect = residualise(tmp_path / "a", tmp_path / "b", settings).extra["residualisation"][
        "effect"
    ]
    truth = np.concatenate(evidence)
    kept = corrected(tmp_path / "b")[truth != 0] / truth[truth != 0]
    assert kept.mean() == pytest.approx(1, abs=0.05), "cross-fitted: all of it stays"
    assert effect["rms_after"] == pytest.approx(effect["rms_before"], rel=0.05)
    assert effect["rms_after_in_sample"] < 0.3 * effect["rms_before"], (
        "in-sample: most of it would be gone"
    )


def test_the_derived_cache_is_fingerprinted_and_sound(tmp_path: Path) -> None:
    responses = some_responses(120, samples_per_prompt=2)
    manifest = publish_cache(tmp_path / "a", responses)
    derived = residualise(tmp_path / "a", tmp_path / "b", Settings())
    assert derived.kind == RESIDUALISED
    assert derived.parents == {"teacher_cache": manifest.fingerprint}
    assert derived.lineage["residualised"] is True
    assert (
        residualise(tmp_path / "a", tmp_path / "b", Settings()).fingerprint == derived.fingerprint
    ), "once more does nothing"
    assert (
        residualise(tmp_path / "a", tmp_path / "c", Settings(folds=4)).fingerprint
        != derived.fingerprint
    )
    findings, _ = check_cache(tmp_path / "b")
    assert [str(finding) for finding in findings] == [], "values above 0 are no fault here"
    for (one, _), (other, scores) in zip(
        cache.read_rows(tmp_path / "a"), cache.read_rows(tmp_path / "b"), strict=True
    ):
        assert scores is not None
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.sampling_logprobs, other.sampling_logprobs)


SECOND = dataclasses.replace(TEACHER, path="teachers/two", weights="4" * 64)


def two_teachers(folder: Path) -> list[tuple[Response, np.ndarray]]:
    """Merges caches of two teachers, whose styles are opposite; returns all rows and scores."""
    rows = []
    for name, teacher, sign in (("a", TEACHER, 1.0), ("b", SECOND, -1.0)):
        responses, _, styles, evidences = planted(300, seed=int(sign > 0))
        own = [
            dataclasses.replace(response, prompt_id=f"{name}{response.prompt_id}")
            for response in responses
        ]
        scores = [
            float32(response.sampling_logprobs + sign * style + evidence)
            for response, style, evidence in zip(own, styles, evidences, strict=True)
        ]
        publish_cache(folder / name, own, scores, shard_size=100, teacher=teacher)
        rows += zip(own, scores, strict=True)
    merge([folder / "a", folder / "b"], folder / "both", teacher_column=True)
    return rows


def test_each_of_several_teachers_loses_its_own_style(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_teachers(tmp_path)
    for name in ("a", "b"):
        residualise(tmp_path / name, tmp_path / f"{name}-alone", Settings())
    manifest = residualise(tmp_path / "both", tmp_path / "corrected", Settings())
    alone = np.concatenate([corrected(tmp_path / f"{name}-alone") for name in ("a", "b")])
    np.testing.assert_array_equal(corrected(tmp_path / "corrected"), alone)
    about = manifest.extra["residualisation"]
    assert {name: own["weights"] for name, own in about["teachers"].items()} == {
        "teacher-0": TEACHER.weights,
        "teacher-1": SECOND.weights,
    }
    opposite = [
        {row["token_id"]: row["bias"] for row in own["tokens"]}[7]
        for own in about["teachers"].values()
    ]
    assert opposite[0] > 0.5
    assert opposite[1] < -0.5
    assert [str(finding) for finding in check_cache(tmp_path / "corrected")[0]] == []
    # The control: one table for both styles, which cancel each other.
    monkeypatch.setattr("lopd.cache.residualise.teachers_in", lambda reader: {})
    residualise(tmp_path / "both", tmp_path / "mixed", Settings())
    assert np.abs(corrected(tmp_path / "mixed") - alone).max() > 0.3


def test_rows_of_several_teachers_in_one_shard(tmp_path: Path) -> None:
    """A refresh publishes such shards."""
    rows = two_teachers(tmp_path)
    residualise(tmp_path / "both", tmp_path / "corrected", Settings())
    of_key = {
        response.key: scores
        for response, scores in cache.read_rows(tmp_path / "corrected")
        if scores is not None
    }
    order = np.random.default_rng(0).permutation(len(rows))
    writer = ArtifactWriter(
        tmp_path / "mixed",
        kind="teacher_cache",
        inputs={},
        models={"teachers.a": TEACHER, "teachers.b": SECOND},
        sampling=SAMPLING,
        lineage={},
    )
    for index, part in enumerate(np.array_split(order, 4)):
        responses = [rows[place][0] for place in part]
        scores = [
            dataclasses.replace(
                score,
                teacher=(TEACHER if response.prompt_id.startswith("a") else SECOND).weights,
            )
            for response, score in zip(
                responses, scores_of(responses, [rows[place][1] for place in part]), strict=True
            )
        ]
        writer.publish_shard(index, cache.to_table(responses, scores))
    writer.finish(vocab_size=VOCABULARY)
    residualise(tmp_path / "mixed", tmp_path / "mixed-corrected", Settings())
    for response, scores in cache.read_rows(tmp_path / "mixed-corrected"):
        assert scores is not None
        np.testing.assert_allclose(scores, of_key[response.key], atol=1e-5)


def with_lineage(folder: Path, name: str, *, consistent: bool) -> None:
    path = folder / name / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["lineage"]["consistent"] = consistent
    path.write_text(json.dumps(manifest))


def test_the_own_teachers_scores_can_stay(tmp_path: Path) -> None:
    two_teachers(tmp_path)
    with pytest.raises(LopdError, match="every teacher of this cache made the student's demonstra"):
        residualise(tmp_path / "both", tmp_path / "x", Settings(), foreign_only=True)
    with pytest.raises(LopdError, match="every teacher of this cache made the student's demonstra"):
        residualise(tmp_path / "a", tmp_path / "x", Settings(), foreign_only=True)
    with_lineage(tmp_path, "b", consistent=False)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "mixed", teacher_column=True)
    manifest = residualise(tmp_path / "mixed", tmp_path / "c", Settings(), foreign_only=True)
    residualise(tmp_path / "b", tmp_path / "b-alone", Settings())
    expected = np.concatenate([corrected(tmp_path / "a"), corrected(tmp_path / "b-alone")])
    np.testing.assert_array_equal(corrected(tmp_path / "c"), expected)
    assert list(manifest.extra["residualisation"]["teachers"]) == ["teacher-1"]
    whole = residualise(tmp_path / "mixed", tmp_path / "d", Settings())
    assert whole.fingerprint != manifest.fingerprint, "the control: both are corrected"
    assert np.abs(corrected(tmp_path / "d") - expected).max() > 0.3


def test_a_teacher_with_too_few_prompts_is_named(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(40, prefix="a"))
    few = some_responses(3, prefix="b", samples_per_prompt=3)
    publish_cache(tmp_path / "b", few, teacher=SECOND)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both", teacher_column=True)
    with pytest.raises(LopdError, match=r"prompts of the teacher 'teacher-1' are in 1 folds"):
        residualise(tmp_path / "both", tmp_path / "c", Settings())


def test_what_is_refused(tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(20))
    residualise(tmp_path / "a", tmp_path / "b", Settings())
    with pytest.raises(ArtifactError, match="this artifact is of kind residualised_cache"):
        residualise(tmp_path / "b", tmp_path / "c", Settings())
    changes: list[dict[str, Any]] = [
        {"folds": 1},
        {"smoothing": -1.0},
        {"token_share": 1.5},
        {"position_bins": 0},
    ]
    for change in changes:
        with pytest.raises(LopdError, match=next(iter(change))):
            residualise(tmp_path / "a", tmp_path / "d", dataclasses.replace(Settings(), **change))
    publish_cache(tmp_path / "one", some_responses(3, samples_per_prompt=3))
    with pytest.raises(LopdError, match="1 folds"):
        residualise(tmp_path / "one", tmp_path / "e", Settings())
    publish_cache(
        tmp_path / "nan",
        some_responses(20),
        [np.full(len(r.token_ids), np.nan) for r in some_responses(20)],
    )
    with pytest.raises(LopdError, match=r"NaN.*lopd cache verify"):
        residualise(tmp_path / "nan", tmp_path / "f", Settings())


def test_surprisal_bins() -> None:
    assert surprisal_edges(8)[[0, -1]] == pytest.approx([0.01, 8.0])
    assert len(surprisal_edges(8)) == 7
    assert len(surprisal_edges(1)) == 0


def test_the_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lopd: Callable[..., Result] = command(monkeypatch, capsys)
    publish_cache(tmp_path / "a", some_responses(60))
    shown = (
        lopd("cache", "residualise", tmp_path / "a", "--out", tmp_path / "b", "--folds", "3")
        .succeeded()
        .out
    )
    for fragment in (
        "style by token",
        "style by position",
        "over 1 nat",
        "cross-fitting",
        "not a foreign style but the lesson",
    ):
        assert fragment in shown
    figures = json.loads(
        lopd(
            "cache",
            "residualise",
            tmp_path / "a",
            "--out",
            tmp_path / "b",
            "--folds",
            "3",
            "--json",
        )
        .succeeded()
        .out
    )
    assert figures["settings"]["folds"] == 3
    assert {"share_over_1_nat_before", "share_over_1_nat_after"} <= set(figures["effect"])
    publish_cache(tmp_path / "second", some_responses(60, prefix="q"), teacher=SECOND)
    merge([tmp_path / "a", tmp_path / "second"], tmp_path / "both", teacher_column=True)
    shown = lopd("cache", "residualise", tmp_path / "both", "--out", tmp_path / "d").succeeded().out
    for fragment in (
        "teacher-0: style by token",
        "teacher-1: style by position",
        "all teachers: tokens with",
        "teacher teacher-1 made the student's demonstrations itself",
    ):
        assert fragment in shown
    lopd("cache", "residualise", tmp_path / "a", "--out", tmp_path / "c", "--folds", "1").refused(
        "folds 1", "at least 2 and at most 1000"
    )
