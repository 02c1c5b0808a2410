"""The port that a server listens on, and the host at which this machine reaches it."""

from __future__ import annotations

import ipaddress
import secrets
from pathlib import Path

from lopd.config import SGLangSection
from lopd.errors import EngineError
from lopd.processes import free_port, port_taken

# Linux gives ports from 32768 on to outgoing connections, unless the machine is set otherwise.
_KERNEL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_ATTEMPTS = 100


class AddressTaken(EngineError):
    """Another program took the port between our test and the server's bind."""


def choose_port(settings: SGLangSection, replica: int) -> int:
    """Return the port for one of the replicas.

    Raises:
        EngineError: The configured port is taken.
    """
    if settings.port is None:
        return lasting_port()
    # The ports of replicas follow each other.
    port = settings.port + replica
    if port_taken(port, settings.host):
        raise EngineError(
            f"port {port} is taken",
            where="sglang.port",
            remedy="end the program that listens on this port, or remove sglang.port: lopd then "
            "uses a free port",
        )
    return port


def lasting_port() -> int:
    """Return a free port that the kernel gives to no outgoing connection.

    The port must still be free when the server is started again. And a client that keeps trying a
    port of the kernel's own range can even be connected to itself.
    """
    first = int(_KERNEL_RANGE.read_text().split()[0])
    candidates = range(10_000, min(first, 65_000))
    # The kernel's range may begin below 10000. Then there are no candidates, and any free port must
    # do.
    for _ in range(_ATTEMPTS if candidates else 0):
        # At random, so that servers that start at the same time seldom try the same port.
        port = secrets.choice(candidates)
        if not port_taken(port):
            return port
    return free_port()


def reachable_host(host: str) -> str:
    """Return the host of the URL at which this machine reaches a server.

    Args:
        host: The IP address that the server listens on.
    """
    address = ipaddress.ip_address(host)
    # 0.0.0.0 and :: mean every interface. They are no addresses that one can connect to.
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return host if address.version == 4 else f"[{host}]"
