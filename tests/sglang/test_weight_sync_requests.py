"""Requests under way while the weights of a real server change: ended first, paused, kept, or aborted and sent again."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from lopd.records import Response
from sglang_rollout.client import SGLangEngine
from sglang_rollout.weight_sync import load_folder
from tests.sglang.conftest import sampling, sampling_requests
from tests.sglang.test_parity import MAX_DIFFERENCE
from tests.sglang.weight_syncing import receiver, send, tensors, worst_difference

COUNT = 32


def running(engine: SGLangEngine) -> tuple[threading.Thread, list[Response]]:
    """Long requests under way; the list fills as they end."""
    done: list[Response] = []
    params = sampling(max_new_tokens=110, stop_token_ids=(2,))
    thread = threading.Thread(target=lambda: done.extend(engine.generate(sampling_requests(COUNT), params)))
    thread.start()
    time.sleep(0.25)  # of a second or more: they are being decoded
    return thread, done


@pytest.mark.parametrize(
    ("transport", "mode"), [("disk", "finish"), ("disk", "pause"), ("tensor", "pause"), ("tensor", "keep"), ("tensor", "abort"), ("distributed", "abort")]
)
def test_requests_under_way(transport: str, mode: str, engine: SGLangEngine, student_dir: Path, other_dir: Path, tmp_path: Path) -> None:
    to = receiver(transport, engine, tmp_path, student_dir, running_requests=mode, verify="off")
    if transport == "disk":  # which asks nothing of the server before commit
        to.begin("new")
        to.receive(tensors(other_dir))
    thread, done = running(engine)
    assert thread.is_alive(), "the requests ended too soon to tell anything"
    ended_before = len(done)
    if transport == "disk":
        to.commit()
    else:
        send(to, "new", tensors(other_dir))
    ended_by_commit = len(done)
    thread.join(60)
    assert not thread.is_alive()
    assert sorted(response.prompt_id for response in done) == sorted(f"p{index}" for index in range(COUNT))  # each exactly once
    assert worst_difference(engine, other_dir) <= MAX_DIFFERENCE
    if mode == "finish":
        assert ended_by_commit == COUNT
    else:
        assert ended_before < COUNT
        assert {response.weight_version for response in done[ended_by_commit:]} == {"new"}
    load_folder([engine], student_dir, "default")
