"""Answers and messages in the types that data sets have them in; and answers that are of no use,
named by row before anything runs."""

from __future__ import annotations

import json
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopd.config import PromptSet
from lopd.errors import DataError
from lopd.records import Prompt
from lopd.tasks import get_task
from lopd.tasks.gold import faults_of
from lopd.tasks.prompts import read_prompts
from lopd.tasks.readers import ReadCounts
from lopd.tasks.values import list_in
from tests.checking import wrong
from tests.stand_ins import Lopd, command, write_project

FIELDS = {"question": "q", "answer": "a"}


@pytest.fixture
def lopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lopd:
    return command(monkeypatch, capsys)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, rows: list[dict[str, Any]], **settings: Any) -> list[Prompt]:
    chosen = {"format": "fields", "fields": FIELDS, **settings}
    return read_prompts(PromptSet(file=write(path, rows), **chosen), "math")


def answer_of(path: Path, value: Any) -> str | None:
    (prompt,) = read(path, [{"q": "Q", "a": value}])
    return prompt.answer


# ---- answers ----


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["$\\frac{1}{2}$"], "$\\frac{1}{2}$"), ("x", "x"), (7, "7"), (18.0, "18"), (1.5, "1.5"),
        (True, "true"), (["1", "2"], '["1", "2"]'), ([1, 2], '["1", "2"]'), ([[3]], "3"),
        ("[1, 2]", "[1, 2]"), ("none", "none"), ([" 5 "], " 5 "), (1e300, "1e+300"), (0, "0"),
        (False, "false"), ([0], "0"), ({"b": 1}, '{"b": 1}'), ("NaN is no number",
        "NaN is no number"),
        # no answer at all
        (float("nan"), None), ([], None), ("   ", None), ("None", None), (None, None), ("", None),
        ("nan", None), ("null", None), ("<NA>", None), ([None], None), ([""], None),
        (["None"], None),
        ([float("nan")], None), ("\n\t", None), ({}, None), ([[]], None),
    ],
    ids=repr,
)  # fmt: skip
def test_answers_that_are_no_text(tmp_path: Path, value: Any, expected: str | None) -> None:
    assert answer_of(tmp_path / "rows.jsonl", value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Decimal("18.00"), "18.00"), (Decimal("1E+3"), "1000"), (date(2025, 1, 4), "2025-01-04"),
        (datetime(2025, 1, 4, 5, 6), "2025-01-04T05:06:00"), ("Größe".encode(), "Größe"),
        ([Decimal("5")], "5"), ([b"5"], "5"), ({"x": Decimal("5")}, '{"x": "5"}'), (b" ", None),
        ([date(2025, 1, 4), date(2025, 1, 5)], '["2025-01-04", "2025-01-05"]'),
        ([{"x": b"y"}], '[{"x": "y"}]'), (float("nan"), None),
    ],
    ids=repr,
)  # fmt: skip
def test_columns_of_parquet(tmp_path: Path, value: Any, expected: str | None) -> None:
    assert answer_of(tmp_path / "rows.parquet", value) == expected


def test_bytes_that_are_no_text_are_named_by_row(tmp_path: Path) -> None:
    rows = [{"q": "one", "a": b"5"}, {"q": "two", "a": b"\xff"}]
    with pytest.raises(DataError, match=r"rows.parquet:2: the column has bytes that are not UTF-8"):
        read(tmp_path / "rows.parquet", rows)


def test_other_fields_that_are_missing_or_no_text(tmp_path: Path) -> None:
    fields = {**FIELDS, "prompt_id": "i", "domain": "d"}
    rows = [{"q": b"Q", "a": "1", "i": 3.0, "d": None}, {"q": b"R", "a": "1", "i": None, "d": "x"}]
    one, two = read(tmp_path / "rows.parquet", rows, fields=fields)
    assert (one.messages[0]["content"], one.prompt_id, one.domain) == ("Q", "fields-3", "math")
    assert two.prompt_id.startswith("fields-")
    assert len(two.prompt_id) == len("fields-") + 16, "a hash"
    for blank in (float("nan"), "  ", None, []):
        with pytest.raises(DataError, match=r"rows.jsonl:1: this row has no question"):
            read(tmp_path / "rows.jsonl", [{"q": blank, "a": "1"}])


def test_rows_are_chosen_by_columns_of_every_type(tmp_path: Path) -> None:
    rows = [{"q": str(n), "a": "1", "n": Decimal(n), "b": str(n).encode()} for n in range(5)]
    chosen = read(tmp_path / "r.parquet", rows, where={"n": {"min": 2}, "b": ["2", "3"]})
    assert [prompt.messages[0]["content"] for prompt in chosen] == ["2", "3"]


