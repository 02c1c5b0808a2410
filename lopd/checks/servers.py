"""What servers are started with, and what they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lopd import processes
from lopd.checks.findings import CORES, ROLES, Finding, architecture_of, devices
from lopd.config import Config
from lopd.errors import ConfigError, LopdError


def server(config: Config) -> Iterator[Finding]:
    """What a server is started with, and what it is asked for."""
    from sglang_rollout.arguments import check_settings
    from sglang_rollout.shared_gpus import colocation_problems

    settings = config.sglang
    problems: list[LopdError] = [*_server_sizes(config), *_unsupported_sampling(config), *colocation_problems(config, on_gpu=devices()[1] != CORES)]
    try:
        check_settings(settings, config.sync)
    except LopdError as error:
        problems.append(error)
    yield from problems
    if settings.port is not None and processes.port_taken(settings.port):
        remedy = "leave sglang.port out (a free one is taken) or end what listens there"
        yield ConfigError(f"sglang.port = {settings.port} is taken", where="127.0.0.1", remedy=remedy)
    elif not problems:
        yield f"port {settings.port} is free" if settings.port is not None else "takes a free port"


def _server_sizes(config: Config) -> Iterator[ConfigError]:
    settings = config.sglang
    limit, unit = devices()
    if settings.tensor * settings.data * settings.replicas > limit:
        several = [name for name in ("tensor", "data", "replicas") if getattr(settings, name) > 1]
        what = " x ".join(f"sglang.{name} = {getattr(settings, name)}" for name in several)
        left = limit // math.prod(getattr(settings, name) for name in several[:-1])  # for the last one; 0: the others are too many already
        remedy = f"set sglang.{several[-1] if left else several[0]}={left or limit} or fewer"
        yield ConfigError(what, where="this machine", limit=f"{limit} {unit}", remedy=remedy)
    if settings.expert > 1 and unit == CORES:
        what = f"sglang.expert = {settings.expert}: SGLang's plain-torch experts are not split"
        yield ConfigError(what, where="this machine", limit="1 without a GPU", remedy="set sglang.expert=1")
    for role in ROLES:
        architecture = architecture_of(config, role)
        if architecture is None:
            continue
        sizes = [(architecture.num_heads, settings.tensor, "number of attention heads", "sglang.tensor")]
        sizes += [(architecture.num_experts, settings.expert, "number of experts", "sglang.expert")] if settings.expert > 1 else []
        for number, divisor, what, key in sizes:
            if number == 0 or number % divisor:
                remedy = f"set {key} to a divisor of {number}" if number else f"set {key} to 1"
                yield ConfigError(f"{what} of the {role} ({number}) does not divide by {key} ({divisor})", where=key, remedy=remedy)
    if settings.max_total_tokens is not None and settings.max_total_tokens < settings.context_length:
        yield ConfigError(
            f"sglang.max_total_tokens = {settings.max_total_tokens}",
            where="sglang",
            limit=f"at least one full sequence: sglang.context_length = {settings.context_length}",
            remedy="raise sglang.max_total_tokens, or leave it out",
        )


def _unsupported_sampling(config: Config) -> Iterator[ConfigError]:
    for name in ("demonstrate", "rollout", "evaluate"):
        min_p = getattr(config, name).min_p
        if min_p > 0 and config.sglang.deterministic:
            what = f"{name}.min_p = {min_p} with sglang.deterministic: SGLang's seeded sampling cannot do it"
            yield ConfigError(what, where="sglang.deterministic", limit="0", remedy=f"set {name}.min_p=0 or sglang.deterministic=false")
