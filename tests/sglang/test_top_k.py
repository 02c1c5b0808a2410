"""The teacher's top-K as SGLang gives it is that of transformers' full distributions; what
contradicts itself is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lopd.errors import EngineError
from lopd.records import TAIL_FLOOR, int32
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.scoring import ScoreRequest, read_scores, score_payload
from tests.limits import apart, within
from tests.models import VOCAB_SIZE

K = 8
TOLERANCE = 1e-4


def requests() -> list[ScoreRequest]:
    rng = np.random.default_rng(9)
    return [
        ScoreRequest(
            f"p{index}",
            0,
            int32(rng.integers(4, VOCAB_SIZE, 5 + index)),
            int32(rng.integers(4, VOCAB_SIZE, 20 + index)),
        )
        for index in range(6)
    ]


@torch.no_grad()
def dense(folder: Path, request: ScoreRequest) -> torch.Tensor:
    """log p of every token at each place of the response, [R, V]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    ids = torch.from_numpy(
        np.concatenate([request.prompt_ids, request.token_ids]).astype(np.int64)
    )[None]
    return torch.log_softmax(model(ids).logits[0, len(request.prompt_ids) - 1 : -1].double(), -1)


def test_against_full_distributions(engine: SGLangEngine, student_dir: Path) -> None:
    wanted = {request.key: request for request in requests()}
    scores = list(engine.score(wanted.values(), top_k=K))
    assert len(scores) == len(wanted)
    for score in scores:
        full = dense(student_dir, wanted[score.key])
        expected, ids = full.topk(K, -1)
        assert score.top is not None
        within(np.abs(score.top.logprobs - expected.numpy()).max(), TOLERANCE)
        own = full.gather(1, torch.from_numpy(score.top.ids).long()).numpy()
        within(np.abs(score.top.logprobs - own).max(), TOLERANCE, "ids and values belong together")
        assert (score.top.ids == ids.numpy()).mean() > 0.99, "ties apart"
        tail = (1 - expected.exp().sum(-1)).clamp(min=TAIL_FLOOR).log().numpy()
        within(np.abs(score.top.tail_logprob - tail).max(), 1e-3)
        shifted = np.abs(score.top.logprobs[1:] - expected.numpy()[:-1]).max()
        apart(shifted, 100 * TOLERANCE, "another place's values are far off")
    plain = {score.key: score for score in engine.score(wanted.values())}
    assert all(plain[score.key].top is None for score in scores)
    assert all(
        np.abs(plain[score.key].teacher_logprobs - score.teacher_logprobs).max() < TOLERANCE
        for score in scores
    )


def answer(request: ScoreRequest, top: list[Any]) -> dict[str, Any]:
    entries = [
        [None, int(request.prompt_ids[-1]), None],
        *([-1.5, int(token), None] for token in request.token_ids),
    ]
    return {"meta_info": {"input_token_logprobs": entries, "input_top_logprobs": [None, *top]}}


def test_what_the_server_must_not_say() -> None:
    request = ScoreRequest("p0", 0, int32([5]), int32([7, 8]))
    assert score_payload([request], ["a"], 2)["top_logprobs_num"] == 2
    assert "top_logprobs_num" not in score_payload([request], ["a"])
    good = [[[-0.5, 9, None], [-1.5, 7, None]], [[-1.0, 3, None], [-1.5, 8, None]]]
    scores = read_scores(request, answer(request, good), 32, 2)
    assert scores.top is not None
    assert scores.top.ids.tolist() == [[9, 7], [3, 8]]
    for wrong, message in (
        (good[:1], "the top 2 for only 1 of 2 tokens"),
        ([good[0], [[-1.0, 3, None]]], "the top 2 for only 1 of 2 tokens"),
        (
            [good[0], [[-1.0, 3, None], [-1.7, 8, None]]],
            "the log-probabilities of the same tokens do not agree",
        ),
        ([good[0], [[-1.5, 8, None], [-1.0, 3, None]]], "its order"),
        ([good[0], [[None, 3, None], [-1.5, 8, None]]], "log-probability nan"),
    ):
        with pytest.raises(EngineError, match=message):
            read_scores(request, answer(request, wrong), 32, 2)
