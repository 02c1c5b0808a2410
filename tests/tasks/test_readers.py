"""Rows of public data sets become prompts: every format by rows of its columns' shapes, nested
columns, the choice of rows, repetitions, folders.
"""

from __future__ import annotations

import json
from datetime import date, datetime
from pathlib import Path
from typing import Any, NoReturn, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopd.config import PromptSet
from lopd.errors import ConfigError, DataError
from lopd.records import Prompt
from lopd.tasks.code_tests import read_tests
from lopd.tasks.formats import BOXED, FORMATS
from lopd.tasks.prompts import read_prompts
from lopd.tasks.readers import ReadCounts
from lopd.tasks.rows import content_hash

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer.\n\n"
    "What is 1+1?"
)


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.parquet") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, **settings: Any) -> list[Prompt]:
    return read_prompts(PromptSet(file=path, **settings), "domain")


# format -> a row; id, question, answer, domain
ROWS: dict[str, tuple[dict[str, Any], tuple[str | None, str, str | None, str]]] = {
    "openthoughts3": (
        {
            "difficulty": 7,
            "source": "x",
            "domain": "science",
            "conversations": [
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "<think>..."},
            ],
        },
        (None, "Why?", None, "science"),
    ),
    "dapo_math_17k": (
        {
            "data_source": "math_dapo",
            "prompt": [{"content": DAPO, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b"},
        },
        ("9a9b", DAPO, "2", "math"),
    ),
    "epicoder": (
        {"instruction": "Write a sort.", "output": "def ..."},
        (None, "Write a sort.", None, "code"),
    ),
    "gsm8k": (
        {"question": "How many?", "answer": "He has 1 <<1=1>>.\n#### 70,000"},
        (None, BOXED.replace("{question}", "How many?"), "70000", "math"),
    ),
    "math_500": (
        {
            "problem": "Find $x$.",
            "solution": "...",
            "answer": "\\frac{1}{2}",
            "subject": "Algebra",
            "level": 5,
            "unique_id": "test/algebra/1.json",
        },
        ("test/algebra/1.json", BOXED.replace("{question}", "Find $x$."), "\\frac{1}{2}", "math"),
    ),
    "aime_2024": (
        {
            "id": 60,
            "problem": "Find $n$.",
            "solution": "...",
            "answer": "033",
            "url": "",
            "year": "2024",
        },
        ("aime_2024-60", BOXED.replace("{question}", "Find $n$."), "033", "math"),
    ),
    "aime_2025": (
        {"problem_idx": 3, "problem": "Find $n$.", "answer": 82, "problem_type": ["Algebra"]},
        ("aime_2025-3", BOXED.replace("{question}", "Find $n$."), "82", "math"),
    ),
    "hmmt_2025": (
        {
            "problem_idx": 1,
            "answer": "\\frac{1}{576}",
            "problem": "Compute.",
            "problem_type": ["Algebra"],
        },
        ("hmmt_2025-1", BOXED.replace("{question}", "Compute."), "\\frac{1}{576}", "math"),
    ),
}


@pytest.mark.parametrize("kind", ["rows.parquet", "rows.jsonl"])
@pytest.mark.parametrize("form", ROWS)
def test_every_format_reads_its_columns(form: str, kind: str, tmp_path: Path) -> None:
    row, (prompt_id, question, answer, domain) = ROWS[form]
    (prompt,) = read(write(tmp_path, [row], kind), format=form)
    assert prompt.messages == ({"role": "user", "content": question},)
    assert (prompt.answer, prompt.domain) == (answer, domain)
    assert prompt.prompt_id == prompt_id or (
        prompt_id is None and prompt.prompt_id.startswith(f"{form}-")
    )


def test_every_format_is_tested_and_can_be_configured() -> None:
    assert {*ROWS, "livecodebench", "lopd", "fields"} == set(FORMATS)
    assert set(get_args(PromptSet.model_fields["format"].annotation)) == set(FORMATS)


def test_other_editions_of_a_data_set(tmp_path: Path) -> None:
    (one,) = read(
        write(tmp_path, [{"ID": "2024-II-4", "Problem": "p", "Solution": "s", "Answer": 33}]),
        format="aime_2024",
    )
    assert (one.prompt_id, one.answer) == ("2024-II-4", "33")
    (two,) = read(
        write(tmp_path, [{"id": 1, "problem": "p", "solution": "so $\\boxed{204}$"}]),
        format="aime_2024",
    )
    assert two.answer == "204"
    row = {
        "prompt": "What is 1+1?",
        "solution": "2",
        "source_prompt": [{"content": DAPO, "role": "user"}],
        "extra_info": {"index": "i"},
    }
    (three,) = read(write(tmp_path, [row]), format="dapo_math_17k")
    assert three.messages[0]["content"] == DAPO
    bare = {"format": "dapo_math_17k", "fields": {"question": "prompt"}, "instruction": "boxed"}
    assert read(tmp_path / "rows.parquet", **bare)[0].messages[0]["content"] == BOXED.replace(
        "{question}", "What is 1+1?"
    )


def test_livecodebench_programs_and_functions(tmp_path: Path) -> None:
    tests = json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}])
    common = {
        "question_title": "t",
        "platform": "atcoder",
        "contest_date": "2025-01-04T00:00:00",
        "difficulty": "easy",
    }
    stdin = {
        **common,
        "question_id": "abc1",
        "question_content": "Add {one}.",
        "starter_code": "",
        "public_test_cases": tests,
        "metadata": "{}",
    }
    call = json.dumps([{"input": "1", "output": "2", "testtype": "functional"}])
    function = {
        **stdin,
        "question_id": "3779",
        "starter_code": "class Solution:\n    def add(self):",
        "public_test_cases": call,
    }
    function["metadata"] = json.dumps({"func_name": "add"})
    path = write(tmp_path, [stdin, function], "test5.jsonl")
    one, two = read(path, format="livecodebench")
    assert "Add {one}." in one.messages[0]["content"]
    assert "standard input" in one.messages[0]["content"]
    assert "def add(self):\n```" in two.messages[0]["content"]
    assert (one.prompt_id, two.prompt_id, one.domain) == ("abc1", "3779", "code")
    found = [read_tests(str(prompt.answer)).tests for prompt in (one, two)]
    assert [[test.kind for test in tests] for tests in found] == [["stdin"], ["call"]]
    window = {"contest_date": {"min": "2025-01-01", "max": "2025-02-01"}}
    assert len(read(path, format="livecodebench", where=window)) == 2
    with pytest.raises(
        DataError, match=r"the prompt set is empty \(2 rows, of which 2 not chosen by where\)"
    ):
        read(path, format="livecodebench", where={"contest_date": {"min": "2025-02-01"}})


