"""The panels of ``lopd report``: results, lineage, cost, refreshes, the teacher's entropy."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from lopd.artifacts import (
    MANIFEST,
    ArtifactWriter,
    identify_model,
    published_weights,
    read_manifest,
)
from lopd.cache import to_table
from lopd.records import Prompt
from lopd.report.html.page import gather
from lopd.report.html.sizes import parameters_of, size_of
from lopd.report.html.source import open_sources
from lopd.tasks.verdict_files import expected_answer
from tests.cache.rollouts import SAMPLING, TEACHER, full_scores, publish_cache, some_responses
from tests.report.made_run import NUM_PROMPTS, make_run, prompts_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("reported"))


@pytest.fixture(scope="module")
def data(run: Path) -> dict[str, Any]:
    return gather(open_sources([run]))


def test_the_overview_has_the_results_with_their_difference(data: dict[str, Any]) -> None:
    overview = data["runs"][0]["overview"]
    rows = {row["name"]: row for row in overview["models"]}
    assert rows["sft"]["accuracy"][0] == rows["distilled"]["accuracy"][0] == 0.5
    # Four prompts of eight were right in another way: the mean is 0, and its error is not.
    assert "The interval holds 0" in overview["further"][0]
    assert ": equal (0.0 points), 95% interval -" in overview["further"][0]
    assert "equal (" not in overview["further"][1]
    assert f"over the same {NUM_PROMPTS} prompts" in overview["further"][0]
    assert rows["sft"]["finish"] == {"stop": 6, "length": 2}
    stages = {row["name"]: row for row in overview["stages"]}
    assert stages["distill"]["parents"]["score"] == stages["score"]["fingerprint"]
    assert stages["score"]["last_command"] == "made"


def test_the_overview_says_which_model_made_what(data: dict[str, Any], run: Path) -> None:
    overview = data["runs"][0]["overview"]
    stages = {row["name"]: row for row in overview["stages"]}
    # What sft has published is what wrote the rollouts.
    student = read_manifest(run / "rollout").models["student"].weights[:12]
    assert stages["sft"]["gave"] == f"SFT student, weights {student}"
    made = identify_model(run / "distill/model").weights
    assert stages["distill"]["gave"] == f"distilled student, weights {made[:12]}"
    assert stages["rollout"]["gave"] == "24 responses of the SFT student"
    assert ["SFT student", f"made by sft (weights {student})"] in overview["about"]
    # A manifest calls both students "student".
    assert [*stages["sft"]["models"]] == ["base student"]
    assert [*stages["rollout"]["models"]] == ["base student", "SFT student"]
    assert stages["evaluate"]["gave"] == "answers and scores of 5 models"
    # The control: other weights are another model.
    manifest = read_manifest(run / "distill")
    shards = [replace(one, sha256="0" * 64) for one in manifest.shards]
    assert published_weights(run / "distill", manifest.shards) == made
    assert published_weights(run / "distill", shards) != made
    assert published_weights(run / "score", read_manifest(run / "score").shards) == ""


def test_the_sizes_of_teacher_and_student(data: dict[str, Any], run: Path, tmp_path: Path) -> None:
    about = dict(data["runs"][0]["overview"]["about"])
    with safe_open(run / "distill/model/model.safetensors", "np") as file:
        count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    config = json.loads((run / "distill/model/config.json").read_text())
    expected = (
        f"{config['num_hidden_layers']} layers, hidden size {config['hidden_size']}, "
        f"{config['num_local_experts']} experts ({config['num_experts_per_tok']} for each token), "
        f"{count:,} parameters"
    )
    assert about["size of the student"] == expected
    assert "size of the teacher" in about
    # Where a file of the weights is missing the count is not known, and nothing is invented.
    folder = tmp_path / "model"
    shutil.copytree(run / "distill/model", folder)
    assert parameters_of(folder) == count
    (folder / "model.safetensors").write_bytes(b"no header")
    assert parameters_of(folder) is None
    (folder / "model.safetensors").unlink()
    assert size_of(folder).endswith("for each token)")
    assert size_of(tmp_path) == ""


def test_an_answer_has_the_one_that_was_expected(data: dict[str, Any], run: Path) -> None:
    _, prompts = prompts_of(data, "held_out")
    answers = [one for prompt in prompts for one in prompt["answers"]]
    rows = [
        json.loads(line) for line in (run / "evaluate/verdicts-sft.jsonl").read_text().splitlines()
    ]
    assert {row["prompt_id"]: row["expected"] for row in rows} == {
        prompt["id"]: prompt["answers"][0]["expected"] for prompt in prompts
    }
    assert all(len(one["expected"]) > 0 for one in answers if "right" in one)
    # Rollouts are not judged. The tests of a program are nothing to read beside an answer.
    assert not any(
        "expected" in one for row in prompts_of(data, "rollouts")[1] for one in row["answers"]
    )
    task = Prompt("p", ({"role": "user", "content": "?"},), domain="math", answer="3")
    assert expected_answer(task) == {"expected": "3"}
    assert expected_answer(replace(task, answer="x" * 1000)) == {}
    assert expected_answer(replace(task, answer=None)) == {}


def test_what_a_reused_stage_has_cost_is_told_apart(run: Path, tmp_path: Path) -> None:
    def cost(summary: dict[str, Any]) -> dict[str, str]:
        (tmp_path / "run/summary.json").write_text(json.dumps(summary))
        data = gather(open_sources([tmp_path / "run"]))
        return dict(data["runs"][0]["overview"]["cost"])

    shutil.copytree(run, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    for name in ("demonstrate", "distill"):
        (tmp_path / "run" / name / "seconds.json").write_text(json.dumps({"seconds": 3600.0}))
    whole = cost(summary)
    assert "reused" not in str(whole).replace("reused: 0", "")
    assert "time of all stages" not in whole
    for row in summary["stages"]:
        row["seconds"] = 1.0
        if row["name"] == "demonstrate":
            row["status"] = "reused"
    told = cost(summary)
    assert told["time of the last command"] == "0:07; stages made: 6, reused: 1"
    assert told["time of all stages"].startswith("2:00:0")
    (hours,) = [text for title, text in told.items() if "hours" in title]
    assert hours == "2.00: 1.00 by the last command, 1.00 by earlier ones"
    assert told["tokens that the teacher wrote"].endswith("(by an earlier command)")
    assert "earlier" not in told["tokens that the teacher scored"]


def test_a_better_baseline_is_the_headline(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/evaluate/verdicts-sft_longer.jsonl"
    texts = [path.read_text().replace('"right": false', '"right": true')]
    # The control: a baseline that is never right is no headline.
    texts.append(texts[0].replace('"right": true', '"right": false'))
    overviews = []
    for text in texts:
        path.write_text(text)
        overviews.append(gather(open_sources([tmp_path / "run"]))["runs"][0])
    better, worse = (one["overview"] for one in overviews)
    assert better["headline"].startswith(
        "SFT of equal compute is better than the distilled student: it is right on 100.0%"
    )
    assert worse["headline"].startswith("The distilled student is right on 50.0%")
    assert worse["headline"] in better["further"]
    states = [
        next(check["state"] for check in one["checks"] if check["title"] == "equal compute")
        for one in overviews
    ]
    assert states == ["warning", "fine"]


def test_the_rollouts_of_a_refresh_are_answers_of_their_own(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    scores = tmp_path / "run/distill/refresh-0001/scores"
    shutil.copytree(run / "score", scores)
    (scores.parent / "seconds.json").write_text('{"teacher_seconds": 1.5}')
    manifest = json.loads((scores / MANIFEST).read_text())
    manifest["sampling"]["temperature"] = 1.0
    (tmp_path / "run/score" / MANIFEST).write_text(json.dumps(manifest))
    manifest["inputs"]["refresh.step"] = 2
    (scores / MANIFEST).write_text(json.dumps(manifest))
    data = gather(open_sources([tmp_path / "run"]))
    found, prompts = prompts_of(data, "rollouts")
    assert [one["title"] for one in found["models"]] == ["SFT student", "student after step 2"]
    assert all(len(prompt["answers"]) == 2 for prompt in prompts)
    # Its line: after which step, how much, how long. The control: a run without one has none.
    rows = read_manifest(run / "score")
    (line,) = data["runs"][0]["refreshes"]
    assert (line["step"], line["responses"], line["seconds"]) == (2, rows.rows, 1.5)
    assert line["tokens"] == sum(shard.tokens for shard in rows.shards)
    assert gather(open_sources([run]))["runs"][0]["refreshes"] == []
    panels = [one for one in data["runs"][0]["tokens"] if one["set"] == "rollouts"]
    charts = {chart["name"]: chart["series"] for chart in data["charts"]}
    # A copy of the rollouts is as far from the teacher as they are.
    (line,) = charts["fresh_reverse_kl"]
    assert line["x"] == [0, 2]
    assert line["y"] == [pytest.approx(-panels[0]["overall"]["mean"], abs=1e-6)] * 2
    quantiles = panels[0]["overall"]["quantiles"]
    assert charts["fresh_advantage"][0]["y"] == [quantiles["0.01"]] * 2
    # Answers of another temperature are not the policy's: their mean is no reverse KL.
    manifest["sampling"]["temperature"] = 0.6
    (scores / MANIFEST).write_text(json.dumps(manifest))
    again = gather(open_sources([tmp_path / "run"]))
    names = [chart["name"] for chart in again["charts"]]
    assert "fresh_advantage" in names
    assert "fresh_reverse_kl" not in names


def test_the_entropy_of_the_teacher_has_panels_where_the_cache_has_it(tmp_path: Path) -> None:
    responses, scores = full_scores(some_responses(30))
    writer = ArtifactWriter(
        tmp_path / "score",
        kind="teacher_cache",
        inputs={},
        models={"teacher": TEACHER},
        sampling=SAMPLING,
        lineage={},
    )
    writer.publish_shard(0, to_table(responses, scores))
    writer.finish()
    data = gather(open_sources([tmp_path / "score"]))
    entropy = data["runs"][0]["tokens"][0]["entropy"]
    values = np.concatenate([one.entropy for one in scores if one.entropy is not None])
    deviation = np.concatenate(
        [
            one.teacher_logprobs - response.sampling_logprobs
            for one, response in zip(scores, responses, strict=True)
        ]
    )
    assert entropy["tokens"] == len(values)
    assert entropy["mean"] == pytest.approx(values.mean(), abs=1e-6)
    assert entropy["quantiles"]["0.5"] == pytest.approx(np.median(values), abs=0.02)
    edges = np.array([0, 0.01, 0.1, 0.5, 1, 2])
    for name, count, mean, share in entropy["sizes"]:
        low = float(name.split(" ")[0])
        own = np.searchsorted(edges, values, side="right") - 1 == list(edges).index(low)
        assert count == own.sum()
        assert mean == pytest.approx(deviation[own].mean(), abs=1e-5)
        whole = np.abs(deviation).sum()
        assert share == pytest.approx(np.abs(deviation[own]).sum() / whole, abs=1e-5)
    assert sum(row[1] for row in entropy["sizes"]) == len(values)
    answer = prompts_of(data, "responses")[1][0]["answers"][0]
    assert scores[0].entropy is not None
    assert np.abs(np.array(answer["entropy"]) / 1000 - scores[0].entropy).max() <= 0.0005001
    # A cache without it has no panel.
    publish_cache(tmp_path / "plain", some_responses(5))
    plain = gather(open_sources([tmp_path / "plain"]))
    assert plain["runs"][0]["tokens"][0]["entropy"] is None
