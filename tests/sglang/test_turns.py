"""A response of several turns: its ids only grow, and limits end it with their own reason."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from lopd.errors import DataError, EngineError
from lopd.records import Ints, Response, float32, int32
from sglang_rollout.requests.sampling import SamplingRequest
from sglang_rollout.requests.turns import Turns, sample_turns
from tests.sglang.conftest import sampling, sampling_requests
from tests.sglang.fake_server import STOP_ID, FakeServer

END = 2
REQUEST = SamplingRequest("p", 0, int32([1, 5, 7]), seed=11)
BETWEEN = [7, 30, 31]


@dataclass
class Model:
    """Writes turns of given lengths, each with its number as the token."""

    lengths: list[int]
    versions: list[str] = field(default_factory=lambda: ["v"] * 9)
    requests: list[SamplingRequest] = field(default_factory=list)
    allowed: list[int] = field(default_factory=list)

    async def sample(self, request: SamplingRequest, allowed: int) -> Response:
        number = len(self.requests)
        self.requests.append(request)
        self.allowed.append(allowed)
        length = self.lengths[number]
        is_cut = length > allowed
        tokens = [10 + number] * (allowed if is_cut else length - 1) + [END] * (not is_cut)
        return Response(
            request.prompt_id,
            request.sample_index,
            request.prompt_ids,
            int32(tokens),
            float32([-0.1 * (number + 1)] * len(tokens)),
            "length" if is_cut else "stop",
            self.versions[number],
        )


@dataclass
class Tool:
    """Replies so many times."""

    times: int
    heard: list[list[int]] = field(default_factory=list)

    def reply(self, token_ids: Ints) -> Ints | None:
        self.heard.append(token_ids.tolist())
        return int32(BETWEEN) if len(self.heard) <= self.times else None


def play(model: Model, tool: Tool, max_turns: int = 4, max_new_tokens: int = 64) -> Response:
    turns = Turns(max_turns, lambda request: tool)
    return asyncio.run(sample_turns(REQUEST, turns, max_new_tokens, model.sample))


def test_ids_only_grow_and_only_the_models_carry_loss() -> None:
    model = Model([4, 2, 3])
    tool = Tool(2)
    response = play(model, tool)
    turns = [[10, 10, 10, END], [11, END], [12, 12, END]]
    assert tool.heard == turns, "each turn alone, with its end token"
    assert response.token_ids.tolist() == [*turns[0], *BETWEEN, *turns[1], *BETWEEN, *turns[2]]
    assert response.prompt_ids.tolist() == REQUEST.prompt_ids.tolist()
    assert response.loss_mask is not None
    mask = [*[True] * 4, *[False] * 3, *[True] * 2, *[False] * 3, *[True] * 3]
    assert response.loss_mask.tolist() == mask
    assert response.finish_reason == "stop"
    expected = [*[-0.1] * 4, *[0.0] * 3, *[-0.2] * 2, *[0.0] * 3, *[-0.3] * 3]
    np.testing.assert_allclose(response.sampling_logprobs, expected, rtol=1e-6)
    whole = [*REQUEST.prompt_ids.tolist(), *response.token_ids.tolist()]
    for request in model.requests:
        length = len(request.prompt_ids)
        assert request.prompt_ids.tolist() == whole[:length], "what stands before it, to the id"
        assert request.shared_ids.tolist() == REQUEST.prompt_ids.tolist(), "one server for all"
    assert model.allowed == [64, 64 - 7, 64 - 12]
    seeds = [request.seed for request in model.requests]
    assert seeds[0] == REQUEST.seed
    assert len(set(seeds)) == 3
    again = Model([4, 2, 3])
    play(again, Tool(2))
    assert [request.seed for request in again.requests] == seeds


def test_one_turn_is_the_plain_response_with_a_mask() -> None:
    """All shards of an artifact have one set of columns, also one in which nothing replied."""
    response = play(Model([4]), Tool(0))
    assert response.loss_mask is not None
    assert response.loss_mask.tolist() == [True] * 4
    plain = asyncio.run(sample_turns(REQUEST, None, 64, Model([4]).sample))
    assert plain.loss_mask is None
    assert plain.token_ids.tolist() == response.token_ids.tolist()


def test_the_limit_of_turns_is_no_end() -> None:
    model = Model([4, 2, 3, 3])
    response = play(model, Tool(9), max_turns=2)
    assert len(model.requests) == 2
    assert response.finish_reason == "abort"
    assert len(response.token_ids) == 4 + 3 + 2
    # The control: a tool that has nothing more to say at that moment.
    assert play(Model([4, 2]), Tool(1), max_turns=2).finish_reason == "stop"


@pytest.mark.parametrize(
    ("max_new_tokens", "length", "num_turns"),
    [(4, 4, 1), (7, 4, 1), (8, 8, 2), (9, 9, 2), (12, 9, 2)],
)
def test_the_limit_of_tokens_is_of_the_whole_response(
    max_new_tokens: int, length: int, num_turns: int
) -> None:
    """Turns of 4 and 2 with 3 between them: the second is cut at 8, whole at 9."""
    model = Model([4, 2, 3])
    response = play(model, Tool(2), max_new_tokens=max_new_tokens)
    assert len(response.token_ids) == length
    assert len(model.requests) == num_turns
    assert response.finish_reason == "length"
    assert response.loss_mask is not None
    assert bool(response.loss_mask[-1]), "it ends with a turn"


def test_a_turn_that_was_cut_gets_no_reply() -> None:
    tool = Tool(9)
    response = play(Model([99]), tool)
    assert (response.finish_reason, tool.heard) == ("length", [])


def test_two_turns_of_other_weights_are_refused() -> None:
    with pytest.raises(EngineError, match="a turn is of the weights w"):
        play(Model([4, 2], versions=["v", "w"]), Tool(1))


def test_an_engine_plays_many_dialogues_at_once_and_keeps_them_apart() -> None:
    """Over HTTP; the fake's tokens depend on all that stands before them."""
    requests = sampling_requests(12)
    tools = {request.key: Tool(2) for request in requests}
    turns = Turns(4, lambda request: tools[request.key])
    params = sampling(stop_token_ids=(STOP_ID,), max_new_tokens=32)
    with FakeServer() as fake:
        found = {one.key: one for one in fake.engine().generate(requests, params, turns=turns)}
        bodies = [body["input_ids"] for body in fake.paths("/generate")]
    assert len(bodies) == 3 * len(requests)
    for request in requests:
        response = found[request.key]
        heard = tools[request.key].heard
        assert [len(turn) for turn in heard] == [4, 4, 4]
        expected = [*heard[0], *BETWEEN, *heard[1], *BETWEEN, *heard[2]]
        assert response.token_ids.tolist() == expected
        assert response.finish_reason == "stop"
        own = request.prompt_ids.tolist()
        for asked in (own, own + expected[:7], own + expected[:14]):
            assert asked in bodies


def test_an_error_of_a_tool_ends_the_stream() -> None:
    class Broken:
        def reply(self, token_ids: Ints) -> Ints | None:
            raise DataError("the tool is broken")

    params = sampling(stop_token_ids=(STOP_ID,))
    turns = Turns(4, lambda request: Broken())
    with FakeServer() as fake:
        found = fake.engine().generate(sampling_requests(3), params, turns=turns)
        with pytest.raises(DataError, match="the tool is broken"):
            list(found)


def test_an_earlier_request_is_not_changed() -> None:
    """A record is frozen: later turns are requests of their own."""
    model = Model([4, 2])
    play(model, Tool(1))
    assert replace(model.requests[0]) == model.requests[0]
    assert model.requests[0].first_len is None
    assert model.requests[1].first_len == len(REQUEST.prompt_ids)
