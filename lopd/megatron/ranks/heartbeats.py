"""Heartbeats: how the parent notices a rank that is lost without having died.

Such a rank was stopped, swapped out, or hangs in a driver. The other ranks wait for it in a
collective. Two limits bound that wait: the timeout of the collective, and the heartbeat.

A thread of each rank touches a file every second. The parent looks at these files. It ends all
ranks when one file has not changed for ``timeout_s``, and it names the rank. The thread shares
nothing with the training but the interpreter, so it costs a training step nothing.

This module imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from lopd.artifacts import remove_folder
from lopd.errors import TrainingError
from lopd.megatron.ranks.lost_nodes import RESUMES

# Environment variable of a rank: the folder of the heartbeat files. Each rank has one file there.
# The name of the file is the rank, its text is the process id.
HEARTBEATS = "LOPD_HEARTBEATS"
# Seconds between two heartbeats of a rank.
BEAT_S = 1.0
# After another rank has given up, a rank is silent once it has missed this many heartbeats. The
# rank that gave up was waiting for exactly that one, so it is not necessary to wait for timeout_s.
MISSED_BEATS = 5


class HeartbeatMonitor:
    """The parent's view of the heartbeats of the ranks on this machine."""

    def __init__(
        self, folder: Path, ranks: Sequence[int], timeout_s: float, error_file: Path
    ) -> None:
        """Make an empty folder for the heartbeat files.

        Args:
            folder: The folder of the heartbeat files. Its previous content is removed.
            ranks: The global ranks that run on this machine.
            timeout_s: The seconds without a heartbeat after which a rank counts as silent.
            error_file: The file that a rank writes when it gives up (see rank_errors.py).
        """
        self.folder = folder
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._error_file = error_file
        # For each rank: the time of its file, and the time of our own clock when we saw that time.
        # Only the second is compared with now. The clock of a file system may differ from ours.
        self._beats: dict[int, tuple[int, float]] = {}
        # The time of our own clock when we last looked at the files.
        self._looked = 0.0
        # For each silent rank: a sentence with the duration and the state of its process.
        self._silent: dict[int, str] = {}
        remove_folder(folder)
        folder.mkdir(parents=True)

    def has_silent_rank(self) -> bool:
        """Return whether a rank has given no sign of life for too long.

        The limit is timeout_s, or MISSED_BEATS heartbeats once another rank has given up. The
        files are read at most once per BEAT_S, so this may be called in a fast loop.
        """
        now = time.monotonic()
        if now - self._looked < BEAT_S or self._silent:
            return bool(self._silent)
        self._forgive_own_pause(now)
        self._looked = now
        # After an error the ranks are about to end. One that hangs then needs no long patience.
        limit_s = MISSED_BEATS * BEAT_S if self._error_file.exists() else self._timeout_s
        for rank in self._ranks:
            heartbeat = self.folder / str(rank)
            try:
                changed = heartbeat.stat().st_mtime_ns
                state = _process_state(heartbeat.read_text())
            except FileNotFoundError:
                state = None
            # The rank has not begun, has come to its end, or has died. The first two are normal.
            # torchrun notices the third.
            if state is None:
                self._beats.pop(rank, None)
                continue
            before, seen = self._beats.get(rank, (0, now))
            if changed != before:
                self._beats[rank] = (changed, now)
            elif now - seen > limit_s:
                silence = f"rank {rank} gave no sign of life for {now - seen:.0f} s ({state})"
                self._silent[rank] = silence
        return bool(self._silent)

    def _forgive_own_pause(self, now: float) -> None:
        """Do not count the time in which this process did not look at the files."""
        # This process was stopped or busy, or the whole machine slept. The ranks may have been
        # paused as well, and after a sleep this process may run before their next heartbeat. So
        # this time is no evidence against a rank. Two beats are the normal distance of two looks.
        unseen_s = now - self._looked - 2 * BEAT_S
        if unseen_s > 0:
            self._beats = {
                rank: (changed, seen + unseen_s) for rank, (changed, seen) in self._beats.items()
            }

    def error(self, log: Path) -> TrainingError | None:
        """Return the error that names the silent ranks, or None if there are none."""
        if not self._silent:
            return None
        what = "; ".join(self._silent[rank] for rank in sorted(self._silent))
        return TrainingError(
            f"{what}; all ranks were ended",
            where=str(log),
            limit=f"at most timeout_s = {self._timeout_s:g} without a sign of life",
            remedy=f"find out what stopped the rank; {RESUMES}",
        )


def start_heartbeat() -> Path | None:
    """Start the heartbeat thread of this rank.

    Returns:
        The heartbeat file. The caller removes it at the end of the work. None if no parent asked
        for heartbeats.
    """
    folder = os.environ.get(HEARTBEATS)
    if folder is None:
        return None
    path = Path(folder, os.environ["RANK"])
    # With the process id the parent can ask the kernel what a silent rank does.
    path.write_text(str(os.getpid()))

    def beat() -> None:
        # The file is missing when the work is done or when the parent has ended.
        with contextlib.suppress(FileNotFoundError):
            while True:
                os.utime(path)
                time.sleep(BEAT_S)

    # A daemon thread does not keep the process from ending.
    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    return path


def _process_state(process_id: str) -> str | None:
    """Return what the kernel says about a process, or None if the process has ended."""
    try:
        # The name of the program stands in brackets and may hold blanks, so the fields are counted
        # from the last bracket on. The first one is the state, as one letter.
        letter = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None
    # A zombie (Z) or a dead process (X) has ended. Its parent has not taken notice yet.
    if letter in "ZX":
        return None
    words = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a device or disk"}
    return f"process {process_id} is {words.get(letter, 'running')}"
