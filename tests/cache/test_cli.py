"""lopd cache at the command line: figures as JSON for programs and as text for readers, findings as
lines with exit code 2.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lopd import cache, pipeline
from lopd.artifacts import read_manifest
from lopd.config import load_config
from lopd.report.cache_view import LEGEND, colour, histogram_lines
from lopd.tasks.tokenizer import decode, load_tokenizer
from lopd.tasks.verdict_files import read_verdicts
from lopd.tasks.verdicts import Verdict
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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a whole run by stand-ins."""
    folder = tmp_path_factory.mktemp("inspected")
    with pytest.MonkeyPatch.context() as patch:
        StandIns().install(patch)
        pipeline.run(load_config(write_project(folder)))
    return folder / "run"


@pytest.mark.parametrize(
    "name", ["demonstrate", "rollout", "score", "evaluate/answers-sft", "evaluate/policy-sft"]
)
def test_what_a_model_answered_can_be_read(
    lopd: Callable[..., Result], run: Path, name: str
) -> None:
    """The text of the prompt and of the response, with the tokenizer that the run itself names."""
    text = lopd("cache", "inspect", run / name, "--sample", "2").succeeded().out
    shown = json.loads(lopd("cache", "inspect", run / name, "--sample", "2", "--json").out)
    rows = {response.key: response for response, _ in cache.read_rows(run / name)}
    tokenizer = load_tokenizer(TINY_TEACHER)
    assert len(shown["sample"]) == 2
    for one in shown["sample"]:
        response = rows[one["prompt_id"], one["sample_index"]]
        assert one["response"] == decode(tokenizer, response.token_ids)
        assert one["prompt"] == decode(tokenizer, response.prompt_ids)
        assert one["response"].splitlines()[0] in text
        assert "<|im_start|>user\n" in text
        # Only a score has advantages to colour, and only answers have a verdict.
        assert (one["scores"] is not None) == (name == "score")
        assert (one["verdict"] is not None) == ("answers" in name)
    assert (LEGEND in text) == (name == "score")
    assert ("verdict: wrong, " in text) == ("answers" in name)


def test_a_run_without_its_models_shows_texts_by_its_own_student(
    lopd: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    moved = tmp_path / "run/rollout"
    manifest = json.loads((moved / "manifest.json").read_text())
    for identity in manifest["models"].values():
        identity["path"] = "/elsewhere"
    (moved / "manifest.json").write_text(json.dumps(manifest))
    found = json.loads(lopd("cache", "inspect", moved, "--sample", "1", "--json").out)
    assert "<|im_start|>" in found["sample"][0]["prompt"]
    # The control: without any tokenizer ids are shown.
    shutil.copytree(moved, tmp_path / "alone/rollout")
    alone = lopd("cache", "inspect", tmp_path / "alone/rollout", "--sample", "1", "--json")
    assert json.loads(alone.out)["sample"][0]["prompt"].replace(" ", "").isdigit()


def test_a_folder_of_artifacts_names_them(lopd: Callable[..., Result], run: Path) -> None:
    for folder in (run, run / "evaluate"):
        lopd("cache", "inspect", folder).refused("holds no responses itself")
    lopd("cache", "inspect", run / "evaluate").refused("answers-base", "policy-teacher")


def test_the_verdicts_of_an_evaluation_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "transcripts").mkdir()
    line = {"prompt_id": "p", "sample_index": 1, "right": True, "reason": "", "found": "5\u2028"}
    (tmp_path / "transcripts/a.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n")
    assert read_verdicts(tmp_path / "answers") == {("p", 1): Verdict(True, "", "5\u2028")}
    assert read_verdicts(tmp_path / "policy-sft") == {}
