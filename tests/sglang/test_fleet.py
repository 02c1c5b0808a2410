"""Several servers of one model: requests are spread and keep their prefixes together, one that is
away is not asked, and weights go to all.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd.errors import EngineError
from sglang_rollout.requests import connections
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.fleet import SGLangFleet, serve
from sglang_rollout.requests.sampling import SamplingRequest
from sglang_rollout.servers.server import SGLangServer
from sglang_rollout.weight_sync import update_weights_from_disk
from tests.limits import apart, close
from tests.sglang.conftest import sampling, sampling_requests, settings
from tests.sglang.fake_server import STOP_ID, FakeServer, reserved_port
from tests.sglang.test_external import context_of
from tests.sglang.test_restart import scores_of, until

PARAMS = sampling(stop_token_ids=(STOP_ID,))


@pytest.fixture
def fakes() -> Iterator[tuple[FakeServer, FakeServer]]:
    with FakeServer() as first, FakeServer() as second:
        yield first, second


class InTurn:
    """Has fakes answer the request that was sent first, and only while as many are open as can be:
    who gets the next one then depends on nobody's speed.
    """

    def __init__(self, fakes: tuple[FakeServer, ...], *, count: int, at_once: int) -> None:
        self._left = count
        self._at_once = at_once
        self._waiting = set[int]()
        self._changed = threading.Condition()
        for fake in fakes:
            fake.change = self._wait

    def _wait(self, answer: dict[str, Any]) -> dict[str, Any]:
        # Requests are numbered in the order in which they are sent.
        mine = int(answer["meta_info"]["id"].rpartition("-")[2])
        with self._changed:
            self._waiting.add(mine)
            self._changed.notify_all()
            came = self._changed.wait_for(
                lambda: (
                    len(self._waiting) == min(self._at_once, self._left)
                    and min(self._waiting) == mine
                ),
                120,
            )
            assert came, f"{len(self._waiting)} requests are open, {self._left} left"
            self._waiting.remove(mine)
            self._left -= 1
            self._changed.notify_all()
        return answer


def fleet(*fakes: FakeServer, **changes: object) -> SGLangFleet:
    return SGLangFleet([fake.engine(**changes) for fake in fakes])


def asked(fake: FakeServer) -> Counter[tuple[int, ...]]:
    return Counter(tuple(body["input_ids"]) for body in fake.paths("/generate"))


def test_requests_are_spread_and_each_is_answered_once(
    fakes: tuple[FakeServer, FakeServer],
) -> None:
    requests = sampling_requests(100)
    InTurn(fakes, count=100, at_once=2 * 8)
    responses = list(fleet(*fakes).generate(requests, PARAMS))
    assert sorted(response.key for response in responses) == sorted(
        request.key for request in requests
    )
    shares = [sum(asked(fake).values()) for fake in fakes]
    assert sum(shares) == 100
    assert min(shares) > 40


def test_the_samples_of_a_prompt_go_where_its_prefix_is(
    fakes: tuple[FakeServer, FakeServer],
) -> None:
    requests = [
        SamplingRequest(r.prompt_id, index, r.prompt_ids, index)
        for r in sampling_requests(25)
        for index in range(8)
    ]
    InTurn(fakes, count=200, at_once=2 * 16)
    list(fleet(*fakes, max_in_flight=16).generate(requests, PARAMS))
    together = sum(
        max(asked(fakes[0])[prompt], asked(fakes[1])[prompt])
        for prompt in {tuple(r.prompt_ids.tolist()) for r in requests}
    )
    assert together / 200 > 0.85  # by chance it would be 0.64
    assert min(sum(asked(fake).values()) for fake in fakes) > 50


def test_a_busy_server_gets_no_more_for_a_prefixs_sake(
    fakes: tuple[FakeServer, FakeServer],
) -> None:
    one = sampling_requests(1)[0]
    requests = [SamplingRequest("p", index, one.prompt_ids, index) for index in range(60)]
    InTurn(fakes, count=60, at_once=2 * 8)
    list(fleet(*fakes).generate(requests, PARAMS))
    assert min(sum(asked(fake).values()) for fake in fakes) > 15


def test_a_server_that_is_away_is_passed_over(
    fakes: tuple[FakeServer, FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_BACKOFF_S", 0.01)
    with reserved_port() as port:
        with FakeServer(port) as third:
            gone = third.engine(retries=0)
        engine = SGLangFleet([gone, fakes[0].engine(retries=0)])
        responses = list(engine.generate(sampling_requests(40), PARAMS))
    assert len(responses) == 40
    assert sum(asked(fakes[0]).values()) == 40


def test_weights_and_calls_go_to_each(
    fakes: tuple[FakeServer, FakeServer], student_dir: Path
) -> None:
    for fake in fakes:
        fake.model_path = str(student_dir)
    engine = fleet(*fakes)
    update_weights_from_disk(engine, student_dir, version="step-3")
    engine.flush_cache()
    engine.call("POST", "/begin_weight_update", {})
    assert [fake.weight_version for fake in fakes] == ["step-3", "step-3"]
    assert [
        len(fake.paths(path)) for fake in fakes for path in ("/flush_cache", "/begin_weight_update")
    ] == [1, 1, 1, 1]
    assert engine.model_info()["weight_version"] == "step-3"
    assert engine.health()
    fakes[1].refuse_update = "as told"
    with pytest.raises(EngineError, match=f"{fakes[1].url}: .*as told"):
        update_weights_from_disk(engine, student_dir, version="step-4")
    # The update does not wait for this server once the other one has refused.
    until("the other has them", lambda: fakes[0].weight_version == "step-4")
    with pytest.raises(EngineError, match=r"weight version 'step-3', but .* has 'step-4'"):
        engine.model_info()


def test_servers_are_started_at_the_same_time(
    student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start ends once all have begun: one after the other, the first would never."""
    begun = threading.Barrier(3)

    def start(server: SGLangServer) -> SGLangServer:
        begun.wait(60)
        server.port = 10_000 + server.replica
        return server

    monkeypatch.setattr(SGLangServer, "start", start)
    with serve(student_dir, settings(replicas=3), log=tmp_path / "log", name="teacher") as engine:
        assert [one.url[-5:] for one in engine.engines] == ["10000", "10001", "10002"]


