"""An SGLang server as a context manager.

The server is started, watched, restarted and stopped with its whole process group. It listens on
loopback unless the configuration says otherwise, and it has a key of its own.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import httpx

from lopd.config import SGLangSection
from lopd.config.secrets import holds_secret, scrubbed
from lopd.devices import num_gpus
from lopd.errors import EngineError
from lopd.processes import GuardedProcess, group_stopped
from sglang_rollout.cpu.settings import cpu_arguments, cpu_environment
from sglang_rollout.servers.addresses import interface_of
from sglang_rollout.servers.arguments import check_host, server_arguments
from sglang_rollout.servers.extra_args import check_extra_args
from sglang_rollout.servers.launch import KEY_VARIABLE, SECRETS_VARIABLE
from sglang_rollout.servers.log_summary import START_LINE, log_summary
from sglang_rollout.servers.ports import AddressTaken, choose_port, reachable_host
from sglang_rollout.servers.scratch import Scratch
from sglang_rollout.servers.start_up import check_checkpoint, wait_until_healthy
from sglang_rollout.servers.supervision import Activity, Watcher
from sglang_rollout.servers.weights_file import remembered_weights

# Longer than the 20 seconds within which SGLang's own health check looks for a sign of life.
_PROBE_TIMEOUT_S = 30.0
# Another program can take a free port in the seconds until the server listens.
_PORT_ATTEMPTS = 3
# The server has nothing to save. On SIGTERM SGLang would wait 5 s for a GPU to settle.
_STOP_GRACE_S = 0.5


class SGLangServer:
    """One server of one checkpoint.

    ``with SGLangServer(...) as server`` starts it, starts it again when it dies (sglang.restarts),
    and always stops it.

    Attributes:
        weights_file: The file where the newest weights are recorded, by whichever process puts them
            into the server (sglang_rollout.servers.weights_file).
        activity: What the requests of this process show about the server.
        port: The port that the server listens on, or 0 before the start.
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
        """
        Args:
            model_dir: The folder of the Hugging Face checkpoint.
            settings: The section [sglang].
            log: The file to which the server's output is appended.
            name: The name of the server in errors and progress lines.
            replica: The index of the server among several of one model. Replicas have their own
                logs and GPUs. They share the weights file and the key.
            weights_file: The default is a file beside the log.
            api_key: The default is a new random key.
            tell: A function that gets one line about each restart.
        """
        self.model_dir = model_dir
        self.settings = settings
        self.log = log
        self.name = name
        self.replica = replica
        # relaunch() changes model_dir. A restart without newer weights in a folder goes back to
        # this one.
        self._first_model_dir = model_dir
        # Restarts before adopt(), which concern the former checkpoint.
        self._former_restarts = 0
        # Nothing is served without a key, not even on loopback: other users of the machine can
        # connect to it too.
        self.api_key = api_key or secrets.token_urlsafe(32)
        self.weights_file = weights_file or log.with_name(f"{log.name}.weights.json")
        self.activity = Activity()
        # Chosen by start(). A port that is chosen earlier could be taken until then.
        self.port = 0
        # The version of weights that came after the start, or None for the weights of the start.
        self._version: str | None = None
        self._process: GuardedProcess | None = None
        self._scratch: Scratch | None = None
        self._healthy = False
        # Held while a process is begun or ended. The watcher's thread and the owner's thread do
        # both: without the lock, stop() could miss a process that a restart is just beginning.
        self._changing = threading.Lock()
        self._watcher = Watcher(
            self, restarts=settings.restarts, hang_timeout_s=settings.hang_timeout_s, tell=tell
        )

    @property
    def url(self) -> str:
        assert self.port, "the server has no address before it is started"
        return f"http://{reachable_host(self.settings.host)}:{self.port}"

    @property
    def group_id(self) -> int:
        """The process group of everything that belongs to the server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def num_restarts(self) -> int:
        """Return how often the server was started again, since adopt() if that was called."""
        return self._watcher.num_restarts - self._former_restarts

    @property
    def command(self) -> list[str]:
        """The command line.

        The API key and values that may be secret are not in it. The server gets them in its
        environment."""
        arguments = json.dumps(scrubbed(self.arguments))
        return [sys.executable, "-m", "sglang_rollout.servers.launch", arguments]

    def _secrets(self) -> dict[str, object]:
        """Return the arguments that the command line hides."""
        # launch.main() puts them back: they travel in the environment, which only the user reads.
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
            # A server takes tensor * data GPUs from its first one on.
            arguments["base_gpu_id"] = self.replica * self.settings.tensor * self.settings.data
        # The user's arguments come last. check_extra_args() has refused those that lopd sets
        # itself.
        return {**arguments, **self.settings.extra_args}

    def start(self, progress: Callable[[float], None] | None = None) -> SGLangServer:
        """Start the server and wait until it has answered a request.

        Args:
            progress: A function that is called with the seconds waited so far.

        Raises:
            EngineError: The folder holds no checkpoint, the port is taken, the server died, or it
                was not healthy within start_timeout_s.
            ConfigError: An extra argument or the host is wrong.
        """
        assert self._process is None, "start() once"
        check_extra_args(self.settings.extra_args)
        check_host(self.settings.host)
        check_checkpoint(self.model_dir, self.name)
        for attempt in range(_PORT_ATTEMPTS):
            self.port = choose_port(self.settings, self.replica)
            try:
                # A file of an earlier run would make a restart load that run's weights.
                self.weights_file.unlink(missing_ok=True)
                self._launch(progress)
                # Only a server that was healthy once is watched. An error of the first start is the
                # caller's: a restart would meet it again.
                self._watcher.start()
                return self
            except BaseException as error:
                # A port that the user has chosen is not replaced by another one.
                last_attempt = attempt + 1 == _PORT_ATTEMPTS
                taken = isinstance(error, AddressTaken) and self.settings.port is None
                if not taken or last_attempt:
                    self.stop()
                    raise
                self.end_process()
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """End the server's whole process group for good. A second call does nothing."""
        # The order matters: a watcher that still runs would take the end for a death. Its restart
        # may be waiting for a healthy server, and ending the process is what ends that wait.
        self._watcher.stop()
        self.end_process()
        self._watcher.join()

    def end_process(self) -> None:
        """End the server's whole process group and remove its scratch folder."""
        with self._changing:
            self._healthy = False
            if self._process is not None:
                # Before the scratch folder, in which the process still has open sockets.
                self._process.stop(grace_s=_STOP_GRACE_S)
                self._process = None
            if self._scratch is not None:
                self._scratch.remove()
                self._scratch = None

    def relaunch(self) -> None:
        """Start the server again at the same address, with the same key. The watcher calls it.

        The server gets the newest weights that are in a folder.

        Raises:
            EngineError: For the same reasons as start().
        """
        self.end_process()
        # Weights of the first start have no version of their own, and SGLang calls them "default".
        first = (self._first_model_dir, None)
        self.model_dir, self._version = remembered_weights(self.weights_file) or first
        check_checkpoint(self.model_dir, self.name)
        self._launch(None)

    def adopt(self, model_dir: Path, name: str) -> None:
        """Count the server as started with a checkpoint whose weights it has got since.

        A restart and the record for a manifest then name that checkpoint.

        Args:
            model_dir: The folder of the Hugging Face checkpoint.
            name: The name of the server in errors and progress lines from now on.
        """
        self.name = name
        # In this order: a restart between the two lines finds the same checkpoint in either place.
        self._first_model_dir = model_dir
        self.weights_file.unlink(missing_ok=True)
        self.model_dir = model_dir
        self._version = None
        self._former_restarts = self._watcher.num_restarts

    def alive(self) -> bool:
        """Return whether the server's process runs. It may still be unhealthy."""
        process = self._process
        return process is not None and process.poll() is None

    def suspended(self) -> bool:
        """Return whether the whole process group is stopped (SIGSTOP)."""
        process = self._process
        return process is not None and group_stopped(process.pid)

    def ready(self) -> bool:
        """Return whether the process runs and has been healthy since its start."""
        return self._healthy and self.alive()

    def check(self) -> None:
        """Raise EngineError if the server is dead and will not be started again."""
        if self._watcher.failure is not None:
            raise self._watcher.failure
        # A watcher that stops restarts nothing any more, and with restarts = 0 it never does.
        if (self._watcher.stopping or self.settings.restarts == 0) and not self.alive():
            raise self.death()

    def responds(self) -> bool:
        """Return whether the scheduler has sent anything recently.

        SGLang's health check is true if the scheduler has sent anything in the last 20 seconds. If
        hang_timeout_s is less than 20 seconds, it is the limit instead.
        """
        return self._ok("/health_generate")

    def reachable(self) -> bool:
        """Return whether the main process answers.

        This asks nothing of the scheduler, which may rightly be paused or without memory.
        """
        return self._ok("/model_info")

    def _ok(self, path: str) -> bool:
        # A probe that takes longer than hang_timeout_s would only delay the decision it is for.
        timeout_s = min(_PROBE_TIMEOUT_S, self.settings.hang_timeout_s)
        try:
            with self._client() as client:
                return client.get(path, timeout=timeout_s).status_code == 200
        except httpx.TransportError:
            return False

    def death(self) -> EngineError:
        """Return the error for a server that was found dead."""
        return EngineError(
            f"the {self.name} server died; its log ends: {log_summary(self.log)}",
            where=str(self.log),
            remedy="read the log, then run the same command again: finished work is kept",
        )

    def record(self) -> dict[str, object]:
        """Return how the server was started, for a manifest.

        The record has no key, no value that looks like a secret, and no port.
        """
        # A port in it would make two runs with the same settings look different.
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

    def _launch(self, progress: Callable[[float], None] | None) -> None:
        with self._changing:
            # stop() may have come while a restart was on its way here. It has ended the old process
            # and would never see a new one.
            if self._watcher.stopping:
                raise EngineError(
                    f"the {self.name} server was stopped",
                    where=str(self.log),
                    remedy="run the same command again: finished work is kept",
                )
            # A new folder for each process: the previous one may have left sockets behind.
            self._scratch = Scratch()
            self.log.parent.mkdir(parents=True, exist_ok=True)
            # Appended: after a restart the log still has the end of the previous process.
            with self.log.open("ab") as output:
                if holds_secret(self.settings.extra_args):
                    # SGLang writes all its arguments into the log.
                    self.log.chmod(0o600)
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                line = f"{START_LINE} the {self.name} server on port {self.port}, {now}\n"
                output.write(line.encode())
                # The server writes to the same file by itself, and this line must come first.
                output.flush()
                environment = self._environment(self._scratch.path)
                self._process = GuardedProcess(self.command, env=environment, output=output)
        # Not under the lock: stop() must be able to end a server that starts.
        with self._client() as client:
            wait_until_healthy(self, client, progress)
        self._healthy = True

    def _client(self) -> httpx.Client:
        # trust_env=False: a proxy of the environment must not see requests to our own servers.
        headers = {"Authorization": f"Bearer {self.api_key}"}
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False)

    def _environment(self, scratch: Path) -> Mapping[str, str]:
        environment = {
            **os.environ,
            KEY_VARIABLE: self.api_key,
            SECRETS_VARIABLE: json.dumps(self._secrets()),
            # SGLang leaves its sockets behind. Here they are removed with the server.
            "TMPDIR": str(scratch),
            # torch's own TCP rendezvous listens on every interface.
            "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{scratch}/rendezvous",
            # A server serves the folder that was checked, and never downloads anything.
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Log-probabilities are at temperature 1, whatever the sampling temperature is.
            "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
        }
        if not _has_gpu():
            # A trainer of another machine that reaches the server at its host also broadcasts
            # weights to it, so the collectives must listen at that host too.
            host = self.settings.host
            everywhere = ipaddress.ip_address(host).is_unspecified
            interface = "lo" if everywhere else interface_of(host)
            environment.update(cpu_environment(self.settings.tensor, interface))
        return environment


def _has_gpu() -> bool:
    return num_gpus() > 0
