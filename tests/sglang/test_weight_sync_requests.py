"""Requests under way while the weights of a real server change: ended first, paused, kept, or
aborted and sent again.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from lopd.records import Response
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.weight_sync import load_folder
from tests.sglang.conftest import sampling
from tests.sglang.test_parity import MAX_DIFFERENCE
from tests.sglang.traffic import PATIENCE_S, Traffic, Turns, number_of, traffic
from tests.sglang.weight_syncing import receiver, send, tensors, worst_difference

AT_ONCE = 8
AFTERWARDS = 8  # requests begun after the last sync
PARAMS = sampling(max_new_tokens=40, stop_token_ids=(2,))


@pytest.fixture(scope="module")
def turns(student_dir: Path, other_dir: Path) -> Turns:
    return Turns(student_dir, other_dir)


def met(
    mode: str, responses: list[Response], version: int, requests: Traffic, turns: Turns
) -> bool:
    """Whether the sync of this version came in the middle of requests. responses: what came after
    it had begun, of requests begun before its end.
    """
    if mode == "finish":
        # The sync has waited for such a response.
        return any(turns.version(response) == version - 1 for response in responses)
    if mode == "abort":
        return any(requests.attempts[number_of(response)] > 1 for response in responses)
    return any(
        turns.version(response) == version and not turns.pure(response) for response in responses
    )


@pytest.mark.parametrize(
    ("transport", "mode"),
    [
        ("disk", "finish"),
        ("disk", "pause"),
        ("tensor", "pause"),
        ("tensor", "keep"),
        ("tensor", "abort"),
        ("distributed", "abort"),
    ],
)
def test_requests_under_way(
    transport: str,
    mode: str,
    engine: SGLangEngine,
    turns: Turns,
    student_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights go in, one checkpoint and the other in turns, until a sync has met requests in the
    middle: hardly ever more than once.
    """
    to = receiver(transport, engine, tmp_path, student_dir, running_requests=mode, verify="off")
    few = SGLangEngine(
        engine.url,
        engine.api_key,
        engine.settings.model_copy(update={"max_in_flight": AT_ONCE}),
        server=engine.server,
    )
    deadline = time.monotonic() + PATIENCE_S
    with traffic(few, PARAMS, monkeypatch) as requests:
        for version in itertools.count(1):
            requests.until_answered(1)
            named = tensors(turns.folder(version))
            if transport == "disk":  # which asks nothing of the server before commit
                to.begin(f"v{version}")
                to.receive(named)
            answered = len(requests.seen()[1])
            if transport == "disk":
                to.commit()
            else:
                send(to, f"v{version}", named)
            begun = requests.seen()[0]
            requests.until_answered(begun)
            between = [
                response
                for response in requests.seen()[1][answered:]
                if number_of(response) < begun
            ]
            if met(mode, between, version, requests, turns):
                break
            assert time.monotonic() < deadline, "no sync has met a request"
        everything = requests.end(more=AFTERWARDS)
    # Each request was answered exactly once.
    assert sorted(number_of(response) for response in everything) == list(range(requests.seen()[0]))
    # No response has a version that is called incomplete.
    assert {turns.version(response) for response in everything} <= set(range(version + 1))
    later = [response for response in everything if number_of(response) >= begun]
    assert len(later) >= AFTERWARDS
    assert {turns.version(response) for response in later} == {version}
    assert all(turns.pure(response) for response in later)
    assert worst_difference(engine, turns.folder(version)) <= MAX_DIFFERENCE
    mixed = [response for response in between if not turns.pure(response)]
    # Each mode is the control of the others: the check can see a mixture.
    assert bool(mixed) == (mode in ("pause", "keep"))
    for response in mixed:
        place = turns.num_before(response)
        assert 0 < place < len(response.token_ids)
        assert turns.version(response) == version
        # With "keep", the server goes on reading the old keys and values.
        assert turns.pure_from(response, place) == (mode == "pause")
    load_folder([engine], student_dir, "default")