# ---- real ones ----


def test_replicas_answer_as_one_server_does_also_when_one_of_them_dies(
    engine: SGLangEngine, student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    requests = sampling_requests(60)
    params = sampling(max_new_tokens=60, stop_token_ids=(2,))
    alone = {
        response.key: response.token_ids.tolist() for response in engine.generate(requests, params)
    }
    context = context_of(tmp_path, student_dir, other_dir, replicas=2, restarts=2, max_in_flight=8)
    with context.serve("teacher", student_dir) as both:
        assert len({one.url for one in both.engines}) == 2
        responses = []
        for number, response in enumerate(both.generate(requests, params)):
            responses.append(response)
            if number == 5:
                second = both.engines[1].server
                assert isinstance(second, SGLangServer)
                os.killpg(second.group_id, signal.SIGKILL)
        assert len(responses) == 60
        assert {response.key: response.token_ids.tolist() for response in responses} == alone
        until(
            "the dead one is back", lambda: second.num_restarts == 1 and second.ready(), seconds=200
        )
    served = context.served["teacher"]  # as it goes into the manifest
    assert [server["num_restarts"] for server in served["servers"]] == [0, 1]
    assert [server["arguments"]["model_path"] for server in served["servers"]] == [
        str(student_dir)
    ] * 2
    assert both.api_key not in json.dumps(served)
    assert len(served["probe"]) == 63
    assert sorted(path.name for path in (tmp_path / "score").glob("*.log")) == [
        "sglang-teacher-0.log",
        "sglang-teacher-1.log",
    ]
    assert "died; its log ends" in (tmp_path / "score" / "log.txt").read_text()


@pytest.mark.slow
def test_both_copies_inside_a_server_get_the_weights(
    student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    with SGLangServer(student_dir, settings(data=2), log=tmp_path / "log") as server:
        engine = SGLangEngine(server.url, server.api_key, server.settings, server=server)
        before = scores_of(engine)
        alone = scores_of(engine)
        update_weights_from_disk(engine, other_dir, version="v2")
        after = scores_of(engine)
    for key, logprobs in before.items():
        close(logprobs, alone[key], abs=1e-5)
        apart(np.abs(logprobs - after[key]).max(), 1e-3)
