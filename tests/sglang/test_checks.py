"""The checks of a server's answers: what passes, what is refused, and that errors name the
response.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lopd.errors import EngineError
from lopd.records import float32, int32
from sglang_rollout.requests.checks import (
    POSITIVE_SLACK,
    check_ending,
    check_logprobs,
    check_not_uniform,
    check_returned_ids,
)

KEY = ("prompt-7", 3)


def test_equal_ids_pass_and_one_different_id_is_named_with_its_position() -> None:
    check_returned_ids(KEY, int32([5, 6, 7]), int32([5, 6, 7]))
    with pytest.raises(
        EngineError, match=r"prompt-7#3: the server returned token 9 at position 1 where 6 was sent"
    ):
        check_returned_ids(KEY, int32([5, 6, 7]), int32([5, 9, 7]))


@pytest.mark.parametrize("returned", [[5, 6], [5, 6, 7, 8], []])
def test_another_number_of_ids_is_refused(returned: list[int]) -> None:
    with pytest.raises(EngineError, match="for the 3 it was sent"):
        check_returned_ids(KEY, int32([5, 6, 7]), int32(returned))


def test_only_the_hidden_id_may_come_back_as_zero() -> None:
    check_returned_ids(KEY, int32([5, 511]), int32([5, 0]), hidden_id=511)
    with pytest.raises(EngineError):
        check_returned_ids(KEY, int32([5, 511]), int32([5, 0]))
    with pytest.raises(EngineError):
        check_returned_ids(KEY, int32([5, 510]), int32([5, 0]), hidden_id=511)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.1, 10 * POSITIVE_SLACK])
def test_impossible_log_probabilities_are_refused(value: float) -> None:
    with pytest.raises(EngineError, match=r"prompt-7#3: log-probability .* at token 2"):
        check_logprobs(KEY, float32([-1.0, -2.0, value]))


@pytest.mark.parametrize("value", [0.0, POSITIVE_SLACK / 2, -1e-9, -100.0, -math.inf])
def test_possible_log_probabilities_pass(value: float) -> None:
    check_logprobs(KEY, float32([-1.0, value]))


def test_a_uniform_teacher_is_refused_and_one_confident_token_is_enough_to_pass() -> None:
    uniform = np.full(8, -math.log(512), dtype=np.float32)
    with pytest.raises(EngineError, match="as if the model had no weights"):
        check_not_uniform(KEY, uniform, 512)
    confident = uniform.copy()
    confident[3] = -0.1
    check_not_uniform(KEY, confident, 512)
    check_not_uniform(KEY, uniform, 1000)  # near -ln V of another vocabulary


def test_few_tokens_may_all_lie_near_the_uniform_value() -> None:
    check_not_uniform(KEY, np.full(7, -math.log(512), dtype=np.float32), 512)


def test_stop_must_end_in_the_stop_token_that_matched() -> None:
    assert check_ending(KEY, int32([5, 2]), {"type": "stop", "matched": 2}, (2, 9)) == "stop"
    with pytest.raises(EngineError, match="none of the stop tokens"):
        check_ending(KEY, int32([5, 4]), {"type": "stop", "matched": 4}, (2, 9))
    with pytest.raises(EngineError, match="none of the stop tokens"):
        # The end token was trimmed and is lost.
        check_ending(KEY, int32([5]), {"type": "stop", "matched": 2}, (2, 9))
    with pytest.raises(EngineError):
        check_ending(KEY, int32([]), {"type": "stop", "matched": 2}, (2,))


def test_nan_logits_that_sglang_disguises_as_a_stop_are_refused() -> None:
    with pytest.raises(EngineError, match="NaN happened"):
        check_ending(KEY, int32([5, 2]), {"type": "stop", "matched": "NaN happened"}, (2,))


@pytest.mark.parametrize(
    ("tokens", "expected"), [([5, 6], "length"), ([5, 2], "stop"), ([], "length")]
)
def test_a_response_that_ends_by_itself_at_the_last_allowed_token_is_no_truncation(
    tokens: list[int], expected: str
) -> None:
    assert check_ending(KEY, int32(tokens), {"type": "length", "length": 2}, (2,)) == expected


@pytest.mark.parametrize("reason", [{"type": "abort"}, {"type": "banana"}])
def test_other_finish_reasons_are_refused(reason: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="unknown"):
        check_ending(KEY, int32([5]), reason, (2,))
