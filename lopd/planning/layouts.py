"""The nearest settings that fit a node.

First the settings of the servers are searched, then those of each training. Near means that few
knobs are changed, and by little. Among equals the fastest settings win.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from lopd.config import Config, ParallelSection, TrainSection
from lopd.megatron.weights.architecture import Architecture, layout_problems
from lopd.planning.assumptions import Assumptions
from lopd.planning.hardware import Node
from lopd.planning.models import PlannedModel
from lopd.planning.plan import Plan, make_plan
from lopd.planning.stages import TRAINED, given_stages

# The stages that the servers' settings decide.
SERVED = ("demonstrate", "rollout", "score", "evaluate")
# Fields of Megatron-Core that move the whole optimizer to the host.
OFFLOAD = {
    # Moments and master weights live on the host, and the CPU updates them.
    "optimizer_cpu_offload": True,
    # All of them: a part would need a search of its own.
    "optimizer_offload_fraction": 1.0,
    # Otherwise float32 master weights stay on the GPU, and little is won.
    "use_precision_aware_optimizer": True,
}
# Shares of a GPU's memory for weights and KV cache: of servers alone on their GPUs, and of servers
# beside a trainer.
MEM_FRACTIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
LIVE_FRACTIONS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)

# New values by dotted key of the configuration.
Changes = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Settings that fit.

    Attributes:
        changes: What to set. It is empty if the configuration fits as it is.
        plan: The plan with these settings.
    """

    changes: Changes
    plan: Plan

    @property
    def overrides(self) -> list[str]:
        """The changes as ``lopd run CONFIG`` takes them."""
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
    """Search for the nearest settings that fit.

    Args:
        config: The configuration to start from.
        models: The models by role.
        node: The machine.
        assumed: What cannot be known before the run.
        cohost: Whether servers of both models run beside the trainer.
        build: Whether to count the parameters of what was found on the model itself.

    Returns:
        The settings, or None if nothing that was searched fits.
    """

    def plan_with(changes: Changes) -> Plan:
        # Hundreds of layouts are tried. The formula takes no time, building takes seconds.
        trial = changed(config, changes)
        return make_plan(trial, models, node, assumed, build=False, cohost=cohost)

    # make_plan refuses a layout that does not divide the student. While one part is searched, the
    # trainings that are not looked at have a layout that divides every model.
    neutral = {f"{name}.{key}": value for name in TRAINED for key, value in _one_rank().items()}
    servers = _nearest(
        _server_settings(config, models, node), neutral, SERVED, config=config, plan_with=plan_with
    )
    # Servers that do not fit anywhere make every later search useless.
    if servers is None:
        return None
    chosen = dict(servers)
    for name in TRAINED:
        if name in given_stages(config):
            continue
        base = {key: value for key, value in neutral.items() if not key.startswith(f"{name}.")}
        base |= chosen
        is_live = name == "distill" and _has_live_servers(config, cohost=cohost)
        training = _nearest(
            _training_settings(config, models, node, name, is_live=is_live),
            base,
            (*SERVED, name) if is_live else (name,),
            config=config,
            plan_with=plan_with,
        )
        if training is None:
            return None
        chosen |= training
    # Candidates name all their settings. The user sees only those that differ from the own ones.
    changes = {key: value for key, value in chosen.items() if _value_at(config, key) != value}
    plan = make_plan(changed(config, changes), models, node, assumed, build=build, cohost=cohost)
    return Suggestion(changes, plan)


def _has_live_servers(config: Config, *, cohost: bool) -> bool:
    """Return whether servers run beside the trainer, so that both must be searched together."""
    return cohost or config.evaluates_at_syncs or config.distill.refresh.is_on


def _nearest(
    candidates: Iterator[dict[str, Any]],
    base: Changes,
    stages: tuple[str, ...],
    *,
    config: Config,
    plan_with: Callable[[Changes], Plan],
) -> dict[str, Any] | None:
    """Return the nearest candidate with which some stages fit, or None.

    Args:
        candidates: The settings to try.
        base: Settings that are tried together with each candidate.
        stages: The stages that must fit.
        config: The configuration from which distances are measured.
        plan_with: Plans the run with changed settings.
    """
    nearest: dict[str, Any] | None = None
    best = (math.inf, math.inf)
    # All candidates are looked at, because their order is not that of their distances.
    for changes in candidates:
        distance = sum(
            _distance(key, value, _value_at(config, key)) for key, value in changes.items()
        )
        # A plan costs far more than a distance, so no plan is made for what is farther away.
        if distance > best[0]:
            continue
        plan = plan_with({**base, **changes})
        if any(problem.stage in stages for problem in plan.problems):
            continue
        # Among equally near settings the faster ones win.
        seconds = sum(plan.times[stage].seconds for stage in stages)
        if (distance, seconds) < best:
            nearest = changes
            best = (distance, seconds)
    return nearest


def _one_rank() -> dict[str, Any]:
    """Return a layout that divides every model."""
    sizes = ("ranks", "nodes", "tensor", "pipeline", "context", "expert", "expert_tensor")
    return {f"parallel.{size}": 1 for size in sizes}


