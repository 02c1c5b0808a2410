"""Servers that lopd did not start give log-probabilities of logits / temperature: they are asked a
second time. On a fake, by count, and on a real one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.scoring import ScoreRequest
from sglang_rollout.servers.server import SGLangServer
from sglang_rollout.servers.supervision import Activity
from tests.models import VOCAB_SIZE
from tests.sglang.conftest import sampling, sampling_requests, settings
from tests.sglang.fake_server import KEY, LOGPROB, FakeServer
from tests.sglang.test_parity import MAX_DIFFERENCE, HuggingFace

AT_ONE = LOGPROB - 0.25  # what the fake gives when it scores


def score_otherwise(answer: dict[str, Any]) -> dict[str, Any]:
    entries = answer["meta_info"].get("input_token_logprobs", [])
    for entry in entries[1:]:
        entry[0] = AT_ONE
    return answer


@pytest.mark.parametrize(
    ("temperature", "own", "again"),
    [(0.7, False, True), (1.3, False, True), (1.0, False, False), (0.7, True, False)],
)
def test_a_server_that_lopd_did_not_start_scores_what_it_sampled_at_another_temperature(
    fake: FakeServer, temperature: float, own: bool, again: bool
) -> None:
    fake.change = score_otherwise
    ours: Any = (
        SimpleNamespace(check=lambda: None, ready=lambda: True, activity=Activity())
        if own
        else None
    )
    engine = SGLangEngine(fake.url, KEY, settings(), server=ours, vocab_size=VOCAB_SIZE)
    responses = list(engine.generate(sampling_requests(9), sampling(temperature=temperature)))
    bodies = fake.paths("/generate")
    scored = [body for body in bodies if body["sampling_params"]["max_new_tokens"] == 0]
    assert (len(responses), len(bodies) - len(scored), len(scored)) == (9, 9, 9 if again else 0)
    assert all(
        (body["sampling_params"]["temperature"], body["return_logprob"]) == (1.0, True)
        for body in scored
    )
    asked = {tuple(body["input_ids"]) for body in scored}
    assert asked == (
        {(*r.prompt_ids.tolist(), *r.token_ids.tolist()) for r in responses} if again else set()
    )
    for response in responses:
        np.testing.assert_array_equal(
            response.sampling_logprobs, np.float32(AT_ONE if again else LOGPROB)
        )


# ---- a real one ----


class ForeignServer(SGLangServer):
    """SGLANG_RETURN_ORIGINAL_LOGPROB is not set."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "tests.sglang.foreign_launch", super().command[-1]]

    def _environment(self, scratch: Path) -> Mapping[str, str]:
        environment = {**super()._environment(scratch)}
        del environment["SGLANG_RETURN_ORIGINAL_LOGPROB"]
        root = str(Path(__file__).parents[2])
        return {
            **environment,
            "PYTHONPATH": os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])]),
        }


@pytest.fixture(scope="module")
def foreign(student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    """Without deterministic inference, as SGLang starts by itself; min-p needs that too."""
    with ForeignServer(
        student_dir,
        settings(deterministic=False),
        log=tmp_path_factory.mktemp("foreign") / "server.log",
    ) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.6, "top_p": 0.95}, {"temperature": 1.4, "top_k": 50}],
    ids=["colder", "hotter"],
)
def test_log_probabilities_of_a_foreign_server_are_at_temperature_one(
    foreign: SGLangServer, student_dir: Path, changes: dict[str, float]
) -> None:
    """The control: the same server taken for one of ours, which is not asked again, gives those of
    the sampling temperature.
    """
    reference = HuggingFace(student_dir)
    temperature = changes["temperature"]
    for server in (None, foreign):
        engine = SGLangEngine(foreign.url, foreign.api_key, foreign.settings, server=server)
        for response in engine.generate(
            sampling_requests(6), sampling(**{**changes, "top_p": 1.0, "top_k": -1})
        ):
            right, wrong = (
                reference.logprobs(response.prompt_ids, response.token_ids, temperature=one)
                for one in (1.0, temperature)
            )
            if server is not None:
                right, wrong = wrong, right
            assert np.abs(response.sampling_logprobs - right).max() <= MAX_DIFFERENCE
            assert np.abs(response.sampling_logprobs - wrong).max() > 100 * MAX_DIFFERENCE
    engine = SGLangEngine(foreign.url, foreign.api_key, foreign.settings)
    for response in engine.generate(sampling_requests(6), sampling(**changes)):
        at_one = reference.logprobs(response.prompt_ids, response.token_ids)
        assert np.abs(response.sampling_logprobs - at_one).max() <= MAX_DIFFERENCE


@pytest.mark.slow
@pytest.mark.parametrize("min_p", [0.3, 0.0])
def test_min_p_reaches_the_engine(foreign: SGLangServer, min_p: float) -> None:
    """No token is less likely than 0.3 of the likeliest; the control, without a limit, has many.
    Only without seeds: deterministic SGLang cannot do it.
    """
    engine = SGLangEngine(foreign.url, foreign.api_key, foreign.settings)
    responses = list(
        engine.generate(
            sampling_requests(12), sampling(max_new_tokens=12, stop_token_ids=(2,), min_p=min_p)
        )
    )
    items = [
        ScoreRequest(r.prompt_id, r.sample_index, r.prompt_ids, r.token_ids) for r in responses
    ]
    below = []
    for scores in engine.score(items, vocab_size=VOCAB_SIZE, top_k=1):
        assert scores.top is not None
        below.append(scores.teacher_logprobs - scores.top.logprobs[:, 0])
    ratios = np.exp(np.concatenate(below))
    assert len(ratios) > 100
    if min_p:
        assert ratios.min() >= min_p - 1e-4
        assert ratios.min() < 0.9, "not only the likeliest"
    else:
        assert np.mean(ratios < 0.3) > 0.3
