"""Training prompts that hold pieces of evaluation prompts are found and left out; and ``lopd
prompts prepare`` writes, reports and repeats.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lopd.config.hub import local_path
from lopd.records import Prompt
from lopd.tasks.decontamination import EvaluationIndex
from tests.models import write_tokenizer
from tests.stand_ins import Lopd, command, write_prompts

QUESTION = (
    "Find the number of ordered pairs (a, b) of positive integers with a + b = 2025 "
    "such that a divides b squared and b is odd."
)
OTHER = (
    "A bakery sells 17 loaves on Monday and three times as many on Friday. "
    "How many loaves did the bakery sell on both days together?"
)
FRAME = (
    "Solve the following problem step by step and write the final answer on the last line "
    "after the word Answer: "
)


def prompt(name: str, text: str) -> Prompt:
    return Prompt(name, ({"role": "user", "content": text},), "math")


def index(*questions: str, ngram: int = 13) -> EvaluationIndex:
    made = EvaluationIndex(ngram)
    made.add("aime", [prompt(f"e{number}", text) for number, text in enumerate(questions)])
    return made


@pytest.mark.parametrize(
    "text",
    [
        QUESTION,
        f"Please solve this. {QUESTION} Show your work.",
        QUESTION.upper().replace(" ", "\n"),
        QUESTION.replace("(", "\\left(").replace("=", "$=$"),
    ],
    ids=["the same", "in a frame", "other spacing", "other marks"],
)
def test_copies_are_found(text: str) -> None:
    match = index(OTHER, QUESTION).match(prompt("t", text))
    assert match is not None
    assert (match.evaluation_set, match.evaluation_id) == ("aime", "e1")
    assert match.coverage > 0.2


def test_others_are_not() -> None:
    """Control of the length: with 5 words a turn of phrase is enough, and then the share of the
    question tells a copy from it.
    """
    like = "Find the number of ordered pairs (m, n) of positive integers with m n = 12."
    assert index(QUESTION).match(prompt("t", like)) is None
    loose = EvaluationIndex(5, min_coverage=0.5)
    loose.add("aime", [prompt("e", QUESTION)])
    assert index(QUESTION, ngram=5).match(prompt("t", like)) is not None
    assert loose.match(prompt("t", like)) is None
    assert loose.match(prompt("t", QUESTION)) is not None
    assert index(QUESTION).match(prompt("t", OTHER)) is None


def test_a_frame_around_every_question_is_no_copy() -> None:
    """Control: around one question of many it is."""
    questions = [
        f"Compute the value of {number} times {number + 1} plus {number + 7}."
        for number in range(40)
    ]
    framed = index(*(FRAME + question for question in questions))
    assert framed.boilerplate
    assert framed.match(prompt("t", FRAME + OTHER)) is None
    assert index(FRAME + questions[0], *questions[1:]).match(prompt("t", FRAME + OTHER)) is not None


def test_short_questions_count_as_a_whole_and_very_short_ones_not() -> None:
    made = index("What is the capital of France?", "Why?")
    assert made.too_short == ["e1"]
    assert made.match(prompt("t", "Tell me: what is the capital of France?")) is not None
    assert made.match(prompt("t", "What is the capital of Spain? Why?")) is None


def test_chinese_has_no_spaces() -> None:
    text = "求所有满足条件的正整数对使得它们的和等于二零二五"
    assert index(text).match(prompt("t", f"请解答。{text}。")) is not None


# ---- lopd prompts ----


@pytest.fixture
def lopd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., object]:
    return command(monkeypatch, capsys)


def test_prepare_writes_reports_and_repeats(lopd: Lopd, tmp_path: Path) -> None:
    rows = [
        {"question": f"w4 w5 w{number}", "answer": f"#### {number}"} for number in range(10, 30)
    ]
    rows += [
        {"question": f"Hint. {QUESTION}", "answer": "#### 1"},
        {"question": rows[0]["question"], "answer": "#### 10"},
        {"question": "w6 " * 60, "answer": "#### 2"},
    ]
    source = write_prompts(tmp_path / "train.jsonl", rows)
    held_out = write_prompts(
        tmp_path / "eval.jsonl", [{"problem": QUESTION, "answer": "7", "id": 5}]
    )
    write_tokenizer(tmp_path / "model")
    out = tmp_path / "made" / "sft.jsonl"
    wanted = (
        "prompts",
        "prepare",
        source,
        "--format",
        "gsm8k",
        "--instruction",
        "plain",
        "--against",
        f"{held_out}:aime_2025",
        "--out",
        out,
    )
    wanted += ("--tokenizer", tmp_path / "model", "--max-tokens", "50")
    shown = lopd(*wanted).succeeded().out
    assert "20 prompts of 23 rows read" in shown
    assert "1 prompts share 13 words with 1 evaluation prompts" in shown
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["answer"] for line in lines] == [str(number) for number in range(10, 30)]
    report = json.loads(out.with_name("sft.jsonl.report.json").read_text())
    assert report["left_out"] == {"in an evaluation set": 1, "repeated": 1, "too long": 1}
    (match,) = report["decontamination"]["matches"]
    assert (match["evaluation_id"], match["evaluation_set"], match["coverage"]) == (
        "aime_2025-5",
        str(held_out),
        1.0,
    )
    assert report["tokens"]["most"] == 4, "<bos> and three words"
    stamp = out.stat().st_mtime_ns
    assert "unchanged, nothing done" in lopd(*wanted).succeeded().out
    assert out.stat().st_mtime_ns == stamp
    assert (
        "5 prompts of" in lopd(*wanted, "--num-prompts", "5", "--shuffle-seed", "1").succeeded().out
    )


def test_prepare_replaces_nothing_that_is_not_its_own(lopd: Lopd, tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "train.jsonl", [{"prompt_id": "a", "question": "Q"}])
    lopd("prompts", "prepare", source, "--out", source).refused(
        "the file exists", "set --out to another file"
    )
    out = tmp_path / "out.jsonl"
    lopd("prompts", "prepare", source, "--out", out).succeeded()
    out.write_text(out.read_text() + "\n")
    lopd("prompts", "prepare", source, "--out", out).refused(
        "its content was not written by lopd prompts"
    )


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--format", "gsm9k"), "format = 'gsm9k'"),
        (("--max-tokens", "9"), "add --tokenizer"),
        (("--where", "domain"), "'domain' is not of the form NAME=VALUE"),
        (("--duplicates", "maybe"), "duplicates = 'maybe'"),
        (("--against", "absent.jsonl:gsm8k"), "no such file"),
    ],
)
def test_prepare_is_refused_in_one_line(
    lopd: Lopd, tmp_path: Path, arguments: tuple[str, ...], fragment: str
) -> None:
    source = write_prompts(tmp_path / "train.jsonl", [{"prompt_id": "a", "question": "Q"}])
    lopd("prompts", "prepare", source, "--out", tmp_path / "out.jsonl", *arguments).refused(
        fragment
    )
    assert not (tmp_path / "out.jsonl").exists()


def test_formats_are_listed(lopd: Lopd) -> None:
    shown = lopd("prompts", "formats").succeeded().out
    assert "dapo_math_17k: DAPO-Math-17k" in shown
    assert "answer = reward_model.ground_truth" in shown


def test_prompts_are_shown_as_a_model_sees_them(lopd: Lopd, tmp_path: Path) -> None:
    source = write_prompts(
        tmp_path / "train.jsonl",
        [{"question": f"w4 w{number}", "answer": f"#### {number}"} for number in (7, 8)],
    )
    write_tokenizer(tmp_path / "model")
    flags = ("prompts", "show", source, "--format", "gsm8k", "--instruction", "plain")
    shown = lopd(*flags, "--tokenizer", tmp_path / "model").succeeded().out
    assert "(math), answer: 7\n<bos> w4 w7\n--- 3 tokens" in shown
    assert "[user] w4 w8" in lopd(*flags, "--num-prompts", "2").succeeded().out


def test_prepare_reads_what_was_downloaded_from_the_hub(
    lopd: Lopd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOPD_HUB", str(tmp_path / "hub"))
    name = "hf://datasets/someone/sums@main"
    evaluation = f"{name}/eval.jsonl:aime_2025"
    words = ("prompts", "prepare", f"{name}/train.jsonl", "--format", "gsm8k", "--out")
    absent = lopd(*words, tmp_path / "made.jsonl")
    assert absent.code == 3
    assert "lopd fetch hf://datasets/someone/sums@main" in absent.err
    folder = local_path(name)
    folder.mkdir(parents=True)
    rows = [{"question": QUESTION, "answer": "#### 1"}, {"question": "2+2=?", "answer": "#### 4"}]
    write_prompts(folder / "train.jsonl", rows)
    assert lopd(*words, tmp_path / "made.jsonl", "--against", evaluation).code == 3
    write_prompts(folder / "eval.jsonl", [{"problem": QUESTION, "answer": "7", "id": 5}])
    lopd(*words, tmp_path / "made.jsonl", "--against", evaluation).succeeded()
    assert len((tmp_path / "made.jsonl").read_text().splitlines()) == 1
    # The controls: without the evaluation set both stay, and a name that is none is refused.
    lopd(*words, tmp_path / "all.jsonl").succeeded()
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 2
    lopd("prompts", "show", "hf://a/../b").refused("not a name on the hub", "hf://org/name@")
