"""What is trained and how: layouts of ranks, the loss, and fields of Megatron-Core.

The ranks of the scorer are checked here too.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from functools import partial

from lopd.cache import columns as columns_of_cache
from lopd.cache.reader import CacheReader
from lopd.checks.findings import Finding, architecture_of, attempt, devices_for
from lopd.config import Config, ForwardSection, ParallelSection, TrainSection
from lopd.errors import ConfigError
from lopd.megatron.weights.architecture import Architecture, layout_problems, scorer_problems


def layouts(config: Config) -> Iterator[Finding]:
    """Check that layouts divide the student, and that this machine can start their ranks."""
    architecture = architecture_of(config, "student")
    for name, section in (("sft", config.sft), ("distill", config.distill)):
        parallel = section.parallel
        problems: list[ConfigError] = []
        if architecture is not None:
            problems += layout_problems(architecture, parallel, where=f"{name}.parallel")
        problems += _rank_problems(name, section, _longest(config, name), devices_for(config))
        yield from problems
        # One line for each training, so that a user sees which layouts were looked at.
        if not problems:
            yield (
                f"{name}: {parallel.ranks} ranks (tensor {parallel.tensor}, "
                f"pipeline {parallel.pipeline}, expert {parallel.expert})"
            )


def microbatch_problems(config: Config, *, without: Collection[str] = ()) -> Iterator[ConfigError]:
    """Yield microbatches that do not hold one sequence. They are wrong on any machine.

    Args:
        config: The configuration.
        without: Stages that this run does not make.
    """
    for name, section in (("sft", config.sft), ("distill", config.distill)):
        if name not in without:
            yield from _microbatch_problems(name, section, _longest(config, name))
    # A refresh scores too, even if the score stage's result is given.
    scores = "score" not in without or config.distill.refresh.is_on
    if config.score.engine == "megatron" and scores:
        yield from _microbatch_problems(
            "score.forward", config.score.forward, config.sglang.context_length
        )


def batch_problem(config: Config, training: str, num_responses: int) -> Iterator[ConfigError]:
    """Yield a step that is larger than all responses of its training.

    Args:
        config: The configuration.
        training: "sft" or "distill".
        num_responses: The number of responses that the training learns from.
    """
    batch_size = getattr(config, training).batch_size
    if batch_size > num_responses:
        yield ConfigError(
            f"{training}.batch_size = {batch_size} is more than the {num_responses} responses, "
            "and a step uses each response at most once",
            where=training,
            limit=f"<= {num_responses}",
            remedy=f"lower {training}.batch_size, or use more prompts",
        )


def batch_problems(config: Config, *, without: Collection[str] = ()) -> Iterator[ConfigError]:
    """Yield steps that are too large by the configuration alone, without reading any file.

    Args:
        config: The configuration.
        without: Stages that this run does not make. Their responses are counted elsewhere.
    """
    trainings = (
        ("sft", "demonstrate", config.prompts.sft),
        ("distill", "rollout", config.prompts.opd),
    )
    for training, sampled, chosen in trainings:
        if sampled not in without and chosen.num_prompts is not None:
            # Only where the configuration gives the number: the rows of a file are counted by
            # another check.
            samples = getattr(config, sampled).samples_per_prompt
            yield from batch_problem(config, training, chosen.num_prompts * samples)


def _longest(config: Config, training: str) -> int:
    """Return the most tokens that a sequence of a training can have."""
    context = config.sglang.context_length
    # Demonstrations may come from elsewhere, so nothing but the context limits them.
    prompt = config.prompts.opd.max_prompt_tokens if training == "distill" else None
    return context if prompt is None else min(context, prompt + config.rollout.max_new_tokens)


def scorer(config: Config) -> Iterator[Finding]:
    """Check that the scoring engine gives what is asked, and that its layout fits the teacher."""
    teacher = architecture_of(config, "teacher")
    # Such as a top-K that the engine does not give, or heads that do not divide.
    problems: list[Finding] = [*scorer_problems(config.score, teacher)]
    if config.score.engine == "megatron":
        problems += _rank_problems(
            "score.forward",
            config.score.forward,
            config.sglang.context_length,
            devices_for(config),
        )
    yield from problems or [config.score.engine]


def _rank_problems(
    name: str,
    section: TrainSection | ForwardSection,
    longest: int,
    machine: tuple[int, str],
) -> Iterator[ConfigError]:
    """Yield why ranks cannot be started on this machine.

    Args:
        name: The key of the section.
        section: The settings of the ranks.
        longest: The most tokens of a sequence.
        machine: The number of devices of one machine, and what they are.
    """
    # Each rank has a GPU of its own, or a core.
    per_machine, unit = machine
    parallel = section.parallel
    # Context ranks need Transformer Engine's attention, so they are asked about first.
    yield from _context_problems(parallel, section.dtype, where=f"{name}.parallel")
    # All machines are taken to be like this one.
    limit = per_machine * parallel.nodes
    if parallel.ranks > limit:
        nodes = f" on {parallel.nodes} nodes" if parallel.nodes > 1 else ""
        yield ConfigError(
            f"{name}.parallel.ranks = {parallel.ranks}{nodes} is too large",
            where="this machine",
            limit=f"at most {per_machine} {unit}",
            remedy=f"set {name}.parallel.ranks={limit} or fewer",
        )
    yield from _microbatch_problems(name, section, longest)


def _microbatch_problems(
    name: str, section: TrainSection | ForwardSection, longest: int
) -> Iterator[ConfigError]:
    # Packing never cuts a sequence, so the longest one must fit into a microbatch.
    if section.max_tokens_per_microbatch < longest:
        yield ConfigError(
            f"{name}.max_tokens_per_microbatch = {section.max_tokens_per_microbatch} is too small",
            where="sglang.context_length",
            limit=f"at least one full sequence: {longest} tokens",
            remedy=f"raise {name}.max_tokens_per_microbatch or lower sglang.context_length",
        )


def objective(config: Config) -> Iterator[Finding]:
    """Check that the parts of the loss go together, and that their inputs will be there."""
    from lopd.objective import RefreshRule, objective_from_config
    from lopd.objective.registry import AVAILABLE, BASE, TOP_K, VERDICTS

    has_top_k = config.score.top_k > 0
    has_base = config.models.teacher_base is not None
    missing: set[str] = set()
    if config.distill.cache is not None:
        # Of a given cache the columns decide, not the knobs of the score stage.
        columns = CacheReader(config.distill.cache).columns
        has_top_k = "teacher_top_ids" in columns
        has_base = columns_of_cache.BASE in columns
        # A cache that was imported may lack the log-probabilities that it was sampled with.
        missing = {"sampling_logprobs"} - columns
    available = (AVAILABLE | TOP_K if has_top_k else AVAILABLE) - missing
    if has_base:
        available |= BASE
    if config.distill.verdicts is not None:
        available |= VERDICTS
    # Building the objective is the check: it refuses parts that do not go together.
    yield str(objective_from_config(config.distill, available))
    # With another distribution than the student's own, the weights are not those of the theory.
    is_tempered = config.rollout.temperature != 1 or config.rollout.top_p != 1
    if config.distill.objective.importance_cap is not None and is_tempered:
        yield (
            "importance weights undo the student's drift, not the rollouts' temperature "
            f"{config.rollout.temperature} or top_p {config.rollout.top_p}"
        )
    yield str(RefreshRule.from_config(config.distill))


def megatron(config: Config) -> Iterator[Finding]:
    """Check the fields of Megatron-Core that stand in a [*.megatron] table.

    They must exist, have their type, and not belong to a knob. Megatron-Core must take them
    together with the rest.
    """
    architecture = architecture_of(config, "student")
    # evaluate trains with the table of sft.
    sections = {"sft": config.sft, "distill": config.distill}
    tables = {name: section for name, section in sections.items() if section.megatron}
    for name, section in tables.items():
        # While it is imported, Megatron-Core warns at length of packages that are not installed.
        with warnings.catch_warnings(action="ignore"):
            # An error of one table must not hide those of the other one.
            yield attempt(partial(_megatron_fields, f"{name}.megatron", section, architecture))
    if not tables:
        yield "no fields beside the knobs"


def _megatron_fields(where: str, section: TrainSection, architecture: Architecture | None) -> str:
    """Build Megatron-Core's three records of settings, as the trainer does."""
    from lopd.megatron.model import overrides
    from lopd.megatron.model.transformer_config import DTYPES, transformer_config
    from lopd.megatron.training.optimizer import optimizer_config
    from lopd.megatron.training.wrapping import ddp_config

    # This alone finds unknown fields and wrong types. What follows finds combinations.
    fields = overrides.read_overrides(section.megatron, where=where)
    distributed = section.parallel.distributed_optimizer
    try:
        # Without the student's shape there is no transformer to configure. Its check says why.
        if architecture is not None:
            transformer_config(
                architecture,
                parallel=section.parallel,
                dtype=section.dtype,
                recompute=section.recompute,
                moe_aux_loss=section.moe_aux_loss,
                overrides=fields.transformer,
            )
        optimizer_config(
            section.optimizer,
            dtype=DTYPES[section.dtype],
            distributed=distributed,
            overrides=fields.optimizer,
        )
        # The order is that of the trainer, so the first error here is the one it would meet.
        ddp_config(distributed, fields.distributed)
    except ConfigError as error:
        # Megatron-Core's own refusals do not know from which table a field came.
        raise ConfigError(error.what, where=where, limit=error.limit, remedy=error.remedy) from None
    return f"{where}: {', '.join(section.megatron)}"


def _context_problems(
    parallel: ParallelSection, dtype: str, *, where: str
) -> Iterator[ConfigError]:
    """Yield why there is no attention across context ranks on this machine, or in this dtype."""
    if parallel.context == 1:
        return
    # Only this question needs Megatron-Core, which takes seconds to import and warns at length.
    with warnings.catch_warnings(action="ignore"):
        from lopd.megatron.model import engine
    yield from engine.context_problems(parallel, dtype, where=where)
