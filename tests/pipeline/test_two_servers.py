"""Slow: a refresh by two real SGLang servers of each model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lopd.artifacts import read_manifest
from tests.pipeline.running import lopd

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
REFRESHED = (
    "prompts.sft.num_prompts=64",
    "prompts.opd.num_prompts=96",
    "prompts.eval.num_prompts=16",
    "sft={num_steps=2, batch_size=32, dtype='float32', max_tokens_per_microbatch=8192}",
    (
        "distill={num_steps=3, batch_size=32, dtype='float32', max_tokens_per_microbatch=8192, "
        "sync_every=0, refresh={every=1}}"
    ),
    "rollout.shard_size=16",
)


def test_two_servers_of_sglang_make_what_one_makes(tmp_path: Path) -> None:
    """Two refreshes on real servers: both sample and both score, and every response, score and
    weight is that of one server, to the bit.
    """
    by_two = tmp_path / "two"
    by_one = tmp_path / "one"
    for stage in ("demonstrate", "sft", "rollout", "score"):
        lopd(stage, by_two, REFRESHED)
    shutil.copytree(by_two, by_one)
    lopd("distill", by_two, [*REFRESHED, "sglang.replicas=2"])
    lopd("distill", by_one, REFRESHED)
    refreshes = read_manifest(by_two / "distill").extra["refreshes"]
    assert [(made["step"], made["version"], made["rows"]) for made in refreshes] == [
        (1, "step-1", 32),
        (2, "step-2", 32),
    ]
    assert refreshes == read_manifest(by_one / "distill").extra["refreshes"]
    for role in ("student", "teacher"):
        for replica in (0, 1):
            assert "Prefill batch" in (
                by_two / "distill" / f"sglang-{role}-{replica}.log"
            ).read_text(errors="replace")
    assert (
        read_manifest(by_two / "distill").fingerprint
        == read_manifest(by_one / "distill").fingerprint
    )
