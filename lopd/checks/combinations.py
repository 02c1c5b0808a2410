"""Knobs of the servers' side that do not go together.

These are limits that are never reached, syncs without a server, and refreshes that could not be
made. They follow from the configuration alone, on any machine. Without these checks each would be
noticed after hours, or never.
"""

from __future__ import annotations

from collections.abc import Iterator

from lopd.checks.findings import Finding
from lopd.config import Config
from lopd.errors import ConfigError
from lopd.tasks.environments import load_environment
from sglang_rollout.servers.shared_gpus import colocation_problems

# Fields of Megatron-Core's DistributedDataParallelConfig with buffers that torch does not allocate.
# lopd cannot give such memory back to a server and take it again.
_SHARED_BUFFERS = ("nccl_ub", "use_megatron_fsdp")


def serves_beside(config: Config) -> bool:
    """Return whether the student's servers live while distill trains."""
    return config.evaluates_at_syncs or config.distill.refresh.is_on


def sampling(config: Config) -> Iterator[Finding]:
    """Check that responses can reach their limits, and that a server can sample as it is asked."""
    problems: list[Finding] = [*sampling_problems(config)]
    yield from problems or ["responses may reach their limits"]
    environment = config.rollout.environment
    if environment is not None:
        # A function that cannot be loaded would be noticed only when the rollouts begin.
        load_environment(environment)
        yield f"{environment.name} replies between turns, at most {config.rollout.max_turns} turns"


def sampling_problems(config: Config) -> Iterator[ConfigError]:
    """Yield sampling settings that have no effect, or that a server refuses."""
    is_sampled = {
        "demonstrate": config.sft.demonstrations is None and config.sft.checkpoint is None,
        "rollout": (config.distill.cache is None and config.rollout.responses is None)
        or config.distill.refresh.is_on,
        "evaluate": config.evaluate.enabled,
    }
    for stage, is_made in is_sampled.items():
        if is_made:
            yield from _stage_sampling_problems(config, stage)
    yield from _turn_problems(config)
    # The queue is the same for all stages, so it is looked at once.
    yield from _queue_problems(config)


def _turn_problems(config: Config) -> Iterator[ConfigError]:
    """Yield knobs of responses of several turns that have no effect, or cannot be used."""
    rollout = config.rollout
    if rollout.responses is None and rollout.allow_foreign_responses:
        yield ConfigError(
            "rollout.allow_foreign_responses has no effect without rollout.responses",
            where="rollout",
            remedy="set rollout.responses, or remove rollout.allow_foreign_responses",
        )
    for key, is_used in (
        ("models.teachers", config.models.teachers),
        ('score.tokenizer = "aligned"', config.aligns_tokenizers),
        ("distill.cache", config.distill.cache is not None),
    ):
        # Nobody knows the domains of such responses, and a given cache has rollouts of its own.
        if rollout.responses is not None and is_used:
            yield ConfigError(
                f"rollout.responses and {key} cannot be used together",
                where="rollout.responses",
                remedy=f"remove rollout.responses or {key}",
            )
    if rollout.environment is None:
        for knob in ("max_turns", "environment_timeout_s"):
            if knob in rollout.model_fields_set:
                yield ConfigError(
                    f"rollout.{knob} has no effect without rollout.environment",
                    where="rollout",
                    remedy=f"set rollout.environment, or remove rollout.{knob}",
                )
    elif config.aligns_tokenizers:
        # Chunks of text would be counted as scored that no model wrote.
        yield ConfigError(
            'rollout.environment and score.tokenizer = "aligned" cannot be used together',
            where="rollout.environment",
            limit="a teacher with the student's tokenizer",
            remedy="remove rollout.environment, or choose a teacher with the student's tokenizer",
        )


