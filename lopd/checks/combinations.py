"""Knobs of the servers' side that do not go together: limits that are never reached, syncs without
a server, refreshes that could not be made.

Of the configuration alone, on any machine: each would otherwise be noticed after hours, or by
nobody.
"""

from __future__ import annotations

from collections.abc import Iterator

from lopd.checks.findings import Finding
from lopd.config import Config
from lopd.errors import ConfigError
from sglang_rollout.servers.shared_gpus import colocation_problems

_SHARED_BUFFERS = (
    "nccl_ub",
    "use_megatron_fsdp",
)  # fields of Megatron-Core's DistributedDataParallelConfig whose buffers are no storages of torch's own


def serves_beside(config: Config) -> bool:
    """Whether the student's servers live while distill trains."""
    return config.distill.sync_every > 0 or config.distill.refresh.is_on


def sampling(config: Config) -> Iterator[Finding]:
    """Limits of responses can be reached, and a server can sample as it is asked."""
    problems: list[Finding] = [*sampling_problems(config)]
    yield from problems or ["responses may reach their limits"]


def sampling_problems(config: Config) -> Iterator[ConfigError]:
    made = {
        "demonstrate": config.sft.demonstrations is None and config.sft.checkpoint is None,
        "rollout": config.distill.cache is None or config.distill.refresh.is_on,
        "evaluate": True,
    }
    length = config.sglang.context_length
    for name in (stage for stage, is_made in made.items() if is_made):
        section = getattr(config, name)
        # the default is no wish for so many, and a limit equal to the context is the usual way to
        # say: as far as it goes
        asked = "max_new_tokens" in section.model_fields_set
        if asked and section.max_new_tokens > length:
            what, limit = (
                f"{name}.max_new_tokens = {section.max_new_tokens}",
                f"sglang.context_length = {length}: no response is ever so long",
            )
            yield ConfigError(
                what,
                where=name,
                limit=limit,
                remedy=f"lower {name}.max_new_tokens, or raise sglang.context_length",
            )
        if section.min_p > 0 and config.sglang.deterministic:
            what = f"{name}.min_p = {section.min_p} with sglang.deterministic: SGLang's seeded sampling cannot do it"
            yield ConfigError(
                what,
                where="sglang.deterministic",
                limit="0",
                remedy=f"set {name}.min_p=0 or sglang.deterministic=false",
            )
    bounded = config.sglang.extra_args.get("max_queued_requests")
    if (
        isinstance(bounded, int)
        and bounded + config.sglang.max_running_requests < config.sglang.max_in_flight
    ):
        what = f"sglang.extra_args.max_queued_requests = {bounded}: the server would refuse what is over {bounded + config.sglang.max_running_requests}"
        limit = f"sglang.max_in_flight = {config.sglang.max_in_flight}"
        yield ConfigError(
            what,
            where="sglang.max_in_flight",
            limit=limit,
            remedy="lower sglang.max_in_flight, or leave max_queued_requests out",
        )


def sync(config: Config, *, on_gpu: bool | None) -> Iterator[Finding]:
    """Weights can go into the servers as [sync] says. on_gpu: of this machine; None: it will be
    another, with GPUs.
    """
    problems = [*sync_problems(config, on_gpu=on_gpu)]
    yield from problems
    if not problems:
        yield (
            f"by {config.sync.transport}"
            if serves_beside(config)
            else "no server lives beside the training: [sync] is of no use"
        )


def sync_problems(config: Config, *, on_gpu: bool | None) -> Iterator[ConfigError]:
    settings, away = config.sync, "set sync.colocate=false"
    if settings.colocate and not serves_beside(config):
        what, limit = (
            "sync.colocate = true, and no server lives beside the training",
            "distill.sync_every above 0, or a refresh",
        )
        yield ConfigError(
            what, where="sync.colocate", limit=limit, remedy=f"{away}, or set distill.sync_every"
        )
    yield from colocation_problems(config, on_gpu=on_gpu)
    for name in _SHARED_BUFFERS:
        if settings.colocate and config.distill.megatron.get(name):
            what, limit = (
                f"distill.megatron.{name} with sync.colocate",
                "buffers of torch's own: others cannot be given back and taken again",
            )
            yield ConfigError(
                what, where="distill.megatron", limit=limit, remedy=f"leave {name} out, or {away}"
            )
    if (
        settings.transport == "distributed"
        and on_gpu is not False
        and serves_beside(config)
        and not config.sglang.student_urls
    ):
        what = "NCCL does not broadcast between two processes of one GPU, and servers that lopd starts begin at the trainer's first"
        remedy = 'set sync.transport = "tensor" or "disk"'
        yield ConfigError(
            what,
            where='sync.transport = "distributed"',
            limit="servers of sglang.student_urls, on GPUs of their own",
            remedy=remedy,
        )


def refresh(config: Config) -> Iterator[Finding]:
    """Refreshes can be made, and what is said of them is not said for nothing."""
    problems: list[Finding] = [*refresh_problems(config)]
    yield from problems or ["as distill.refresh says" if config.distill.refresh.is_on else "none"]


def refresh_problems(config: Config) -> Iterator[ConfigError]:
    settings = config.distill.refresh
    if not settings.is_on:
        if settings.keep_teacher:
            remedy = "set refresh.every, or a bound of the drift, or leave keep_teacher out"
            yield ConfigError(
                "refresh.keep_teacher without a refresh",
                where="distill.refresh",
                limit="no teacher is needed",
                remedy=remedy,
            )
        return
    if config.distill.cache is not None:
        limit = "fresh rollouts join those of the score stage"
        yield ConfigError(
            "distill.refresh with distill.cache",
            where="distill",
            limit=limit,
            remedy="use one of the two",
        )
    if config.models.teachers:
        remedy = "set distill.refresh.every = 0, or distil domain after domain"
        yield ConfigError(
            "distill.refresh with models.teachers",
            where="distill.refresh",
            limit="fresh rollouts are scored by one teacher",
            remedy=remedy,
        )
    own_servers = (
        config.score.engine == "sglang"
        and not config.sglang.teacher_urls
        and not config.sglang.student_urls
    )
    if config.sglang.port is not None and own_servers:
        what = f"sglang.port = {config.sglang.port} with distill.refresh: the student's server has it when the teacher's is started"
        yield ConfigError(
            what,
            where="sglang.port",
            limit="one server a port",
            remedy="leave sglang.port out: free ones are taken",
        )
