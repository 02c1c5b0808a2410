"""Machines on this one: network namespaces on a bridge of their own. They share the file system, as
nodes of a cluster do. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROUTER = "10.77.0.254"  # nobody: a machine without a default route has no address towards the world


@dataclass(frozen=True)
class Machine:
    namespace: str
    address: str

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Runs a command there, in a session of its own; what it writes is appended to the log."""
        with log.open("ab") as output:
            words = ["ip", "netns", "exec", self.namespace, *command]
            return subprocess.Popen(
                words,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def lose_network(self) -> None:
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    def regain_network(self) -> None:
        _ip("-n", self.namespace, "link", "set", "eth0", "up")
        _ip("-n", self.namespace, "route", "replace", "default", "via", ROUTER)

    def kill(self) -> None:
        """Every process there, at once."""
        for process in _ip("netns", "pids", self.namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)


@contextlib.contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """So many, at 10.77.0.1 and up; with their processes they are gone when the block ends."""
    bridge = f"lopd{os.getpid()}"
    made = [Machine(f"{bridge}-{index}", f"10.77.0.{index + 1}") for index in range(count)]
    hosts = "127.0.0.1 localhost\n" + "".join(
        f"{machine.address} {machine.namespace}\n" for machine in made
    )
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for index, machine in enumerate(made):
            # ip netns exec puts these files in the place of /etc's: torch looks up its peers'
            # names, which must not take long
            files = Path("/etc/netns", machine.namespace)
            files.mkdir(parents=True)
            (files / "hosts").write_text(hosts)
            (files / "resolv.conf").write_text("nameserver 127.0.0.1\n")
            _ip("netns", "add", machine.namespace)
            _ip(
                "link",
                "add",
                f"v{os.getpid()}-{index}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                machine.namespace,
            )
            _ip("link", "set", f"v{os.getpid()}-{index}", "master", bridge, "up")
            _ip("-n", machine.namespace, "link", "set", "lo", "up")
            _ip("-n", machine.namespace, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            machine.regain_network()
        yield made
    finally:
        for machine in made:
            with contextlib.suppress(subprocess.CalledProcessError):
                machine.kill()
                _ip("netns", "del", machine.namespace)
            shutil.rmtree(Path("/etc/netns", machine.namespace), ignore_errors=True)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", bridge)


def why_impossible() -> str:
    """What this machine lacks for them; empty: nothing."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "needs root and iproute2"
    probe = f"lopd{os.getpid()}-probe"
    if (
        subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode
        != 0
    ):
        return "network namespaces are not allowed here"
    _ip("netns", "del", probe)
    return ""


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout
