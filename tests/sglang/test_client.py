"""The engine's contract, with a fake server and the real one, and its failures, with the fake."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lopd.config import SGLangSection
from lopd.errors import ConfigError, DataError, EngineError
from sglang_rollout.requests import connections
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.sampling import SamplingRequest
from sglang_rollout.requests.scoring import ScoreRequest
from sglang_rollout.requests.streaming import pulled_ahead
from tests.models import VOCAB_SIZE
from tests.sglang.conftest import sampling, sampling_requests
from tests.sglang.fake_server import KEY, LOGPROB, STOP_ID, FakeServer, reserved_port

STOPS = (STOP_ID,)
# for what takes milliseconds, on a machine with much else to do; without a bound it would take for
# ever
AT_ONCE_S = 60.0


@pytest.fixture(params=["fake", "real"])
def any_engine(request: pytest.FixtureRequest) -> SGLangEngine:
    """The same tests against the fake and the real server."""
    if request.param == "fake":
        fake: FakeServer = request.getfixturevalue("fake")
        fake.delay_s = 0.002
        return fake.engine(max_in_flight=8)
    real: SGLangEngine = request.getfixturevalue("engine")
    return SGLangEngine(
        real.url,
        real.server.api_key,
        real.settings.model_copy(update={"max_in_flight": 8}),
        server=real.server,
    )  # type: ignore[union-attr]


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_BACKOFF_S", 0.01)


# ---- the contract, fake and real ----


def test_each_request_is_answered_once_and_never_more_are_open_than_allowed(
    any_engine: SGLangEngine,
) -> None:
    pulled = answered = most = 0

    def requests() -> Iterator[SamplingRequest]:
        nonlocal pulled, most
        for request in sampling_requests(60):
            pulled += 1
            most = max(most, pulled - answered)
            yield request

    keys = []
    for response in any_engine.generate(
        requests(), sampling(max_new_tokens=8, stop_token_ids=STOPS)
    ):
        answered += 1
        keys.append(response.key)
    assert sorted(keys) == sorted(request.key for request in sampling_requests(60))
    assert most == any_engine.settings.max_in_flight + pulled_ahead(
        any_engine.settings.max_in_flight
    )


def test_order_and_company_of_requests_do_not_change_a_response(any_engine: SGLangEngine) -> None:
    requests = sampling_requests(24)
    params = sampling(max_new_tokens=8, stop_token_ids=STOPS)
    forward = {
        response.key: response.token_ids.tolist()
        for response in any_engine.generate(requests, params)
    }
    backward = {
        response.key: response.token_ids.tolist()
        for response in any_engine.generate(reversed(requests[:12]), params)
    }
    assert backward == {key: forward[key] for key in backward}


def test_scores_come_for_each_response_in_any_order(any_engine: SGLangEngine) -> None:
    items = [
        ScoreRequest(r.prompt_id, r.sample_index, r.prompt_ids[:6], r.prompt_ids[6:])
        for r in sampling_requests(30)
    ]
    scores = {score.key: score for score in any_engine.score(items, vocab_size=VOCAB_SIZE)}
    assert scores.keys() == {item.key for item in items}
    assert all(len(scores[item.key].teacher_logprobs) == len(item.token_ids) for item in items)


def test_leaving_early_frees_the_server_for_the_next_stream(any_engine: SGLangEngine) -> None:
    results = any_engine.generate(
        sampling_requests(40), sampling(max_new_tokens=40, stop_token_ids=STOPS)
    )
    next(results)
    began = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert (
        len(
            list(
                any_engine.generate(
                    sampling_requests(3), sampling(max_new_tokens=4, stop_token_ids=STOPS)
                )
            )
        )
        == 3
    )
    assert time.monotonic() - began < AT_ONCE_S
    assert not any(thread.name == "sglang-requests" for thread in threading.enumerate())


def test_no_requests_give_no_responses(any_engine: SGLangEngine) -> None:
    assert list(any_engine.generate([], sampling())) == []
    assert list(any_engine.score([], vocab_size=VOCAB_SIZE)) == []


def test_a_prompt_that_fills_the_context_is_named(any_engine: SGLangEngine) -> None:
    with pytest.raises(
        DataError, match="prompt p0 has 128 tokens, so no token is left for a response"
    ):
        list(any_engine.generate(sampling_requests(1, prompt_len=128), sampling()))


def test_a_response_is_cut_where_the_context_ends_and_says_so(any_engine: SGLangEngine) -> None:
    requests = sampling_requests(8, prompt_len=126)
    responses = list(
        any_engine.generate(requests, sampling(max_new_tokens=40, stop_token_ids=STOPS))
    )
    cut = [response for response in responses if response.finish_reason == "length"]
    assert len(responses) == 8
    assert len(cut) >= 6  # one or the other may have ended by itself
    assert {len(response.prompt_ids) + len(response.token_ids) for response in cut} == {
        any_engine.settings.context_length
    }


def test_without_the_key_nothing_is_answered(any_engine: SGLangEngine) -> None:
    stranger = SGLangEngine(any_engine.url, "another-key", any_engine.settings)
    with pytest.raises(EngineError, match=r"401.*remedy: the key is not this server's"):
        list(stranger.generate(sampling_requests(1), sampling()))
    with pytest.raises(EngineError, match="401"):
        stranger.model_info()


def test_an_unknown_path_is_explained(any_engine: SGLangEngine) -> None:
    with pytest.raises(EngineError, match="/no_such_path was refused with HTTP 404"):
        any_engine.call("POST", "/no_such_path", {})


# ---- failures, on the fake ----


def test_the_fake_is_asked_for_as_many_at_once_as_allowed_and_no_more(fake: FakeServer) -> None:
    fake.answering.clear()
    with ThreadPoolExecutor(1) as pool:
        params = sampling(stop_token_ids=STOPS)
        responses = pool.submit(
            lambda: list(fake.engine(max_in_flight=20).generate(sampling_requests(60), params))
        )
        fake.until_open(20)
        fake.answering.set()
        assert len(responses.result()) == 60
    assert fake.most_at_once == 20


@pytest.mark.parametrize("failure", [500, 503, 429, 0])
def test_a_transient_failure_is_repeated_and_leaves_no_trace(
    fake: FakeServer, failure: int
) -> None:
    params = sampling(stop_token_ids=STOPS)
    expected = {
        response.key: response.token_ids.tolist()
        for response in fake.engine().generate(sampling_requests(10), params)
    }
    fake.failures = [failure] * 3
    responses = list(fake.engine(retries=3).generate(sampling_requests(10), params))
    assert len(responses) == 10
    assert {response.key: response.token_ids.tolist() for response in responses} == expected
    assert len(fake.paths("/generate")) == 10 + 13


def test_failures_beyond_retries_name_the_request_and_the_limit(fake: FakeServer) -> None:
    fake.failures = [503] * 100
    with pytest.raises(
        EngineError, match=r"failed 3 times; at last: HTTP 503: as told.*sglang.retries = 2"
    ):
        list(fake.engine(retries=2).generate(sampling_requests(1), sampling(stop_token_ids=STOPS)))
    assert len(fake.paths("/generate")) == 3


def test_a_refusal_is_not_repeated(fake: FakeServer) -> None:
    fake.failures = [400]
    with pytest.raises(EngineError, match="refused with HTTP 400: as told"):
        list(fake.engine().generate(sampling_requests(1), sampling(stop_token_ids=STOPS)))
    assert len(fake.paths("/generate")) == 1


def test_an_aborted_response_is_asked_for_again(fake: FakeServer) -> None:
    aborts = iter([True, False])

    def change(answer: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
        if next(aborts):
            answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "paused"}
        return answer

    fake.change = change
    [response] = fake.engine().generate(sampling_requests(1), sampling(stop_token_ids=STOPS))
    assert response.finish_reason == "stop"


def test_leaving_early_tells_the_server_which_requests_to_forget(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_ABORT_TIMEOUT_S", AT_ONCE_S)
    turn = threading.Lock()

    def change(answer: dict[str, object]) -> dict[str, object]:
        if not turn.acquire(blocking=False):  # all but the first
            left.wait(AT_ONCE_S)
        return answer

    left = threading.Event()
    fake.change = change
    results = fake.engine(max_in_flight=4).generate(
        sampling_requests(40), sampling(stop_token_ids=STOPS)
    )
    next(results)
    while len(fake.paths("/generate")) < 5:  # the one that is done, and four that are open
        time.sleep(0.01)
    results.close()  # type: ignore[attr-defined]
    forgotten = {body["rid"] for body in fake.paths("/abort_request")}
    left.set()
    assert len(forgotten) == 4
    assert forgotten < {body["rid"] for body in fake.paths("/generate")}


def test_a_timeout_is_an_error_within_its_bound(fake: FakeServer) -> None:
    fake.answering.clear()
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"no answer within sglang.request_timeout_s = 0.2"):
        list(
            fake.engine(request_timeout_s=0.2, retries=1).generate(
                sampling_requests(1), sampling(stop_token_ids=STOPS)
            )
        )
    assert time.monotonic() - began < AT_ONCE_S


def test_no_server_there_is_an_error_at_once() -> None:
    with reserved_port() as port:
        with FakeServer(port) as gone:
            engine = gone.engine(retries=1, outage_timeout_s=0.2)
        with pytest.raises(
            EngineError,
            match=r"could not be reached for \d+ s; limit: at most sglang.outage_timeout_s = 0.2",
        ):
            list(engine.generate(sampling_requests(1), sampling()))
        assert not engine.health()


def test_a_server_that_is_away_for_a_while_is_waited_for_and_no_failure_is_counted() -> None:
    turns = itertools.count()
    gone = threading.Event()

    def change(answer: dict[str, object]) -> dict[str, object]:
        if next(turns) >= 5:  # these are lost
            gone.wait(AT_ONCE_S)
        return answer

    with reserved_port() as port:
        with FakeServer(port) as first:
            first.change = change
            results = first.engine(retries=0, max_in_flight=4).generate(
                sampling_requests(40), sampling(stop_token_ids=STOPS)
            )
            keys = [next(results).key for _ in range(5)]
            first.until_open(4)
        gone.set()
        time.sleep(0.3)  # so that somebody looks for it in vain
        with FakeServer(port) as second:
            keys += [response.key for response in results]
            assert sorted(keys) == sorted(request.key for request in sampling_requests(40))
            assert len(second.paths("/generate")) == 35


def test_a_request_that_ends_every_server_it_meets_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "_MAX_OUTAGES", 2)
    given_up = threading.Event()

    def end_at_every_request(port: int) -> None:
        """Run a server that starts for a moment and ends at every request."""
        while not given_up.wait(0.05):
            with FakeServer(port) as server:
                server.failures = [0] * 9
                while not server.calls and not given_up.is_set():
                    time.sleep(0.005)

    with reserved_port() as port:
        thread = threading.Thread(target=end_at_every_request, args=(port,))
        thread.start()
        try:
            engine = SGLangEngine(
                f"http://127.0.0.1:{port}",
                KEY,
                SGLangSection(context_length=128, outage_timeout_s=60, retries=99),
            )
            with pytest.raises(
                EngineError, match=r"request \('p0', 0\) failed \d+ times; at last: "
            ):
                list(engine.generate(sampling_requests(1), sampling(stop_token_ids=STOPS)))
        finally:
            given_up.set()
            thread.join()


def test_min_p_is_refused_before_it_kills_a_deterministic_server(fake: FakeServer) -> None:
    with pytest.raises(ConfigError, match="min_p"):
        list(fake.engine(deterministic=True).generate(sampling_requests(1), sampling(min_p=0.1)))
    assert fake.calls == []
    assert (
        len(
            list(
                fake.engine(deterministic=False).generate(
                    sampling_requests(1), sampling(min_p=0.1, stop_token_ids=STOPS)
                )
            )
        )
        == 1
    )


def test_a_foreign_servers_log_probabilities_are_asked_again_at_temperature_one(
    fake: FakeServer,
) -> None:
    def colder(
        answer: dict[str, dict[str, list[list[float]]]],
    ) -> dict[str, dict[str, list[list[float]]]]:
        for entry in answer["meta_info"]["output_token_logprobs"]:
            entry[0] = -0.1  # as of logits / temperature
        return answer

    fake.change = colder
    engine = fake.engine()
    engine.vocab_size = VOCAB_SIZE
    [warm] = engine.generate(sampling_requests(1), sampling(temperature=1.0, stop_token_ids=STOPS))
    [cold] = engine.generate(sampling_requests(1), sampling(temperature=0.5, stop_token_ids=STOPS))
    np.testing.assert_array_equal(warm.sampling_logprobs, np.float32(-0.1))
    np.testing.assert_array_equal(cold.sampling_logprobs, np.float32(LOGPROB))


@pytest.mark.parametrize("broken", ["meta_info", "everything"])
def test_what_is_no_generation_is_refused(fake: FakeServer, broken: str) -> None:
    fake.change = lambda answer: {"output_ids": [1]} if broken == "meta_info" else {}
    with pytest.raises(EngineError, match="not a generation"):
        list(fake.engine().generate(sampling_requests(1), sampling()))
