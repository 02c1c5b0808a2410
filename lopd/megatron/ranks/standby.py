"""Ranks that wait: a process that has done their imports before the training is known.

The parent of the ranks owns it. It has a group of its own from its start on, and ends with its
parent like every child of ours. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from lopd.processes import GuardedProcess

# What the process runs.
PROGRAM: tuple[str, ...] = ("-m", "lopd.megatron.ranks.forking")


@dataclass
class WaitingRanks:
    """A process that forks ranks when it is told to (lopd.megatron.ranks.forking)."""

    process: GuardedProcess
    # Where its output is read, and where the order is written.
    output: int
    orders: int

    @classmethod
    def start(cls, environment: Mapping[str, str]) -> WaitingRanks:
        """Start it with the environment that its ranks will have, as far as it is known."""
        # Two pipes: one for what the ranks print, and one for the order that they wait for.
        output, write_end = os.pipe()
        read_end, orders = os.pipe()
        try:
            process = GuardedProcess(
                [sys.executable, "-u", *PROGRAM],
                env=environment,
                output=write_end,
                source=read_end,
            )
        except BaseException:
            os.close(output)
            os.close(orders)
            raise
        finally:
            # The child has copies. Each pipe ends only when nobody holds its other end.
            os.close(write_end)
            os.close(read_end)
        return cls(process, output, orders)

    def begin(self, order: bytes) -> None:
        """Tell it what to run. It runs that and ends."""
        # It may have died a moment ago. Then its exit code tells so, as that of ranks that fail.
        with contextlib.suppress(BrokenPipeError), os.fdopen(self.orders, "wb") as pipe:
            pipe.write(order)

    def close(self) -> None:
        """End it without an order."""
        os.close(self.orders)
        self.process.stop(grace_s=0.5)
        os.close(self.output)


class Standby:
    """The ranks that wait in this process, at most one training's."""

    def __init__(self) -> None:
        self._waiting: WaitingRanks | None = None
        self._threads = 0

    def prepare(self, environment: Mapping[str, str], threads: int) -> None:
        """Let ranks with this number of threads wait. It does nothing where they wait already."""
        # The number of threads is fixed when torch is imported, so ranks with another number are of
        # no use.
        if self._waiting is not None and self._threads == threads:
            return
        self.close()
        self._waiting = WaitingRanks.start(environment)
        self._threads = threads

    def take(self, threads: int) -> WaitingRanks | None:
        """Return the ranks that wait, which are the caller's from now on; None: there are none."""
        waiting = self._waiting
        # Ranks that could not do their imports fail again, and the usual start says why.
        if waiting is None or self._threads != threads or waiting.process.poll() is not None:
            return None
        self._waiting = None
        return waiting

    def close(self) -> None:
        """End the ranks that wait."""
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None


# One for the process: whoever starts ranks takes those that wait (run_ranks), and does not have to
# know who has prepared them.
STANDBY = Standby()
