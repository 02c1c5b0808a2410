"""What servers are started with, and where: sizes, addresses, arguments; and whether those of the
user can do what is asked of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from lopd import processes
from lopd.checks.combinations import serves_beside
from lopd.checks.findings import (
    CORES,
    Finding,
    Shapes,
    architecture_of,
    devices_for,
    refusal,
    shapes_of,
)
from lopd.config import Config
from lopd.errors import ConfigError, EngineError, LopdError

# a server that takes longer to say what it can do is asked no more: lopd check says nothing of it
_ASKING_S = 10.0
_CPU_ONLY = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
}  # extra_args that only these values work for without a GPU


def server(config: Config) -> Iterator[Finding]:
    """What a server is started with, and what it is asked for."""
    from sglang_rollout.servers.addresses import check_meeting

    settings = config.sglang
    problems = [
        *server_problems(config, shapes_of(config)),
        *_machine_problems(config),
        *refusal(lambda: check_meeting(config.sync)),
    ]
    if not problems:
        problems += _fingerprint_problems(config)
    yield from problems
    ports = (
        [] if settings.port is None else [*range(settings.port, settings.port + settings.replicas)]
    )
    taken = [port for port in ports if processes.port_taken(port)]
    if taken:
        what = (
            f"sglang.port = {settings.port} is taken"
            if taken[0] == settings.port
            else f"port {taken[0]}, of replica {taken[0] - ports[0] + 1}, is taken"
        )
        remedy = "leave sglang.port out (a free one is taken) or end what listens there"
        yield ConfigError(what, where="127.0.0.1", remedy=remedy)
    elif not problems:
        yield f"port {settings.port} is free" if settings.port is not None else "takes a free port"


def server_problems(config: Config, shapes: Shapes) -> Iterator[LopdError]:
    """On whatever machine: arguments and addresses that are none, and models that do not divide by
    a server's sizes.
    """
    from sglang_rollout.servers.addresses import check_reach
    from sglang_rollout.servers.arguments import check_host, check_urls
    from sglang_rollout.servers.extra_args import check_extra_args
    from sglang_rollout.servers.launch import CONTEXT_MARGIN

    settings = config.sglang
    yield from refusal(lambda: check_extra_args(settings.extra_args))
    if "enable_memory_saver" in settings.extra_args:
        yield ConfigError(
            "enable_memory_saver is set by lopd",
            where="sglang.extra_args",
            remedy="leave it out; it follows sync.colocate",
        )
    yield from refusal(lambda: check_host(settings.host))
    no_urls = [*refusal(lambda: check_urls(settings))]
    yield from no_urls or refusal(lambda: check_reach(config.sync, settings.student_urls))
    for role, architecture in shapes.items():
        sizes = [
            (architecture.num_heads, settings.tensor, "number of attention heads", "sglang.tensor")
        ]
        sizes += (
            [(architecture.num_experts, settings.expert, "number of experts", "sglang.expert")]
            if settings.expert > 1
            else []
        )
        for number, divisor, what, key in sizes:
            if number == 0 or number % divisor:
                remedy = f"set {key} to a divisor of {number}" if number else f"set {key} to 1"
                yield ConfigError(
                    f"{what} of the {role} ({number}) does not divide by {key} ({divisor})",
                    where=key,
                    remedy=remedy,
                )
    needed = settings.context_length + CONTEXT_MARGIN
    if settings.max_total_tokens is not None and settings.max_total_tokens < needed:
        limit = f"at least one full sequence: sglang.context_length = {settings.context_length}, and {CONTEXT_MARGIN} that SGLang keeps back"
        remedy = f"set sglang.max_total_tokens to {needed} or more, or leave it out"
        yield ConfigError(
            f"sglang.max_total_tokens = {settings.max_total_tokens}",
            where="sglang",
            limit=limit,
            remedy=remedy,
        )


def _machine_problems(config: Config) -> Iterator[LopdError]:
    """What this machine has not got."""
    from sglang_rollout.servers.addresses import interface_of

    settings = config.sglang
    limit, unit = devices_for(config)
    if settings.tensor * settings.data * settings.replicas > limit:
        several = [name for name in ("tensor", "data", "replicas") if getattr(settings, name) > 1]
        what = " x ".join(f"sglang.{name} = {getattr(settings, name)}" for name in several)
        left = limit // math.prod(
            getattr(settings, name) for name in several[:-1]
        )  # for the last one; 0: the others are too many already
        remedy = f"set sglang.{several[-1] if left else several[0]}={left or limit} or fewer"
        yield ConfigError(what, where="this machine", limit=f"{limit} {unit}", remedy=remedy)
    if unit == CORES and settings.expert > 1:
        what = f"sglang.expert = {settings.expert}: SGLang's plain-torch experts are not split"
        yield ConfigError(
            what, where="this machine", limit="1 without a GPU", remedy="set sglang.expert=1"
        )
    for name, only in _CPU_ONLY.items() if unit == CORES else ():
        if settings.extra_args.get(name, only) != only:
            what = f"sglang.extra_args.{name} = {settings.extra_args[name]!r}"
            yield ConfigError(
                what, where="this machine", limit=f"{only} without a GPU", remedy="leave it out"
            )
    if settings.host.count(".") == 3 and settings.host != "0.0.0.0":
        yield from refusal(lambda: interface_of(settings.host, "sglang.host"))


def _fingerprint_problems(config: Config) -> Iterator[ConfigError]:
    """Servers of the user that were asked to tell fingerprints of their weights and cannot. One
    that does not answer yet is no problem yet.
    """
    if (
        config.sync.verify != "tensors"
        or not serves_beside(config)
        or architecture_of(config, "student") is None
    ):
        return
    from sglang_rollout.requests.client import Refused
    from sglang_rollout.requests.external import connect
    from sglang_rollout.server_side.served_weights import DTYPES

    engines = (
        connect(config.sglang.student_urls, config.sglang, config.models.student).engines
        if config.sglang.student_urls
        else ()
    )
    for engine in engines:
        try:
            engine.call(
                "POST",
                "/weights_checker",
                {"action": f"{DTYPES}{config.models.student}"},
                timeout_s=_ASKING_S,
            )
        except Refused as error:
            if "Unsupported action" in error.what:
                what = "this server cannot tell fingerprints of its weights, as those that lopd starts can"
                remedy = 'leave sync.verify out (it is then "scores"), or set it to "off"'
                yield ConfigError(
                    what, where=engine.url, limit='sync.verify = "tensors"', remedy=remedy
                )
        except EngineError:
            continue
