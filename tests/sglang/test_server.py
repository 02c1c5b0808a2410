"""Starting, watching and ending a real server: what goes wrong is explained within a bound, and
nothing outlives its parent.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from lopd.errors import ConfigError, EngineError
from lopd.processes import group_alive
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.servers.extra_args import check_extra_args
from sglang_rollout.servers.launch import SECRETS_VARIABLE
from sglang_rollout.servers.log_summary import log_summary
from sglang_rollout.servers.ports import lasting_port
from sglang_rollout.servers.scratch import remove_orphans
from sglang_rollout.servers.server import SGLangServer
from sglang_rollout.servers.server_fields import known_fields
from tests.models import EOS_ID
from tests.sglang.conftest import sampling, sampling_requests, settings

# for what takes a second or five: without an end to it, it would take the 600 s of
# request_timeout_s, or for ever
BOUND_S = 60.0


def members(group: int) -> list[psutil.Process]:
    """The living processes of a group, oldest first."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return sorted(found, key=lambda process: process.create_time())


def command_line(process: psutil.Process) -> str:
    """Of a process that may have ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def gone_within(group: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not group_alive(group):
            return True
        time.sleep(0.05)
    return False


# ---- extra_args ----


def test_the_fields_of_serverargs_are_read_without_importing_sglang() -> None:
    assert {"model_path", "attention_backend", "disable_radix_cache", "schedule_policy"} <= set(
        known_fields()
    )
    code = (
        "import sys, sglang_rollout.servers.server as s; "
        "s.check_extra_args({'schedule_policy': 'fcfs'}); "
        "print([m for m in sys.modules if m.startswith('sglang.')])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("atention_backend", "the nearest known argument is attention_backend"),
        ("api_key", "set by lopd"),
        ("trust_remote_code", "never run"),
        ("tp_size", "sglang.tensor"),
    ],
)
def test_extra_arguments_are_checked_by_name_before_anything_starts(
    student_dir: Path, tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_extra_args({name: "x"})
    with pytest.raises(ConfigError, match=message):
        SGLangServer(student_dir, settings(extra_args={name: "x"}), log=tmp_path / "log").start()
    assert not (tmp_path / "log").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can split experts")
def test_split_experts_are_refused_on_a_cpu(student_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sglang.expert: .* above 1 on a machine without a GPU"):
        SGLangServer(student_dir, settings(expert=2), log=tmp_path / "log").start()


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("10.1.2.3", "10.1.2.3"),
        ("::", "[::1]"),
    ],
)
def test_a_server_listens_where_it_is_told_and_is_reached_there(
    student_dir: Path, tmp_path: Path, host: str, reached: str
) -> None:
    server = SGLangServer(student_dir, settings(host=host), log=tmp_path / "log")
    server.port = 1234
    assert (server.arguments["host"], server.url) == (host, f"http://{reached}:1234")
    assert SGLangServer(student_dir, settings(), log=tmp_path / "log").settings.host == "127.0.0.1"


def test_what_is_no_address_is_refused_before_anything_starts(
    student_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="'my-host' is not an IP address"):
        SGLangServer(student_dir, settings(host="my-host"), log=tmp_path / "log").start()
    assert not (tmp_path / "log").exists()


def test_a_port_of_ours_is_never_one_that_the_kernel_gives_to_a_client() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not [port for port in (lasting_port() for _ in range(200)) if first <= port <= last]


def test_a_record_hides_what_may_be_a_secret(student_dir: Path, tmp_path: Path) -> None:
    server = SGLangServer(
        student_dir,
        settings(extra_args={"ssl_keyfile_password": "hunter2", "schedule_policy": "fcfs"}),
        log=tmp_path / "log",
    )
    server.port = 1234
    arguments = server.record()["arguments"]
    assert isinstance(arguments, dict)
    assert (
        arguments["ssl_keyfile_password"],
        arguments["schedule_policy"],
        arguments["tp_size"],
    ) == ("***", "fcfs", 1)
    assert server.api_key not in str(server.record())


# ---- what cannot start ----


def test_a_taken_port_is_named_before_anything_starts(student_dir: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(EngineError, match=rf"port {port} is taken"):
            SGLangServer(student_dir, settings(port=port), log=tmp_path / "log").start()
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "everything"])
def test_a_folder_that_is_no_checkpoint_is_refused_before_anything_starts(
    student_dir: Path, tmp_path: Path, missing: str
) -> None:
    folder = tmp_path / "model"
    if missing != "everything":
        shutil.copytree(student_dir, folder)
        (folder / missing).unlink()
    with pytest.raises(EngineError, match="the teacher checkpoint has no"):
        SGLangServer(folder, settings(), log=tmp_path / "log", name="teacher").start()
    assert not (tmp_path / "log").exists()


def test_a_server_stopped_while_it_starts_is_not_waited_for_as_long_as_a_slow_one(
    student_dir: Path, tmp_path: Path
) -> None:
    """Control: every other start, none of which is stopped, may take start_timeout_s."""
    server = SGLangServer(
        student_dir, settings(hang_timeout_s=1.0, start_timeout_s=500), log=tmp_path / "log"
    )
    groups: list[int] = []

    def stop(_: float) -> None:
        groups.append(server.group_id)
        os.killpg(server.group_id, signal.SIGSTOP)

    with pytest.raises(
        EngineError,
        match=r"was stopped \(SIGSTOP\) while it started.*limit: at most sglang.hang_timeout_s = 1",
    ):
        server.start(stop)
    assert not group_alive(groups[0])


def test_a_damaged_checkpoint_gives_the_cause_and_leaves_no_process(
    student_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(student_dir, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    server = SGLangServer(folder, settings(), log=tmp_path / "log")
    # The error names the cause, and not that start_timeout_s has passed.
    with pytest.raises(
        EngineError, match=r"did not start; its log ends: .*[Ss]afetensor"
    ) as caught:
        server.start()
    assert str(tmp_path / "log") in str(caught.value)
    assert not server.alive()
    assert [
        process
        for process in psutil.Process().children(recursive=True)
        if str(folder) in command_line(process)
    ] == []


def test_a_context_longer_than_the_models_is_refused(student_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match=r"sglang.context_length = 513 is larger than the 512 positions"
    ):
        SGLangServer(student_dir, settings(context_length=513), log=tmp_path / "log").start()


def test_a_server_that_is_not_healthy_in_time_is_ended(student_dir: Path, tmp_path: Path) -> None:
    server = SGLangServer(student_dir, settings(start_timeout_s=0.5), log=tmp_path / "log")
    waited: list[float] = []
    with pytest.raises(
        EngineError, match=r"not healthy after \d+ s; .*sglang.start_timeout_s = 0.5"
    ):
        server.start(progress=waited.append)
    assert waited
    assert waited == sorted(waited)
    assert not server.alive()


def test_the_cause_is_found_under_a_traceback_and_shutdown_messages(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "[2026] fine\n"
        "Traceback (most recent call last):\n"
        "  File x\n"
        "ValueError: the cause\n"
        "[2026] SIGQUIT received. It usually means one child failed.\n"
    )
    assert log_summary(log) == "ValueError: the cause"
    log.write_text("one\ntwo\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sglang_rollout.servers.log_summary.shutil.disk_usage",
            lambda _: SimpleNamespace(free=0),
        )
        assert log_summary(log) == "one | two | the disk of this log is full"
    assert log_summary(log) == "one | two"
    log.write_text(
        "ValueError: of a former start\n--- starting the student server on port 1\nthree\n"
    )
    assert log_summary(log) == "three"
    log.write_text(
        "three\n[2026] Decode batch, #running-req: 2\n[2026] Prefill batch, #new-seq: 1\n"
    )
    assert log_summary(log) == "three"


# ---- a running one ----


def test_the_key_stands_in_no_command_line_and_in_no_log_and_only_loopback_listens(
    server: SGLangServer,
) -> None:
    processes = members(server.group_id)
    assert len(processes) >= 3
    assert not any(server.api_key in " ".join(process.cmdline()) for process in processes)
    assert server.api_key not in server.log.read_text()
    assert server.api_key not in " ".join(server.command)
    listening = {
        c.laddr.ip
        for process in processes
        for c in process.net_connections(kind="inet")
        if c.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_a_secret_argument_stands_in_no_command_line(student_dir: Path, tmp_path: Path) -> None:
    """It reaches the server all the same: tests/pipeline/test_end_to_end.py finds it in the log,
    where SGLang writes its arguments.
    """
    told = {
        "hicache_storage_backend_extra_config": '{"token": "hunter2", "pages": 4}',
        "log_requests": False,
    }
    server = SGLangServer(student_dir, settings(extra_args=told), log=tmp_path / "log")
    assert "hunter2" not in " ".join(server.command)
    given = json.loads(server.command[-1])
    secrets = json.loads(server._environment(tmp_path)[SECRETS_VARIABLE])
    assert secrets == {
        "hicache_storage_backend_extra_config": told["hicache_storage_backend_extra_config"]
    }
    assert {**given, **secrets} == server.arguments
    plain = SGLangServer(student_dir, settings(), log=tmp_path / "log")
    assert json.loads(plain._environment(tmp_path)[SECRETS_VARIABLE]) == {}


def test_keys_are_never_the_same(student_dir: Path, tmp_path: Path) -> None:
    keys = {SGLangServer(student_dir, settings(), log=tmp_path / "log").api_key for _ in range(10)}
    assert len(keys) == 10
    assert all(len(key) >= 32 for key in keys)


def test_health_and_cache(engine: SGLangEngine) -> None:
    assert engine.health()
    assert engine.server_version() >= (0, 5, 17)
    engine.flush_cache()


def _kill_scheduler(server: SGLangServer) -> None:
    next(process for process in members(server.group_id) if "scheduler" in process.name()).kill()


def _kill_everything(server: SGLangServer) -> None:
    os.killpg(server.group_id, signal.SIGKILL)


@pytest.mark.parametrize("kill", [_kill_everything, _kill_scheduler], ids=["group", "scheduler"])
def test_a_server_killed_while_it_samples_is_noticed_and_leaves_no_process(
    student_dir: Path,
    tmp_path: Path,
    kill: Callable[[SGLangServer], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The folder is new, so that leftovers are seen. Its path is short, because sockets are made in
    # it.
    scratch = tempfile.mkdtemp(dir="/tmp")
    monkeypatch.setattr("tempfile.tempdir", scratch)
    with SGLangServer(
        student_dir, settings(context_length=500, max_running_requests=8), log=tmp_path / "log"
    ) as server:
        group = server.group_id
        assert list(Path(scratch).glob("lopd-sglang-*/sglang_loads_*"))
        engine = SGLangEngine(server.url, server.api_key, server.settings, server=server)
        long = sampling(max_new_tokens=480, stop_token_ids=(EOS_ID,))
        responses = engine.generate(sampling_requests(200), long)
        next(responses)
        kill(server)
        began = time.monotonic()
        with pytest.raises(
            EngineError, match=rf"{tmp_path / 'log'}: the student server died; its log ends: "
        ):
            list(responses)
        assert time.monotonic() - began < BOUND_S
        with pytest.raises(EngineError, match="died"):
            engine.model_info()
    server.stop()  # a second time
    assert gone_within(group, BOUND_S)
    os.rmdir(scratch)  # nothing is left in it


def test_a_server_ends_with_its_parent_even_at_kill_9(
    student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tempfile.mkdtemp(dir="/tmp")
    code = f"""
        import time
        from pathlib import Path
        from sglang_rollout.servers.server import SGLangServer
        from tests.sglang.conftest import settings
        log = Path({str(tmp_path / "log")!r})
        with SGLangServer(Path({str(student_dir)!r}), settings(), log=log) as server:
            print(server.group_id, flush=True)
            time.sleep(600)
    """
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "TMPDIR": scratch},
    )
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    assert len(members(group)) >= 3
    monkeypatch.setattr("tempfile.tempdir", scratch)
    remove_orphans()  # what the next server does: this one is still there
    assert list(Path(scratch).glob("lopd-sglang-*/sglang_loads_*"))
    parent.kill()
    parent.wait()
    assert gone_within(group, BOUND_S)
    remove_orphans()
    os.rmdir(scratch)  # nothing is left in it
