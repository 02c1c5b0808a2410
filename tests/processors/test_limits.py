"""The helper that asserts the suite's numeric limits, and the table of what it recorded."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import limits
from tests.limits import apart, close, within
from tests.megatron.launch import run_ranks
from tests.processors import imitation
from tests.processors.table import MARGIN, near, read, show

NUM_ROWS = 200


@pytest.fixture(autouse=True)
def unrecorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails here on purpose does not stand in the table of a sweep."""
    monkeypatch.delenv(limits.FILE, raising=False)


@pytest.fixture
def file(unrecorded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where differences are recorded during the test."""
    path = tmp_path / "own.jsonl"
    monkeypatch.setenv(limits.FILE, str(path))
    return path


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_difference_up_to_the_limit_passes_and_one_above_fails() -> None:
    within(1e-5, 1e-5)
    with pytest.raises(AssertionError, match=r"loss: 1\.1e-05; limit: 1e-05"):
        within(1.1e-5, 1e-5, "loss")
    with pytest.raises(AssertionError):
        within(math.nan, 1e-5)
    apart(0.2, 0.1)
    for lost in (0.09, math.nan):
        with pytest.raises(AssertionError, match=r"at least: 0\.1"):
            apart(lost, 0.1)


@pytest.mark.parametrize(
    ("expected", "wrong"),
    [
        (2.0, 2.1),
        ([1.0, -4.0], [1.0, -4.1]),
        (np.array([[1.0], [2.0]]), np.array([[1.0], [2.1]])),
        (torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.0, 2.1])),
        ({"loss": 2.0, "norm": 3.0}, {"loss": 2.1, "norm": 3.0}),
        ([math.inf, 1.0], [math.inf, 1.1]),
        ([1.0, 2.0], [math.nan, 2.0]),
    ],
)
def test_numbers_of_any_kind_are_compared_and_a_wrong_one_fails(expected: Any, wrong: Any) -> None:
    for limit in ({"rel": 1e-3}, {"abs": 1e-3}, {"rel": 1e-3, "abs": 1e-3}):
        close(expected, expected, **limit)
        with pytest.raises(AssertionError):
            close(wrong, expected, **limit)


def test_other_keys_and_other_shapes_fail() -> None:
    with pytest.raises(AssertionError):
        close({"loss": 2.0}, {"norm": 2.0}, abs=1.0)
    with pytest.raises(AssertionError, match="shapes are"):
        close([1.0, 1.0], [1.0], abs=1.0)
    with pytest.raises(AssertionError, match="no limit is given"):
        close(1.0, 1.0)


def test_what_was_seen_is_recorded_even_where_it_fails(file: Path) -> None:
    close(2.002, 2.0, rel=2e-3, name="relative")
    close([3.0, 2.5], [3.0, 2.0], abs=1.0)
    close(2.5, 2.0, rel=0.5, abs=1.0)
    apart(0.2, 0.1, "control")
    with pytest.raises(AssertionError):
        within(0.5, 0.25, "too far")
    rows = rows_of(file)
    name = "tests/processors/test_limits.py::test_what_was_seen_is_recorded_even_where_it_fails"
    assert {row["test"] for row in rows} == {name}
    assert [row["name"] for row in rows] == ["relative", "", "", "control", "too far"]
    assert [row["kind"] for row in rows] == ["limit", "limit", "limit", "control", "limit"]
    assert [row["limit"] for row in rows] == [2e-3, 1.0, 1.0, 0.1, 0.25]
    seen = [row["difference"] for row in rows]
    assert seen == pytest.approx([1e-3, 0.5, 0.25, 0.2, 0.5])


def test_nothing_is_recorded_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    within(0.0, 1.0)
    assert not list(tmp_path.iterdir())


def record_many() -> str:
    for number in range(NUM_ROWS):
        within(number, NUM_ROWS, f"rank {os.environ['RANK']}")
    return os.environ["PYTEST_CURRENT_TEST"]


def test_ranks_record_whole_lines_under_their_tests_name(file: Path) -> None:
    names = run_ranks(record_many, 2)
    assert all("test_ranks_record_whole_lines" in name for name in names)
    rows = rows_of(file)
    assert len(rows) == 2 * NUM_ROWS
    for rank in range(2):
        mine = [row["difference"] for row in rows if row["name"] == f"rank {rank}"]
        assert mine == list(range(NUM_ROWS))


# ---- the table ----


def recorded(folder: Path, processor: str, *rows: tuple[str, str, float, float]) -> None:
    """rows: test, kind, limit, difference."""
    with (folder / f"{processor}.jsonl").open("w") as file:
        for test, kind, limit, seen in rows:
            row = {"test": test, "name": "", "kind": kind, "limit": limit, "difference": seen}
            file.write(json.dumps(row) + "\n")


def test_the_table_has_the_worst_of_all_processors_and_marks_what_is_near(tmp_path: Path) -> None:
    recorded(
        tmp_path,
        "sse",
        ("tests/a.py::test_far[one]", "limit", 1.0, 0.2),
        ("tests/a.py::test_far[two]", "limit", 1.0, 0.1),
        ("tests/a.py::test_near", "limit", 1.0, 0.1),
        ("tests/a.py::test_exact", "limit", 1.0, 0.0),
        ("tests/a.py::test_control", "control", 0.1, 0.5),
    )
    recorded(
        tmp_path,
        "avx2",
        ("tests/a.py::test_near", "limit", 1.0, 0.4),
        ("tests/a.py::test_lost", "limit", 1.0, math.nan),
        ("tests/a.py::test_control", "control", 0.1, 0.2),
    )
    figures = read(tmp_path)
    found = {figure.test.rpartition("_")[2]: figure for figure in figures}
    assert [figure.test.rpartition("_")[2] for figure in figures][:3] == ["lost", "control", "near"]
    assert (found["far"].worst, found["far"].where) == (0.2, "sse one")
    assert (found["near"].worst, found["near"].where) == (0.4, "avx2")
    assert (found["control"].worst, found["control"].where) == (0.2, "avx2")
    assert near(figures) == [found["lost"], found["near"]]
    shown = show(figures).splitlines()
    assert len(shown) == 1 + len(figures)
    assert [line.endswith("NEAR") for line in shown[1:]] == [True, False, True, False, False]
    assert found["near"].ratio < MARGIN < found["far"].ratio


# ---- processors ----


def test_what_this_machine_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "cpuinfo"
    about.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu sse4_2 avx2 fma\n")
    monkeypatch.setattr(imitation, "CPU_INFO", about)
    lacking = {name: imitation.lacking(each) for name, each in imitation.PROCESSORS.items()}
    needed = "avx512f avx512bw avx512dq avx512vl"
    assert lacking == {"sse": "", "avx2": "", "avx512": needed, "own": ""}
    settings = imitation.environment_of(imitation.PROCESSORS["avx2"], tmp_path)
    assert settings == imitation.PROCESSORS["avx2"].settings, "an Intel processor needs no more"
