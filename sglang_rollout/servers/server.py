"""An SGLang server as a context manager: started, watched, restarted and stopped with its whole
process group, on loopback, with a key of its own.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import httpx

from lopd.config import SGLangSection
from lopd.config.secrets import holds_secret, scrubbed
from lopd.errors import EngineError
from lopd.processes import GuardedProcess, free_port, group_stopped, last_lines, port_taken
from sglang_rollout.cpu.settings import cpu_arguments, cpu_environment
from sglang_rollout.servers.addresses import interface_of
from sglang_rollout.servers.arguments import check_host, server_arguments
from sglang_rollout.servers.extra_args import check_extra_args
from sglang_rollout.servers.launch import KEY_VARIABLE, SECRETS_VARIABLE
from sglang_rollout.servers.scratch import Scratch
from sglang_rollout.servers.supervision import Activity, Watcher, remembered_weights

__all__ = ["SGLangServer", "check_extra_args"]

_POLL_S, _PROBE_TIMEOUT_S = 0.05, 30.0
_PORT_ATTEMPTS = (
    3  # a free port can be taken by another program in the seconds until the server listens
)
_START_LINE = "--- starting"  # in the log, before what a server writes
_ERROR_LINE = re.compile(
    r"^(?:\[[^]]*\] )?(?:[\w.]*(?:Error|Exception|Interrupt)\b: ?.*|.*\bOut of memory\b.*)"
)


class SGLangServer:
    """One server of one checkpoint. ``with SGLangServer(...) as server`` starts it, starts it again
    when it dies (sglang.restarts), and always stops it.

    log: where the server's output is appended. name: how errors and progress call it ("student",
    "teacher"). replica: which of several it is; their logs and GPUs differ, their weights_file and
    key are shared. tell: gets a line about every restart.
    """

    def __init__(
        self,
        model_dir: Path,
        settings: SGLangSection,
        *,
        log: Path,
        name: str = "student",
        replica: int = 0,
        weights_file: Path | None = None,
        api_key: str | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.model_dir, self.settings, self.log, self.name, self.replica = (
            model_dir,
            settings,
            log,
            name,
            replica,
        )
        self._first_model_dir = model_dir
        self.api_key = api_key or secrets.token_urlsafe(32)
        self.weights_file = weights_file or log.with_name(f"{log.name}.weights.json")
        """Where the newest weights are remembered (sglang_rollout.servers.supervision), by whichever process puts them into the server."""
        self.activity = Activity()
        self.port = 0
        self._version: str | None = None  # of weights that are not those of model_dir
        self._process: GuardedProcess | None = None
        self._scratch: Scratch | None = None
        self._healthy = False
        self._changing = threading.Lock()  # a process is begun or ended
        self._watcher = Watcher(
            self, restarts=settings.restarts, hang_timeout_s=settings.hang_timeout_s, tell=tell
        )

    @property
    def url(self) -> str:
        assert self.port, "the server has no address before it is started"
        return f"http://{reachable_host(self.settings.host)}:{self.port}"

    @property
    def group_id(self) -> int:
        """Process group of everything that belongs to the server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def num_restarts(self) -> int:
        """How often it was started again."""
        return self._watcher.num_restarts

    @property
    def command(self) -> list[str]:
        """The command line; the key and what may be a secret are in the environment, not here."""
        return [
            sys.executable,
            "-m",
            "sglang_rollout.servers.launch",
            json.dumps(scrubbed(self.arguments)),
        ]

    def _secrets(self) -> dict[str, object]:
        """The arguments that the command line hides."""
        hidden = scrubbed(self.arguments)
        return {name: value for name, value in self.arguments.items() if hidden[name] != value}

    @property
    def arguments(self) -> dict[str, object]:
        """The fields of SGLang's ServerArgs."""
        arguments = server_arguments(
            self.model_dir, self.settings, self.port, version=self._version
        )
        if not _has_gpu():
            arguments = cpu_arguments(arguments)
        elif self.replica:
            arguments["base_gpu_id"] = self.replica * self.settings.tensor * self.settings.data
        return {**arguments, **self.settings.extra_args}

    # --- its life ----------------------------------------------------------------------------------------------------------------------------------

    def start(self, progress: Callable[[float], None] | None = None) -> SGLangServer:
        """Start the server and wait until it has answered a request. progress: called with the
        seconds waited so far.

        EngineError: no checkpoint there, the port is taken, the server died, or it was not healthy
        within start_timeout_s. ConfigError: extra_args.
        """
        assert self._process is None, "start() once"
        check_extra_args(self.settings.extra_args)
        check_host(self.settings.host)
        self._check_checkpoint()
        for attempt in range(_PORT_ATTEMPTS):
            self.port = self._choose_port()
            try:
                self.weights_file.unlink(missing_ok=True)  # of a former run
                self._launch(progress)
                self._watcher.start()
                return self
            except BaseException as error:
                if (
                    isinstance(error, _AddressTaken)
                    and self.settings.port is None
                    and attempt + 1 < _PORT_ATTEMPTS
                ):
                    self.end_process()
                else:
                    self.stop()
                    raise
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """End the server's whole process group; it is not started again. Safe to call twice."""
        self._watcher.stop()
        self.end_process()
        self._watcher.join()

    def end_process(self) -> None:
        """End the server's whole process group."""
        with self._changing:
            self._healthy = False
            if self._process is not None:
                self._process.stop(
                    grace_s=0.5
                )  # it has nothing to save; on SIGTERM it would wait 5 s for a GPU to settle
                self._process = None
            if self._scratch is not None:
                self._scratch.remove()
                self._scratch = None

    def relaunch(self) -> None:
        """Start it again: same address and key, the newest weights that are in a folder. For the
        watcher. EngineError as start().
        """
        self.end_process()
        self.model_dir, self._version = remembered_weights(self.weights_file) or (
            self._first_model_dir,
            None,
        )
        self._check_checkpoint()
        self._launch(None)

    def alive(self) -> bool:
        """True while the server's process runs; says nothing about its health."""
        process = self._process
        return process is not None and process.poll() is None

    def ready(self) -> bool:
        """True while the process runs and has been healthy since it was started."""
        return self._healthy and self.alive()

    def check(self) -> None:
        """EngineError where the server is dead and will not be started again."""
        if self._watcher.failure is not None:
            raise self._watcher.failure
        if (self._watcher.stopping or self.settings.restarts == 0) and not self.alive():
            raise self.death()

    def responds(self) -> bool:
        """SGLang's own question of health: True where its scheduler has sent anything within 20
        seconds, or less where hang_timeout_s is less.
        """
        return self._ok("/health_generate")

    def reachable(self) -> bool:
        """True where its main process answers. Asks nothing of the scheduler, which may rightly be
        paused, or without memory.
        """
        return self._ok("/model_info")

    def _ok(self, path: str) -> bool:
        try:
            with self._client() as client:
                return (
                    client.get(
                        path, timeout=min(_PROBE_TIMEOUT_S, self.settings.hang_timeout_s)
                    ).status_code
                    == 200
                )
        except httpx.TransportError:
            return False

    def death(self) -> EngineError:
        """What to raise when the server is found dead."""
        return EngineError(
            f"the {self.name} server died; its log ends: {log_summary(self.log)}",
            where=str(self.log),
            remedy="read the log; run the same command again to go on from what was published",
        )

    def record(self) -> dict[str, object]:
        """How the server was started, for a manifest: no key, no value that looks like one, and not
        the port, which is another every time.
        """
        arguments = {
            name: value for name, value in scrubbed(self.arguments).items() if name != "port"
        }
        return {"arguments": arguments, "num_restarts": self.num_restarts}

    def __enter__(self) -> SGLangServer:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _check_checkpoint(self) -> None:
        config = self.model_dir / "config.json"
        try:
            json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EngineError(
                f"the {self.name} checkpoint has no readable config.json ({error})",
                where=str(self.model_dir),
                remedy="give a Hugging Face folder",
            ) from None
        if not any(self.model_dir.glob("*.safetensors")):
            raise EngineError(
                f"the {self.name} checkpoint has no safetensors",
                where=str(self.model_dir),
                remedy="give a Hugging Face folder",
            )

    def _choose_port(self) -> int:
        if self.settings.port is None:
            return lasting_port()
        port = self.settings.port + self.replica
        if port_taken(port, self.settings.host):
            raise EngineError(
                f"port {port} is taken",
                where="sglang.port",
                remedy="end the program that listens there, or leave sglang.port out for a free one",
            )
        return port

    def _launch(self, progress: Callable[[float], None] | None) -> None:
        with self._changing:
            if self._watcher.stopping:
                raise EngineError(f"the {self.name} server was stopped", where=str(self.log))
            self._scratch = Scratch()
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as output:
                if holds_secret(self.settings.extra_args):
                    self.log.chmod(0o600)  # SGLang writes all its arguments into it
                output.write(
                    f"{_START_LINE} the {self.name} server on port {self.port}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode()
                )
                output.flush()
                self._process = GuardedProcess(
                    self.command, env=self._environment(self._scratch.path), output=output
                )
        self._wait_until_healthy(progress)
        self._healthy = True

    def _client(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.api_key}"}, trust_env=False
        )

    def _environment(self, scratch: Path) -> Mapping[str, str]:
        environment = {
            **os.environ,
            KEY_VARIABLE: self.api_key,
            SECRETS_VARIABLE: json.dumps(self._secrets()),
            "TMPDIR": str(scratch),  # SGLang leaves its sockets behind
            # torch's own TCP rendezvous listens on every interface
            "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{scratch}/rendezvous",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # log-probabilities at temperature 1, whatever the sampling temperature
            "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
        }
        if not _has_gpu():
            # a trainer of another machine, which reaches the server there, also broadcasts its
            # weights to it
            host = self.settings.host
            environment.update(
                cpu_environment(
                    self.settings.tensor,
                    "lo" if ipaddress.ip_address(host).is_unspecified else interface_of(host),
                )
            )
        return environment

    def _wait_until_healthy(self, progress: Callable[[float], None] | None) -> None:
        began = ran = time.monotonic()
        with self._client() as client:
            while True:
                waited = time.monotonic() - began
                process = self._process
                if process is None or not group_stopped(process.pid):
                    ran = time.monotonic()
                elif (
                    time.monotonic() - ran > self.settings.hang_timeout_s
                ):  # as one that hangs once it is up; a long start may still end well, this one cannot
                    what = f"the {self.name} server was stopped (SIGSTOP) while it started; its log ends: {log_summary(self.log)}"
                    raise EngineError(
                        what,
                        where=str(self.log),
                        limit=f"sglang.hang_timeout_s = {self.settings.hang_timeout_s:g}",
                        remedy="let it run",
                    )
                if not self.alive():
                    if "address already in use" in " ".join(last_lines(self.log, 40)):
                        raise _AddressTaken(
                            f"port {self.port} was taken while the {self.name} server started",
                            where=str(self.log),
                        )
                    what = f"the {self.name} server did not start; its log ends: {log_summary(self.log)}"
                    raise EngineError(
                        what,
                        where=str(self.log),
                        remedy="mend what the log says, then run the same command again",
                    )
                if waited > self.settings.start_timeout_s:
                    raise EngineError(
                        f"the {self.name} server is not healthy after {waited:.0f} s; its log ends: {log_summary(self.log)}",
                        where=str(self.log),
                        limit=f"sglang.start_timeout_s = {self.settings.start_timeout_s:g}",
                        remedy="read the log; raise sglang.start_timeout_s where the machine is only slow",
                    )
                if self._answers(
                    client,
                    min(self.settings.start_timeout_s - waited, self.settings.hang_timeout_s),
                ):
                    return
                if progress is not None:
                    progress(waited)
                time.sleep(_POLL_S)

    def _answers(self, client: httpx.Client, patience_s: float) -> bool:
        """True once the server has generated a token; nothing listens until its workers have loaded
        the model.
        """
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
        try:
            return (
                client.post(
                    "/generate", json=body, timeout=httpx.Timeout(max(patience_s, 1.0), connect=1.0)
                ).status_code
                == 200
            )
        except httpx.TransportError:
            return False


