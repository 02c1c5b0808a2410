"""Where trainer and servers meet for a broadcast: on loopback, unless sync.host asks for an address
that other machines reach.

The store and gloo's connections have neither key nor encryption: whoever reaches the address while
a sync forms its group can disturb it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from lopd.config import SyncSection
from lopd.errors import ConfigError, EngineError

LOOPBACK, AUTO = "127.0.0.1", "auto"
_GLOO = "GLOO_SOCKET_IFNAME"


def check_reach(settings: SyncSection, urls: Sequence[str]) -> None:
    """ConfigError: the servers at urls are on other machines, where this transport does not reach
    them as it is set.
    """
    distant = _distant(urls)
    if distant is None or settings.transport == "disk":
        return
    if settings.transport == "tensor":
        what, remedy = (
            "the transport tensor shares memory, which ends at this machine",
            'set sync.transport = "distributed" (with sync.host) or "disk"',
        )
        raise ConfigError(what, where=distant, limit="servers on loopback", remedy=remedy)
    if _is_loopback(settings.host):
        remedy = f'set sync.host to an address of this machine that they reach, or to "{AUTO}"; or sync.transport = "disk"'
        raise ConfigError(
            "a server of another machine cannot join a broadcast on loopback",
            where=distant,
            limit=f"sync.host = {settings.host}",
            remedy=remedy,
        )


def check_meeting(settings: SyncSection) -> None:
    """ConfigError: sync.host is set where nobody meets, or is no address of this machine."""
    if settings.transport == "distributed":
        if settings.host != AUTO:
            interface_of(settings.host, "sync.host")
    elif settings.host != LOOPBACK:
        what, limit = (
            f'sync.host = "{settings.host}" with sync.transport = "{settings.transport}"',
            "of use to a broadcast alone",
        )
        raise ConfigError(
            what,
            where="sync.host",
            limit=limit,
            remedy='leave sync.host out, or set sync.transport = "distributed"',
        )


def meeting_address(host: str, urls: Sequence[str]) -> str:
    """The IPv4 address of this machine at which the ranks of the servers at urls join. host:
    sync.host. EngineError: no way to a server.
    """
    if host != AUTO:
        return host
    distant = _distant(urls)
    return LOOPBACK if distant is None else _address_towards(distant)


def interface_of(address: str, key: str = "") -> str:
    """The network interface that has this address. ConfigError: none has. key: the knob that says
    it.
    """
    import psutil

    if _is_loopback(address):
        return "lo"
    names: list[str] = [
        name
        for name, found in psutil.net_if_addrs().items()
        for one in found
        if one.address == address
    ]
    if names:
        return names[0]
    raise ConfigError(
        "no network interface of this machine has it",
        where=f"{key} = {address}" if key else address,
        remedy="name one of its addresses",
    )


@contextlib.contextmanager
def gloo_on(interface: str) -> Iterator[None]:
    """gloo takes the interface from the environment when a group is made; without it, that of the
    host's name.
    """
    before = os.environ.get(_GLOO)
    os.environ[_GLOO] = interface
    try:
        yield
    finally:
        if before is None:
            del os.environ[_GLOO]
        else:
            os.environ[_GLOO] = before


def _distant(urls: Sequence[str]) -> str | None:
    return next((url for url in urls if not _is_loopback(urlsplit(url).hostname or "")), None)


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _address_towards(url: str) -> str:
    """This machine's own address on the way to a server; nothing is sent."""
    parts = urlsplit(url)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or 80))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise EngineError(
            f"no way to the server ({error.strerror})",
            where=url,
            remedy="mend the network between the machines",
        ) from None
