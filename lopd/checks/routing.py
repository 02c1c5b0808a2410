"""Routed experts in the rollouts, and their replay in the training."""

from __future__ import annotations

from collections.abc import Iterator

from lopd.cache.columns import ROUTED_EXPERTS
from lopd.cache.reader import CacheReader
from lopd.checks.findings import Finding, architecture_of
from lopd.config import Config
from lopd.errors import ConfigError
from lopd.megatron.weights.architecture import Architecture, router_problems


def routing(config: Config) -> Iterator[Finding]:
    """Check that the student's routers can be recorded and replayed as the configuration asks."""
    problems: list[Finding] = [*routing_problems(config, architecture_of(config, "student"))]
    problems += _cache_problems(config)
    yield from problems
    if not problems:
        kept = "kept" if config.rollout.routed_experts else "not kept"
        replayed = "replayed" if config.distill.routing_replay else "not replayed"
        yield f"the sampler's experts are {kept}, and {replayed}"


def _cache_problems(config: Config) -> Iterator[ConfigError]:
    cache = config.distill.cache
    if cache is None or not config.distill.routing_replay:
        return
    # Of a given cache the columns decide, not the knobs of the rollout stage.
    if ROUTED_EXPERTS not in CacheReader(cache).columns:
        yield ConfigError(
            f"distill.routing_replay = true, but the cache has no column {ROUTED_EXPERTS}",
            where=str(cache),
            limit="a cache of rollouts that were made with rollout.routed_experts = true",
            remedy="give such a cache, or set distill.routing_replay = false",
        )


def routing_problems(config: Config, student: Architecture | None) -> Iterator[ConfigError]:
    """Yield settings of routed experts that do not go together, on any machine.

    Args:
        config: The configuration.
        student: The shape of the student. None: it is not known, and its experts are not checked.
    """
    distill = config.distill
    asked = {
        "rollout.routed_experts": config.rollout.routed_experts,
        "distill.routing_replay": distill.routing_replay,
    }
    for where, is_on in asked.items():
        if is_on and student is not None:
            yield from router_problems(student, where=where)
    if not distill.routing_replay:
        return
    if distill.cache is None and not config.rollout.routed_experts:
        yield ConfigError(
            "distill.routing_replay = true, but the rollouts do not keep the experts",
            where="distill.routing_replay",
            limit="only with rollout.routed_experts = true",
            remedy="set rollout.routed_experts = true, or remove distill.routing_replay",
        )
    # The stages of a pipeline go on to the next microbatch before the backward pass of this one. A
    # router that the backward pass runs again would replay the choice of another microbatch.
    if distill.parallel.pipeline > 1 and distill.recompute != "none":
        yield ConfigError(
            f"distill.routing_replay and distill.recompute = {distill.recompute!r} cannot be used "
            "together with several pipeline stages",
            where="distill.recompute",
            limit="exactly 'none' with distill.parallel.pipeline above 1",
            remedy="set distill.recompute = 'none', or distill.parallel.pipeline = 1",
        )
    if distill.megatron.get("moe_router_fusion"):
        yield ConfigError(
            "distill.routing_replay and moe_router_fusion cannot be used together: the fused "
            "router chooses by itself",
            where="distill.megatron",
            remedy="remove moe_router_fusion, or distill.routing_replay",
        )