def _has_gpu() -> bool:
    import torch  # here: `lopd check` needs this module and not the second it takes to import torch

    return torch.cuda.is_available()


def lasting_port() -> int:
    """A port that nothing listens on and that the kernel gives to no outgoing connection: it must
    still be free when the server is started again.

    A client that keeps asking for a port of the kernel's own range can even be connected to itself.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(10_000, min(first, 65_000))
    for _ in range(100 if candidates else 0):
        port = secrets.choice(candidates)
        if not port_taken(port):
            return port
    return free_port()


def reachable_host(host: str) -> str:
    """Where a client of this machine finds a server that listens on host."""
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return host if address.version == 4 else f"[{host}]"


class _AddressTaken(EngineError):
    """Another program took the port between our look and the server's bind."""


def log_summary(log: Path) -> str:
    """The last error that a server's log tells, or its last lines: tracebacks and shutdown messages
    bury the cause.
    """
    lines = last_lines(log, 200)
    begun = [index for index, line in enumerate(lines) if line.startswith(_START_LINE)]
    if begun:  # what a former start left says nothing of this one
        lines = lines[begun[-1] + 1 :] or ["(nothing)"]
    lines = [line for line in lines if " batch, #" not in line] or lines[
        -1:
    ]  # what it decoded last is no cause
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    full = (
        ["the disk of this log is full"] if shutil.disk_usage(log.parent).free == 0 else []
    )  # then the log lacks the cause
    return " | ".join([*(line[:300] for line in (errors[-2:] or lines[-4:])), *full])
