"""Run all stages, or one stage, for the verbs that do so."""

from __future__ import annotations

from lopd.config import Config
from lopd.entry import run


def run_stages(config: Config, stage: str | None = None) -> None:
    """Check a configuration, run its stages, and show the summary.

    Args:
        config: The configuration of the run.
        stage: The only stage to run. None runs all stages in order.

    Raises:
        LopdError: A check or a stage failed.
    """
    summary = run(config, stage=stage)
    # rich takes a while to import, and a failed check ends before this.
    from lopd.report.console import print_line, show_summary

    show_summary(summary)
    print_line(f"everything is in {config.run.dir}")
