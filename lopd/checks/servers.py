"""What servers are started with, and where: sizes, addresses and arguments.

Servers that the user has started are asked whether they can do what the run needs of them.
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
from lopd.megatron.weights.architecture import Architecture

# Seconds in which a server must say what it can do. A slower one is busy or loading, and lopd check
# then says nothing of it.
_ANSWER_S = 10.0
# Arguments of SGLang, and the only value with which each works without a GPU.
_CPU_ONLY = {"attention_backend": "torch_native", "sampling_backend": "pytorch"}


def server(config: Config) -> Iterator[Finding]:
    """Check the arguments of the servers that are started, and the requests that they will get."""
    from sglang_rollout.servers.addresses import check_meeting

    problems = [
        *server_problems(config, shapes_of(config)),
        *_machine_problems(config),
        *refusal(lambda: check_meeting(config.sync)),
    ]
    # Servers are asked only if the configuration is right. An address that is none cannot answer.
    if not problems:
        problems += _fingerprint_problems(config)
    yield from problems
    # Whether a port is free is asked last: it may change at any time.
    taken = [*_port_problems(config)]
    yield from taken
    if not taken and not problems:
        port = config.sglang.port
        yield f"port {port} is free" if port is not None else "lopd will use a free port"


def _port_problems(config: Config) -> Iterator[ConfigError]:
    """Yield the first port that another program has taken."""
    first = config.sglang.port
    if first is None:
        return
    # Replica i listens on the i-th port from the first one on.
    # One port is enough to know: the servers of a model start together or not at all.
    for replica in range(config.sglang.replicas):
        port = first + replica
        if not processes.port_taken(port):
            continue
        what = f"port {port}, of replica {replica + 1}, is taken"
        if replica == 0:
            what = f"sglang.port = {first} is taken"
        yield ConfigError(
            what,
            where="127.0.0.1",
            remedy="remove sglang.port (lopd then uses a free port), or end the program that "
            "listens on this port",
        )
        return


def server_problems(config: Config, shapes: Shapes) -> Iterator[LopdError]:
    """Yield what is wrong with the servers' settings on any machine.

    Args:
        config: The configuration.
        shapes: The shapes of the models by role.
    """
    from sglang_rollout.servers.addresses import check_reach
    from sglang_rollout.servers.arguments import check_host, check_urls
    from sglang_rollout.servers.extra_args import check_extra_args
    from sglang_rollout.servers.launch import CONTEXT_MARGIN

    settings = config.sglang
    yield from refusal(lambda: check_extra_args(settings.extra_args))
    # It must be on exactly if server and trainer take turns. lopd knows, and the user may not.
    if "enable_memory_saver" in settings.extra_args:
        yield ConfigError(
            "enable_memory_saver is set by lopd",
            where="sglang.extra_args",
            remedy="remove enable_memory_saver: lopd sets it where sync.colocate is true",
        )
    # The address on which servers listen must be one, before anything is compared with it.
    yield from refusal(lambda: check_host(settings.host))
    # Whether weights reach the servers can be said only of addresses that are right.
    wrong_urls = [*refusal(lambda: check_urls(settings))]
    yield from wrong_urls or refusal(lambda: check_reach(config.sync, settings.student_urls))
    for role, architecture in shapes.items():
        yield from _size_problems(config, role, architecture)
    needed = settings.context_length + CONTEXT_MARGIN
    # Otherwise a request as long as the context could never be served.
    if settings.max_total_tokens is not None and settings.max_total_tokens < needed:
        yield ConfigError(
            f"sglang.max_total_tokens = {settings.max_total_tokens} is too small",
            where="sglang",
            limit="at least one full sequence: sglang.context_length = "
            f"{settings.context_length}, plus {CONTEXT_MARGIN} tokens that SGLang "
            "reserves",
            remedy=f"set sglang.max_total_tokens to {needed} or more, or remove it",
        )


def _size_problems(config: Config, role: str, architecture: Architecture) -> Iterator[ConfigError]:
    """Yield the sizes of a server by which a model does not divide."""
    settings = config.sglang
    sizes = [
        (architecture.num_heads, settings.tensor, "number of attention heads", "sglang.tensor")
    ]
    # One expert rank divides every model, one without experts too.
    if settings.expert > 1:
        sizes.append(
            (architecture.num_experts, settings.expert, "number of experts", "sglang.expert")
        )
    for number, divisor, what, key in sizes:
        # A dense model has 0 experts, which every size divides, but there is nothing to divide.
        if number == 0 or number % divisor:
            yield ConfigError(
                f"{what} of the {role} ({number}) does not divide by {key} ({divisor})",
                where=key,
                remedy=f"set {key} to a divisor of {number}" if number else f"set {key} to 1",
            )


def _machine_problems(config: Config) -> Iterator[LopdError]:
    """Yield what the servers need and this machine has not got."""
    from sglang_rollout.servers.addresses import interface_of

    settings = config.sglang
    # Servers of one model need all their devices at once.
    limit, unit = devices_for(config)
    if settings.tensor * settings.data * settings.replicas > limit:
        yield _too_many_processes(config, limit, unit)
    # On a CPU the experts run in plain torch, which knows no expert ranks.
    if unit == CORES and settings.expert > 1:
        yield ConfigError(
            f"sglang.expert = {settings.expert}: SGLang cannot split experts in plain torch",
            where="this machine",
            limit="exactly 1 on a machine without a GPU",
            remedy="set sglang.expert=1",
        )
    for name, only in _CPU_ONLY.items() if unit == CORES else ():
        value = settings.extra_args.get(name, only)
        if value != only:
            yield ConfigError(
                f"sglang.extra_args.{name} = {value!r} cannot be used",
                where="this machine",
                limit=f"exactly {only} on a machine without a GPU",
                remedy="remove this argument",
            )
    # Three dots: an IPv4 address. It must be one of this machine's. 0.0.0.0 means all of them.
    if settings.host.count(".") == 3 and settings.host != "0.0.0.0":
        yield from refusal(lambda: interface_of(settings.host, "sglang.host"))


def _too_many_processes(config: Config, limit: int, unit: str) -> ConfigError:
    """Return the error for servers that need more devices than there are."""
    settings = config.sglang
    sizes = {name: getattr(settings, name) for name in ("tensor", "data", "replicas")}
    several = [name for name, size in sizes.items() if size > 1]
    # What the other sizes leave for the last one. 0 means that the others are too many already,
    # so the first one must shrink.
    left = limit // math.prod(sizes[name] for name in several[:-1])
    name = several[-1] if left else several[0]
    return ConfigError(
        " x ".join(f"sglang.{name} = {sizes[name]}" for name in several) + " is too large",
        where="this machine",
        limit=f"at most {limit} {unit}",
        remedy=f"set sglang.{name}={left or limit} or fewer",
    )


def _fingerprint_problems(config: Config) -> Iterator[ConfigError]:
    """Yield servers of the user that cannot tell fingerprints of their weights.

    Only sync.verify = "tensors" asks for fingerprints.
    """
    urls = config.sglang.student_urls
    if config.sync.verify != "tensors" or not serves_beside(config) or not urls:
        return
    # The fingerprints are asked for in the dtypes of the student's files.
    if architecture_of(config, "student") is None:
        return
    from sglang_rollout.requests.client import Refused
    from sglang_rollout.requests.external import connect
    from sglang_rollout.server_side.served_weights import LAYOUT

    # The question for the layout alone computes no fingerprint, so it costs the server nothing.
    action = {"action": f"{LAYOUT}{config.models.student}"}
    for engine in connect(urls, config.sglang, config.models.student).engines:
        try:
            engine.call("POST", "/weights_checker", action, timeout_s=_ANSWER_S)
        except Refused as error:
            # A plain SGLang does not know this action. The servers that lopd starts do.
            if "Unsupported action" in error.what:
                yield ConfigError(
                    "this server cannot report fingerprints of its weights, because lopd "
                    "did not start it",
                    where=engine.url,
                    limit='only servers that lopd starts, with sync.verify = "tensors"',
                    remedy='remove sync.verify (its value is then "scores"), or set '
                    'sync.verify to "off"',
                )
        except EngineError:
            # A server that does not answer yet may be loading. That is no problem yet.
            continue
