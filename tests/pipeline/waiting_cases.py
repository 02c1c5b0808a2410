"""Two ranks that wait for a refresh for longer than a collective may last; started by run_ranks."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from lopd.megatron.launch import ERROR_FILE, reporting_errors

COLLECTIVE_TIMEOUT_S, REFRESH_S = 2.0, 4.0


def wait(job_file: Path) -> None:
    from lopd.config import ParallelSection
    from lopd.megatron import parallel
    from lopd.stages.batches import Refreshes
    from lopd.stages.training import TrainingJob

    ready = Path(os.environ[ERROR_FILE]).parent  # ranks meet after their imports, which may take longer for one than the timeout
    (ready / f"ready-{os.environ['RANK']}").touch()
    while len(list(ready.glob("ready-*"))) < 2:
        time.sleep(0.02)
    parallel.initialize(ParallelSection(ranks=2), seed=1, timeout_s=COLLECTIVE_TIMEOUT_S)
    job = TrainingJob.from_json(json.loads(job_file.read_text()))
    refreshes = Refreshes(job, {"refresh_due": "2 steps"}, push=lambda step: None)
    samples = refreshes(2, say)
    parallel.gather_objects(len(samples))
    say(f"rank {parallel.rank()} learns from {len(samples)}, due: {refreshes.due}")
    if parallel.rank() == 0:  # the control: as long, but the other rank waits in a collective
        time.sleep(REFRESH_S)
    parallel.gather_objects("late")
    say("waited in a collective")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    with reporting_errors():
        wait(Path(sys.argv[1]))
