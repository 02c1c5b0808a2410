"""The address at which the trainer and the servers meet for a broadcast of weights.

The default is loopback. With sync.host it is an address that other machines can reach. The store
and gloo's connections have neither a key nor encryption. Whoever can reach the address while a sync
forms its group can disturb that sync, so a wider address must be asked for.
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

# The default of every address here: only programs of this machine can connect.
LOOPBACK = "127.0.0.1"
AUTO = "auto"
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def check_reach(settings: SyncSection, urls: Sequence[str]) -> None:
    """Check that the configured transport can reach these servers.

    Args:
        settings: The section [sync].
        urls: The base URLs of the servers.

    Raises:
        ConfigError: A server is on another machine and the transport does not reach it.
    """
    remote = _first_remote(urls)
    # A folder needs a shared file system, but no address: the servers read it by themselves.
    if remote is None or settings.transport == "disk":
        return
    if settings.transport == "tensor":
        raise ConfigError(
            "the transport tensor works only on one machine, because it shares memory",
            where=remote,
            limit="only servers on the loopback address",
            remedy='set sync.transport = "distributed" (with sync.host) or "disk"',
        )
    # "auto" is no address. It passes here, and the address is found when a sync begins.
    if _is_loopback(settings.host):
        raise ConfigError(
            "a server on another machine cannot join a broadcast on the loopback address",
            where=remote,
            limit=f"sync.host must not be {settings.host}",
            remedy="set sync.host to an address of this machine that the servers reach, or to "
            f'"{AUTO}"; or set sync.transport = "disk"',
        )


def check_meeting(settings: SyncSection) -> None:
    """Check that sync.host is used by the transport and belongs to this machine.

    Raises:
        ConfigError: The transport does not use sync.host, or no interface has this address.
    """
    if settings.transport == "distributed":
        # "auto" is found later: it depends on the servers that are running then.
        if settings.host != AUTO:
            interface_of(settings.host, "sync.host")
    # A value that nobody uses is refused and not ignored. The user may believe that it has an
    # effect.
    elif settings.host != LOOPBACK:
        raise ConfigError(
            f'sync.host = "{settings.host}" has no effect with sync.transport = '
            f'"{settings.transport}"',
            where="sync.host",
            limit='only with sync.transport = "distributed"',
            remedy='remove sync.host, or set sync.transport = "distributed"',
        )


def meeting_address(host: str, urls: Sequence[str]) -> str:
    """Return the IPv4 address of this machine at which the servers' ranks join a broadcast.

    Args:
        host: The value of sync.host.
        urls: The base URLs of the servers.

    Raises:
        EngineError: The network of this machine has no route to a server.
    """
    if host != AUTO:
        return host
    remote = _first_remote(urls)
    # All servers meet at one address, so the route to the first remote one decides. Servers that
    # are reached through several networks need an explicit sync.host.
    return LOOPBACK if remote is None else _address_towards(remote)


def interface_of(address: str, key: str = "") -> str:
    """Return the name of the network interface that has this address.

    Args:
        address: An IP address.
        key: The configuration key that the error names.

    Raises:
        ConfigError: No interface of this machine has the address.
    """
    # Here and not at the top: only this function needs it, and `lopd check` imports this module.
    import psutil

    # All of 127.0.0.0/8 is loopback, but psutil lists 127.0.0.1 alone.
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
        "no network interface of this machine has this address",
        where=f"{key} = {address}" if key else address,
        remedy="give one of the addresses of this machine",
    )


@contextlib.contextmanager
def gloo_on(interface: str) -> Iterator[None]:
    """Make groups that are formed inside the block use this network interface.

    gloo reads the interface from the environment when a group is made. Without the variable it
    takes the interface to which the name of this host resolves.
    """
    before = os.environ.get(_GLOO_INTERFACE)
    os.environ[_GLOO_INTERFACE] = interface
    try:
        yield
    finally:
        # The trainer's own groups use the same variable, so it must not stay changed.
        if before is None:
            del os.environ[_GLOO_INTERFACE]
        else:
            os.environ[_GLOO_INTERFACE] = before


def _first_remote(urls: Sequence[str]) -> str | None:
    """Return the first URL that is not on loopback."""
    return next((url for url in urls if not _is_loopback(urlsplit(url).hostname or "")), None)


def _is_loopback(host: str) -> bool:
    # A host name is no IP address: ip_address() refuses it with a ValueError.
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _address_towards(url: str) -> str:
    """Return this machine's own address on the route to a server."""
    parts = urlsplit(url)
    try:
        # To connect a UDP socket sends nothing: the kernel only chooses the route and with it the
        # local address. So this works although the server may not answer yet.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or 80))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise EngineError(
            f"there is no route to the server ({error.strerror})",
            where=url,
            remedy="repair the network between the machines",
        ) from None
