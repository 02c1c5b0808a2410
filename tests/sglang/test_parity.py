"""The real server against Hugging Face in float32: log-probabilities, seeds, ends, temperature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from lopd.records import Floats, Ints, Response, int32
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.scoring import ScoreRequest
from sglang_rollout.servers.server import SGLangServer
from tests.limits import apart, within
from tests.models import VOCAB_SIZE
from tests.sglang.conftest import MANY_STOPS, sampling, sampling_requests

MAX_DIFFERENCE = 1e-4  # nats, over at least NUM_TOKENS tokens
NUM_TOKENS = 1000


class HuggingFace:
    """The reference: transformers, float32, eager attention, one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        self._model = Qwen3MoeForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.no_grad()
    def logprobs(self, prompt_ids: Ints, token_ids: Ints, temperature: float = 1.0) -> Floats:
        """Log-probability of each response token [R]."""
        ids = torch.from_numpy(np.concatenate([prompt_ids, token_ids]).astype(np.int64))  # [L]
        logits = self._model(ids[None]).logits[0, len(prompt_ids) - 1 : -1].float()  # [R, V]
        return (
            torch.log_softmax(logits / temperature, -1)
            .gather(1, ids[len(prompt_ids) :, None])[:, 0]
            .numpy()
        )


@pytest.fixture(scope="module")
def reference(student_dir: Path) -> HuggingFace:
    return HuggingFace(student_dir)


@pytest.fixture(scope="module")
def responses(server: SGLangServer) -> list[Response]:
    """60 responses of about 24 tokens, sampled once."""
    engine = SGLangEngine(server.url, server.api_key, server.settings, server=server)
    return list(engine.generate(sampling_requests(60), sampling()))


def scored(engine: SGLangEngine, responses: list[Response]) -> dict[tuple[str, int], Floats]:
    items = [
        ScoreRequest(r.prompt_id, r.sample_index, r.prompt_ids, r.token_ids) for r in responses
    ]
    return {scores.key: scores.teacher_logprobs for scores in engine.score(items)}


def test_sampling_scoring_and_hugging_face_agree(
    engine: SGLangEngine, responses: list[Response], reference: HuggingFace
) -> None:
    scores = scored(engine, responses)
    expected = np.concatenate([reference.logprobs(r.prompt_ids, r.token_ids) for r in responses])
    sampling_logprobs = np.concatenate([r.sampling_logprobs for r in responses])
    scoring_logprobs = np.concatenate([scores[r.key] for r in responses])
    assert len(expected) >= NUM_TOKENS
    worst = {
        "sampling": np.abs(sampling_logprobs - expected).max(),
        "scoring": np.abs(scoring_logprobs - expected).max(),
    }
    print(f"\n{len(expected)} tokens, max |d| against Hugging Face: {worst}")
    within(max(worst.values()), MAX_DIFFERENCE)
    within(np.abs(sampling_logprobs - scoring_logprobs).max(), MAX_DIFFERENCE)


def test_control_scores_shifted_by_one_do_not_agree(
    engine: SGLangEngine, responses: list[Response], reference: HuggingFace
) -> None:
    long = [response for response in responses if len(response.token_ids) >= 20][:10]
    scores = scored(engine, long)
    for response in long:
        expected = reference.logprobs(response.prompt_ids, response.token_ids)
        apart(np.abs(scores[response.key][1:] - expected[:-1]).max(), 100 * MAX_DIFFERENCE)


def test_the_last_token_of_the_vocabulary_is_scored_as_itself(
    engine: SGLangEngine, reference: HuggingFace
) -> None:
    """SGLang echoes this id as 0; its log-probability must be the right one all the same."""
    prompt = int32([1, 40, 50])
    ids = int32([60, VOCAB_SIZE - 1, 70, VOCAB_SIZE - 1])
    [scores] = engine.score([ScoreRequest("last", 0, prompt, ids)])
    within(np.abs(scores.teacher_logprobs - reference.logprobs(prompt, ids)).max(), MAX_DIFFERENCE)
    apart(
        np.abs(scores.teacher_logprobs - reference.logprobs(prompt, int32([60, 0, 70, 0]))).max(),
        100 * MAX_DIFFERENCE,
    )


