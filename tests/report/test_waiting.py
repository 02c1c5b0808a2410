"""A command that is silent for long says what it does; one that is fast says nothing."""

from __future__ import annotations

import time

import pytest

from lopd.report.waiting import Waiting


def test_a_line_comes_only_where_it_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    shown = ""
    with Waiting(silence_s=0.05) as waiting:
        waiting.begin("looking at: prompts")
        # Until the line is there. A test that waits for a time would fail on a busy machine.
        while not shown:
            shown = capsys.readouterr().err
            time.sleep(0.01)
    assert shown == "looking at: prompts ...\n"
    with Waiting(silence_s=300) as waiting:
        waiting.begin("this")
        waiting.begin("that")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
