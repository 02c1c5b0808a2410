"""Bodies for tests.megatron.launch.run_ranks: five steps on four ranks, in layouts that two cannot
form, and their reference on one.
"""

from __future__ import annotations

import math
from typing import Any

from lopd.batching import build_microbatch
from lopd.megatron.ranks import parallel
from lopd.megatron.training import wrapping
from lopd.megatron.training.trainer import Trainer
from lopd.records import Microbatch
from tests.megatron.trainer_cases import NUM_STEPS, samples_of, settings_of, train, trainer_of

FOUR_RANKS: dict[str, dict[str, Any]] = {
    "tensor, expert, data": {"tensor": 2, "expert": 2},
    "tensor, expert, data, plain optimizer": {
        "tensor": 2,
        "expert": 2,
        "distributed_optimizer": False,
    },
    "tensor, expert, pipeline": {"tensor": 2, "expert": 2, "pipeline": 2},
    "expert tensor, data": {"tensor": 2, "expert_tensor": 2},
    "expert tensor, expert": {"tensor": 2, "expert": 2, "expert_tensor": 2},
    "expert tensor alone": {"expert_tensor": 2},
    "expert of four": {"tensor": 2, "expert": 4},
    "pipeline, data": {"pipeline": 2},
}
FEW = {
    "data": {},
    "tensor, expert, data": {"tensor": 2, "expert": 2},
    "pipeline, data": {"pipeline": 2},
}
# responses of a step, one in a microbatch, dealt in rounds: the last microbatch of some ranks has
# none
NUM_FEW = 5


def _few(step: int) -> list[Microbatch]:
    rounds = math.ceil(NUM_FEW / parallel.data_size())
    mine = samples_of(step, NUM_FEW)[parallel.data_rank() :: parallel.data_size()]
    return [build_microbatch(mine[index : index + 1], 2) for index in range(rounds)]


def train_few(trainer: Trainer) -> dict[str, Any]:
    batches = [_few(step) for step in range(NUM_STEPS)]
    steps = [trainer.train_step(batch) for batch in batches]
    empty = sum(not batch[-1].loss_mask.any() for batch in batches)
    return {
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "empty": parallel.gather_objects(int(empty)),
    }


def one_rank(model: str) -> dict[str, Any]:
    return {
        "all": train(trainer_of(model, settings_of())),
        "few": train_few(trainer_of(model, settings_of())),
    }


def four_ranks(model: str) -> dict[str, Any]:
    results: dict[str, Any] = {
        name: train(trainer_of(model, settings_of(layout))) for name, layout in FOUR_RANKS.items()
    }
    for recompute in ("selective", "full"):
        results[recompute] = train(
            trainer_of(model, settings_of(FOUR_RANKS["tensor, expert, data"], recompute=recompute))
        )
    for name, layout in FEW.items():
        results[f"few: {name}"] = train_few(trainer_of(model, settings_of(layout)))
    marked, wrapping.mark_experts = wrapping.mark_experts, lambda module: None
    results["unmarked experts"] = train(trainer_of(model, settings_of({"tensor": 2})))
    wrapping.mark_experts = marked
    return results
