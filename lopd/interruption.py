"""Ends a command by Ctrl-C or SIGTERM, also where Python loses the exception that says so.

Python runs a signal handler between two instructions of the main thread. If those belong to a
destructor, or to a callback of the import system, Python prints the exception of the handler and
goes on as if nothing had happened. A bare `except` in a library has the same effect. A run that
imports torch meets such places, and a cluster that ends a job does not send its signal twice.

Within the import system an exception does more harm than to be lost. Raised between the call that
takes the lock of all imports and the block that gives it back, it leaves the lock taken, and every
other thread that imports something waits for ever. So nothing is raised there.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

# The shell's exit code for a process that SIGINT ended is 128 + 2.
INTERRUPTED_CODE = 130
# Servers and ranks get some seconds each to end by themselves. Several of them end one by one.
END_WITHIN_S = 60.0
_LOOK_EVERY_S = 0.2
# The file name of the code of Python's import system that takes and gives back its locks.
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"


class Interrupted(BaseException):
    """The user pressed Ctrl-C, or the process received SIGTERM.

    This is no KeyboardInterrupt. typer would handle that one and exit before the servers and the
    ranks are ended.
    """


class Interruption:
    """Raises Interrupted in the main thread on a signal, and sees that the process ends."""

    def __init__(self, end_within_s: float = END_WITHIN_S) -> None:
        """
        Args:
            end_within_s: Seconds from the first signal until the process ends at the latest.
        """
        self._end_within_s = end_within_s
        self._in_flight: weakref.ref[Interrupted] | None = None
        self._is_watched = False
        self._is_ending = False

    def install(self) -> None:
        """Handle Ctrl-C and SIGTERM from now on. Only the main thread may call this."""
        # Clusters end a job with SIGTERM. It must end servers and ranks as Ctrl-C does.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        sys.unraisablehook = _without_interrupted(sys.unraisablehook)

    def ends(self) -> None:
        """Note that the command ends now, so that a signal has nothing more to say."""
        self._is_ending = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_ending:
            return
        if not self._is_watched:
            self._is_watched = True
            # Not threading.Thread: the main thread may hold one of that module's locks just now.
            _thread.start_new_thread(self._watch, (number,))
        if frame is not None and frame.f_code.co_filename == _IMPORT_SYSTEM:
            # The watching thread sends the signal again, unless an interruption is on its way.
            return
        error = Interrupted()
        # An exception lives as long as it is on its way up. One that was lost is freed.
        self._in_flight = weakref.ref(error)
        try:
            raise error
        finally:
            # Its traceback holds this frame. With this name the two would keep each other alive.
            del error

    def _watch(self, number: int) -> None:
        deadline = time.monotonic() + self._end_within_s
        main = threading.main_thread().ident
        assert main is not None, "the main thread has begun"
        while time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
            is_lost = self._in_flight is None or self._in_flight() is None
            if is_lost and not self._is_ending:
                signal.pthread_kill(main, number)
        # Not sys.exit: the end that hangs would hang again. The guards of servers and ranks end
        # them when this process is gone (lopd.processes).
        sys.stderr.write(
            f"lopd: interrupted; ended at once, because the orderly end took longer than "
            f"{self._end_within_s:.0f} s\n"
        )
        sys.stderr.flush()
        os._exit(INTERRUPTED_CODE)


def _without_interrupted(former: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a hook that prints no lost Interrupted, because it is raised again."""

    def hook(lost: Any) -> None:
        if not isinstance(lost.exc_value, Interrupted):
            former(lost)

    return hook


# One for the process, because a signal has one handler.
INTERRUPTION = Interruption()