def _stage_sampling_problems(config: Config, stage: str) -> Iterator[ConfigError]:
    section = getattr(config, stage)
    length = config.sglang.context_length
    # Only a limit that the user has set is judged. The default is no wish for so many tokens, and
    # a limit equal to the context is the usual way to ask for as many as there is room for.
    is_set = "max_new_tokens" in section.model_fields_set
    if is_set and section.max_new_tokens > length:
        yield ConfigError(
            f"{stage}.max_new_tokens = {section.max_new_tokens} is too large",
            where=stage,
            limit=f"at most sglang.context_length = {length}",
            remedy=f"lower {stage}.max_new_tokens, or raise sglang.context_length",
        )
    # Deterministic sampling derives each token from the seed of its request.
    if section.min_p > 0 and config.sglang.deterministic:
        yield ConfigError(
            f"{stage}.min_p = {section.min_p} cannot be used with sglang.deterministic: "
            "SGLang's seeded sampling has no min_p",
            where="sglang.deterministic",
            limit="exactly 0",
            remedy=f"set {stage}.min_p=0 or sglang.deterministic=false",
        )


def _queue_problems(config: Config) -> Iterator[ConfigError]:
    """Yield a queue that is too short for the requests that lopd keeps in flight."""
    settings = config.sglang
    # SGLang's own default is a queue without an end.
    queue = settings.extra_args.get("max_queued_requests")
    if not isinstance(queue, int):
        return
    # A server holds what it runs and what it queues. It refuses the next request.
    held = queue + settings.max_running_requests
    if held < settings.max_in_flight:
        yield ConfigError(
            f"sglang.extra_args.max_queued_requests = {queue} is too small: the server "
            f"would refuse requests beyond {held}",
            where="sglang.max_in_flight",
            limit=f"at least sglang.max_in_flight = {settings.max_in_flight}",
            remedy="lower sglang.max_in_flight, or remove max_queued_requests",
        )


def sync(config: Config, *, on_gpu: bool | None) -> Iterator[Finding]:
    """Check that weights can go into the servers as [sync] says.

    Args:
        config: The configuration.
        on_gpu: Whether this machine has GPUs. None means that the run will be on another machine,
            which has GPUs.
    """
    problems = [*sync_problems(config, on_gpu=on_gpu)]
    yield from problems
    if problems:
        return
    if serves_beside(config):
        yield f"by {config.sync.transport}"
    else:
        yield "no server lives beside the training: [sync] has no effect"


def sync_problems(config: Config, *, on_gpu: bool | None) -> Iterator[ConfigError]:
    """Yield settings of [sync] that do not go together with the others.

    Args:
        config: The configuration.
        on_gpu: Whether the servers run on GPUs, as in sync().
    """
    settings = config.sync
    no_colocation = "set sync.colocate=false"
    # Taking turns without a server would cost time in every step and save nothing.
    if settings.colocate and not serves_beside(config):
        yield ConfigError(
            "sync.colocate = true has no effect: no server runs during the training",
            where="sync.colocate",
            limit="distill.sync_every above 0 with evaluate.enabled, or a refresh of the rollouts",
            remedy=f"{no_colocation}, or set distill.sync_every",
        )
    yield from colocation_problems(config, on_gpu=on_gpu)
    for name in _SHARED_BUFFERS:
        # Such buffers are registered with NCCL or owned by Megatron-FSDP.
        if settings.colocate and config.distill.megatron.get(name):
            yield ConfigError(
                f"distill.megatron.{name} cannot be used with sync.colocate: only memory "
                "that torch allocates can be given back and taken again",
                where="distill.megatron",
                remedy=f"remove {name}, or {no_colocation}",
            )
    # gloo, which replaces NCCL on a CPU, has no such limit.
    on_own_gpus = bool(config.sglang.student_urls)
    is_broadcast = settings.transport == "distributed" and serves_beside(config)
    if is_broadcast and on_gpu is not False and not on_own_gpus:
        yield ConfigError(
            "NCCL does not broadcast between two processes of one GPU, and servers that lopd "
            "starts use the trainer's GPUs from the first on",
            where='sync.transport = "distributed"',
            limit="only with servers of sglang.student_urls that have their own GPUs",
            remedy='set sync.transport = "tensor" or "disk"',
        )


def refresh(config: Config) -> Iterator[Finding]:
    """Check that refreshes can be made, and that no knob of them is without effect."""
    problems: list[Finding] = [*refresh_problems(config)]
    yield from problems or [
        "as distill.refresh sets it" if config.distill.refresh.is_on else "none"
    ]


