"""What is trained and how: layouts of ranks, the scorer's too, the loss, Megatron-Core's own
fields.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

from lopd.cache.reader import CacheReader
from lopd.checks.findings import Finding, architecture_of, attempt, devices_for
from lopd.config import Config, ForwardSection, ParallelSection, TrainSection
from lopd.errors import ConfigError
from lopd.megatron.weights.architecture import Architecture, layout_problems, scorer_problems


def layouts(config: Config) -> Iterator[Finding]:
    """The student divides by the layout of sft and of distill, and the machine can start their
    ranks.
    """
    architecture = architecture_of(config, "student")
    for name, section in (("sft", config.sft), ("distill", config.distill)):
        problems = (
            []
            if architecture is None
            else [*layout_problems(architecture, section.parallel, where=f"{name}.parallel")]
        )
        problems += _oversized(name, section, _longest(config, name), devices_for(config))
        yield from problems
        if not problems:
            parallel = section.parallel
            yield f"{name}: {parallel.ranks} ranks (tensor {parallel.tensor}, pipeline {parallel.pipeline}, expert {parallel.expert})"


def microbatch_problems(config: Config, *, without: Collection[str] = ()) -> Iterator[ConfigError]:
    """Microbatches that do not hold one sequence, on any machine. without: stages that are not
    made.
    """
    for name, section in (("sft", config.sft), ("distill", config.distill)):
        if name not in without:
            yield from _too_short(name, section, _longest(config, name))
    if config.score.engine == "megatron" and (
        "score" not in without or config.distill.refresh.is_on
    ):
        yield from _too_short("score.forward", config.score.forward, config.sglang.context_length)


def _longest(config: Config, training: str) -> int:
    """Tokens that a sequence of a training may have: the context's; of distill fewer, where
    prompts.opd bounds its prompts.
    """
    prompt = config.prompts.opd.max_prompt_tokens if training == "distill" else None
    return (
        config.sglang.context_length
        if prompt is None
        else min(config.sglang.context_length, prompt + config.rollout.max_new_tokens)
    )


def scorer(config: Config) -> Iterator[Finding]:
    """The chosen engine gives what is asked of it, and the teacher divides by the layout of its
    ranks.
    """
    engine, forward = config.score.engine, config.score.forward
    problems: list[Finding] = [*scorer_problems(config.score, architecture_of(config, "teacher"))]
    if engine == "megatron":
        problems += _oversized(
            "score.forward", forward, config.sglang.context_length, devices_for(config)
        )
    yield from problems or [engine]


def _oversized(
    name: str,
    section: TrainSection | ForwardSection,
    context_length: int,
    machine: tuple[int, str],
) -> Iterator[ConfigError]:
    most, unit = machine
    yield from _context_problems(section.parallel, section.dtype, where=f"{name}.parallel")
    if section.parallel.ranks > most * section.parallel.nodes:
        what = f"{name}.parallel.ranks = {section.parallel.ranks}" + (
            f" on {section.parallel.nodes} nodes" if section.parallel.nodes > 1 else ""
        )
        remedy = f"set {name}.parallel.ranks={most * section.parallel.nodes} or fewer"
        yield ConfigError(what, where="this machine", limit=f"{most} {unit}", remedy=remedy)
    yield from _too_short(name, section, context_length)


def _too_short(
    name: str, section: TrainSection | ForwardSection, context_length: int
) -> Iterator[ConfigError]:
    if section.max_tokens_per_microbatch < context_length:
        what, limit = (
            f"{name}.max_tokens_per_microbatch = {section.max_tokens_per_microbatch}",
            f"at least one full sequence: {context_length}",
        )
        remedy = f"raise {name}.max_tokens_per_microbatch or lower sglang.context_length"
        yield ConfigError(what, where="sglang.context_length", limit=limit, remedy=remedy)


def objective(config: Config) -> Iterator[Finding]:
    """The pieces of the loss go together, and the cache and the trainer give what they need."""
    from lopd.objective import RefreshRule, objective_from_config
    from lopd.objective.registry import AVAILABLE, TOP_K

    available = AVAILABLE | TOP_K if config.score.top_k else AVAILABLE
    if config.distill.cache is not None:
        columns = CacheReader(config.distill.cache).columns
        available = (AVAILABLE | TOP_K if "teacher_top_ids" in columns else AVAILABLE) - (
            {"sampling_logprobs"} - columns
        )
    yield str(objective_from_config(config.distill, available))
    tempered = config.rollout.temperature != 1 or config.rollout.top_p != 1
    if config.distill.objective.importance_cap is not None and tempered:
        yield f"importance weights undo the student's drift, not the rollouts' temperature {config.rollout.temperature} or top_p {config.rollout.top_p}"
    yield str(RefreshRule.from_config(config.distill))


def megatron(config: Config) -> Iterator[Finding]:
    """Fields beside the knobs exist in Megatron-Core, have their type, are nobody else's, and
    Megatron-Core takes them together with the rest.
    """
    tables = {
        name: section
        for name, section in (("sft", config.sft), ("distill", config.distill))
        if section.megatron
    }
    for name, section in tables.items():
        with warnings.catch_warnings(
            action="ignore"
        ):  # importing Megatron-Core tells at length of what is not installed
            yield attempt(
                partial(
                    _megatron_fields,
                    f"{name}.megatron",
                    section,
                    architecture_of(config, "student"),
                )
            )
    if not tables:
        yield "no fields beside the knobs"


def _megatron_fields(where: str, section: TrainSection, architecture: Architecture | None) -> str:
    from lopd.megatron.model import overrides
    from lopd.megatron.model.transformer_config import DTYPES, transformer_config
    from lopd.megatron.training.optimizer import optimizer_config
    from lopd.megatron.training.wrapping import ddp_config

    fields = overrides.read_overrides(section.megatron, where=where)
    distributed = section.parallel.distributed_optimizer
    try:
        if architecture is not None:
            about: Any = {
                "parallel": section.parallel,
                "dtype": section.dtype,
                "recompute": section.recompute,
                "moe_aux_loss": section.moe_aux_loss,
            }
            transformer_config(architecture, **about, overrides=fields.transformer)
        optimizer_config(
            section.optimizer,
            dtype=DTYPES[section.dtype],
            distributed=distributed,
            overrides=fields.optimizer,
        )
        ddp_config(distributed, fields.distributed)
    except ConfigError as error:
        raise ConfigError(error.what, where=where, limit=error.limit, remedy=error.remedy) from None
    return f"{where}: {', '.join(section.megatron)}"


def _context_problems(
    parallel: ParallelSection, dtype: str, *, where: str
) -> Iterator[ConfigError]:
    """Context ranks on a machine, or with a dtype, for which there is no attention across ranks.
    Only to answer that, Megatron-Core is imported.
    """
    if parallel.context > 1:
        with warnings.catch_warnings(
            action="ignore"
        ):  # it tells at length of what is not installed
            from lopd.megatron.model import engine
        yield from engine.context_problems(parallel, dtype, where=where)
