"""A line on stderr where a command is silent for seconds, so that nobody takes it for hung."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import Self

# Seconds of silence after which a line says what is being done.
SILENCE_S = 1.5


class Waiting:
    """Says what is being done if it takes long. stdout stays for results."""

    def __init__(self, silence_s: float = SILENCE_S) -> None:
        """Prepare it.

        Args:
            silence_s: Seconds after which a line is printed.
        """
        self._silence_s = silence_s
        self._timer: threading.Timer | None = None

    def begin(self, what: str) -> None:
        """Note what the command waits for from now on. The wait before it has ended."""
        self.end()
        self._timer = threading.Timer(self._silence_s, _say, (what,))
        # A command that ends must not wait for a line that it no longer needs.
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        """Note that the command waits for nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()


def _say(what: str) -> None:
    sys.stderr.write(f"{what} ...\n")
    sys.stderr.flush()
