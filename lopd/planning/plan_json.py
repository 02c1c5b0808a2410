"""A plan as JSON, for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lopd.planning.assumptions import WORK
from lopd.planning.horizon import short_horizon
from lopd.planning.memory import MemoryUse
from lopd.planning.plan import Plan
from lopd.planning.stages import LIGHTNING


def as_json(plan: Plan) -> dict[str, Any]:
    """Return everything that a plan says. Sizes are bytes, times seconds or GPU hours.

    Programs read these keys, so none of them changes its name.
    """
    if not plan.has_gpus:
        return _without_gpus(plan)
    node = plan.node
    shorter = short_horizon(plan)
    # Stages whose result is given are there with 0 hours, so that all plans have the same keys.
    hours = {stage: plan.gpu_hours(stage) for stage in plan.times}
    return {
        "node": {
            "gpu": node.gpu.name,
            "gpus": node.num_gpus,
            "gpu_memory": node.gpu.memory,
            "host_memory": node.host_memory,
        },
        # The source says whether a shape was read from a file or is what is known of the model.
        **_models(plan),
        "fits": plan.fits,
        "tight": plan.tight,
        "problems": [{"stage": problem.stage, "what": problem.what} for problem in plan.problems],
        "memory": {
            stage: _memory_as_json(use, node.gpu.memory) for stage, use in plan.memory.items()
        },
        **_work(plan),
        "seconds": {stage: time.seconds for stage, time in plan.times.items()},
        # Only trainings have a utilisation. Sampling is bound by memory, where it says nothing.
        "mfu": {stage: plan.times[stage].utilisation for stage in plan.trained},
        "sync_seconds": plan.syncs.seconds,
        "gpu_hours": {
            **hours,
            "total": sum(hours.values()),
            # The sum that the paper publishes as the GPU hours of Lightning OPD.
            "lightning_opd": sum(hours[stage] for stage in LIGHTNING),
        },
        # What rollouts that stop at distill.objective.prefix_tokens would take; None without it.
        "short_horizon": None if shorter is None else asdict(shorter),
        # With these a program can tell two plans apart that differ in nothing else.
        "assumptions": {name: getattr(plan.assumed, name) for name in plan.assumed.__slots__},
    }


def _without_gpus(plan: Plan) -> dict[str, Any]:
    """Return what is known of a run on a CPU. What is not estimated has no key, or is None."""
    return {
        "node": {"device": "cpu"},
        **_models(plan),
        # Not true and not false: whether it fits was not asked.
        "fits": None,
        "problems": [],
        **_work(plan),
        "assumptions": {name: getattr(plan.assumed, name) for name in WORK},
    }


def _models(plan: Plan) -> dict[str, Any]:
    return {
        "models": {
            role: {"name": model.name, "source": model.source}
            for role, model in plan.models.items()
        },
        "parameters": {
            "total": plan.total,
            "active": plan.active,
            # One number for each pipeline stage, since the first and the last one hold more.
            "per_rank": {
                name: [stage.total for stage in stages] for name, stages in plan.per_rank.items()
            },
        },
    }


def _work(plan: Plan) -> dict[str, Any]:
    return {
        "disk": {**plan.disk, "total": sum(plan.disk.values())},
        "tokens": {stage: time.tokens for stage, time in plan.times.items()},
        "flops": {stage: time.flops for stage, time in plan.times.items()},
    }


def _memory_as_json(use: MemoryUse, limit: int) -> dict[str, Any]:
    return {
        "gpu": dict(use.gpu),
        "gpu_total": use.gpu_total,
        "gpu_limit": limit,
        "fits": use.gpu_total <= limit,
        "host": dict(use.host),
        "host_total": use.host_total,
        # Empty unless trainer and servers take turns with the GPUs.
        "turns": dict(use.turns),
        **use.figures,
    }
