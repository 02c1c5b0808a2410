"""Start the trainer's ranks on this machine, watch them, and raise the one error that stopped them.

The ranks run under torchrun. This process watches their heartbeats (heartbeats.py), copies their
lines into the log, and ends all of them when one is lost. This module imports no torch, so that
the parent of the ranks stays small.
"""

from __future__ import annotations

import math
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lopd.artifacts import remove_folder
from lopd.config import ForwardSection, TrainSection
from lopd.errors import LopdError, TrainingError
from lopd.megatron.ranks.forking import order_line
from lopd.megatron.ranks.heartbeats import BEAT_S, HEARTBEATS, MISSED_BEATS, HeartbeatMonitor
from lopd.megatron.ranks.lost_nodes import (
    COLLECTIVE,
    ERROR_SUFFIX,
    HEARTBEATS_SUFFIX,
    RESUMES,
    describe_other_nodes,
    remove_reports_of_others,
)
from lopd.megatron.ranks.nodes import ANNOUNCEMENT, NODE, Node, interface_towards, own_address
from lopd.megatron.ranks.rank_errors import ERROR_FILE, read_report
from lopd.megatron.ranks.standby import STANDBY
from lopd.processes import GuardedProcess, die_with_parent, last_lines

# A file beside the log. It tells the other machines where the first one is.
ANNOUNCEMENT_FILE = "first_node.json"
# Seconds that machines wait for each other before the first step. Imports from a busy file system
# take minutes.
JOIN_S = 600.0
# The device files of NVIDIA's and AMD's drivers. They are looked up because this module imports no
# torch that could be asked for a GPU.
_GPUS = ("/dev/nvidiactl", "/dev/kfd")