def test_a_response_that_ends_keeps_its_end_token_and_one_that_is_cut_has_none(
    responses: list[Response],
) -> None:
    ended = [r for r in responses if r.finish_reason == "stop"]
    cut = [r for r in responses if r.finish_reason == "length"]
    assert len(ended) >= 10
    assert len(cut) >= 5
    assert all(
        r.token_ids[-1] in MANY_STOPS and not set(r.token_ids[:-1].tolist()) & set(MANY_STOPS)
        for r in ended
    )
    assert all(
        len(r.token_ids) == 40 and not set(r.token_ids.tolist()) & set(MANY_STOPS) for r in cut
    )


def test_an_end_token_that_is_the_last_allowed_one_ends_the_response(
    engine: SGLangEngine, responses: list[Response]
) -> None:
    """SGLang calls this "length"; the same tokens with one more allowed are "stop"."""
    ended = min(
        (r for r in responses if r.finish_reason == "stop" and len(r.token_ids) > 1),
        key=lambda r: len(r.token_ids),
    )
    request = next(request for request in sampling_requests(60) if request.key == ended.key)
    [same] = engine.generate([request], sampling(max_new_tokens=len(ended.token_ids)))
    [shorter] = engine.generate([request], sampling(max_new_tokens=len(ended.token_ids) - 1))
    assert (same.finish_reason, same.token_ids.tolist()) == ("stop", ended.token_ids.tolist())
    assert (shorter.finish_reason, shorter.token_ids.tolist()) == (
        "length",
        ended.token_ids[:-1].tolist(),
    )


def test_the_context_bounds_a_response_to_the_token(engine: SGLangEngine) -> None:
    [request] = sampling_requests(1, prompt_len=100)
    [response] = engine.generate([request], sampling(max_new_tokens=1000, stop_token_ids=(2,)))
    assert len(response.token_ids) == engine.settings.context_length - 100
    [scores] = engine.score([ScoreRequest("p", 0, response.prompt_ids, response.token_ids)])
    within(np.abs(scores.teacher_logprobs - response.sampling_logprobs).max(), MAX_DIFFERENCE)


def test_a_seed_fixes_a_response_to_the_last_bit_in_any_company(
    engine: SGLangEngine, responses: list[Response]
) -> None:
    """2 requests at once instead of 32, other neighbours, another order: ids and log-probabilities
    are the same bits.
    """
    few = SGLangEngine(
        engine.url,
        engine.server.api_key,
        engine.settings.model_copy(update={"max_in_flight": 2}),
        server=engine.server,
    )  # type: ignore[union-attr]
    expected = {r.key: r for r in responses}
    for response in few.generate(reversed(sampling_requests(60)[:24]), sampling()):
        np.testing.assert_array_equal(response.token_ids, expected[response.key].token_ids)
        np.testing.assert_array_equal(
            response.sampling_logprobs, expected[response.key].sampling_logprobs
        )


def test_control_other_seeds_give_other_responses(
    engine: SGLangEngine, responses: list[Response]
) -> None:
    expected = {r.key: r.token_ids.tolist() for r in responses}
    others = list(engine.generate(sampling_requests(20, purpose="another"), sampling()))
    assert sum(r.token_ids.tolist() == expected[r.key] for r in others) <= 1


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.6, "top_p": 0.95}, {"temperature": 1.4, "top_k": 50}],
    ids=["colder", "hotter"],
)
def test_log_probabilities_are_at_temperature_one_whatever_the_sampling(
    engine: SGLangEngine, reference: HuggingFace, changes: dict[str, float]
) -> None:
    """Of a server of ours; those of others: test_foreign_server.py."""
    for response in engine.generate(sampling_requests(6), sampling(**changes)):
        at_one = reference.logprobs(response.prompt_ids, response.token_ids)
        raw = reference.logprobs(
            response.prompt_ids, response.token_ids, temperature=changes["temperature"]
        )
        within(np.abs(response.sampling_logprobs - at_one).max(), MAX_DIFFERENCE)
        apart(np.abs(response.sampling_logprobs - raw).max(), 100 * MAX_DIFFERENCE, "SGLang's own")


def test_a_cold_sampler_takes_the_likeliest_token(
    engine: SGLangEngine, reference: HuggingFace
) -> None:
    """Temperature reaches the sampler at all: with the log-probabilities at temperature 1 it could
    be lost without a trace.
    """
    cold = np.concatenate(
        [
            r.sampling_logprobs
            for r in engine.generate(sampling_requests(10), sampling(temperature=0.05))
        ]
    )
    warm = np.concatenate(
        [
            r.sampling_logprobs
            for r in engine.generate(sampling_requests(10), sampling(temperature=1.0))
        ]
    )
    assert cold.mean() > warm.mean() + 0.5
