"""Ranks of the tests of what only makes a training faster: each way of running a step must come to
the same figures.
"""

from __future__ import annotations

from typing import Any

from tests.megatron.trainer_cases import settings_of, train, trainer_of

LAYOUT = {"tensor": 2, "expert": 4, "expert_tensor": 1}  # two data ranks for all but the experts
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 20_000}
SELECTIVE = {"recompute_modules": ["moe"]}


def four_ranks(model: str) -> dict[str, Any]:
    """The plain steps; gradients exchanged while the backward pass goes on; experts computed again;
    both; and a control.
    """
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "overlap": {"megatron": OVERLAP},
        "selective": {"recompute": "selective", "megatron": SELECTIVE},
        "both": {"recompute": "selective", "megatron": {**OVERLAP, **SELECTIVE}},
    }
    result: dict[str, Any] = {name: train(trainer_of(model, settings_of(LAYOUT, **way))) for name, way in ways.items()}
    result["control"] = train(_without_the_exchange(trainer_of(model, settings_of(LAYOUT, megatron=OVERLAP))))
    return result


def _without_the_exchange(trainer: Any) -> Any:
    """Gradients of dense weights that are started on their way and never summed over the data
    ranks.
    """
    for group in trainer.model.bucket_groups:
        group.start_grad_sync = lambda *arguments, **named: None
        group.finish_grad_sync = lambda *arguments, **named: None
    return trainer