def test_answers_of_known_formats(tmp_path: Path) -> None:
    """The next column is looked at where one holds a missing value; boxes hold braces."""
    solution = "so $\\boxed{\\frac{1}{2}}$"
    for missing in (float("nan"), "None", None, []):
        row = {"id": 1, "problem": "p", "answer": missing, "solution": solution}
        (prompt,) = read(tmp_path / "a.jsonl", [row], format="aime_2024", fields={})
        assert prompt.answer == "\\frac{1}{2}"
    row = {"id": 1, "problem": "p", "answer": ["33"]}
    assert read(tmp_path / "b.jsonl", [row], format="aime_2024", fields={})[0].answer == "33"
    row = {"question": "p", "answer": float("nan")}
    assert read(tmp_path / "c.jsonl", [row], format="gsm8k", fields={})[0].answer is None


@pytest.mark.parametrize("value", ["   ", "None", "nan", "\n", 5, float("nan"), [], ["5"]])
def test_our_own_form_refuses_what_is_no_answer(tmp_path: Path, value: Any) -> None:
    path = write(tmp_path / "own.jsonl", [{"prompt_id": "a", "question": "q", "answer": value}])
    with pytest.raises(DataError, match=r"own.jsonl:1: (the )?answer is ") as caught:
        read_prompts(PromptSet(file=path), "math")
    assert caught.value.remedy


# ---- messages ----

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    "value",
    [
        json.dumps(TURNS), repr(TURNS), TURNS, json.dumps(TURNS).encode().decode(),
        [{"role": "System", "content": "Be brief."}, {"role": "User", "content": "Hi"}],
        [{"role": "developer", "content": "Be brief."}, {"from": "human", "value": "Hi"}],
        [TURNS[0], {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        [TURNS[0], {"role": "USER", "content": [{"type": "text", "text": "H"}, "i"]}],
    ],
    ids=ascii,
)  # fmt: skip
def test_messages_in_every_form(tmp_path: Path, value: Any) -> None:
    (prompt,) = read(tmp_path / "m.jsonl", [{"m": value}], fields={"messages": "m"})
    assert prompt.messages == tuple(TURNS)


@pytest.mark.parametrize("value", [json.dumps(TURNS), repr(TURNS)])
def test_messages_as_text_in_our_own_form(tmp_path: Path, value: str) -> None:
    path = write(tmp_path / "own.jsonl", [{"prompt_id": "a", "messages": value}])
    (prompt,) = read_prompts(PromptSet(file=path), "math")
    assert prompt.messages == tuple(TURNS)


def test_text_that_only_looks_like_messages_is_a_question(tmp_path: Path) -> None:
    for text in ("[1, 2, 3] has which sum?", "[1, 2, 3]", '{"a": 1}', "{x} is a set", "Hi", "[]"):
        (prompt,) = read(tmp_path / "m.jsonl", [{"m": text}], fields={"messages": "m"})
        assert prompt.messages == ({"role": "user", "content": text},)
        (prompt,) = read(tmp_path / "q.jsonl", [{"q": text}])
        assert prompt.messages == ({"role": "user", "content": text},)
    (prompt,) = read(tmp_path / "q.jsonl", [{"q": json.dumps(TURNS)}])
    assert prompt.messages[0]["content"] == json.dumps(TURNS), "the column of questions holds text"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "tool", "content": "5"}], "the role 'tool' is none of"),
        ([{"role": 3, "content": "5"}], "the role 3 is none of"),
        ([{"content": "5"}], "it has no role"), ([{"role": "user"}], "it has no content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url"),
        ([{"role": "user", "content": 5}], r"its content is not text \(int\)"),
        (["text"], "it is no message"), ('[{"role": "user", "content": "cut', "cannot be read"),
    ],
)  # fmt: skip
def test_messages_that_are_refused_say_why(tmp_path: Path, turns: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"m.jsonl:1: .*{message}"):
        read(tmp_path / "m.jsonl", [{"m": turns}], fields={"messages": "m"})


# ---- answers of no use ----

UNUSABLE = [
    ("math", {}, "2 3", "digits stand side by side"),
    ("math", {}, '["1", "2"]', "a list of 2 answers"),
    ("math", {}, "$ $", "empty"),
    ("math", {"max_answer_chars": 10}, "1" * 11, "it has 11 characters"),
    ("math", {"limit_s": 1.0}, "9^{9^{9^{9}}}", "for more than limit_s, 1 s"),
    ("code", {}, "[]", "no test"), ("code", {}, "assert True", "runs no assertion"),
    ("code", {}, "import numpy\nassert f() == 1", "without task.options.packages"),
    ("plain", {}, '["a", "b"]', "alternatives is not set"), ("plain", {}, " ", "empty"),
]  # fmt: skip
USABLE = [
    ("math", {}, "\\frac{1}{2}"), ("math", {}, '["5"]'), ("math", {}, "1\\,234"),
    ("math", {}, "[1, 2]"),
    ("math", {}, "\\text{Evelyn}"), ("math", {}, "3,4"),
    ("math", {"max_answer_chars": 10}, "1" * 10),
    ("code", {}, "assert f() == 1"), ("code", {"packages": True}, "import numpy\nassert f() == 1"),
    ("plain", {"alternatives": True}, '["a", "b"]'), ("plain", {}, "a"), ("plain", {}, '["a"]'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "gold", "message"), UNUSABLE, ids=ascii)
