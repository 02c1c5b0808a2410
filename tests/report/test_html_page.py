"""``lopd report``: what stands on the page is what stands in the run."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd.cache import read_rows
from lopd.records import Response, float32, int32
from lopd.report.html import page as pages
from lopd.report.html.comparing import paired_difference, verdict_of
from lopd.report.html.learning_curve import PICTURE, draw_learning_curve
from lopd.report.html.page import docs_beside, gather, make_page, packed, render, scan_all
from lopd.report.html.pictures import write_pictures
from lopd.report.html.source import open_sources
from lopd.report.html.tokens import Deviations, kind_of
from lopd.report.html.transcripts import Texts, budgets
from lopd.tasks.verdict_files import read_verdicts
from tests.cache.rollouts import publish_cache, some_responses
from tests.evaluation.test_model_evaluation import MODEL, PROBLEMS, SAMPLES, TASK, Oracle
from tests.report.made_run import NUM_PROMPTS, make_run, prompts_of
from tests.stand_ins import Result, StandIns, command, write_prompts

VENDOR = Path(pages.__file__).parent / "vendor"


@pytest.fixture
def lopd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    return command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("reported"))


@pytest.fixture(scope="module")
def data(run: Path) -> dict[str, Any]:
    return gather(open_sources([run]))


def unpacked(page: bytes) -> dict[str, Any]:
    """The data of a page as the browser reads them."""
    found = re.search(rb'id="data"[^>]*>([A-Za-z0-9+/=]+)<', page)
    assert found is not None
    return dict(json.loads(gzip.decompress(base64.b64decode(found[1]))))


@pytest.mark.parametrize(
    ("name", "model", "folder"),
    [
        ("held_out", "sft", "evaluate/scores-sft"),
        ("held_out", "distilled", "evaluate/scores-distilled"),
        ("held_out", "teacher", "evaluate/scores-teacher"),
        ("rollouts", "sft", "score"),
    ],
)
def test_every_token_of_the_page_is_the_one_of_the_cache(
    data: dict[str, Any], run: Path, name: str, model: str, folder: str
) -> None:
    prompt_set, prompts = prompts_of(data, name)
    number = [one["name"] for one in prompt_set["models"]].index(model)
    shown = {
        (prompt["id"], answer["sample"]): answer
        for prompt in prompts
        for answer in prompt["answers"]
        if answer["model"] == number
    }
    verdicts = read_verdicts((run / folder).with_name(f"answers-{model}"))
    rows = list(read_rows(run / folder))
    assert len(shown) == len(rows)
    for response, scores in rows:
        answer = shown[response.key]
        ids = [data["vocabulary"][index][1] for index in answer["tokens"]]
        assert ids == response.token_ids.tolist()
        assert scores is not None
        for column, values in (("teacher", scores), ("student", response.sampling_logprobs)):
            # In thousandths of a nat.
            assert np.abs(np.array(answer[column]) / 1000 - values).max() <= 0.0005001
        assert answer["finish"] == response.finish_reason
        if name == "held_out":
            assert answer["right"] == verdicts[response.key].right


def test_the_text_of_a_prompt_hides_the_template_and_nothing_else(data: dict[str, Any]) -> None:
    _, prompts = prompts_of(data, "held_out")
    rows = [data["vocabulary"][index] for index in prompts[0]["prompt"]]
    assert "".join(row[0] for row in rows).startswith("<|im_start|>user\n")
    # The names of the stand-in's prompts contain the prompt.
    visible = "".join(row[0] for row in rows if not row[2]).strip()
    assert visible.removesuffix("=?") == prompts[0]["id"].removeprefix("reg-")


def test_the_marks_of_thinking_are_shown_and_other_marks_are_hidden(run: Path) -> None:
    texts = Texts(run / "score", None)
    ids = {texts.of(token).strip(): token for token in texts.special}
    think = [token for text, token in ids.items() if text in ("<think>", "</think>")]
    assert len(think) == 2
    assert not any(texts.is_hidden(token) for token in think)
    # They stay special tokens in the figures by kind. The control: an end token is hidden.
    assert texts.is_hidden(ids["<|im_end|>"])


def test_the_curves_are_the_lines_of_the_metrics(data: dict[str, Any]) -> None:
    charts = {chart["title"].split(" (")[0]: chart for chart in data["charts"]}
    assert charts["Loss of distill"]["series"][0]["y"] == [1.0, 0.5]
    accuracy = charts["Accuracy on held-out prompts at each weight sync"]["series"][0]
    assert (accuracy["x"], accuracy["y"], accuracy["low"]) == ([0, 2], [50.0, 75.0], [30.0, 55.0])
    # Nothing was measured, so there is no empty chart.
    assert "Gradient norm" not in charts


def test_the_same_run_gives_the_same_page_without_a_network(run: Path) -> None:
    page, data = make_page(open_sources([run]), docs="")
    assert page == make_page(open_sources([run]), docs="")[0]
    assert unpacked(page)["vocabulary"] == data["vocabulary"]
    # Neither scripts nor styles nor images of elsewhere. The control is that the pattern finds one.
    outside = re.compile(rb'(src|href)="(https?:)?//|url\(|@import|fetch\(|XMLHttpRequest')
    assert not outside.search(page.replace(packed({**data, "docs": ""}).encode(), b""))
    assert outside.search(b'<img src="https://example.org/a.png">')


def test_a_page_with_strange_text_stays_a_page(data: dict[str, Any]) -> None:
    strange = "</script><img src=x onerror=alert(1)> \ud800 \u2028"
    page = render({**data, "vocabulary": [[strange, 1, 0]]}, "")
    assert b"<img" not in page
    # Half of a surrogate pair is no character.
    assert unpacked(page)["vocabulary"][0][0] == strange.replace("\ud800", "?")


def deviations(responses: list[Response], scores: list[Any]) -> Deviations:
    found = Deviations()
    for response, row in zip(responses, scores, strict=True):
        found.add(response, float32(row))
    return found


def test_figures_of_tokens_against_plain_numpy() -> None:
    responses = some_responses(50, seed=3)
    rng = np.random.default_rng(5)
    scores = [r.sampling_logprobs + rng.normal(-0.2, 3.0, len(r.token_ids)) for r in responses]
    figures = deviations(responses, scores).figures(str, {2})
    assert figures is not None
    ids = np.concatenate([r.token_ids for r in responses])
    values = np.concatenate(
        [float32(s) - r.sampling_logprobs for r, s in zip(responses, scores, strict=True)]
    ).astype(float)
    overall = figures.overall
    assert overall["tokens"] == len(values)
    assert overall["mean"] == pytest.approx(values.mean(), abs=1e-6)
    assert overall["mean_abs"] == pytest.approx(np.abs(values).mean(), abs=1e-6)
    assert overall["over_1"] == pytest.approx((np.abs(values) > 1).mean(), abs=0.01)
    for share, value in overall["quantiles"].items():
        assert value == pytest.approx(np.quantile(values, float(share)), abs=0.1)
    largest = np.sort(np.abs(values))[::-1]
    count = len(values) // 100
    top = largest[:count].sum() / largest.sum()
    assert overall["top_1_percent"] == pytest.approx(top, abs=0.01)
    for token, (text, number, mean, share) in figures.tokens.items():
        own = values[ids == token]
        assert (text, number) == (str(token), len(own))
        assert mean == pytest.approx(own.mean(), abs=1e-6)
        assert share == pytest.approx(np.abs(own).sum() / np.abs(values).sum(), abs=1e-6)
    assert figures.kinds["special token"][0] == (ids == 2).sum()
    assert sum(kind[2] for kind in figures.kinds.values()) == pytest.approx(1.0)
    # The first tenth of each response.
    first = [
        (float32(s) - r.sampling_logprobs)[np.arange(len(s)) * 10 // len(s) == 0]
        for r, s in zip(responses, scores, strict=True)
    ]
    assert figures.positions[0][0] == pytest.approx(np.concatenate(first).mean(), abs=1e-5)


def test_a_deviation_is_of_the_right_token() -> None:
    """The control of the test above: one token that the teacher dislikes stands out."""
    response = replace(
        some_responses(1)[0],
        token_ids=int32([7, 8, 9]),
        sampling_logprobs=float32([-1.0, -1.0, -1.0]),
    )
    figures = deviations([response], [[-1.0, -5.0, -1.0]]).figures(str, set())
    assert figures is not None
    assert {token: row[3] for token, row in figures.tokens.items()} == {7: 0.0, 8: 1.0, 9: 0.0}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" the", "beginning of a word"),
        ("ing", "part of a word"),
        ("42", "number"),
        ("\n\n", "line break"),
        ("  ", "space"),
        (",", "punctuation"),
        ("+", "mathematical or other symbol"),
        ("\ufffd", "part of a character"),
    ],
)
def test_kinds_of_tokens(text: str, kind: str) -> None:
    assert kind_of(text) == kind


def test_what_a_small_set_leaves_is_for_the_large_ones() -> None:
    assert budgets([10, 500, 900], 1000) == [10, 495, 495]
    assert budgets([10, 20], 1000) == [10, 20]
    assert budgets([], 1000) == []


def test_too_many_responses_are_sampled_and_the_page_says_so(tmp_path: Path) -> None:
    responses = some_responses(200)
    scores = [r.sampling_logprobs - 0.01 for r in responses]
    scores[150] = responses[150].sampling_logprobs - 4.0
    publish_cache(tmp_path / "score", responses, scores)
    sources = open_sources([tmp_path / "score"])
    few = gather(sources, max_tokens=2000)
    found, prompts = prompts_of(few, "responses")
    assert found["total"] == 200
    assert 10 < len(prompts) < 60
    assert 0 < found["strongest"] < len(prompts) / 2
    # The prompt on which teacher and student disagree most is kept, whatever the draw.
    for seed in range(3):
        kept = prompts_of(gather(sources, max_tokens=2000, seed=seed), "responses")[1]
        assert "p150" in [prompt["id"] for prompt in kept]
    # Figures are of all tokens, also of those whose text is left out.
    all_of_them = gather(sources)
    assert few["runs"][0]["tokens"] == all_of_them["runs"][0]["tokens"]
    assert len(prompts_of(all_of_them, "responses")[1]) == 200


def test_a_page_stays_below_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_cache(tmp_path / "score", some_responses(150))
    sources = open_sources([tmp_path / "score"])
    whole, _ = make_page(sources, docs="")
    # Between the page without transcripts and with all of them.
    limit = len(render(gather(sources, max_tokens=0), "")) + 15_000
    assert len(whole) > limit
    monkeypatch.setattr(pages, "MAX_BYTES", limit)
    page, data = make_page(sources, docs="")
    assert len(page) < limit
    assert 0 < len(prompts_of(data, "responses")[1]) < 150
    monkeypatch.setattr(pages, "MAX_BYTES", 1000)
    with pytest.raises(pages.DataError, match="even without transcripts"):
        make_page(sources, docs="")


def test_two_runs_are_compared(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "distill.optimizer.lr": 0.001}))
    path = other / "evaluate/verdicts-distilled.jsonl"
    path.write_text(path.read_text().replace('"right": false', '"right": true'))
    data = gather(open_sources([run, other]))
    assert [row[0] for row in data["knobs"]] == ["distill.optimizer.lr"]
    assert "by 50.0 points" in data["comparisons"][0]["text"]
    assert [one["name"] for one in data["runs"]] == ["run", "other"]


def test_two_runs_hold_the_same_prompts(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other")
    # With other models its own choice would be another one.
    shutil.rmtree(tmp_path / "other/evaluate/scores-sft")
    shutil.rmtree(tmp_path / "other/evaluate/answers-base")
    data = gather(open_sources([run, tmp_path / "other"]), max_tokens=3000)
    kept = [
        {prompt["id"] for one in of_run["sets"] for prompt in one["prompts"]}
        for of_run in data["runs"]
    ]
    assert kept[0] == kept[1]
    totals = [one["total"] for one in data["runs"][0]["sets"] if one["name"] == "held_out"]
    assert 0 < len(kept[0]) < sum(one["total"] for one in data["runs"][0]["sets"])
    assert totals == [NUM_PROMPTS]


def test_prompts_of_one_name_that_differ_are_not_compared(run: Path) -> None:
    scans = {one.answers.model: one for one in scan_all(open_sources([run]))[0]}
    difference = paired_difference(scans["base"], scans["distilled"])
    assert difference is not None
    assert difference["num_prompts"] == NUM_PROMPTS
    changed = replace(scans["base"], prompts=dict.fromkeys(scans["base"].prompts, 0))
    assert paired_difference(changed, scans["distilled"]) is None


def test_the_command_writes_a_page_and_pictures(
    lopd: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pages/one.html"
    said = lopd("report", run, "--out", out, "--png", tmp_path / "png").succeeded().out
    assert "one.html" in said
    assert unpacked(out.read_bytes())["runs"][0]["name"] == "run"
    for name in (PICTURE, "curves.png", "timeline.png", "tokens.png"):
        assert (tmp_path / "png" / name).read_bytes().startswith(b"\x89PNG")
    # The learning curve that a run leaves is this one.
    shutil.copytree(run, tmp_path / "run")
    left = draw_learning_curve(tmp_path / "run", title="Distillation by Lightning OPD")
    assert left.read_bytes() == (tmp_path / "png" / PICTURE).read_bytes()
    # Demonstrations have neither metrics nor scores nor times.
    data = gather(open_sources([run / "demonstrate"]))
    assert write_pictures(data, tmp_path / "none") == []


def test_what_is_no_run_is_one_line(lopd: Callable[..., Result], run: Path, tmp_path: Path) -> None:
    lopd("report", tmp_path / "absent").refused("there is no such folder", "remedy")
    lopd("report", tmp_path).refused("neither a run, nor an evaluation, nor responses")
    lopd("report", run / "sft").refused("holds no responses itself", f"lopd report {run}")
    lopd("report", run, run).refused("given twice")
    lopd("report", run, "--tokenizer", tmp_path).refused("tokenizer.json")


def test_an_evaluation_without_a_run(
    lopd: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StandIns(engine=Oracle()).install(monkeypatch)
    prompts = [
        {"prompt_id": one.prompt_id, "messages": [*map(dict, one.messages)], "answer": one.answer}
        for one in map(TASK.to_prompt, PROBLEMS)
    ]
    file = write_prompts(tmp_path / "prompts.jsonl", prompts)
    task = ("--task", "register_arithmetic", "--prompts", file, "--out", tmp_path / "out")
    knobs = (f"evaluate.samples_per_prompt={SAMPLES}", "evaluate.max_new_tokens=64")
    lopd("evaluate", "--model", MODEL, *task, *knobs, "sglang.dtype=float32").succeeded()
    data = gather(open_sources([tmp_path / "out"]))
    found, shown = prompts_of(data, "held_out")
    assert [model["title"] for model in found["models"]] == ["model"]
    # Problem i is right in its first i samples, but never in the last one, which is cut off.
    right = [sum(answer["right"] for answer in prompt["answers"]) for prompt in shown]
    assert right == [0, 1, 2, 3, 3, 3]
    assert {answer["reason"] for answer in shown[5]["answers"] if not answer["right"]} != {""}
    # Its transcripts have the expected answers too.
    expected = {answer["expected"] for answer in shown[5]["answers"]}
    assert expected == {TASK.to_prompt(PROBLEMS[5]).answer}
    assert "is right on 50.0% of the answers" in data["runs"][0]["overview"]["headline"]
    assert data["runs"][0]["tokens"] == []


def test_samples_of_the_policy_apart_from_the_answers(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    # As where the answers are sampled at another temperature: the teacher scores other samples.
    (tmp_path / "run/evaluate/policy-sft").mkdir()
    data = gather(open_sources([tmp_path / "run"]))
    held_out, prompts = prompts_of(data, "held_out")
    sft = [model["name"] for model in held_out["models"]].index("sft")
    answers = [one for prompt in prompts for one in prompt["answers"] if one["model"] == sft]
    assert not any("teacher" in one for one in answers)
    assert all("right" in one for one in answers)
    _, apart = prompts_of(data, "policy")
    assert all("teacher" in one and "right" not in one for row in apart for one in row["answers"])


def test_an_unfinished_run_can_be_reported(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/evaluate")
    manifest = json.loads((tmp_path / "run/distill/manifest.json").read_text())
    (tmp_path / "run/distill/manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    data = gather(open_sources([tmp_path / "run"]))
    notes = [one["text"] for one in data["runs"][0]["checks"] if one["state"] == "note"]
    assert any("Not finished: distill" in note for note in notes)
    assert any("No evaluation has finished" in note for note in notes)


def test_the_vendored_library_is_the_one_of_its_readme() -> None:
    readme = (VENDOR / "README.md").read_text()
    for name in ("uPlot.iife.min.js", "uPlot.min.css"):
        digest = hashlib.sha256((VENDOR / name).read_bytes()).hexdigest()
        assert f"`{name}` | `{digest}`" in readme


def test_an_installed_lopd_has_all_files_of_the_page() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    patterns = tomllib.loads(text)["tool"]["setuptools"]["package-data"]["lopd.report.html"]
    package = VENDOR.parent
    packed_files = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in package.rglob("*.*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} <= packed_files


def test_links_lead_from_a_page_in_the_checkout_to_the_documentation() -> None:
    checkout = Path(pages.__file__).parents[3]
    folder = checkout / "runs/mine"
    found = folder / docs_beside(folder / "report.html") / "understand.md"
    assert Path(os.path.normpath(found)).is_file()
    # The control: from elsewhere a relative address would break as soon as the page is moved.
    # Not a temporary folder: TMPDIR may lie in the checkout.
    assert docs_beside(checkout.parent / "report.html") == ""


@pytest.mark.parametrize(
    ("mean", "interval", "begin", "part"),
    [
        (0.64, (0.608, 0.672), "b is better than a by 64.0 points", "(95% interval 60.8 to 67.2)"),
        (-0.64, (-0.672, -0.608), "a is better than b by 64.0 points", "60.8 to 67.2"),
        (-0.01, (-0.03, 0.01), "a is ahead of b by 1.0 points", "may be chance"),
        (0.0002, (-0.03, 0.0304), "a and b are equal over the same 500", "interval -3.0 to +3.0"),
    ],
)
def test_the_better_run_is_named_first(
    mean: float, interval: tuple[float, float], begin: str, part: str
) -> None:
    text = verdict_of(("a", "b"), {"mean": mean, "interval": interval, "num_prompts": 500})
    assert text.startswith(begin)
    assert part in text
    assert "other seeds" in text
