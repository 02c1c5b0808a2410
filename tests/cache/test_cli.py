"""lopd cache at the command line: figures as JSON for programs and as text for readers, findings as
lines with exit code 2.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lopd import cache
from lopd.artifacts import read_manifest
from lopd.report.cache_view import colour, histogram_lines
from tests.cache.rollouts import TINY_TEACHER, publish_cache, some_responses
from tests.stand_ins import Result, StandIns, command, write_project


@pytest.fixture
def lopd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    return command(monkeypatch, capsys)


def test_verify(lopd: Callable[..., Result], tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(20))
    assert "sound" in lopd("cache", "verify", tmp_path / "a").succeeded().out
    figures = json.loads(lopd("cache", "verify", tmp_path / "a", "--json").succeeded().out)
    assert (figures["ok"], figures["rows"], figures["findings"]) == (True, 20, [])
    publish_cache(
        tmp_path / "b",
        some_responses(2),
        [np.full(len(response.token_ids), np.nan) for response in some_responses(2)],
    )
    wrong = lopd("cache", "verify", tmp_path / "b")
    assert wrong.code == 2
    assert "NaN or null in teacher_logprobs: p0/0, p1/0" in wrong.out
    assert json.loads(lopd("cache", "verify", tmp_path / "b", "--json").out)["findings"][0][
        "named"
    ] == ["p0/0", "p1/0"]
    lopd("cache", "verify", tmp_path / "nothing").refused("no manifest.json")


def test_inspect_counts_right(lopd: Callable[..., Result], tmp_path: Path) -> None:
    responses = some_responses(40)
    logprobs = [np.minimum(0, response.sampling_logprobs - 1.5) for response in responses]
    publish_cache(tmp_path / "a", responses, logprobs)
    figures = json.loads(lopd("cache", "inspect", tmp_path / "a", "--json").succeeded().out)
    lengths = [len(response.token_ids) for response in responses]
    assert (figures["rows"], figures["tokens"]) == (40, sum(lengths))
    assert figures["truncated_share"] == pytest.approx(8 / 40)
    assert figures["end_token_coverage"] == 1.0
    assert figures["lengths"]["mean"] == pytest.approx(np.mean(lengths))
    assert figures["advantage_at_start"]["mean"] == pytest.approx(-1.5, abs=1e-4)
    assert figures["advantage_at_start"]["share_over_1_nat"] == 1.0
    assert (figures["duplicate_keys"], figures["duplicate_sequences"]) == (0, 0)
    size = sum(path.stat().st_size for path in (tmp_path / "a").glob("*.parquet"))
    assert figures["bytes_per_token"] == pytest.approx(size / sum(lengths))
    assert sum(figures["bytes_per_token_by_column"].values()) == pytest.approx(
        figures["bytes_per_token"]
    )


def test_inspect_sees_duplicates_and_missing_end_tokens(
    lopd: Callable[..., Result], tmp_path: Path
) -> None:
    responses = some_responses(20)
    responses[0].token_ids[-1] = 9
    cache.write_responses(tmp_path / "a", [*responses, responses[3]], kind="rollouts", inputs={})
    figures = json.loads(lopd("cache", "inspect", tmp_path / "a", "--json").succeeded().out)
    assert (figures["duplicate_keys"], figures["duplicate_sequences"]) == (1, 1)
    assert figures["end_token_coverage"] == pytest.approx(16 / 17)


def test_inspect_for_a_reader(lopd: Callable[..., Result], tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(20))
    text = (
        lopd("cache", "inspect", tmp_path / "a", "--sample", "2", "--tokenizer", TINY_TEACHER)
        .succeeded()
        .out
    )
    for fragment in (
        "bytes per token",
        "teachers/one",
        "advantage at the start",
        "response lengths",
        "20.00% of the responses",
        "most at token",
    ):
        assert fragment in text
    ids = lopd("cache", "inspect", tmp_path / "a", "--sample", "1").succeeded().out
    assert "most at token" in ids, "without a tokenizer the ids are shown"


def test_colours_follow_the_disagreement() -> None:
    assert [colour(value) for value in (-9, -3, -1, 0, 1, 3)] == [
        "bold white on red",
        "bold red",
        "red",
        "",
        "green",
        "bold green",
    ]


def test_histogram_bars_grow_with_counts() -> None:
    bars = [
        line.count("#")
        for line in histogram_lines({"edges": [0, 1, 2, None], "counts": [100, 25, 0]})
    ]
    assert bars == [40, 20, 0]


def test_every_verb_from_split_to_import(lopd: Callable[..., Result], tmp_path: Path) -> None:
    publish_cache(tmp_path / "a", some_responses(60))
    lopd("cache", "split", tmp_path / "a", "--parts", "2", "--out", tmp_path / "h").succeeded()
    figures = json.loads(
        lopd(
            "cache",
            "merge",
            tmp_path / "h/part-00",
            tmp_path / "h/part-01",
            "--out",
            tmp_path / "m",
            "--json",
        )
        .succeeded()
        .out
    )
    assert figures["rows"] == 60
    assert figures["bytes_per_token"] > 0
    exported = lopd(
        "cache",
        "export",
        tmp_path / "m",
        "--out",
        tmp_path / "x.parquet",
        "--tokenizer",
        TINY_TEACHER,
    ).succeeded()
    assert "cannot hold" in exported.out
    imported = lopd(
        "cache",
        "import",
        tmp_path / "x.parquet",
        "--out",
        tmp_path / "i",
        "--tokenizer",
        TINY_TEACHER,
    ).succeeded()
    assert "lacks sampled token ids" in imported.out
    assert "sound" in lopd("cache", "verify", tmp_path / "i").succeeded().out
    lopd("cache", "merge", tmp_path / "a", "--out", tmp_path / "n").refused("at least 2")
    lopd("cache", "split", tmp_path / "a", "--parts", "1", "--out", tmp_path / "n").refused("parts")


def test_the_score_stage_stores_16_bits_and_says_what_that_lost(
    lopd: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    StandIns().install(monkeypatch)
    config = write_project(tmp_path)
    for stage in ("demonstrate", "sft", "rollout"):
        lopd(stage, config).succeeded()
    lopd("score", config, "score.logprob_bits=16").succeeded()
    manifest = read_manifest(tmp_path / "run" / "score")
    assert (manifest.inputs["score.logprob_bits"], manifest.extra["logprob_bits"]) == (16, 16)
    assert manifest.extra["logprob_loss"]["max_abs"] == pytest.approx(
        abs(np.float64(np.float32(-0.4)) - float(np.float16(-0.4)))
    ), "the stand-in says -0.4"
    assert (manifest.extra["vocab_size"], manifest.extra["end_token_ids"]) == (32, [2])
    lopd("score", config, "score.logprob_bits=8").refused("score.logprob_bits")
    assert "sound" in lopd("cache", "verify", tmp_path / "run" / "score").succeeded().out
    lopd("score", config).succeeded()
    assert read_manifest(tmp_path / "run" / "score").extra["logprob_loss"] is None, (
        "lossless unless asked otherwise"
    )
