"""SGLang's ServerArgs from ours, and the check of what a user adds to them."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lopd.config import SGLangSection, SyncSection
from lopd.errors import ConfigError
from sglang_rollout.servers.addresses import check_meeting, check_reach
from sglang_rollout.servers.extra_args import check_extra_args


def server_arguments(
    model_dir: Path, settings: SGLangSection, port: int, *, version: str | None = None
) -> dict[str, Any]:
    """Fields of ServerArgs for a server of this checkpoint, as JSON values; the key is not among
    them. version: of its weights, where they have one.
    """
    arguments: dict[str, Any] = {
        "model_path": str(model_dir),
        "host": settings.host,
        "port": port,
        "trust_remote_code": False,
        "skip_tokenizer_init": True,  # token ids are the truth
        # our own first request is the warm-up; SGLang's sleeps a second before it asks
        "skip_server_warmup": True,
        "log_level_http": "warning",  # else a line per request
        "dtype": settings.dtype,
        "tp_size": settings.tensor,
        "ep_size": settings.expert,
        "dp_size": settings.data,
        "context_length": settings.context_length,
        "max_running_requests": settings.max_running_requests,
        "mem_fraction_static": settings.mem_fraction,
        "enable_deterministic_inference": settings.deterministic,
    }
    if settings.max_total_tokens is not None:
        arguments["max_total_tokens"] = settings.max_total_tokens
    if version is not None:
        arguments["weight_version"] = version
    return arguments


def check_settings(settings: SGLangSection, sync: SyncSection) -> None:
    """ConfigError: what can be found wrong with the sections before a server is started or asked."""
    check_extra_args(settings.extra_args)
    check_host(settings.host)
    check_urls(settings)
    check_reach(sync, settings.student_urls)
    check_meeting(sync)


def check_urls(settings: SGLangSection) -> None:
    """ConfigError for what is no URL in teacher_urls and student_urls, for a server named twice,
    and for one that would serve both models.
    """
    for name in ("teacher_urls", "student_urls"):
        urls = [_checked_url(url, f"sglang.{name}") for url in getattr(settings, name)]
        for url in urls:
            if [_same(other) for other in urls].count(_same(url)) > 1:
                times = [_same(other) for other in urls].count(_same(url))
                raise ConfigError(
                    f"{url!r} is there {times} times",
                    where=f"sglang.{name}",
                    limit="each server once",
                    remedy="name it once",
                )
            if name == "student_urls" and _same(url) in {
                _same(teacher) for teacher in settings.teacher_urls
            }:
                what, remedy = (
                    f"{url!r} is also in sglang.teacher_urls",
                    "name another server: weights of the student would replace the teacher's",
                )
                raise ConfigError(
                    what, where="sglang.student_urls", limit="one model a server", remedy=remedy
                )


def _same(url: str) -> str:
    """Equal for two names of one server on this machine."""
    return url.rstrip("/").replace("//localhost", "//127.0.0.1", 1)


def _checked_url(url: str, where: str) -> str:
    """Without a slash at its end."""
    remedy = "give http://host:port"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port  # a port out of bounds is a ValueError
    except ValueError as error:
        raise ConfigError(f"{url!r} is no URL ({error})", where=where, remedy=remedy) from None
    if "@" in parts.netloc:  # not shown: it may hold a password
        raise ConfigError(
            "a URL with a name or password in it",
            where=where,
            remedy=f"{remedy}, and the servers' key in LOPD_SGLANG_KEY",
        )
    if (
        parts.scheme not in ("http", "https")
        or not re.fullmatch(r"[\w.:%-]+", host)
        or parts.query
        or parts.fragment
    ):
        raise ConfigError(f"{url!r} is no URL", where=where, remedy=remedy)
    if re.fullmatch(r".*/v1/*", parts.path):
        what, limit = (
            f"{url!r} is the address of the OpenAI interface",
            "that of the server: lopd asks /generate, which takes and gives token ids",
        )
        raise ConfigError(what, where=where, limit=limit, remedy=f"{remedy}, without /v1")
    return url.rstrip("/")


def check_host(host: str) -> None:
    """ConfigError unless it is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(
            f"{host!r} is no IP address",
            where="sglang.host",
            remedy="127.0.0.1 for this machine alone, or the address to listen on",
        ) from None