def test_what_no_answer_can_meet(name: str, options: Any, gold: str, message: str) -> None:
    task: Any = get_task(name, options)
    prompt = Prompt("p", ({"role": "user", "content": "q"},), name, gold)
    assert message in task.answer_fault(prompt)
    assert not task.judge(prompt, f"```python\nf = int\n```\n\\boxed{{{gold}9}}", "stop").right


@pytest.mark.parametrize(("name", "options", "gold"), USABLE, ids=ascii)
def test_what_an_answer_can_meet(name: str, options: Any, gold: str) -> None:
    task: Any = get_task(name, options)
    assert task.answer_fault(Prompt("p", ({"role": "user", "content": "q"},), name, gold)) == ""


def test_lists_of_answers() -> None:
    plain: Any = get_task("plain", {"alternatives": True})
    prompt = Prompt("p", ({"role": "user", "content": "q"},), "plain", '["Paris", "Lutetia"]')
    assert plain.judge(prompt, "Lutetia", "stop").right
    assert not plain.judge(prompt, '["Paris", "Lutetia"]', "stop").right
    math: Any = get_task("math", {})
    one = Prompt("p", ({"role": "user", "content": "q"},), "math", '["$\\\\frac{1}{2}$"]')
    assert math.judge(one, "\\boxed{0.5}", "stop").right
    assert not math.judge(one, "\\boxed{0.6}", "stop").right
    assert list_in("[1, 2]") is None


def test_every_fault_is_found_with_its_row(tmp_path: Path) -> None:
    rows = [{"q": f"Q{index}", "a": "2 3" if index % 2 else "5"} for index in range(6)]
    counts = ReadCounts()
    chosen = PromptSet(file=write(tmp_path / "r.jsonl", rows), format="fields", fields=FIELDS)
    prompts = read_prompts(chosen, "math", counts=counts)
    found = list(faults_of(get_task("math", {}), prompts, counts))
    assert [one.where.rpartition(":")[2] for one in found] == ["2", "4", "6"]
    assert {one.field for one in found} == {"a"}
    assert list(faults_of(get_task("register_arithmetic", {}), prompts, counts)) == []


def test_lopd_check_names_the_row(tmp_path: Path) -> None:
    """Shuffled, in a folder, with an empty line before: the row is still the right one."""
    config = write_project(tmp_path)
    folder = tmp_path / "held_out"
    folder.mkdir()
    golds = ["5", "5", "2 3", "5", "5"]
    rows = [{"q": f"8{index}+06=?", "gold": {"a": gold}} for index, gold in enumerate(golds)]
    (folder / "b.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["task.name=math", "task.options={}"]
    sets = 'format="fields", fields={question="q", answer="gold.a"}'
    chosen = f'prompts.eval={{file="held_out", {sets}, shuffle_seed=3}}'
    lines = [line for line in wrong(config, *overrides, chosen) if "prompts.eval" in line]
    assert len(lines) == 1
    assert "held_out/b.jsonl:4: the answer of prompt" in lines[0]
    assert "(field gold.a) cannot be used: digits stand side by side in '2 3'" in lines[0]
    assert "remedy: correct this answer" in lines[0]
    rows[2]["gold"] = {"a": "5"}
    write(folder / "b.jsonl", rows)
    assert not [line for line in wrong(config, *overrides, chosen) if "prompts.eval" in line]
    rows[3]["gold"] = {"a": "None"}
    write(folder / "b.jsonl", rows)
    (line,) = [line for line in wrong(config, *overrides, chosen) if "prompts.eval" in line]
    assert "held_out/b.jsonl:4: prompt" in line
    assert "has no answer to verify a response with (field gold.a)" in line


def test_lopd_prompts_prepare_names_the_row_and_leaves_it_out(lopd: Lopd, tmp_path: Path) -> None:
    rows = [
        {"question": "one", "answer": "so\n#### 5"}, {"question": "two", "answer": "so\n#### 2 3"},
        {"question": "three", "answer": None},
    ]  # fmt: skip
    source = write(tmp_path / "g.jsonl", rows)
    out = tmp_path / "out.jsonl"
    wanted = ("prompts", "prepare", source, "--format", "gsm8k", "--out", out)
    output = lopd(*wanted).succeeded().out
    assert "1 with an answer that cannot be used" in output
    assert "g.jsonl:2: field answer: digits stand side by side in '2 3'" in output
    assert "remedy: correct this answer" in output
    assert len(out.read_text().splitlines()) == 2, "a prompt without an answer is of use"
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    (about,) = report["unusable_answers"]
    assert (about["where"], about["field"]) == (f"{source}:2", "answer")
    output = lopd(*wanted, "--task", "plain").succeeded().out
    assert "left out: none" in output, "as plain text 2 3 is an answer like any other"
    own = write(tmp_path / "own.jsonl", [{"prompt_id": "a", "question": "q", "answer": "assert 1"}])
    wanted = ("prompts", "prepare", own, "--task", "code", "--out", tmp_path / "own_out.jsonl")
    what = (
        "own.jsonl:1: answer: the tests of a problem cannot be used: the code of the tests runs "
        "no assertion"
    )
    lopd(*wanted).refused(what)
