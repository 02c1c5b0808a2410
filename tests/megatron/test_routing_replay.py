"""Routing replay: with the sampler's choice the trainer computes the sampler's log-probabilities
where routers are close to ties, in each layout, and the gradient flows through the routers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lopd.batching.context import context_part
from lopd.errors import ConfigError
from lopd.records import Response
from tests.limits import apart, within
from tests.megatron.launch import run_ranks
from tests.megatron.replay_cases import (
    Sampler,
    differences,
    gradients,
    microbatch_of,
    save,
    write_near_ties,
)

LIMIT = 1e-5  # nats
WRONG = 1e-2  # nats, in the worst token of a choice of other experts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_near_ties(tmp_path_factory.mktemp("near_ties"))


@pytest.fixture(scope="module")
def sampler(folder: Path) -> Sampler:
    return Sampler(folder)


@pytest.fixture(scope="module")
def responses(sampler: Sampler) -> list[Response]:
    return sampler.responses()


@pytest.fixture(scope="module")
def data(responses: list[Response], tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("data") / "rollouts", responses)


@pytest.mark.parametrize(
    "layout", [{"ranks": 1}, {"ranks": 2, "tensor": 2, "expert": 2}, {"ranks": 2, "pipeline": 2}]
)
def test_the_replayed_forward_is_the_samplers(
    folder: Path, data: str, layout: dict[str, int]
) -> None:
    found = run_ranks(differences, layout["ranks"], folder=str(folder), data=data, layout=layout)
    for of_rank in found:
        within(of_rank["replay"], LIMIT)
        within(of_rank["again"], LIMIT)
        apart(of_rank["none"], WRONG)


def test_the_gradient_flows_through_the_routers(
    folder: Path, sampler: Sampler, responses: list[Response], data: str
) -> None:
    sampler.model.zero_grad()
    for response in responses:
        ids = np.concatenate([response.prompt_ids, response.token_ids]).astype(np.int64)
        # The log-probabilities of the response alone, as the loss mask has it.
        sampler.logprobs(torch.as_tensor(ids))[len(response.prompt_ids) - 1 :].sum().backward()
    expected = {
        str(number): layer.mlp.gate.weight.grad
        for number, layer in enumerate(sampler.model.model.layers, start=1)
    }
    ours = {
        name: run_ranks(gradients, 1, folder=str(folder), data=data, **settings)[0]
        for name, settings in {
            "replay": {"with_routing": True},
            "recompute": {"with_routing": True, "recompute": "full"},
            "none": {"with_routing": False},
        }.items()
    }
    for layer, gradient in expected.items():
        largest = gradient.abs().max().item()
        for name in ("replay", "recompute"):
            difference = (torch.tensor(ours[name][layer]) - gradient).abs().max().item()
            within(difference / largest, 1e-4)
        without = (torch.tensor(ours["none"][layer]) - gradient).abs().max().item()
        apart(without / largest, 1e-2)


def test_context_ranks_route_their_own_positions(
    responses: list[Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lopd.megatron.model import routing_replay
    from lopd.megatron.ranks import parallel

    microbatch = microbatch_of(responses)
    routed = microbatch.routed_experts
    assert routed is not None
    seen = np.zeros(len(routed), dtype=int)
    for rank in range(2):
        part = context_part(
            microbatch.cu_seqlens, microbatch.num_sequences, rank=rank, size=2, tensor=2
        )
        for tensor_rank in range(2):
            monkeypatch.setattr(parallel, "tensor_size", lambda: 2)
            monkeypatch.setattr(parallel, "tensor_rank", lambda own=tensor_rank: own)
            monkeypatch.setattr(parallel, "device", lambda: "cpu")
            rows = routing_replay._own_rows(routed, part).numpy()
            own = np.split(part.index, 2)[tensor_rank]
            is_real = own < len(routed)
            np.testing.assert_array_equal(rows[is_real], routed[own[is_real]])
            # What pads a part must name as many experts as a router chooses.
            assert (np.diff(np.sort(rows, axis=-1), axis=-1) > 0).all()
            seen[own[is_real]] += 1
    num_real = int(microbatch.cu_seqlens[microbatch.num_sequences])
    assert (seen[:num_real] == 1).all()


def test_a_fused_router_is_refused(folder: Path) -> None:
    from lopd.config import ParallelSection
    from lopd.megatron.model.transformer_config import transformer_config
    from lopd.megatron.weights.architecture import read_architecture

    with pytest.raises(ConfigError, match="moe_router_fusion and routing replay cannot be used"):
        transformer_config(
            read_architecture(folder),
            parallel=ParallelSection(),
            dtype="float32",
            recompute="none",
            moe_aux_loss=0.0,
            routing_replay=True,
            overrides={"moe_router_fusion": True},
        )


def test_the_records_of_a_microbatch(responses: list[Response]) -> None:
    microbatch = microbatch_of(responses)
    routed = microbatch.routed_experts
    assert routed is not None
    assert len(routed) == len(microbatch.token_ids) == 98, "97 tokens, padded to an even number"
    for number, response in enumerate(responses):
        start, stop = microbatch.cu_seqlens[number : number + 2]
        np.testing.assert_array_equal(routed[start : stop - 1], response.routed_experts)
        assert routed[stop - 1].tolist() == [[0, 1]] * 2, "the last position chooses anything"
    assert routed[-1].tolist() == [[0, 1]] * 2, "and so does padding"
