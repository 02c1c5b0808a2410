"""The fields of SGLang's ServerArgs that follow from our configuration, and the checks of [sglang]
that need no server.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
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
    """Return the fields of ServerArgs for a server of this checkpoint, as JSON values.

    The key is not among them, because the command line is visible to every user of the machine.

    Args:
        model_dir: The folder of the Hugging Face checkpoint.
        settings: The section [sglang].
        port: The port that the server listens on.
        version: The weight version that the server reports. Without it SGLang reports "default".
    """
    arguments: dict[str, Any] = {
        "model_path": str(model_dir),
        "host": settings.host,
        "port": port,
        "trust_remote_code": False,
        # Prompts and responses are token ids. A second tokenization could change them.
        "skip_tokenizer_init": True,
        # Our own first request is the warm-up. SGLang's warm-up sleeps a second before it asks.
        "skip_server_warmup": True,
        # At "info" the HTTP server writes a line per request.
        "log_level_http": "warning",
        "dtype": settings.dtype,
        # The parallel sizes inside one server. sglang.replicas makes more servers instead.
        "tp_size": settings.tensor,
        "ep_size": settings.expert,
        "dp_size": settings.data,
        # launch.main() adds a margin to it, because the limit of SGLang is not exact.
        "context_length": settings.context_length,
        "max_running_requests": settings.max_running_requests,
        "mem_fraction_static": settings.mem_fraction,
        "enable_deterministic_inference": settings.deterministic,
    }
    # SGLang chooses by itself what is left out: the size of the KV cache from mem_fraction_static,
    # and the weight version "default".
    if settings.max_total_tokens is not None:
        arguments["max_total_tokens"] = settings.max_total_tokens
    if version is not None:
        arguments["weight_version"] = version
    return arguments


def check_settings(settings: SGLangSection, sync: SyncSection) -> None:
    """Check what can be found wrong in the sections before a server is started or asked.

    Raises:
        ConfigError: A setting cannot work.
    """
    check_extra_args(settings.extra_args)
    check_host(settings.host)
    check_urls(settings)
    check_reach(sync, settings.student_urls)
    check_meeting(sync)


def check_urls(settings: SGLangSection) -> None:
    """Check teacher_urls and student_urls.

    Raises:
        ConfigError: A value is no URL, a server is named twice, or one server would serve both
            models.
    """
    teachers = {_normalized(url) for url in settings.teacher_urls}
    for name in ("teacher_urls", "student_urls"):
        urls = [_checked_url(url, f"sglang.{name}") for url in getattr(settings, name)]
        for url in urls:
            _check_named_once(url, urls, name)
            # Every sync writes the student's weights into student_urls. A teacher at the same
            # address would then score with the student's weights, without any error.
            if name == "student_urls" and _normalized(url) in teachers:
                raise ConfigError(
                    f"{url!r} is also in sglang.teacher_urls",
                    where="sglang.student_urls",
                    limit="exactly one model per server",
                    remedy="give another server: the weights of the student would replace those "
                    "of the teacher",
                )


def _check_named_once(url: str, urls: Sequence[str], name: str) -> None:
    # A server that is named twice would get twice the requests that it can hold.
    times = [_normalized(other) for other in urls].count(_normalized(url))
    if times > 1:
        raise ConfigError(
            f"{url!r} is in the list {times} times",
            where=f"sglang.{name}",
            limit="each server exactly once",
            remedy="remove the other entries",
        )


def _normalized(url: str) -> str:
    """Return a form that is equal for two names of one server on this machine."""
    # Only these two names are taken as equal. Another name may belong to another machine.
    return url.rstrip("/").replace("//localhost", "//127.0.0.1", 1)


def _checked_url(url: str, where: str) -> str:
    """Return the URL without a slash at its end, or raise ConfigError."""
    remedy = "give http://host:port"
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        # urlsplit() reads the port only here, and a port out of bounds is a ValueError.
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is not a URL ({error})", where=where, remedy=remedy) from None
    if "@" in parts.netloc:
        # The message does not show the URL, because it may hold a password.
        raise ConfigError(
            "the URL of a server must not contain a user name or a password",
            where=where,
            remedy=f"{remedy}, and give the servers' key in LOPD_SGLANG_KEY",
        )
    is_http = parts.scheme in ("http", "https")
    # Names and IPv4 addresses, and IPv6 addresses with their colons and zones.
    is_host = re.fullmatch(r"[\w.:%-]+", host)
    if not is_http or not is_host or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} is not a URL", where=where, remedy=remedy)
    # SGLang has both interfaces on one port, and other programs want the address with /v1.
    if re.fullmatch(r".*/v1/*", parts.path):
        raise ConfigError(
            f"{url!r} is the address of the OpenAI interface, but lopd uses /generate",
            where=where,
            remedy=f"{remedy}, without /v1",
        )
    return url.rstrip("/")


def check_host(host: str) -> None:
    """Check that sglang.host is an IP address.

    Raises:
        ConfigError: The value is not an IP address, for example a name.
    """
    try:
        # A name could stand for several addresses.
        ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(
            f"{host!r} is not an IP address",
            where="sglang.host",
            remedy="set sglang.host to 127.0.0.1 (only this machine can connect), or to the "
            "address to listen on",
        ) from None