# ---- field maps ----


def test_a_field_map_reaches_into_nested_columns(tmp_path: Path) -> None:
    row = {
        "task": {"turns": [{"text": "skip"}, {"text": "Q"}], "gold": [7, 8]},
        "meta": json.dumps({"key": "k1"}),
        "topic": "algebra",
    }
    fields = {
        "question": "task.turns[1].text",
        "answer": "task.gold[-1]",
        "prompt_id": "meta.key",
        "domain": "topic",
    }
    (prompt,) = read(write(tmp_path, [row]), format="fields", fields=fields)
    assert prompt == Prompt("k1", ({"role": "user", "content": "Q"},), "algebra", "8")


def test_messages_end_with_the_user(tmp_path: Path) -> None:
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Why?"),
        ("assistant", "..."),
    ]
    path = write(
        tmp_path, [{"chat": [{"role": role, "content": content} for role, content in turns]}]
    )
    (prompt,) = read(
        path, format="fields", fields={"messages": "chat"}, instruction="<<{question}>>"
    )
    assert [message["content"] for message in prompt.messages] == [
        "Be brief.",
        "Hi",
        "Hello",
        "<<Why?>>",
    ]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"format": "fields"}, ConfigError, "does not name the column of the questions"),
        ({"format": "fields", "fields": {"question": "a..b"}}, ConfigError, "'a..b' is not a path"),
        (
            {"format": "fields", "fields": {"query": "a"}},
            ConfigError,
            "query = 'a' is not allowed; limit: the names question",
        ),
        ({"format": "fields", "fields": {"question": 3}}, ConfigError, "question = 3"),
        (
            {"format": "fields", "fields": {"question": "b"}},
            DataError,
            "rows.parquet:1: this row has no question; limit: one of the columns of this row: b",
        ),
        ({"format": "fields", "fields": {"question": "c"}}, DataError, r"messages\[0\] is 1"),
        (
            {"format": "gsm8k", "instruction": "solve it"},
            ConfigError,
            "does not contain",
        ),
        (
            {"format": "fields", "fields": {"question": "a"}, "where": {"c": {"least": 1}}},
            ConfigError,
            "min = ..., max = ...",
        ),
    ],
    ids=str,
)
def test_mistakes_are_one_line(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = write(tmp_path, [{"a": "Q", "b": None, "c": [1]}])
    with pytest.raises(error, match=message) as caught:
        read(path, **settings)
    assert "\n" not in str(caught.value)


# ---- choosing ----


def numbered(count: int) -> list[dict[str, Any]]:
    return [
        {
            "q": f"Question {number}",
            "level": number % 5,
            "hard": number % 2 == 0,
            "topic": "ab"[number % 2],
        }
        for number in range(count)
    ]


FIELDS: dict[str, Any] = {"format": "fields", "fields": {"question": "q"}}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"level": 3}, 4),
        ({"level": [3, 4]}, 8),
        ({"level": {"min": 2, "max": 3}}, 8),
        ({"hard": True, "topic": "a"}, 10),
        ({"level": 3, "hard": True}, 2),
    ],
    ids=str,
)
def test_rows_are_chosen_by_their_columns(
    tmp_path: Path, where: dict[str, Any], expected: int
) -> None:
    assert len(read(write(tmp_path, numbered(20)), **FIELDS, where=where)) == expected