def refresh_problems(config: Config) -> Iterator[ConfigError]:
    """Yield settings that do not go together with distill.refresh."""
    if not config.distill.refresh.is_on:
        yield from _useless_knobs(config)
        return
    yield from _amount_problems(config)
    yield from _source_problems(config)
    yield from _port_problems(config)


def _useless_knobs(config: Config) -> Iterator[ConfigError]:
    """Yield knobs of a refresh that are set although none is made."""
    settings = config.distill.refresh
    # The knob says what becomes of the teacher's server between refreshes. Without refreshes it
    # has no meaning, and the user may have meant to turn them on.
    if settings.keep_teacher:
        yield ConfigError(
            "refresh.keep_teacher has no effect without a refresh: no teacher is needed",
            where="distill.refresh",
            remedy="set refresh.every, or set a bound of the drift, or remove refresh.keep_teacher",
        )
    if settings.horizons:
        yield ConfigError(
            "refresh.horizons has no effect without a refresh",
            where="distill.refresh",
            remedy="set refresh.every, or a bound of the drift, or remove refresh.horizons",
        )


def _amount_problems(config: Config) -> Iterator[ConfigError]:
    """Yield lengths and numbers of fresh responses that a training cannot use."""
    settings = config.distill.refresh
    # A longer one would not fit into the microbatches, which are made for rollout.max_new_tokens.
    longest = config.rollout.max_new_tokens
    wrong = [tokens for tokens in settings.horizons if not 1 <= tokens <= longest]
    if wrong:
        yield ConfigError(
            f"refresh.horizons has {wrong[0]}",
            where="distill.refresh",
            limit=f"at least 1 and at most rollout.max_new_tokens = {longest}",
            remedy="correct distill.refresh.horizons, or raise rollout.max_new_tokens",
        )
    wanted = settings.num_responses
    # Its steps would learn from the same response several times at once.
    if wanted is not None and wanted < config.distill.batch_size:
        yield ConfigError(
            f"refresh.num_responses = {wanted} is less than a step learns from",
            where="distill.refresh",
            limit=f">= distill.batch_size = {config.distill.batch_size}",
            remedy="raise distill.refresh.num_responses, or lower distill.batch_size",
        )


def _source_problems(config: Config) -> Iterator[ConfigError]:
    """Yield caches and teachers to which no fresh rollouts can be added."""
    # A refresh adds to the rollouts of the run, and a given cache is not the run's.
    if config.distill.cache is not None:
        yield ConfigError(
            "distill.refresh and distill.cache cannot be used together: fresh rollouts "
            "are added to those of the score stage",
            where="distill",
            remedy="remove distill.refresh or distill.cache",
        )
    # A refresh scores once, by the teacher.
    if config.models.teacher_base is not None:
        yield ConfigError(
            "distill.refresh and models.teacher_base cannot be used together: a refresh is scored "
            "by the teacher alone",
            where="distill.refresh",
            remedy="set distill.refresh.every = 0, or remove models.teacher_base",
        )
    # The teachers of domains score one after the other, so none of them can run on.
    if config.models.teachers and config.distill.refresh.keep_teacher:
        yield ConfigError(
            "refresh.keep_teacher and models.teachers cannot be used together: each teacher is "
            "started for its own part of a refresh",
            where="distill.refresh",
            limit="exactly one teacher, whose server can run on",
            remedy="remove refresh.keep_teacher",
        )


def _port_problems(config: Config) -> Iterator[ConfigError]:
    """Yield a port that two servers would need at the same time."""
    # A refresh starts the teacher's server while the student's still lives. Both would want the one
    # port.
    starts_both = (
        config.score.engine == "sglang"
        and not config.sglang.teacher_urls
        and not config.sglang.student_urls
    )
    # Megatron-Core as scorer, or servers of the user, need no port here.
    if config.sglang.port is not None and starts_both:
        yield ConfigError(
            f"sglang.port = {config.sglang.port} with distill.refresh: "
            "the student's server already uses it when the teacher's server starts",
            where="sglang.port",
            limit="exactly one server on a port",
            remedy="remove sglang.port: lopd then uses free ports",
        )
