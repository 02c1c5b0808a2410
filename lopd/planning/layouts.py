"""The nearest settings that fit a node: first the servers', then those of each training. Near: few
knobs changed, by little; among equals the fastest.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from lopd.config import Config, TrainSection
from lopd.megatron.weights.architecture import layout_problems
from lopd.planning.assumptions import Assumptions
from lopd.planning.hardware import Node
from lopd.planning.models import PlannedModel
from lopd.planning.plan import TRAINED, Plan, given_stages, make_plan

SERVED = ("demonstrate", "rollout", "score", "evaluate")
OFFLOAD = {
    "optimizer_cpu_offload": True,
    "optimizer_offload_fraction": 1.0,
    "use_precision_aware_optimizer": True,
}
MEM_FRACTIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
LIVE_FRACTIONS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)

Changes = Mapping[str, Any]  # dotted key -> value


@dataclass(frozen=True, slots=True)
class Suggestion:
    """changes: what to set, over the configuration; empty: it fits as it is."""

    changes: Changes
    plan: Plan

    @property
    def overrides(self) -> list[str]:
        """As ``lopd run CONFIG`` takes them."""
        return [f"{key}={_toml(value)}" for key, value in self.changes.items()]

    def as_json(self) -> dict[str, Any]:
        return {"changes": dict(self.changes), "overrides": self.overrides, "fits": self.plan.fits}


def nearest_that_fits(
    config: Config,
    models: Mapping[str, PlannedModel],
    node: Node,
    assumed: Assumptions,
    *,
    cohost: bool = False,
    build: bool = True,
) -> Suggestion | None:
    """None: nothing that was searched fits. build: count the parameters of what was found on the
    model itself.
    """

    def tried(changes: Changes) -> Plan:
        return make_plan(
            changed(config, changes), models, node, assumed, build=False, cohost=cohost
        )

    def first(
        candidates: Iterator[dict[str, Any]], base: Changes, stages: tuple[str, ...]
    ) -> dict[str, Any] | None:
        found: list[tuple[float, float, dict[str, Any]]] = []
        for changes in candidates:
            distance = sum(
                _distance(key, value, _at(config, key)) for key, value in changes.items()
            )
            if found and distance > found[0][0]:
                continue
            plan = tried({**base, **changes})
            if not any(problem.stage in stages for problem in plan.problems):
                found.append((distance, sum(plan.work[stage].seconds for stage in stages), changes))
                found.sort(key=lambda each: each[:2])
        return found[0][2] if found else None

    harmless = {f"{name}.{key}": value for name in TRAINED for key, value in _one_gpu().items()}
    chosen: dict[str, Any] = {}
    servers = first(_servers(config, models, node), harmless, SERVED)
    if servers is None:
        return None
    chosen |= servers
    for name in (stage for stage in TRAINED if stage not in given_stages(config)):
        others = {
            key: value
            for key, value in harmless.items()
            if not key.startswith(f"{name}.") and key not in chosen
        }
        live = name == "distill" and (
            cohost or config.distill.sync_every > 0 or config.distill.refresh.is_on
        )
        stages = (*SERVED, name) if live else (name,)
        training = first(_trainings(config, models, node, name, live), {**others, **chosen}, stages)
        if training is None:
            return None
        chosen |= training
    kept = {key: value for key, value in chosen.items() if _at(config, key) != value}
    plan = make_plan(changed(config, kept), models, node, assumed, build=build, cohost=cohost)
    return Suggestion(kept, plan)


def _one_gpu() -> dict[str, Any]:
    """A layout that divides every model, for the training that is not looked at."""
    return {
        f"parallel.{key}": 1
        for key in ("ranks", "nodes", "tensor", "pipeline", "context", "expert", "expert_tensor")
    }


def _servers(
    config: Config, models: Mapping[str, PlannedModel], node: Node
) -> Iterator[dict[str, Any]]:
    settings = config.sglang
    sizes = [
        size
        for size in _powers(node.num_gpus)
        if all(model.arch.num_heads % size == 0 for model in models.values())
    ]
    expert = [(settings.expert, settings.tensor)]
    for tensor, fraction in itertools.product(
        sizes,
        sorted(
            {settings.mem_fraction, *MEM_FRACTIONS},
            key=lambda share: abs(share - settings.mem_fraction),
        ),
    ):
        if (
            settings.expert > 1
            and (settings.expert, tensor) != expert[0]
            and tensor % settings.expert
        ):
            continue
        replicas = (
            settings.replicas
            if tensor == settings.tensor and settings.replicas * tensor <= node.num_gpus
            else node.num_gpus // tensor
        )
        yield {
            "sglang.tensor": tensor,
            "sglang.replicas": replicas,
            "sglang.data": 1 if tensor != settings.tensor else settings.data,
            "sglang.mem_fraction": fraction,
        }


def _trainings(
    config: Config, models: Mapping[str, PlannedModel], node: Node, name: str, live: bool
) -> Iterator[dict[str, Any]]:
    """Layouts that divide the student, with and without recompute and offload. live: servers beside
    it, smaller or (those that only evaluate) not at all.
    """
    student, section = models["student"].arch, getattr(config, name)
    sparse = student.num_experts > 0
    ranks = node.num_gpus * section.parallel.nodes
    sizes = _powers(ranks)
    contexts = sorted(
        {1, section.parallel.context}
    )  # one that is asked for may stay; none is proposed, since it has never been run on a GPU
    for tensor, pipeline, context, expert, expert_tensor in itertools.product(
        sizes, sizes, contexts, sizes if sparse else [1], sizes if sparse else [1]
    ):
        layout = {
            "ranks": ranks,
            "tensor": tensor,
            "pipeline": pipeline,
            "context": context,
            "expert": expert,
            "expert_tensor": expert_tensor,
        }
        parallel = section.parallel.model_copy(update=layout)
        if (
            tensor * pipeline * context > ranks
            or expert * expert_tensor * pipeline > ranks
            or any(layout_problems(student, parallel))
        ):
            continue
        keys = {f"{name}.parallel.{key}": value for key, value in layout.items()}
        for recompute, table, servers in itertools.product(
            _recomputes(section), _tables(section), _servers_beside(config) if live else [{}]
        ):
            yield {**keys, f"{name}.recompute": recompute, f"{name}.megatron": table, **servers}


def _recomputes(section: TrainSection) -> list[str]:
    return list(dict.fromkeys([section.recompute, "none", "selective", "full"]))


def _tables(section: TrainSection) -> list[dict[str, Any]]:
    own = dict(section.megatron)
    return [own] if own.get("optimizer_cpu_offload") else [own, {**own, **OFFLOAD}]


def _servers_beside(config: Config) -> list[dict[str, Any]]:
    """Shares of the GPUs' memory for them, or no evaluation while training."""
    smaller = [
        {"sglang.mem_fraction": fraction}
        for fraction in (config.sglang.mem_fraction, *LIVE_FRACTIONS)
    ]
    return [*smaller, {"distill.sync_every": 0}] if config.distill.sync_every > 0 else smaller


