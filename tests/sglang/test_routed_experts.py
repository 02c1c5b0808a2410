"""The experts of a server: asked for, read, refused; and those of a real one, whose responses the
trainer then computes as the server did.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd.errors import EngineError
from lopd.records import Response
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.routed import RouterShape
from sglang_rollout.requests.sampling import generate_payload, read_response
from sglang_rollout.servers.server import SGLangServer
from sglang_rollout.weight_sync import update_weights_from_disk
from tests.limits import apart, within
from tests.megatron.launch import run_ranks
from tests.megatron.replay_cases import Sampler, differences, save, write_near_ties
from tests.sglang.conftest import sampling, sampling_requests
from tests.sglang.test_sampling import REQUEST, answer

# Of tests.models.write_qwen3_moe.
ROUTER = RouterShape(num_layers=2, num_experts=4, experts_per_token=2)
LIMIT = 1e-5  # nats
WRONG = 1e-2  # nats


def with_experts(values: Any) -> dict[str, Any]:
    """An answer of three tokens to a prompt of three: five positions are routed."""
    reply = answer([8, 9, 2], [-1.0, -2.0, -3.0], {"type": "stop", "matched": 2})
    raw = np.asarray(values, dtype="<i4").tobytes()
    reply["meta_info"]["routed_experts"] = base64.b64encode(raw).decode()
    return reply


def experts() -> np.ndarray[Any, Any]:
    return np.arange(5 * 2 * 2).reshape(5, 2, 2) % 4


def test_a_server_is_asked_only_where_the_experts_are_wanted() -> None:
    asked = generate_payload(REQUEST, sampling(router=ROUTER), 8, "name")
    assert asked["return_routed_experts"] is True
    plain = generate_payload(REQUEST, sampling(), 8, "name")
    assert {**plain, "return_routed_experts": True} == asked
    assert "return_routed_experts" not in plain


def test_the_experts_of_every_position_but_the_last_are_read() -> None:
    response = read_response(REQUEST, sampling(router=ROUTER), 40, with_experts(experts()))
    assert response.routed_experts is not None
    assert response.routed_experts.dtype == np.int16
    np.testing.assert_array_equal(response.routed_experts, experts())
    plain = read_response(REQUEST, sampling(), 40, with_experts(experts()))
    assert plain.routed_experts is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (experts()[:4], "returned 16 routed experts; .*20: 5 positions x 2 layers x 2 experts"),
        (np.where(experts() == 3, 4, experts()), "returned the expert 4; .*at most 3"),
        (np.where(experts() == 3, -1, experts()), "returned the expert -1"),
        (np.where(np.arange(5)[:, None, None] == 3, 0, experts()), "position 3 name one expert"),
    ],
)
def test_experts_that_cannot_be_these(values: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        read_response(REQUEST, sampling(router=ROUTER), 40, with_experts(values))
    assert "p#0" in str(caught.value)


def test_a_server_that_returns_none_or_noise() -> None:
    reply = answer([8, 9, 2], [-1.0, -2.0, -3.0], {"type": "stop", "matched": 2})
    with pytest.raises(EngineError, match=r"no routed experts.*enable-return-routed-experts"):
        read_response(REQUEST, sampling(router=ROUTER), 40, reply)
    reply["meta_info"]["routed_experts"] = "no base64!"
    with pytest.raises(EngineError, match="routed experts that cannot be read"):
        read_response(REQUEST, sampling(router=ROUTER), 40, reply)


@pytest.fixture(scope="module")
def near_ties(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_near_ties(tmp_path_factory.mktemp("near_ties"))


def test_a_real_server_names_the_experts_of_each_token(
    engine: SGLangEngine, student_dir: Path
) -> None:
    """Many requests at once, with prompts of several lengths: each has its own experts."""
    requests = [
        *sampling_requests(20, prompt_len=12),
        *(
            replace(one, prompt_id=f"q{one.prompt_id}")
            for one in sampling_requests(20, prompt_len=5)
        ),
    ]
    responses = list(engine.generate(requests, sampling(router=ROUTER)))
    assert len(responses) == 40
    reference = Sampler(student_dir)
    for response in responses:
        assert response.routed_experts is not None
        expected = reference.routed(response)
        np.testing.assert_array_equal(
            np.sort(response.routed_experts, -1), np.sort(expected, -1), str(response.key)
        )


def test_the_trainer_computes_what_a_real_server_has_sampled(
    engine: SGLangEngine, server: SGLangServer, student_dir: Path, near_ties: Path, tmp_path: Path
) -> None:
    """Float32 on both sides, on a model whose routers are close to ties."""
    before = engine.model_info()["weight_version"]
    update_weights_from_disk(engine, near_ties, version="near ties", like=student_dir)
    try:
        requests = sampling_requests(12, purpose="ties")
        responses: list[Response] = list(engine.generate(requests, sampling(router=ROUTER)))
    finally:
        update_weights_from_disk(engine, student_dir, version=before, like=student_dir)
    data = save(tmp_path / "rollouts", responses)
    (found,) = run_ranks(differences, 1, folder=str(near_ties), data=data, layout={"ranks": 1})
    within(found["replay"], LIMIT)
    apart(found["none"], WRONG)
