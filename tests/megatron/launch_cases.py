"""A rank that fails in one way or another; started by run_ranks, without importing torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lopd.errors import DataError
from lopd.megatron.ranks.heartbeats import HEARTBEATS
from lopd.megatron.ranks.rank_errors import ERROR_FILE, reporting_errors


def train(case: str, timeout_s: float) -> None:
    """Collectives without end over gloo, as a training has them; rank 1 leaves them at the third.
    timeout_s: of a collective.
    """
    from lopd.config import ParallelSection
    from lopd.megatron.ranks import parallel

    # Ranks meet after their imports, which on a busy machine take longer for one than this timeout.
    ready = Path(os.environ[ERROR_FILE]).parent
    (ready / f"ready-{os.environ['RANK']}").touch()
    while len(list(ready.glob("ready-*"))) < 2:
        time.sleep(0.05)
    parallel.initialize(ParallelSection(ranks=2), seed=1, timeout_s=timeout_s)
    for step in range(10):
        if step == 3 and parallel.rank() == 1:
            if case == "absent":
                time.sleep(3600)
            print("rank 1 stops itself")
            os.kill(os.getpid(), signal.SIGSTOP)
        parallel.gather_objects(step)


def main(case: str, timeout_s: float) -> None:
    rank = int(os.environ["RANK"])
    # One write: print would write the end of the line apart, and the other rank's line could come
    # between.
    sys.stdout.write(
        f"rank {rank} of {os.environ['WORLD_SIZE']}, {os.environ['OMP_NUM_THREADS']} threads: "
        f"{os.environ['LOPD_CASE']}\n"
    )
    if case == "works":
        if rank == 0:  # as torch's torch_shm_manager: a session of its own, and the rank's stderr
            subprocess.Popen(["sleep", "3600"], start_new_session=True)
        return
    if case == "slow":
        with reporting_errors():
            time.sleep(8 * rank)
        print(f"rank {rank} is done")
        return
    if case in ("stopped", "absent"):
        # This comes before anybody watches: a library that is being loaded may delay the heartbeat.
        import lopd.megatron.ranks.parallel  # noqa: F401

        with reporting_errors():
            train(case, timeout_s if case == "absent" else 3600)
    if case == "stopped early":
        with reporting_errors():
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            other = Path(os.environ[HEARTBEATS], "1")
            while not (
                other.exists()
                and "State:\tT" in Path(f"/proc/{other.read_text()}/status").read_text()
            ):
                time.sleep(0.1)
            raise RuntimeError("Timed out waiting 4000ms for recv operation to complete")
    if rank == 0:
        time.sleep(3600)  # waits for the other, as in a collective
    if case == "reports":
        with reporting_errors():
            raise DataError(
                "no token carries loss",
                where="batch 3",
                limit="at least 1",
                remedy="drop empty responses",
            )
    if case == "raises":
        raise RuntimeError("gradients of the wrong shape")
    if case == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)  # "waits"


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
