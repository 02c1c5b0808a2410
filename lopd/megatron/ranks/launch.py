"""Starts the trainer's ranks on this machine, watches over them, and brings back the one error that
stopped them. Imports no torch.

A rank that is lost without dying (stopped, swapped out, stuck in a driver) would leave the others
waiting in a collective. Two things bound the wait: the collective's own timeout, and a heartbeat. A
thread of each rank touches a file every second; the parent looks at the files, ends everything when
one has not changed for ``timeout_s``, and says which. The thread shares nothing with the training
but the interpreter, so it costs a step nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from lopd import errors
from lopd.artifacts import remove_folder
from lopd.config import ForwardSection, TrainSection
from lopd.errors import EXIT_CODE, LopdError, TrainingError
from lopd.megatron.ranks.lost_nodes import (
    COLLECTIVE,
    ERROR_SUFFIX,
    HEARTBEATS_SUFFIX,
    forget_others,
    lost_peer,
    state_of_others,
)
from lopd.megatron.ranks.nodes import ANNOUNCEMENT, NODE, Node, interface_towards, own_address
from lopd.processes import GuardedProcess, die_with_parent, last_lines

# environment variable: where a rank leaves the LopdError that ends it, as JSON
ERROR_FILE = "LOPD_ERROR_FILE"
# environment variable: folder in which each rank keeps a file with its process id, touched every
# BEAT_S
HEARTBEATS = "LOPD_HEARTBEATS"
ANNOUNCEMENT_FILE = "first_node.json"  # beside the log: where the first of several machines is
# how long machines wait for each other before the first step: imports from a busy file system take
# minutes
JOIN_S = 600.0
BEAT_S = 1.0
MISSED_BEATS = (
    5  # where another rank has given up, so many missing ones name the rank that it waited for
)
_GPUS = ("/dev/nvidiactl", "/dev/kfd")  # NVIDIA's and AMD's drivers
_AGAIN = "the same command goes on from the newest checkpoint"


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
    """Runs ``python -m module args`` on this many ranks under torchrun until they end; all of them
    end with this process, whatever ends it.

    What they write to stdout and stderr goes to the log (appended) and line by line to on_line.
    env: instead of this process's environment. A rank that fails takes the others with it, and so
    does one that gives no sign of life for timeout_s; nothing is restarted: the caller runs again
    from the newest checkpoint. stop: once it is set, from another thread, all ranks are ended.
    Raises the LopdError that a rank reported (see reporting_errors), else TrainingError: which rank
    fell silent, or the last lines of the log.

    node: this machine of several (lopd.megatron.ranks.nodes), each with an equal part of the ranks;
    the first one announces itself beside the log, another one joins the address and port in join.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    error_file = log.with_name(log.name + ERROR_SUFFIX)
    error_file.unlink(missing_ok=True)
    here = (
        range(ranks)
        if node is None
        else range(ranks // node.count * node.index, ranks // node.count * (node.index + 1))
    )
    watch = _Watch(log.with_name(log.name + HEARTBEATS_SUFFIX), here, timeout_s, error_file)
    command = [
        *(
            sys.executable,
            "-m",
            "lopd.megatron.ranks.torchrun",
            f"--nproc-per-node={len(here)}",
            "--max-restarts=0",
        ),
        *(() if node is None else (f"--rdzv-conf=timeout={math.ceil(max(timeout_s, JOIN_S))}",)),
        *(() if join is None else (f"--master-addr={join[0]}", f"--master-port={join[1]}")),
        *("--module", __name__, module, *args),
    ]
    environment = dict(os.environ if env is None else env)
    environment |= {
        "OMP_NUM_THREADS": str(threads_per_rank),
        # ranks of one machine need no other interface, and must not listen on one
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONUNBUFFERED": "1",  # a line is on screen when it is written
        "PYTHONWARNINGS": environment.get(
            "PYTHONWARNINGS", "ignore"
        ),  # a hundred lines of Megatron's and torch's would bury what the ranks say
        ERROR_FILE: str(error_file),
        HEARTBEATS: str(watch.folder),
    }
    environment = {
        **device_environment(on_gpu=any(Path(device).exists() for device in _GPUS)),
        **environment,
    }
    if node is not None:
        interface = interface_towards(own_address(environment) if join is None else join[0])
        environment |= {
            NODE: node.text,
            ANNOUNCEMENT: str(log.with_name(ANNOUNCEMENT_FILE)),
            "GLOO_SOCKET_IFNAME": interface,
        }
        environment.setdefault("NCCL_SOCKET_IFNAME", interface)
        if join is None:
            forget_others(log, node)
    read_end, write_end = os.pipe()
    try:
        with log.open("ab") as log_file:
            try:
                process = GuardedProcess(command, env=environment, output=write_end)
            finally:
                os.close(write_end)
            try:
                for line in _lines(read_end, process, watch, stop or threading.Event()):
                    log_file.write(line)
                    log_file.flush()
                    if on_line is not None:
                        on_line(line.decode("utf-8", "replace").rstrip())
                code = process.wait()
            finally:
                process.stop()
    finally:
        os.close(read_end)
        remove_folder(watch.folder)
    if code != 0:
        reported = _reported(error_file)
        if reported is not None and reported.where != COLLECTIVE:
            raise reported
        unexplained = TrainingError(
            f"the trainer ended with code {code}: {' | '.join(_telling_lines(log))}",
            where=str(log),
            remedy=f"see the log; {_AGAIN}",
        )
        found = watch.error(log) or reported or unexplained
        if node is not None:
            what = f"{found.what}; {state_of_others(log, node, MISSED_BEATS * BEAT_S)}"
            found = TrainingError(what, where=found.where, limit=found.limit, remedy=found.remedy)
        raise found


def device_environment(*, on_gpu: bool) -> dict[str, str]:
    """Variables of a rank that follow the device; those that the user has set win.

    On a GPU kernels run in the order in which they are called (CUDA_DEVICE_MAX_CONNECTIONS):
    Megatron-Core starts an exchange between tensor ranks and then a product that is to run
    meanwhile, which otherwise may take the GPU first. Newer GPUs than Hopper do not need it. Only
    Megatron's FSDP wants another value, and that is refused (lopd.megatron.model.overrides). On a
    CPU
    nothing of Megatron's is compiled, and to import the compiler takes a rank a second.
    """
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if on_gpu else {"TORCHDYNAMO_DISABLE": "1"}


def threads_of(settings: TrainSection | ForwardSection) -> int:
    """CPU threads of a rank: those of threads_per_rank, else one; but where the CPU updates the
    weights, this rank's share of the cores.

    One thread updates about 2.7e8 weights a second (docs/plan.md), so with one a step of a large
    model would wait for it.
    """
    if settings.threads_per_rank is not None:
        return settings.threads_per_rank
    if not (isinstance(settings, TrainSection) and settings.megatron.get("optimizer_cpu_offload")):
        return 1
    here = settings.parallel.ranks // settings.parallel.nodes
    return max(1, len(os.sched_getaffinity(0)) // here)


class _Watch:
    """The parent's view of the ranks' heartbeats. Reads no clock but its own, and notices a beat by
    a file's change.
    """

    def __init__(
        self, folder: Path, ranks: Sequence[int], timeout_s: float, error_file: Path
    ) -> None:
        self.folder, self._ranks, self._timeout_s, self._error_file = (
            folder,
            ranks,
            timeout_s,
            error_file,
        )
        self._beats: dict[
            int, tuple[int, float]
        ] = {}  # rank: time of the file, and our time when we saw it
        self._looked = 0.0
        self._silent: dict[int, str] = {}  # rank: for how long, and what its process does
        remove_folder(folder)
        folder.mkdir(parents=True)

    def finds_silence(self) -> bool:
        """Whether a rank has given no sign of life for timeout_s; for a few beats, once another has
        given up. Looks at most once per beat.
        """
        now = time.monotonic()
        if now - self._looked < BEAT_S or self._silent:
            return bool(self._silent)
        unseen_s = now - self._looked - 2 * BEAT_S
        if (
            unseen_s > 0
        ):  # this process was stopped, or busy: silence that nobody listened to is nobody's, least of all that of a machine that slept
            self._beats = {
                rank: (changed, seen + unseen_s) for rank, (changed, seen) in self._beats.items()
            }
        self._looked = now
        bound_s = MISSED_BEATS * BEAT_S if self._error_file.exists() else self._timeout_s
        for rank in self._ranks:
            heartbeat = self.folder / str(rank)
            try:
                changed, doing = heartbeat.stat().st_mtime_ns, _doing(heartbeat.read_text())
            except FileNotFoundError:
                doing = None
            if doing is None:  # not begun, at its end, or dead, which is torchrun's to notice
                self._beats.pop(rank, None)
                continue
            before, seen = self._beats.get(rank, (0, now))
            if changed != before:
                self._beats[rank] = (changed, now)
            elif now - seen > bound_s:
                self._silent[rank] = (
                    f"rank {rank} gave no sign of life for {now - seen:.0f} s ({doing})"
                )
        return bool(self._silent)

    def error(self, log: Path) -> TrainingError | None:
        if not self._silent:
            return None
        what = "; ".join(self._silent[rank] for rank in sorted(self._silent))
        return TrainingError(
            f"{what}; all ranks were ended",
            where=str(log),
            limit=f"timeout_s = {self._timeout_s:g}",
            remedy=f"see what held it; {_AGAIN}",
        )


def _doing(process_id: str) -> str | None:
    """What the kernel says of a process; None: there is no such process any more."""
    try:
        letter = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None
    if letter in "ZX":
        return None
    doing = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a device or disk"}.get(
        letter, "running"
    )
    return f"process {process_id} is {doing}"


def _lines(
    pipe: int, process: GuardedProcess, watch: _Watch, stop: threading.Event
) -> Iterator[bytes]:
    """What the ranks write, line by line, until nobody holds the other end of the pipe, or only a
    process outside the ranks' group does: torch's torch_shm_manager has a session of its own, keeps
    the ranks' stderr, and lives as long as a server has tensors of theirs mapped.

    Ends what is left of the group once the command has ended, and all of it when a rank has fallen
    silent or stop is set.
    """
    rest, ended = b"", False
    while True:
        if select.select([pipe], [], [], 0.5)[0]:
            chunk = os.read(pipe, 65536)
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line + b"\n" for line in lines)
            if not chunk:
                break
        elif ended:
            break
        elif process.poll() is not None:
            process.stop()
            ended = True
        if watch.finds_silence() or stop.is_set():
            process.stop(grace_s=1.0)  # waiting for a collective, no rank can end by itself
    if rest:
        yield rest + b"\n"