def run_ranks(
    module: str,
    args: Sequence[str],
    *,
    ranks: int,
    threads_per_rank: int,
    log: Path,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
    node: Node | None = None,
    join: tuple[str, int] | None = None,
) -> None:
    """Run ``python -m module args`` on this many ranks under torchrun until they end.

    All ranks end with this process, whatever ends it. A rank that fails takes the others with it.
    So does a rank that gives no sign of life for timeout_s. Nothing is restarted: the caller runs
    the ranks again from the newest checkpoint.

    Args:
        module: The module that each rank runs.
        args: The command line of the module.
        ranks: The number of ranks, over all machines.
        threads_per_rank: The CPU threads of each rank.
        log: What the ranks write to stdout and stderr is appended to this file.
        timeout_s: The seconds without a heartbeat after which a rank counts as lost.
        env: The environment of the ranks. None: the environment of this process.
        on_line: A function that is called with each line of the ranks' output.
        stop: Another thread sets this event to end all ranks.
        node: This machine, if the training takes several (lopd.megatron.ranks.nodes). Each machine
            runs an equal part of the ranks. The first one announces itself beside the log.
        join: The address and port of the first machine. Every other machine needs them.

    Raises:
        LopdError: The error that a rank reported (see rank_errors.reporting_errors).
        TrainingError: No rank reported an error. The message names the rank that fell silent, or
            quotes the last lines of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    error_file = log.with_name(log.name + ERROR_SUFFIX)
    # An earlier run may have left its error. It must not be taken for the error of this run.
    error_file.unlink(missing_ok=True)
    local_ranks = _local_ranks(ranks, node)
    heartbeats = log.with_name(log.name + HEARTBEATS_SUFFIX)
    monitor = HeartbeatMonitor(heartbeats, local_ranks, timeout_s, error_file)
    command = _torchrun_command(module, args, len(local_ranks), timeout_s, node, join)
    environment = _rank_environment(env, threads_per_rank, error_file, monitor.folder)
    if node is not None:
        environment |= _node_environment(environment, log, node, join)
        # The first machine removes what an earlier run left, before the others can join this one.
        if join is None:
            remove_reports_of_others(log, node)
    # Ranks that wait are of this machine alone, and have done their imports.
    waiting = STANDBY.take(threads_per_rank) if node is None else None
    if waiting is not None:
        waiting.begin(order_line(module, args, ranks, environment))
        output = waiting.output
        process = waiting.process
    else:
        output, process = _start(command, environment)
    code = _run_to_end(output, process, log, monitor, on_line, stop or threading.Event())
    if code != 0:
        raise _failure(code, log, error_file, monitor, node)


def _local_ranks(ranks: int, node: Node | None) -> range:
    """Return the global ranks of this machine. torchrun numbers them machine by machine."""
    if node is None:
        return range(ranks)
    ranks_per_node = ranks // node.count
    return range(ranks_per_node * node.index, ranks_per_node * (node.index + 1))


def _torchrun_command(
    module: str,
    args: Sequence[str],
    num_local_ranks: int,
    timeout_s: float,
    node: Node | None,
    join: tuple[str, int] | None,
) -> list[str]:
    command = [sys.executable, "-m", "lopd.megatron.ranks.torchrun"]
    # torchrun must not restart ranks by itself. They would begin from the same checkpoint, without
    # a line to the user.
    command += [f"--nproc-per-node={num_local_ranks}", "--max-restarts=0"]
    if node is not None:
        command.append(f"--rdzv-conf=timeout={math.ceil(max(timeout_s, JOIN_S))}")
    if join is not None:
        address, port = join
        command += [f"--master-addr={address}", f"--master-port={port}"]
    # Each rank first runs this module, which becomes the wanted module (see _become_rank).
    return [*command, "--module", __name__, module, *args]


def prepare_ranks(settings: TrainSection) -> None:
    """Let ranks of a training do their imports and wait; run_ranks then takes them.

    It does nothing for a training on several machines. Call it only on a machine without GPUs
    (lopd.megatron.ranks.forking).
    """
    if settings.parallel.nodes == 1:
        threads = threads_of(settings)
        STANDBY.prepare(_common_environment(None, threads), threads)


def _rank_environment(
    env: Mapping[str, str] | None, threads_per_rank: int, error_file: Path, heartbeats: Path
) -> dict[str, str]:
    files = {ERROR_FILE: str(error_file), HEARTBEATS: str(heartbeats)}
    return _common_environment(env, threads_per_rank) | files


def _common_environment(env: Mapping[str, str] | None, threads_per_rank: int) -> dict[str, str]:
    """Return what all ranks of this machine have in their environment."""
    environment = dict(os.environ if env is None else env)
    environment |= {
        "OMP_NUM_THREADS": str(threads_per_rank),
        # Ranks of one machine need no other interface, and must not listen on one.
        "GLOO_SOCKET_IFNAME": "lo",
        # A line is on screen as soon as it is written.
        "PYTHONUNBUFFERED": "1",
    }
    # Megatron and torch write about a hundred lines of warnings. The ranks' own lines would be
    # lost among them.
    environment.setdefault("PYTHONWARNINGS", "ignore")
    on_gpu = any(Path(device).exists() for device in _GPUS)
    return {**device_environment(on_gpu=on_gpu), **environment}


def _node_environment(
    environment: Mapping[str, str], log: Path, node: Node, join: tuple[str, int] | None
) -> dict[str, str]:
    """Return the variables that ranks need in addition where there are several machines."""
    # gloo and NCCL must use the interface by which the machines reach each other. Their own choice
    # may be another one, for example a bridge of Docker.
    interface = interface_towards(own_address(environment) if join is None else join[0])
    return {
        NODE: node.text,
        ANNOUNCEMENT: str(log.with_name(ANNOUNCEMENT_FILE)),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": environment.get("NCCL_SOCKET_IFNAME", interface),
    }


def device_environment(*, on_gpu: bool) -> dict[str, str]:
    """Return the variables of a rank that depend on the device. Values set by the user win."""
    # Megatron-Core starts an exchange between tensor ranks and then a product that is to run at
    # the same time. With one connection a GPU runs kernels in the order in which they are called.
    # With more the product may take the GPU first, and nothing overlaps. GPUs newer than Hopper do
    # not need this. Only Megatron's FSDP wants another value, and lopd.megatron.model.overrides
    # refuses FSDP.
    if on_gpu:
        return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    # On a CPU nothing of Megatron's is compiled. To import the compiler takes a second a rank.
    return {"TORCHDYNAMO_DISABLE": "1"}


def threads_of(settings: TrainSection | ForwardSection) -> int:
    """Return the CPU threads of a rank.

    The knob threads_per_rank wins. Without it a rank has one thread. If the CPU updates the weights
    (optimizer_cpu_offload), a rank has its share of the cores of this machine.
    """
    if settings.threads_per_rank is not None:
        return settings.threads_per_rank
    if not (isinstance(settings, TrainSection) and settings.megatron.get("optimizer_cpu_offload")):
        return 1
    # One thread updates about 2.7e8 weights a second (docs/plan.md). With one thread a step of a
    # large model would wait for the update.
    ranks_per_node = settings.parallel.ranks // settings.parallel.nodes
    return max(1, len(os.sched_getaffinity(0)) // ranks_per_node)


def _start(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, GuardedProcess]:
    """Start torchrun, and return where its output is read."""
    read_end, write_end = os.pipe()
    try:
        return read_end, GuardedProcess(command, env=environment, output=write_end)
    except BaseException:
        os.close(read_end)
        raise
    finally:
        # The child has a copy. The pipe ends only when nobody holds this end any more.
        os.close(write_end)


def _run_to_end(
    output: int,
    process: GuardedProcess,
    log: Path,
    monitor: HeartbeatMonitor,
    on_line: Callable[[str], None] | None,
    stop: threading.Event,
) -> int:
    """Copy the lines of the ranks to the log and to on_line, and return the exit code."""
    try:
        with log.open("ab") as log_file:
            for line in _output_lines(output, process, monitor, stop):
                log_file.write(line)
                # Flushed at once, because the log is read when this process is killed.
                log_file.flush()
                if on_line is not None:
                    on_line(line.decode("utf-8", "replace").rstrip())
            return process.wait()
    finally:
        # on_line may raise, and so does a KeyboardInterrupt: no rank may stay behind.
        process.stop()
        os.close(output)
        remove_folder(monitor.folder)


def _output_lines(
    pipe: int, process: GuardedProcess, monitor: HeartbeatMonitor, stop: threading.Event
) -> Iterator[bytes]:
    """Yield the lines that the ranks write, until the ranks have ended.

    All ranks are ended when one has fallen silent, or when stop is set.
    """
    rest = b""
    has_ended = False
    while True:
        # At most half a second, so that silence and stop are noticed while nothing is written.
        if select.select([pipe], [], [], 0.5)[0]:
            chunk = os.read(pipe, 65536)
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line + b"\n" for line in lines)
            # An empty chunk is the end of the pipe: nobody holds the other end.
            if not chunk:
                break
        elif has_ended:
            # The ranks have ended, but a process outside their group still holds the pipe: torch's
            # torch_shm_manager has a session of its own and keeps the ranks' stderr. It lives as
            # long as a server has mapped tensors of the ranks, so nobody can wait for it.
            break
        elif process.poll() is not None:
            # torchrun has ended. What is left of its group is ended too. One more round reads what
            # these processes wrote last.
            process.stop()
            has_ended = True
        if monitor.has_silent_rank() or stop.is_set():
            # A rank that waits for a collective cannot end by itself, so a long grace is useless.
            process.stop(grace_s=1.0)
    # The last line may have no end.
    if rest:
        yield rest + b"\n"


def _failure(
    code: int, log: Path, error_file: Path, monitor: HeartbeatMonitor, node: Node | None
) -> LopdError:
    """Return the error that says best why the ranks ended with this exit code."""
    report = read_report(error_file)
    # The rank knows the reason.
    if report is not None and report.where != COLLECTIVE:
        return report
    # Otherwise a rank has only waited for others in vain. The heartbeats tell which one was lost.
    # Where they do not, the report of the waiting rank is better than the end of the log.
    unexplained = TrainingError(
        f"the trainer ended with code {code}: {' | '.join(_last_words(log))}",
        where=str(log),
        remedy=f"read the log; {RESUMES}",
    )
    found = monitor.error(log) or report or unexplained
    if node is None:
        return found
    what = f"{found.what}; {describe_other_nodes(log, node, MISSED_BEATS * BEAT_S)}"
    return TrainingError(what, where=found.where, limit=found.limit, remedy=found.remedy)


def _last_words(log: Path, count: int = 3) -> list[str]:
    """Return the last lines of a log that the ranks wrote themselves."""
    lines = last_lines(log, 200)
    for index, line in enumerate(lines):
        # After a failure torchrun adds a long summary. It begins with a line from this file.
        if "torch/distributed/elastic/multiprocessing/api.py" in line:
            lines = lines[:index] or lines
            break
    return lines[-count:]


def _become_rank(module: str, args: Sequence[str]) -> None:
    """Turn this process into ``python -m module args``."""
    # torchrun puts every rank into a session of its own. The guard ends torchrun's group, and so
    # it does not reach the ranks. The kernel ends them when torchrun ends.
    die_with_parent()
    os.execv(sys.executable, [sys.executable, "-u", "-m", module, *args])


if __name__ == "__main__":
    _become_rank(sys.argv[1], sys.argv[2:])
