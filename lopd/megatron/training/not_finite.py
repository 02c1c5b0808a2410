"""The error of a step whose loss or gradient is not finite.

It names the ranks where the value came from, the responses, and the checkpoint to continue from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lopd.errors import TrainingError
from lopd.megatron.checkpoints.checkpoint import Checkpoints
from lopd.megatron.ranks import parallel
from lopd.records import Microbatch

# How many responses the message names.
NAMED_RESPONSES = 8


def loss_suspects(
    outputs: Sequence[Mapping[str, Tensor]], microbatches: Sequence[Microbatch]
) -> list[Microbatch]:
    """Return the microbatches of this rank whose own loss is not finite.

    Args:
        outputs: The sums of each microbatch. They are empty but on the last pipeline stage.
        microbatches: The microbatches of this rank.
    """
    # Pairs are formed only where there are outputs: on the earlier stages there are none to pair.
    if not outputs:
        return []
    pairs = zip(microbatches, outputs, strict=True)
    return [microbatch for microbatch, sums in pairs if not math.isfinite(sums["loss"].item())]


def has_bad_gradient(model: Any) -> bool:
    """Return whether a gradient of this rank is not finite."""
    # Megatron-Core adds up gradients in main_grad; .grad is empty. A frozen weight has neither.
    return any(
        not torch.isfinite(parameter.main_grad).all()
        for parameter in model.parameters()
        if parameter.requires_grad
    )


def not_finite_error(
    what: str,
    *,
    is_here: bool,
    suspects: Sequence[Microbatch],
    step: int,
    checkpoints: Checkpoints | None,
) -> TrainingError:
    """Return the error of a step that was not made. Collective: every rank raises the same one.

    Args:
        what: The value that is not finite, and what it is.
        is_here: Whether it came from this rank.
        suspects: The microbatches of this rank that may have caused it.
        step: The number of the step, from 1.
        checkpoints: The checkpoints of the training, if it has any.
    """
    # Only the ranks where the value came from name responses. After the gradients were summed, a
    # nan of one rank is on all ranks of its group.
    own: list[str] = []
    if is_here:
        keys = (key for microbatch in suspects for key in microbatch.keys)
        own = [f"{prompt_id}/{sample_index}" for prompt_id, sample_index in keys]
    gathered = parallel.gather_objects((is_here, own))
    ranks = ", ".join(str(rank) for rank, (is_bad, _) in enumerate(gathered) if is_bad)
    # Ranks with the same microbatches name the same responses. The dict keeps the first of each.
    responses = list(dict.fromkeys(name for _, names in gathered for name in names))
    learned = ""
    if responses:
        more = len(responses) - NAMED_RESPONSES
        others = f" and {more} more" if more > 0 else ""
        learned = f", learning from the responses {', '.join(responses[:NAMED_RESPONSES])}{others}"
    newest = None
    if checkpoints is not None:
        # A checkpoint that is being written holds the weights before this step, so it is good. It
        # is published first: otherwise the message would name an older one.
        checkpoints.finish()
        newest = checkpoints.newest()
    return TrainingError(
        f"{what}, on rank {ranks or 'unknown'}{learned}; the weights were not updated",
        where=f"step {step}",
        remedy="lower the learning rate, or check the data; the last good checkpoint is "
        f"{'the initial model' if newest is None else newest}",
    )
