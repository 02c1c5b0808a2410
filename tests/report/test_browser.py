"""The page of ``lopd report`` in a real headless Chromium.

tests/report/install_chromium.sh installs Debian's one. LOPD_SCREENSHOTS=FOLDER keeps pictures.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd.cache import read_rows
from lopd.records import Response
from lopd.report.html.page import gather, make_page, render
from lopd.report.html.source import open_sources
from lopd.tasks.tokenizer import decode, load_tokenizer
from tests.report.chromium import Chromium, program
from tests.report.made_run import make_run
from tests.stand_ins import TINY_MODELS

pytestmark = pytest.mark.skipif(
    program() is None, reason="there is no Chromium: bash tests/report/install_chromium.sh"
)
COUNT = "document.querySelector('#transcripts [role=status]').textContent"
SCHEMES = (("light", 1280, False), ("dark", 1280, True), ("phone", 360, False))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("shown"))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_bytes(make_page(open_sources([run]), docs="docs")[0])
    return path


@pytest.fixture
def browser(chromium: Chromium, page: Path) -> Iterator[Chromium]:
    """The page, opened anew. No test may leave an error or ask for anything but the page."""
    chromium.look(1280)
    chromium.errors.clear()
    chromium.requests.clear()
    chromium.open(page)
    yield chromium
    assert chromium.errors == []
    # The icon is data of the page itself.
    asked = [url for url in chromium.requests if not url.startswith("data:")]
    assert asked == [page.resolve().as_uri()]


def choose(browser: Chromium, label: str, value: str) -> None:
    """Choose a value of a select box by its label, as a person does."""
    browser.js(
        "(() => { const label = [...document.querySelectorAll('#transcripts label')]"
        f".find((one) => one.firstChild.textContent === {json.dumps(label)});"
        f"const box = label.querySelector('select'); box.value = {json.dumps(value)};"
        "box.dispatchEvent(new Event('change')); })()"
    )


def prompts(browser: Chromium) -> list[str]:
    """The names of the prompts in the list, in its order."""
    return list(
        browser.js(
            "[...document.querySelectorAll('.results .about')]"
            ".map((one) => one.textContent.split(' \\u00b7 ')[0])"
        )
    )


def answers(run: Path, model: str) -> dict[str, tuple[Response, Any]]:
    folder = run / "evaluate" / f"scores-{model}"
    return {response.prompt_id: (response, scores) for response, scores in read_rows(folder)}


def test_every_section_is_there(browser: Chromium) -> None:
    for name in ("overview", "pipeline", "curves", "tokens", "transcripts"):
        assert browser.js(f"!document.getElementById('{name}').hidden"), name
    assert browser.js("document.getElementById('state').hidden")


def test_every_filter(browser: Chromium, run: Path) -> None:
    names = [*answers(run, "sft")]
    assert prompts(browser) == names
    sizes = {
        model: {
            name: float(np.abs(np.round(scores, 3) - np.round(one.sampling_logprobs, 3)).mean())
            for name, (one, scores) in answers(run, model).items()
        }
        for model in ("sft", "distilled")
    }
    # Answer i is right before for even i, and after for i < 4 (tests/report/made_run.py).
    expected = {
        "won": [names[1], names[3]],
        "lost": [names[4], names[6]],
        "better": [names[1], names[3]],
        "worse": [names[4], names[6]],
        "wrong": names[4:],
        "cut": [names[2], names[5]],
        "nearer": [name for name in names if sizes["distilled"][name] < sizes["sft"][name]],
        "further": [name for name in names if sizes["distilled"][name] > sizes["sft"][name]],
        "all": names,
        "answered": names,
    }
    assert expected["nearer"]
    assert expected["further"]
    for value, wanted in expected.items():
        choose(browser, "Show", value)
        assert prompts(browser) == wanted, value
        assert browser.js(COUNT) == f"{len(wanted)} of 8 prompts"


def test_search_finds_texts_and_names(browser: Chromium, run: Path) -> None:
    tokenizer = load_tokenizer(TINY_MODELS / "teacher")
    texts = {}
    for model in ("base", "sft", "sft_longer", "distilled", "teacher"):
        for name, (response, _) in answers(run, model).items():
            whole = decode(tokenizer, response.prompt_ids) + decode(tokenizer, response.token_ids)
            texts[name] = f"{texts.get(name, name)}\n{whole}"
    # A part of one answer that no other prompt has, and one that nothing has.
    response = answers(run, "distilled")[[*texts][5]][0]
    for wanted in (decode(tokenizer, response.token_ids[:8]), [*texts][3], "no such text"):
        browser.js(
            "(() => { const box = document.querySelector('input[type=search]');"
            f"box.value = {json.dumps(wanted)}; box.dispatchEvent(new Event('input')); }})()"
        )
        found = [name for name, text in texts.items() if wanted.strip().lower() in text.lower()]
        assert prompts(browser) == found
        assert len(found) == (0 if wanted == "no such text" else 1)


def test_sorting_by_disagreement(browser: Chromium, run: Path) -> None:
    sizes = {
        name: np.abs(scores - response.sampling_logprobs)
        for name, (response, scores) in answers(run, "distilled").items()
    }
    choose(browser, "Sort by", "mean")
    assert prompts(browser) == sorted(sizes, key=lambda name: -sizes[name].mean())
    choose(browser, "Sort by", "token")
    assert prompts(browser) == sorted(sizes, key=lambda name: -sizes[name].max())


def test_the_pointed_token_says_what_the_cache_says(browser: Chromium, run: Path) -> None:
    tokenizer = load_tokenizer(TINY_MODELS / "teacher")
    name, (response, scores) = next(iter(answers(run, "distilled").items()))
    assert browser.js("document.querySelector('#transcripts h3').textContent") == f"Prompt {name}"
    # The second answer is the one of the distilled student.
    text = ".answers > div:nth-child(2) .text"
    # A line break has no width that one could point at.
    seen = [
        place
        for place, token in enumerate(response.token_ids[:-1])
        if decode(tokenizer, [token]).strip()
    ]
    for place in (seen[0], seen[len(seen) // 2], seen[-1]):
        browser.point_at(f"{text} .t:nth-child({place + 1})")
        told = browser.js("document.getElementById('token-figures').textContent")
        student = float(response.sampling_logprobs[place])
        teacher = float(scores[place])
        signed = f"{teacher - student:+.3f}".replace("-", "\u2212")
        assert f"token {place + 1} of {len(response.token_ids)}" in told
        piece = json.dumps(decode(tokenizer, [response.token_ids[place]]))
        assert f"{piece}, id {response.token_ids[place]}," in told
        assert f"log \u03c0_student \u2212{-student:.3f} (" in told
        assert f"log \u03c0_teacher \u2212{-teacher:.3f}" in told
        # Rounded to a thousandth each, so the difference may be one of them away.
        assert signed[:-1] in told or abs(teacher - student) < 0.002
    # The colours follow the difference: the class of every token.
    classes = browser.js(
        f"[...document.querySelector({text!r}).children].map((one) => one.className)"
    )
    assert len(classes) == len(response.token_ids)
    for place, shown in enumerate(classes):
        value = round(float(scores[place]), 3) - round(float(response.sampling_logprobs[place]), 3)
        level = sum(abs(value) > bound for bound in (0.5, 2, 5))
        wanted = f"{'less' if value < 0 else 'more'}-{level}"
        assert (wanted in shown) == (level > 0), (place, value, shown)


def test_the_keyboard_goes_through_tokens_and_charts(browser: Chromium, run: Path) -> None:
    told = "document.getElementById('token-figures').textContent"
    browser.js("document.querySelector('.answers .text').focus()")
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 13)):
        browser.press(key)
        assert browser.js(told).startswith(f"token {place} of 13")
    # With Shift to the next token beyond 1 nat.
    _, (response, scores) = next(iter(answers(run, "sft").items()))
    large = np.flatnonzero(np.abs(scores - response.sampling_logprobs) > 1)
    browser.press("Home")
    browser.press("ArrowRight", shift=True)
    assert browser.js(told).startswith(f"token {large[large > 0][0] + 1} of 13")
    browser.press("Escape")
    assert browser.js("document.querySelector('.figures').hidden")
    chart = "document.querySelector('#curves .plot')"
    browser.js(f"{chart}.scrollIntoView(); {chart}.focus()")
    browser.wait_for(f"{chart}.querySelector('canvas') !== null")
    browser.press("ArrowRight")
    assert browser.js(f"{chart}.nextSibling.textContent") == "optimizer step 1: run 1"
    assert "run: 1 nats at 1, 0.5 nats at 2" in browser.js(f"{chart}.getAttribute('aria-label')")


def test_the_same_answer_of_several_models_is_shown_once(browser: Chromium, run: Path) -> None:
    titles = "[...document.querySelectorAll('.answers h4')].map((e) => e.textContent)"
    apart = ["before: SFT student", "after: distilled student", "teacher"]
    assert browser.js(titles)[:3] == apart
    browser.js("[...document.querySelectorAll('.results button')].at(-1).click()")
    assert browser.js(titles)[0] == " = ".join(apart)
    assert "The same answer 3 times" in browser.js("document.querySelector('.answers').textContent")
    # Each model has figures of its own.
    browser.point_at(".answers .t")
    told = browser.js("document.getElementById('token-figures').textContent")
    for model, title in (("sft", apart[0]), ("distilled", apart[1]), ("teacher", apart[2])):
        response, _ = [*answers(run, model).values()][-1]
        value = f"log \u03c0_student \u2212{-float(response.sampling_logprobs[0]):.3f}"
        assert value in told.split(f"{title}: ")[1].split("difference")[0]


def test_every_plot_names_its_axes(browser: Chromium) -> None:
    """uPlot draws the names into the canvas, so the calls that draw text are watched."""
    browser.js(
        "(() => { window.drawn = []; const draw = CanvasRenderingContext2D.prototype.fillText;"
        "CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {"
        "window.drawn.push(text); return draw.call(this, text, ...rest); };"
        "lopd.charts.forEach((one) => { if (one.plot.clientWidth) one.draw(); }); })()"
    )
    browser.wait_for("window.drawn.includes('optimizer step')")
    drawn = set(browser.js("window.drawn"))
    # Those of the charts that are folded are not drawn yet.
    shown = {one["unit"] for one in browser.js("lopd.data.charts") if one["group"] == "main"}
    assert shown
    assert shown <= drawn
    assert {"tenth of the response", "% of the tokens are below", "tokens"} <= drawn


def test_a_point_of_the_accuracy_says_on_how_many_prompts_it_stands(browser: Chromium) -> None:
    plot = "[...document.querySelectorAll('.plot')].find((e) => e.ariaLabel.startsWith('Accuracy'))"
    browser.js(f"{plot}.scrollIntoView(); {plot}.focus()")
    browser.wait_for(f"{plot}.querySelector('canvas') !== null")
    browser.press("ArrowRight")
    told = browser.js(f"{plot}.nextSibling.textContent")
    assert told == "optimizer step 0: run 50 (95% interval: 30 to 70), 8 prompts"


def test_special_tokens_are_shown_on_demand(browser: Chromium) -> None:
    seen = "document.querySelector('#transcripts .text').innerText"
    assert "im_start" not in browser.js(seen)
    assert "user" not in browser.js(seen)
    browser.js("document.getElementById('special').click()")
    assert "<|im_start|>user" in browser.js(seen)
    # An end token on which teacher and student disagree is seen without asking.
    browser.js("document.getElementById('special').click()")
    ends = browser.js(
        "[...document.querySelectorAll('.answers .special')].map((one) =>"
        "[/-[123]/.test(one.className), getComputedStyle(one).display !== 'none'])"
    )
    assert all(marked == visible for marked, visible in ends)
    assert {marked for marked, _ in ends} == {True, False}


@pytest.mark.parametrize(("name", "width", "dark"), SCHEMES)
def test_it_fits_every_screen(browser: Chromium, name: str, width: int, dark: bool) -> None:
    browser.look(width, dark=dark)
    assert browser.js("document.documentElement.scrollWidth <= innerWidth")
    # No column is out of sight either: a table that does not fit becomes a list.
    browser.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    hidden = (
        "[...document.querySelectorAll('.scroll')].filter((one) =>"
        "one.scrollWidth > one.clientWidth).map((one) => one.textContent.slice(0, 60))"
    )
    browser.wait_for(f"{hidden}.length === 0")
    # Tables of charts are as narrow as these.
    stacked = (
        "[...document.querySelectorAll('.stacked')].filter((e) => !e.closest('figure')).length"
    )
    assert (browser.js(stacked) > 3) == (width < 600)
    ground = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") != dark
    if "LOPD_SCREENSHOTS" in os.environ:
        browser.screenshot(Path(os.environ["LOPD_SCREENSHOTS"]) / f"{name}.png", whole=True)


def test_whoever_hears_the_page_is_told_the_same(browser: Chromium) -> None:
    # Every control has a name, every chart a sentence and a table, and every table a caption.
    nameless = (
        "[...document.querySelectorAll('input, select, button, summary, a')].filter((one) =>"
        "!(one.textContent.trim() || one.labels?.[0]?.textContent.trim())).length"
    )
    assert browser.js(nameless) == 0
    assert browser.js("[...document.querySelectorAll('.plot')].every((one) => one.ariaLabel)")
    assert browser.js("[...document.querySelectorAll('table')].every((one) => one.caption)")
    headings = browser.js("[...document.querySelectorAll('h1, h2')].map((one) => one.tagName)")
    assert headings == ["H1", *["H2"] * 6]
    # Each word that is explained leads to its explanation, and says it at once.
    unexplained = (
        "[...document.querySelectorAll('a.term')].filter((one) => !one.title ||"
        "!document.querySelector(one.getAttribute('href')))"
    )
    assert browser.js(f"{unexplained}.length") == 0
    assert browser.js("document.querySelectorAll('a.term').length") > 10


def test_a_character_of_several_tokens_is_one_piece(
    chromium: Chromium, run: Path, tmp_path: Path
) -> None:
    data = gather(open_sources([run / "score"]))
    prompt_set = data["runs"][0]["sets"][0]
    row = {
        "model": 0,
        "sample": 0,
        "finish": "stop",
        "tokens": [0, 1, 2],
        "student": [-100, -100, -100],
        "teacher": [-100, -3000, -400],
    }
    data["vocabulary"] = [["", 240, 0], ["", 159, 0], ["\N{GRINNING FACE}", 152, 0]]
    prompt_set["prompts"] = [{"id": "p", "prompt": [], "answers": [row]}]
    path = tmp_path / "character.html"
    path.write_bytes(render(data, ""))
    chromium.open(path)
    pieces = chromium.js(
        "[...document.querySelectorAll('.answers .t')].map((one) => [one.textContent,"
        "one.className])"
    )
    # -2.9 and -0.3 together are beyond 2 nats.
    assert pieces == [["\N{GRINNING FACE}", "t less-2"]]
    chromium.point_at(".answers .t")
    told = chromium.js("document.getElementById('token-figures').textContent")
    assert told.count("(begins a character)") == 2
    assert "difference \u22122.900 nats" in told


def test_servers_that_start_side_by_side_count_once(
    chromium: Chromium, run: Path, tmp_path: Path
) -> None:
    data = gather(open_sources([run]))
    spans = (("stage", 0, 30), ("server start", 1, 11), ("server start", 2, 13))
    data["runs"][0]["timeline"] = [
        {"lane": "demonstrate", "label": kind, "kind": kind, "start": start, "end": end}
        for kind, start, end in spans
    ]
    path = tmp_path / "times.html"
    path.write_bytes(render(data, ""))
    chromium.open(path)
    cells = chromium.js(
        "[...[...document.querySelectorAll('table')].find((e) => e.caption.textContent.startsWith("
        "'Where the time went')).tBodies[0].rows[0].cells].map((e) => e.textContent)"
    )
    rest = "the teacher samples; reading of prompts"
    assert cells == ["demonstrate", "0:30 (100%)", "0:12", "0:18", rest]


def test_two_runs_stand_side_by_side(chromium: Chromium, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["distill.optimizer.lr"] = 0.5
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    path = tmp_path / "two.html"
    path.write_bytes(make_page(open_sources([run, tmp_path / "other"]), docs="")[0])
    chromium.errors.clear()
    chromium.open(path)
    assert chromium.errors == []
    assert chromium.js("document.querySelectorAll('.card').length") == 2
    assert prompts(chromium) == [*answers(run, "sft")]
    titles = chromium.js("[...document.querySelectorAll('.answers h4')].map((e) => e.textContent)")
    # The long table of the knobs is below the curves, and folded.
    knobs = chromium.js("document.querySelector('#curves > details.knobs').textContent")
    assert knobs.startswith("The runs differ in 1 knob")
    assert "distill.optimizer.lr" in knobs
    assert not chromium.js("document.querySelector('details.knobs').open")
    # The second question of everybody is answered without a click.
    lines = chromium.js("[...document.querySelectorAll('.differing li')].map((e) => e.textContent)")
    assert len(lines) == 1
    assert lines[0].startswith("distill.optimizer.lr: ")
    assert lines[0].endswith(" / 0.5")
    # The copy has the same answers.
    assert titles[0].startswith("first: run: distilled student = second: other: distilled student")
    labels = chromium.js(
        "[...document.querySelectorAll('#transcripts label')].map((e) =>e.firstChild.textContent)"
    )
    assert labels[1:3] == ["First", "Second"]


def test_a_wrong_answer_has_the_expected_one_beside_it(browser: Chromium, run: Path) -> None:
    lines = (run / "evaluate/verdicts-distilled.jsonl").read_text().splitlines()
    expected = {row["prompt_id"]: row["expected"] for row in map(json.loads, lines)}
    choose(browser, "Show", "lost")
    name = prompts(browser)[0]
    told = browser.js("[...document.querySelectorAll('.verdict')].map((e) => e.textContent)")
    # Right before, wrong after: the control is the first one.
    assert told[0] == "\u2713 right"
    assert told[1] == f"\u2717 wrong (wrong answer), expected: {expected[name]}"


def test_a_refresh_is_marked_on_the_curves(chromium: Chromium, run: Path, tmp_path: Path) -> None:
    data = gather(open_sources([run]))
    path = tmp_path / "refreshed.html"
    counts = []
    lists = []
    for refreshes in (
        [],
        [{"step": 1, "responses": 24, "tokens": 1304, "seconds": 12.34}],
    ):
        data["runs"][0]["refreshes"] = refreshes
        path.write_bytes(render(data, ""))
        chromium.open(path)
        # Only these lines have such dashes.
        chromium.js(
            "(() => { window.marked = 0;"
            "const set = CanvasRenderingContext2D.prototype.setLineDash;"
            "CanvasRenderingContext2D.prototype.setLineDash = function (dash) {"
            "if (String(dash) === '2,4') window.marked += 1; return set.call(this, dash); };"
            "lopd.charts.forEach((one) => { if (one.plot.clientWidth) one.draw(); });"
            # uPlot draws in the next turn.
            "setTimeout(() => { window.done = true; }, 100); })()"
        )
        chromium.wait_for("window.done === true")
        counts.append(chromium.js("window.marked"))
        lists.append(
            chromium.js("[...document.querySelectorAll('.refreshes li')].map((e) => e.textContent)")
        )
    assert counts[0] == 0
    assert counts[1] > 1
    line = "after step 1: 24 responses, 1,304 tokens scored, the teacher took 12.3 s"
    assert lists == [[], [line]]


def test_a_damaged_page_says_so(chromium: Chromium, page: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.html"
    damaged.write_bytes(page.read_bytes().replace(b'octet-stream">H4', b'octet-stream">AA'))
    chromium.call("Page.navigate", url=damaged.as_uri())
    chromium.wait_for("document.getElementById('state')?.textContent.includes('cannot be shown')")
    # The control of the other tests: an error of the page is noticed. Its message may come after
    # the text has changed, and it is read with the answer to a later question.
    deadline = time.monotonic() + 30
    while not chromium.errors and time.monotonic() < deadline:
        chromium.js("1")
    assert chromium.errors
    chromium.errors.clear()
