"""The packages of the trackers that a run uses."""

from __future__ import annotations

from collections.abc import Iterator

from lopd.checks.findings import Finding
from lopd.config import Config
from lopd.report.trackers import missing_package


def trackers(config: Config) -> Iterator[Finding]:
    """Check that the packages of report.trackers are installed."""
    # A tracker that cannot be imported ends no training, so without this check its absence is
    # noticed too late.
    names = config.report.trackers
    problems = [problem for name in names if (problem := missing_package(name)) is not None]
    yield from problems
    if names and not problems:
        yield f"the metrics also go to {', '.join(names)}"