def _telling_lines(log: Path, count: int = 3) -> list[str]:
    """The last lines of a rank's own words, without what torchrun says after a failure."""
    lines = last_lines(log, 200)
    for index, line in enumerate(lines):
        if "torch/distributed/elastic/multiprocessing/api.py" in line:
            lines = lines[:index] or lines
            break
    return lines[-count:]


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Around a rank's work: gives signs of life, and ends with one line for run_ranks (of several
    ranks' errors the first counts) and exit code 2, without a traceback, where a LopdError comes
    out or a collective has waited longer than its timeout.
    """
    heartbeat = _start_heartbeat()
    try:
        yield
    except LopdError as error:
        _report(error)
    except RuntimeError as error:
        lost = lost_peer(error) if NODE in os.environ else None
        if lost is None and not _is_timeout(error):
            raise
        did = (
            "waited too long for the other ranks"
            if lost is None
            else f"lost its connection to {lost}"
        )
        what = f"rank {os.environ.get('RANK')} {did} ({str(error).strip().splitlines()[0][:200]})"
        _report(
            TrainingError(
                what,
                where=COLLECTIVE,
                limit="timeout_s" if lost is None else "",
                remedy=f"see in the log what the others did; {_AGAIN}",
            )
        )
    if heartbeat is not None:
        heartbeat.unlink(missing_ok=True)


def _start_heartbeat() -> Path | None:
    """None: nobody watches."""
    folder = os.environ.get(HEARTBEATS)
    if folder is None:
        return None
    path = Path(folder, os.environ["RANK"])
    path.write_text(str(os.getpid()))

    def beat() -> None:
        with contextlib.suppress(FileNotFoundError):  # the work is done, or the parent gone
            while True:
                os.utime(path)
                time.sleep(BEAT_S)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    return path


def _is_timeout(error: RuntimeError) -> bool:
    """gloo's and the store's timeouts are RuntimeErrors that only their text tells from others.
    NCCL's watchdog ends the process itself.
    """
    text = str(error).lower()
    return "timed out" in text or "timeout" in text


def _report(error: LopdError) -> NoReturn:
    path = os.environ.get(ERROR_FILE)
    if path is None:
        raise error
    fields = {
        "type": type(error).__name__,
        "what": error.what,
        "where": error.where,
        "limit": error.limit,
        "remedy": error.remedy,
    }
    with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as handle:
        json.dump(fields, handle)
    sys.stderr.write(f"{error}\n")
    sys.stderr.flush()
    os._exit(EXIT_CODE)  # a normal exit would wait for collectives that the other ranks never join


def _reported(error_file: Path) -> LopdError | None:
    try:
        fields = json.loads(error_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    kind = getattr(errors, fields.pop("type"), None)
    if not (isinstance(kind, type) and issubclass(kind, LopdError)):
        kind = TrainingError
    return kind(fields.pop("what"), **fields)


def _become_rank(module: str, args: Sequence[str]) -> None:
    """Turns this process into ``python -m module args``, to end when torchrun does: torchrun puts
    every rank into a session of its own, out of reach of the guard that ends torchrun's group.
    """
    die_with_parent()
    os.execv(sys.executable, [sys.executable, "-u", "-m", module, *args])


if __name__ == "__main__":
    _become_rank(sys.argv[1], sys.argv[2:])
