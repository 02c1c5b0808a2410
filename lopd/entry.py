"""The entry for Python: one call does what ``lopd run`` does, and returns the figures."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lopd.config import Config, load_config
from lopd.errors import ConfigError


def run(
    config: Config | str | Path, overrides: Sequence[str] = (), *, stage: str | None = None
) -> dict[str, Any]:
    """Check a configuration, run its stages, and return the summary of the run.

    The same call again reuses what is finished. It goes on after a kill or an error.

    Args:
        config: A TOML file, or a configuration that load_config has read.
        overrides: Texts ``section.key=value`` for a TOML file, as on the command line.
        stage: The only stage to run, for example "distill". None runs all stages in order.

    Returns:
        The content of run.dir/summary.json: accuracies, reverse KL, and the seconds of each stage.

    Raises:
        LopdError: A check or a stage failed. Its text says what, where, the limit and the remedy.
    """
    if not isinstance(config, Config):
        config = load_config(config, overrides)
    elif overrides:
        raise ConfigError(
            "overrides were given beside a configuration that is read already",
            where="lopd.run",
            remedy="give them to load_config, or give the TOML file",
        )
    # The threads of Hugging Face's tokenizers do not survive a later fork of this process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The stages import torch, so this import waits until the configuration is known to be right.
    from lopd import checks, pipeline
    from lopd.artifacts.file_hashes import HASHES
    from lopd.stages.order import STAGES
    from lopd.summary import FILE

    names = [one.name for one in STAGES]
    if stage is not None and stage not in names:
        raise ConfigError(
            f"no stage {stage!r:.60}", where="lopd.run", limit=f"one of {', '.join(names)}"
        )
    # Once per command: the checks and the stages then read each file once.
    if config.run.rehash:
        HASHES.forget()
    pipeline.load_hashes(config)
    # All checks come before the first stage: a mistake in the last stage's settings must be
    # noticed now, not after hours of sampling and training.
    checks.check_all(config, stage=stage)
    pipeline.run(config, only=None if stage is None else (stage,))
    # Read from its file: what is returned is exactly what a program reads later.
    summary: dict[str, Any] = json.loads((config.run.dir / FILE).read_text(encoding="utf-8"))
    return summary
