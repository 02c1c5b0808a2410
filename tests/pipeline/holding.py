"""``lopd``, all of it real, held where a test wants it: ``python -m tests.pipeline.holding VERB
CONFIG OVERRIDES...``, and the trainer's ranks likewise.

A kill must land in the middle of something. A test that only watches for the moment comes too late
on a busy machine; here the command waits at the moment. LOPD_TEST_HOLDS names a folder with one
file a place, called STAGE-NUMBER. A stage that has published so many shards in all, or whose rank 0
has logged this step, or which sends that bucket of all its weight syncs in place (sync-NUMBER, from
1), writes STAGE-NUMBER.held beside it and goes on when that is removed. Everything else of the
command goes on: servers, heartbeats, what is in flight.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HOLDS = "LOPD_TEST_HOLDS"


def hold(stage: str, number: int) -> None:
    """Waits here if the test says so."""
    place = Path(os.environ[HOLDS], f"{stage}-{number}")
    if place.exists():
        held = place.with_suffix(".held")
        held.touch()
        place.unlink()
        while held.exists():
            time.sleep(0.02)


def hold_after_shards() -> None:
    """From now on, in this process, where the test says so."""
    from lopd.artifacts import ArtifactWriter

    publish = ArtifactWriter.publish_shard

    def publish_and_hold(writer: ArtifactWriter, index: int, table: Any) -> None:
        publish(writer, index, table)
        hold(writer.folder.name, len(writer.published))

    ArtifactWriter.publish_shard = publish_and_hold  # type: ignore[method-assign]


def hold_before_buckets() -> None:
    """Likewise, of the weights that go to a server."""
    from sglang_rollout.weight_sync.in_place import InPlaceReceiver

    receive, sent = InPlaceReceiver.receive, [0]

    def hold_and_receive(receiver: InPlaceReceiver, bucket: Any) -> None:
        sent[0] += 1
        hold("sync", sent[0])
        receive(receiver, bucket)

    InPlaceReceiver.receive = hold_and_receive  # type: ignore[method-assign]


def command() -> None:
    """lopd itself; its ranks run this module too."""
    from lopd import cli
    from lopd.stages import training

    def run_ranks(module: str, arguments: list[str], **about: Any) -> None:
        start("tests.pipeline.holding", [module, *arguments], **about)

    start = training.run_ranks
    hold_after_shards()
    training.run_ranks = run_ranks  # type: ignore[assignment]
    sys.argv[0] = "lopd"
    cli.main()


def rank() -> None:
    """A rank of the module that is named first, which is a stage's file."""
    from lopd.report.metrics import MetricsLog

    log = MetricsLog.train

    def log_and_hold(
        metrics: MetricsLog, stage: str, step: int, figures: Mapping[str, float]
    ) -> None:
        log(metrics, stage, step, figures)
        hold(stage, step)

    MetricsLog.train = log_and_hold  # type: ignore[method-assign]
    hold_before_buckets()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    (rank if "RANK" in os.environ else command)()
