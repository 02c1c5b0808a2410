"""What stands on the screen: lines, bars, tables, errors."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lopd.errors import ConfigError
from lopd.report import console
from lopd.report.console import (
    duration,
    model_table,
    print_line,
    progress,
    show_error,
    show_summary,
    stage_table,
    training_line,
    with_error,
)

SUMMARY: dict[str, Any] = {
    "stages": [
        {"name": "sft", "status": "reused", "seconds": 0.25},
        {"name": "distill", "status": "done", "seconds": 61.5},
    ],
    "accuracy": {
        "teacher": 0.984,
        "base": 0.44,
        "sft": 0.62,
        "distilled": 0.9725,
        "num_prompts": 500,
        "samples_per_prompt": 4,
    },
    "accuracy_standard_error": {"teacher": 0.0031, "base": 0.012, "sft": 0.011},
    "reverse_kl": {"teacher": 1e-8, "base": 0.5, "sft": 0.2593, "distilled": 0.00221},
    "reverse_kl_standard_error": {
        "teacher": 1e-9,
        "base": 0.013,
        "sft": 0.0042,
        "distilled": 0.00034,
    },
    "notes": ["a note [in brackets]"],
}


def shown(thing: Any) -> str:
    screen = Console(file=io.StringIO(), width=100)
    screen.print(thing)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def row_of(text: str, name: str) -> list[str]:
    """The cells of the table row that begins with this name."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_model_table_shows_percent_and_nats_with_standard_errors() -> None:
    text = shown(model_table(SUMMARY))
    assert row_of(text, "base student") == ["base student", "44.0 ± 1.2", "0.500 ± 0.013"]
    assert row_of(text, "SFT student") == ["SFT student", "62.0 ± 1.1", "0.259 ± 0.004"]
    assert row_of(text, "distilled student") == ["distilled student", "97.2", "0.0022 ± 0.0003"]
    assert row_of(text, "teacher") == ["teacher", "98.4 ± 0.3", "< 0.00001"]
    assert "SFT of equal compute" not in text  # that baseline was switched off
    assert "500 prompts x 4 samples" in text


def test_stage_table_adds_up() -> None:
    text = shown(stage_table(SUMMARY))
    assert row_of(text, "sft") == ["sft", "reused", "0.2"]
    assert row_of(text, "all") == ["all", "", "61.8"]


def test_summary_prints_tables_and_notes_literally(capsys: pytest.CaptureFixture[str]) -> None:
    show_summary(SUMMARY)
    text = capsys.readouterr().out
    assert (
        text.index("distilled student") < text.index("stages") < text.index("a note [in brackets]")
    )
    show_summary({"stages": SUMMARY["stages"]})
    assert "accuracy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (0.259, 0.0042, "0.259 ± 0.004"),
        (0.259, 0.0012, "0.2590 ± 0.0012"),
        (12.3, 4.0, "12 ± 4"),
        (0.259, None, "0.259"),
        (0.259, float("nan"), "0.259"),
        (0.002212, 0.0, "0.00221"),
        (-0.02, 0.03, "-0.02 ± 0.03"),
        (3e-7, 1e-7, "< 0.00001"),
    ],
)
def test_a_figure_has_as_many_decimals_as_its_error_warrants(
    value: float, error: float | None, expected: str
) -> None:
    assert with_error(value, error) == expected


def test_training_line_is_one_line_with_what_is_known() -> None:
    figures = {
        "loss": 0.1234567,
        "advantage": -0.05,
        "reverse_kl": 0.04,
        "grad_norm": 1.5,
        "lr": 1e-4,
        "processed_tokens_per_s": 12345.6,
        "weight": 1.0,
    }
    assert training_line("distill", 3, 150, figures) == (
        "distill   3/150  loss 0.1235  advantage -0.0500  reverse KL 0.0400  grad norm 1.500  "
        "lr 1.0e-04  tokens/s 12,346"
    )
    assert training_line("sft", 8, 8, {"loss": 2.0}) == "sft 8/8  loss 2.0000"


def test_error_is_one_line_on_stderr_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(
        ConfigError(
            "value\nwith a break, [red] and " + "length " * 60,
            where="a.toml",
            limit="3",
            remedy="do that",
        )
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: a.toml: value with a break, [red] and ")
    assert err.endswith("remedy: do that\n")


def test_print_line_writes_the_line_to_screen_and_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "stage" / "log.txt"
    print_line("sft: first [1/2]", log)
    print_line("sft: second", log)
    print_line("screen only")
    assert capsys.readouterr().out == "sft: first [1/2]\nsft: second\nscreen only\n"
    assert [line.partition("Z ")[2] for line in log.read_text().splitlines()] == [
        "sft: first [1/2]",
        "sft: second",
    ]


def test_duration() -> None:
    assert [duration(seconds) for seconds in (0.84, 59.4, 245, 3723)] == [
        "0.8 s",
        "0:59",
        "4:05",
        "1:02:03",
    ]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_plain_progress_speaks_every_ten_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    with progress("rollout", total=1000, done=400, unit="responses") as bar:
        for _ in range(600):
            clock.now += 0.0625  # exact in binary
            bar.advance()
    assert capsys.readouterr().out.splitlines() == [
        # 160 in 10 s: the 400 of an earlier run are not counted
        "rollout: 560/1,000 responses, 16.0/s, 0:28 left",
        "rollout: 720/1,000 responses, 16.0/s, 0:18 left",
        "rollout: 880/1,000 responses, 16.0/s, 0:08 left",
        "rollout: 1,000/1,000 responses, 16.0/s, 0:38",
    ]


def test_plain_progress_says_where_an_error_stopped_it(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        with progress("score", total=10, unit="responses") as bar:
            bar.advance(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert capsys.readouterr().out.startswith("score: stopped at 3/10 responses")


def test_bar_on_a_terminal_shows_count_unit_and_rate_below_other_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    monkeypatch.setattr(console, "_console", screen)
    with progress("rollout", total=20, unit="responses") as bar:
        bar.advance(5)
        print_line("a line meanwhile")
        bar.advance(15)
    assert isinstance(screen.file, io.StringIO)
    text = screen.file.getvalue()
    assert "a line meanwhile" in text
    assert "20/20 responses" in text
