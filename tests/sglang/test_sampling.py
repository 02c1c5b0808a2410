"""Requests and answers of sampling and scoring, without a server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lopd.errors import DataError, EngineError
from lopd.records import int32, token_hash
from sglang_rollout.requests.sampling import (
    SamplingRequest,
    new_tokens_allowed,
    read_response,
    request_seed,
)
from sglang_rollout.requests.scoring import ScoreRequest, check_scorable, read_scores
from tests.sglang.conftest import sampling

REQUEST = SamplingRequest("p", 0, int32([5, 6, 7]), seed=1)


def answer(ids: list[int], logprobs: list[float | None], reason: dict[str, Any]) -> dict[str, Any]:
    entries = [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)]
    return {
        "output_ids": ids,
        "meta_info": {
            "output_token_logprobs": entries,
            "finish_reason": reason,
            "weight_version": "v3",
        },
    }


def echo(ids: list[int], logprobs: list[float | None]) -> dict[str, Any]:
    return {
        "meta_info": {
            "input_token_logprobs": [
                [logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)
            ]
        }
    }


def test_a_seed_depends_on_run_prompt_sample_and_purpose_and_on_nothing_else() -> None:
    seed = request_seed(17, "p1", 0, "rollout")
    assert seed == request_seed(17, "p1", 0, "rollout")
    others = {
        request_seed(18, "p1", 0, "rollout"),
        request_seed(17, "p2", 0, "rollout"),
        request_seed(17, "p1", 1, "rollout"),
        request_seed(17, "p1", 0, "eval"),
    }
    assert len(others | {seed}) == 5


def test_seeds_are_31_bit_and_do_not_collide_in_a_large_run() -> None:
    seeds = {
        request_seed(0, f"prompt-{prompt}", sample, "rollout")
        for prompt in range(5000)
        for sample in range(4)
    }
    assert min(seeds) >= 0
    assert max(seeds) < 2**31
    assert len(seeds) > 20_000 - 3  # by chance 0.1 pairs of 20,000 fall together


def test_sample_and_prompt_do_not_run_into_each_other() -> None:
    assert request_seed(1, "1", 11, "x") != request_seed(1, "11", 1, "x")


def test_new_tokens_are_reduced_to_what_the_context_has_left() -> None:
    assert new_tokens_allowed(REQUEST, sampling(max_new_tokens=40), context_length=128) == 40
    assert new_tokens_allowed(REQUEST, sampling(max_new_tokens=40), context_length=20) == 20 - 3


@pytest.mark.parametrize("prompt", [[], list(range(4, 30))])
def test_a_prompt_that_is_empty_or_fills_the_context_is_named(prompt: list[int]) -> None:
    with pytest.raises(DataError, match="prompt p9 has"):
        new_tokens_allowed(
            SamplingRequest("p9", 0, int32(prompt), 0), sampling(), context_length=20
        )


def test_the_end_token_is_part_of_the_response() -> None:
    response = read_response(
        REQUEST,
        sampling(),
        40,
        answer([8, 9, 2], [-1.0, -2.0, -3.0], {"type": "stop", "matched": 2}),
    )
    assert response.token_ids.tolist() == [8, 9, 2]
    assert response.sampling_logprobs.tolist() == [-1.0, -2.0, -3.0]
    assert (response.finish_reason, response.weight_version) == ("stop", "v3")


def test_a_truncated_response_is_marked_and_has_no_end_token() -> None:
    response = read_response(
        REQUEST, sampling(), 2, answer([8, 9], [-1.0, -2.0], {"type": "length", "length": 2})
    )
    assert (response.finish_reason, response.token_ids.tolist()) == ("length", [8, 9])


def test_a_response_cut_before_its_limit_is_refused() -> None:
    with pytest.raises(EngineError, match="max_total_tokens"):
        read_response(
            REQUEST, sampling(), 40, answer([8, 9], [-1.0, -2.0], {"type": "length", "length": 2})
        )


def test_ids_that_differ_from_those_of_the_log_probabilities_are_refused() -> None:
    broken = answer([8, 9, 2], [-1.0, -2.0, -3.0], {"type": "stop", "matched": 2})
    broken["output_ids"] = [8, 8, 2]
    with pytest.raises(EngineError, match="p#0"):
        read_response(REQUEST, sampling(), 40, broken)


def test_scores_carry_the_hash_of_exactly_these_ids() -> None:
    request = ScoreRequest("p", 4, int32([5, 6, 7]), int32([8, 9]))
    scores = read_scores(request, echo([7, 8, 9], [None, -1.0, -2.0]), vocab_size=512)
    assert scores.key == ("p", 4)
    assert scores.token_hash == token_hash(int32([5, 6, 7]), int32([8, 9]))
    assert scores.token_hash != token_hash(int32([5, 6]), int32([7, 8, 9]))
    np.testing.assert_array_equal(scores.teacher_logprobs, np.float32([-1.0, -2.0]))


@pytest.mark.parametrize(
    ("returned", "logprobs"),
    [
        pytest.param([7, 8, 10], [None, -1.0, -2.0], id="another token"),
        pytest.param([8, 9], [None, -2.0], id="shifted by one"),
        pytest.param([6, 7, 8, 9], [None, -1.0, -1.0, -2.0], id="one too many"),
        pytest.param([7, 8, 9], [None, None, -2.0], id="null, JSON's NaN"),
        pytest.param([7, 8, 9], [None, 0.5, -2.0], id="positive"),
    ],
)
def test_wrong_scores_are_refused_by_name(
    returned: list[int], logprobs: list[float | None]
) -> None:
    with pytest.raises(EngineError, match="response p#4"):
        read_scores(
            ScoreRequest("p", 4, int32([5, 6, 7]), int32([8, 9])),
            echo(returned, logprobs),
            vocab_size=512,
        )


@pytest.mark.parametrize(("prompt_len", "response_len"), [(0, 3), (3, 0), (10, 11)])
def test_what_cannot_be_scored_is_named(prompt_len: int, response_len: int) -> None:
    check_scorable(
        ScoreRequest("p", 4, int32(range(10)), int32(range(10))), context_length=20, vocab_size=10
    )
    with pytest.raises(DataError, match="response p#4"):
        check_scorable(
            ScoreRequest("p", 4, int32(range(prompt_len)), int32(range(response_len))),
            context_length=20,
            vocab_size=11,
        )


@pytest.mark.parametrize("name", ["prompt", "response"])
def test_a_token_past_the_rows_of_the_served_model_is_named_and_not_sent(name: str) -> None:
    """SGLang gives such an id back as 0, as a server with another model would."""
    ids = int32([1, 7])
    request = ScoreRequest("p", 4, int32([1, 8]) if name == "prompt" else ids, int32([8, 1]))
    check_scorable(request, context_length=20, vocab_size=9)
    with pytest.raises(
        DataError, match=r"token 8 past the rows of the model; limit: at most 7: the served"
    ) as error:
        check_scorable(request, context_length=20, vocab_size=8)
    assert error.value.where == "response p#4"
