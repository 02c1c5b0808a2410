"""How many responses were cut off at a token limit, and the warning where they are many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lopd.config import Config

if TYPE_CHECKING:
    from pathlib import Path

    from lopd.stages.context import StageContext

# From this share on a warning is given. A long tail is usual; a fifth of the data without an end is
# a limit that does not fit the model.
LARGE_SHARE = 0.2
# The key of the warnings in a manifest's extra. lopd.summary shows them.
WARNINGS = "warnings"


def truncation_figures(
    context: StageContext, folder: Path, section: str | None = None, *, is_wanted: bool = False
) -> dict[str, Any]:
    """Return the share of an artifact's responses that were cut off, and log a large one.

    Args:
        context: The stage that has sampled them.
        folder: The folder of the shards, which no manifest has to list yet.
        section: The section with the limit. None: that of the stage.
        is_wanted: Whether the limit is meant to cut responses. Then there is no warning.

    Returns:
        truncated_share, and warnings if it is large; for the manifest. Nothing for a worker, which
        knows only its own shards.
    """
    # A worker sees a part of the artifact only. The whole is counted when it is completed.
    if context.share is not None:
        return {}
    count = 0
    cut_lengths: list[int] = []
    for path in sorted(folder.glob("shard-*.parquet")):
        # Two columns: the log-probabilities of a large artifact need not be decoded for this.
        table = pq.read_table(path, columns=["finish_reason", "token_ids"])
        cut = np.array(table.column("finish_reason").to_pylist()) == "length"
        lengths = pc.list_value_length(table.column("token_ids")).to_numpy()
        count += table.num_rows
        cut_lengths += lengths[cut].tolist()
    section = section or context.stage.name
    warning = truncation_warning(context.config, section, cut_lengths, count)
    # A refresh with a short horizon cuts its responses on purpose.
    if is_wanted:
        warning = ""
    if warning:
        context.log(f"WARNING: {warning}")
    share = len(cut_lengths) / max(1, count)
    return {"truncated_share": share, **({WARNINGS: [warning]} if warning else {})}


def truncation_warning(
    config: Config, stage: str, cut_lengths: Sequence[int], count: int, *, of: str = ""
) -> str:
    """Return what to say of responses that were cut off, or "" if they are few.

    Args:
        config: The configuration.
        stage: The section with the limit: demonstrate, rollout or evaluate.
        cut_lengths: The length of each response that was cut off, in tokens.
        count: The number of all responses.
        of: Whose responses they are, where a stage has those of several models.
    """
    share = len(cut_lengths) / max(1, count)
    if share < LARGE_SHARE:
        return ""
    limit = getattr(config, stage).max_new_tokens
    # A response that ends below its own limit has met the end of the context.
    at_context = sum(length < limit for length in cut_lengths)
    knob = f"{stage}.max_new_tokens = {limit}"
    # The knob that cut most of them is the one worth raising.
    if at_context * 2 > len(cut_lengths):
        knob = f"sglang.context_length = {config.sglang.context_length}"
    whose = f" of {of}" if of else ""
    return (
        f"{share:.0%} of the responses{whose} ({len(cut_lengths):,} of {count:,}) were cut off at "
        f"the token limit and have no end; raise {knob}"
    )
