"""Run all stages, or one stage, for the verbs that do so."""

from __future__ import annotations

import json

from lopd.artifacts.file_hashes import HASHES
from lopd.config import Config


def run_stages(config: Config, stage: str | None = None) -> None:
    """Check a configuration, run its stages, and show the summary.

    Args:
        config: The configuration of the run.
        stage: The only stage to run. None runs all stages in order.

    Raises:
        LopdError: A check or a stage failed.
    """
    # The stages import torch, so this import waits until the configuration is known to be right.
    from lopd import checks, pipeline

    # Once per command: the checks and the stages then read each file once.
    if config.run.rehash:
        HASHES.forget()
    # All checks come before the first stage: a mistake in the last stage's settings must be
    # noticed now, not after hours of sampling and training.
    checks.check_all(config, stage=stage)
    pipeline.run(config, only=None if stage is None else (stage,))
    _show_result(config)


def _show_result(config: Config) -> None:
    """Print the accuracies and the seconds of each stage, and where the files are."""
    from lopd.report.console import print_line, show_summary
    from lopd.summary import FILE

    # The summary is read from its file, not passed on in memory: what the user sees here is
    # exactly what a program reads later.
    show_summary(json.loads((config.run.dir / FILE).read_text(encoding="utf-8")))
    print_line(f"everything is in {config.run.dir}")