def test_dates_with_and_without_quotes(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [{"q": str(day), "when": datetime(2025, 1, day), "tags": [day]} for day in range(1, 11)],
    )
    for bound in ("2025-01-08", date(2025, 1, 8)):
        assert len(read(path, **FIELDS, where={"when": {"min": bound}})) == 3
    with pytest.raises(DataError, match="10 not chosen"):
        read(path, **FIELDS, where={"tags": {"min": 1}})


def test_true_is_no_number_and_text_no_date(tmp_path: Path) -> None:
    path = write(tmp_path, numbered(20))
    for where in ({"hard": 1}, {"topic": {"min": 1}}, {"absent": "x"}):
        with pytest.raises(DataError, match="20 not chosen"):
            read(path, **FIELDS, where=where)


def test_repeated_questions_are_dropped_or_kept(tmp_path: Path) -> None:
    path = write(
        tmp_path, [{"q": "What is 1+1?"}, {"q": "  What is  1+1?\n"}, {"q": "What is 1+2?"}]
    )
    counts = ReadCounts()
    kept = read_prompts(PromptSet(file=path, **FIELDS), "d", counts=counts)
    assert [prompt.messages[0]["content"] for prompt in kept] == ["What is 1+1?", "What is 1+2?"]
    assert (counts.rows, counts.left_out) == (3, {"repeated": 1})
    one, two, three = read(path, **FIELDS, duplicates="keep")
    assert two.prompt_id.endswith("#2")
    assert len({one.prompt_id, two.prompt_id, three.prompt_id}) == 3


def test_the_same_id_of_two_questions_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [{"q": "a", "i": 1}, {"q": "b", "i": 1}])
    with pytest.raises(
        DataError,
        match=r"rows.parquet:2: the prompt_id 'fields-1' is not unique: it is also on line 1",
    ):
        read(path, format="fields", fields={"question": "q", "prompt_id": "i"})


def test_lengths_and_shuffling(tmp_path: Path) -> None:
    path = write(
        tmp_path, [*numbered(30), {"q": "x" * 100, "level": 0, "hard": False, "topic": "a"}]
    )
    assert len(read(path, **FIELDS, max_prompt_chars=50)) == 30
    first, second, other = (
        read(path, **FIELDS, shuffle_seed=seed, num_prompts=10) for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other
    assert first != read(path, **FIELDS, num_prompts=10)
    more = read(path, **FIELDS, shuffle_seed=1, num_prompts=20)
    assert more[:10] == first, "a longer set begins with the shorter one"


# ---- files ----


def test_a_folder_is_read_in_order_of_its_files(tmp_path: Path) -> None:
    rows = numbered(4)
    for name, part in (
        ("data/train-00001.parquet", rows[2:]),
        ("data/train-00000.parquet", rows[:2]),
    ):
        write(tmp_path, part, name)
    write(tmp_path, [{"q": "cached"}], ".cache/x.parquet")
    (tmp_path / "README.md").write_text("a card")
    assert [prompt.messages[0]["content"] for prompt in read(tmp_path, **FIELDS)] == [
        row["q"] for row in rows
    ]
    before = content_hash(tmp_path)
    assert before is not None
    write(tmp_path, rows[:1], "data/train-00001.parquet")
    assert content_hash(tmp_path) != before
    write(tmp_path, rows, "extra.jsonl")
    with pytest.raises(
        DataError, match=r"this folder has files of several kinds \(.jsonl, .parquet\)"
    ):
        read(tmp_path, **FIELDS)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(22, "Invalid argument", "/proc/1/task/1/net")

    monkeypatch.setattr(Path, "rglob", refuse)
    with pytest.raises(
        DataError,
        match=r"/proc/1/task/1/net: cannot be read \(Invalid argument\); remedy: give a folder",
    ):
        read(tmp_path, **FIELDS)


def test_a_list_in_json_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(numbered(3)))
    assert len(read(path, **FIELDS)) == 3
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(tmp_path / "bad.parquet", **FIELDS)
    for name in ("absent.parquet", "absent.jsonl", "absent.json"):
        with pytest.raises(DataError, match="no such file"):
            read(tmp_path / name, **FIELDS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="this folder has no file of prompts"):
        read(tmp_path / "empty", **FIELDS)
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match=r":1: a JSON object is needed, but the row is a list"):
        read(tmp_path / "list.jsonl", **FIELDS)
