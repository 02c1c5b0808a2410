"""Top-p, top-k and min-p reach the engine: on a real server, by the places of the sampled tokens
among the likeliest.
"""

from __future__ import annotations

import numpy as np
import pytest

from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.sampling import generate_payload
from sglang_rollout.requests.scoring import ScoreRequest
from tests.models import VOCAB_SIZE
from tests.sglang.conftest import sampling, sampling_requests

LIKELIEST = 8


def test_every_limit_is_sent() -> None:
    params = sampling(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, stop_token_ids=(2, 3))
    sent = generate_payload(sampling_requests(1)[0], params, 11, "name")["sampling_params"]
    expected = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "max_new_tokens": 11,
        "stop_token_ids": [2, 3],
    }
    assert {name: sent[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("limit", "most"), [({"top_k": 1}, 1), ({"top_k": 5}, 5), ({"top_p": 0.05}, 4), ({}, LIKELIEST)]
)
def test_sampled_tokens_are_among_the_likeliest(
    engine: SGLangEngine, limit: dict[str, float], most: int
) -> None:
    """The control is without a limit: then most tokens are not. top_p: the random model's likeliest
    token has about 0.04.
    """
    responses = list(
        engine.generate(
            sampling_requests(12), sampling(max_new_tokens=12, stop_token_ids=(2,), **limit)
        )
    )
    items = [
        ScoreRequest(r.prompt_id, r.sample_index, r.prompt_ids, r.token_ids) for r in responses
    ]
    scores = {
        score.key: score.top
        for score in engine.score(items, vocab_size=VOCAB_SIZE, top_k=LIKELIEST)
    }
    places = []
    for response in responses:
        top = scores[response.key]
        assert top is not None
        found = top.ids == response.token_ids[:, None]  # [R, K]
        places += np.where(found.any(1), found.argmax(1), LIKELIEST).tolist()
    assert len(places) > 100
    if limit:
        assert max(places) < most
        assert max(places) > 0 or most == 1
    else:
        assert np.mean(np.array(places) == LIKELIEST) > 0.5