def _powers(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]


def _distance(key: str, new: Any, old: Any) -> float:
    """How much a change costs the user: doublings of a size, steps of a share, and what each switch
    takes away.
    """
    if new == old:
        return 0.0
    if key.endswith("mem_fraction"):
        return abs(float(new) - float(old)) * 5
    if key.endswith("recompute"):
        return 1.0
    if key.endswith("megatron"):
        return 3.0
    if key.endswith("sync_every"):
        return 2.0
    doublings: float = abs(math.log2(new / old))
    return doublings * (2.0 if key.endswith("pipeline") else 1.0)


def _at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _toml(value: Any) -> str:
    """A value as TOML; a table in one line, a word bare (an override takes both)."""
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{key} = {json.dumps(inner)}" for key, inner in value.items()) + " }"
        )
    return value if isinstance(value, str) else json.dumps(value)


def changed(config: Config, changes: Changes) -> Config:
    """The configuration with these dotted keys set."""
    for key, value in changes.items():
        config = _set(config, key.split("."), value)
    return config


def _set(section: Any, path: list[str], value: Any) -> Any:
    assert isinstance(section, BaseModel)
    inner = value if len(path) == 1 else _set(getattr(section, path[0]), path[1:], value)
    return section.model_copy(update={path[0]: inner})