def _server_settings(
    config: Config, models: Mapping[str, PlannedModel], node: Node
) -> Iterator[dict[str, Any]]:
    """Yield settings of servers: tensor ranks that divide the heads, and shares of the memory."""
    # All stages that sample or score use the same settings, so they are searched once.
    settings = config.sglang
    sizes = [
        size
        for size in _powers_of_two(node.num_gpus)
        if all(model.arch.num_heads % size == 0 for model in models.values())
    ]
    # Nearest first, because what is farther than a find is skipped.
    fractions = sorted(
        {settings.mem_fraction, *MEM_FRACTIONS},
        key=lambda share: abs(share - settings.mem_fraction),
    )
    for tensor, fraction in itertools.product(sizes, fractions):
        is_as_configured = tensor == settings.tensor
        # SGLang's expert ranks are among its tensor ranks.
        if settings.expert > 1 and not is_as_configured and tensor % settings.expert:
            continue
        replicas = node.num_gpus // tensor
        if is_as_configured and settings.replicas * tensor <= node.num_gpus:
            replicas = settings.replicas
        yield {
            "sglang.tensor": tensor,
            "sglang.replicas": replicas,
            # Data ranks were chosen for the configured tensor ranks. Otherwise replicas fill the
            # node.
            "sglang.data": settings.data if is_as_configured else 1,
            "sglang.mem_fraction": fraction,
        }


def _training_settings(
    config: Config,
    models: Mapping[str, PlannedModel],
    node: Node,
    name: str,
    *,
    is_live: bool,
) -> Iterator[dict[str, Any]]:
    """Yield settings of a training: layouts, with and without recompute and offload.

    Args:
        config: The configuration to start from.
        models: The models by role.
        node: The machine.
        name: The training.
        is_live: Whether servers run beside it. Then smaller servers are tried too, and none at
            all if they only evaluate.
    """
    section = getattr(config, name)
    tables = _megatron_tables(section)
    servers = _live_server_settings(config) if is_live else [{}]
    ranks = node.num_gpus * section.parallel.nodes
    # Each layout is tried with every way to save memory, and the distance decides.
    for layout in _layouts(models["student"].arch, section.parallel, ranks):
        keys = {f"{name}.parallel.{key}": value for key, value in layout.items()}
        for recompute, table, server in itertools.product(_recomputes(section), tables, servers):
            yield {**keys, f"{name}.recompute": recompute, f"{name}.megatron": table, **server}


def _layouts(
    student: Architecture, parallel: ParallelSection, ranks: int
) -> Iterator[dict[str, int]]:
    """Yield the layouts of a number of ranks that divide the student."""
    # Other sizes hardly ever divide heads, layers and experts.
    sizes = _powers_of_two(ranks)
    # Context ranks that are asked for may stay. None are proposed, because they have never run on
    # a GPU.
    contexts = sorted({1, parallel.context})
    expert_sizes = sizes if student.num_experts else [1]
    for tensor, pipeline, context, expert, expert_tensor in itertools.product(
        sizes, sizes, contexts, expert_sizes, expert_sizes
    ):
        layout = {
            "ranks": ranks,
            "tensor": tensor,
            "pipeline": pipeline,
            "context": context,
            "expert": expert,
            "expert_tensor": expert_tensor,
        }
        # What does not fit is left out before a section is made, which is slower.
        # Data ranks are what these sizes leave. There must be at least one.
        if tensor * pipeline * context > ranks or expert * expert_tensor * pipeline > ranks:
            continue
        if not any(layout_problems(student, parallel.model_copy(update=layout))):
            yield layout


def _recomputes(section: TrainSection) -> list[str]:
    # A dict keeps the order: the configured value first, and none twice.
    return list(dict.fromkeys([section.recompute, "none", "selective", "full"]))


def _megatron_tables(section: TrainSection) -> list[dict[str, Any]]:
    # The other fields of the table stay as the user has set them.
    own = dict(section.megatron)
    # A user who offloads has chosen the fraction, and keeps it.
    return [own] if own.get("optimizer_cpu_offload") else [own, {**own, **OFFLOAD}]


def _live_server_settings(config: Config) -> list[dict[str, Any]]:
    """Return shares of the GPUs' memory for servers beside a trainer, or no evaluation."""
    # The configured share comes first, because it has distance 0.
    smaller: list[dict[str, Any]] = [
        {"sglang.mem_fraction": fraction}
        for fraction in (config.sglang.mem_fraction, *LIVE_FRACTIONS)
    ]
    return [*smaller, {"distill.sync_every": 0}] if config.evaluates_at_syncs else smaller


def _powers_of_two(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]


def _distance(key: str, new: Any, old: Any) -> float:
    """Return how much a change costs the user.

    The unit is one doubling of a layout's size. The weights are choices, not measurements.
    """
    if new == old:
        return 0.0
    # A step of 0.2 costs as much as a doubling.
    if key.endswith("mem_fraction"):
        return abs(float(new) - float(old)) * 5
    # Recompute costs time, and no feature.
    if key.endswith("recompute"):
        return 1.0
    # Offload needs much host memory, and its speed depends on the machine's CPUs.
    if key.endswith("megatron"):
        return 3.0
    # Without syncs the run has no learning curve.
    if key.endswith("sync_every"):
        return 2.0
    doublings: float = abs(math.log2(new / old))
    # Pipelines have bubbles, which a plan does not count.
    return doublings * (2.0 if key.endswith("pipeline") else 1.0)


def _value_at(config: Config, key: str) -> Any:
    # A dotted key names sections from the outside to the inside.
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _toml(value: Any) -> str:
    """Return a value as an override takes it: a table in one line, a word without quotes."""
    # json.dumps writes text, numbers, true and false as TOML does.
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{key} = {json.dumps(inner)}" for key, inner in value.items())
        return "{ " + pairs + " }"
    return value if isinstance(value, str) else json.dumps(value)


def changed(config: Config, changes: Changes) -> Config:
    """Return a configuration with some dotted keys set to new values."""
    for key, value in changes.items():
        config = _set(config, key.split("."), value)
    return config


def _set(section: Any, path: list[str], value: Any) -> Any:
    assert isinstance(section, BaseModel)
    # Sections are frozen, so every section on the way to the key is copied.
    inner = value if len(path) == 1 else _set(getattr(section, path[0]), path[1:], value)
    return section.model_copy(update={path[0]: inner})
