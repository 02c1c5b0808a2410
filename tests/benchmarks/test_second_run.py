"""benchmarks/second_run.py: both parts run, and the second identity reads nothing."""

from __future__ import annotations

from benchmarks.second_run import large_model


def test_the_second_identity_reads_nothing() -> None:
    figures = large_model(0.2)
    assert figures["seconds_identify_again"] < figures["seconds_identify_first"] / 3
