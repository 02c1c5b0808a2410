"""Weights received by broadcast into a model: where they belong if they lie there whole, by the
model's own loader otherwise; what arrives is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sglang_rollout.cpu import incoming
from sglang_rollout.server_side import served_weights

SHAPES = {
    "embed": (10, 4),
    "q": (4, 4),
    "k": (2, 4),
    "sharded": (6, 4),
    "turned": (4, 3),
    "scaled": (3,),
    "wide": (5,),
    "other": (2,),
}
WHOLE = {"embed", "q", "k"}


class Model(nn.Module):
    """Fuses q and k, pads embed, holds half of sharded, turned transposed, scaled doubled, wide in
    float64, and leaves other out.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {
            "embed": (12, 4),
            "qk": (6, 4),
            "sharded": (3, 4),
            "turned": (3, 4),
            "scaled": (3,),
        }.items():
            self.register_parameter(
                name, nn.Parameter(torch.full(shape, -1.0), requires_grad=False)
            )
        self.wide = nn.Parameter(torch.zeros(5, dtype=torch.float64), requires_grad=False)
        self.loaded: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        with torch.no_grad():
            for name, tensor in weights:
                self.loaded.append(name)
                if name == "embed":
                    self.embed.data[:10].copy_(tensor)
                elif name in ("q", "k"):
                    self.qk.data[slice(0, 4) if name == "q" else slice(4, 6)].copy_(tensor)
                elif name == "sharded":
                    self.sharded.data.copy_(tensor[3:])
                elif name == "turned":
                    self.turned.data.copy_(tensor.t())
                elif name == "scaled":
                    self.scaled.data.copy_(tensor)
                    self.scaled.data.mul_(2)
                elif name == "wide":
                    self.wide.data.copy_(tensor)


class Broadcasts:
    """In the place of torch's: what is received is written where it is waited for."""

    def __init__(self, values: dict[str, Tensor], fails_at: int = -1) -> None:
        self.values = list(values.values())
        self.fails_at = fails_at
        self.targets: list[Tensor] = []
        self.waited: list[int] = []

    def broadcast(self, tensor: Tensor, src: int, group: Any, async_op: bool) -> Any:
        assert (src, group, async_op, tensor.is_contiguous()) == (0, "group", True, True)
        index = len(self.targets)
        self.targets.append(tensor)
        outer = self

        class Handle:
            def wait(self) -> None:
                outer.waited.append(index)
                if index == outer.fails_at:
                    raise RuntimeError("connection closed by peer")
                tensor.copy_(outer.values[index])

        return Handle()


def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def receive(
    model: Model, monkeypatch: pytest.MonkeyPatch, *, fails_at: int = -1
) -> tuple[Broadcasts, Exception | None]:
    broadcasts = Broadcasts(values(), fails_at)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcasts.broadcast)
    error = incoming.receive(
        model,
        list(SHAPES),
        [torch.float32] * len(SHAPES),
        [list(shape) for shape in SHAPES.values()],
        "group",
    )
    return broadcasts, error


def test_the_model_holds_what_its_own_loader_would_have_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = Model()
    expected.load_weights(values().items())
    model = Model()
    for _ in range(2):  # the second time from what is remembered
        model.loaded.clear()
        broadcasts, error = receive(model, monkeypatch)
        assert error is None
        assert all(
            torch.equal(held, wanted)
            for held, wanted in zip(model.parameters(), expected.parameters(), strict=True)
        )
    assert set(model.loaded) == set(SHAPES) - WHOLE
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    in_place = {
        name
        for name, target in zip(SHAPES, broadcasts.targets, strict=True)
        if target.untyped_storage().data_ptr() in storages
    }
    assert in_place == WHOLE
    # The tensor that the loader leaves out is waited for too.
    assert sorted(set(broadcasts.waited)) == list(range(len(SHAPES)))


def test_parameters_that_have_moved_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    receive(model, monkeypatch)
    model.qk.data = torch.full((6, 4), -1.0)
    _, error = receive(model, monkeypatch)
    assert error is None
    assert torch.equal(model.qk.data[:4], values()["q"])


def test_a_loader_whose_copies_cannot_be_told_loads_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Careful(Model):
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
            # This reads a value, which a tensor without data does not have.
            super().load_weights(
                (name, tensor) for name, tensor in weights if tensor.sum().item() > -1e9
            )

    model = Careful()
    _, error = receive(model, monkeypatch)
    assert error is None
    assert set(model.loaded) >= set(SHAPES)
    assert torch.equal(model.qk.data, torch.cat([values()["q"], values()["k"]]))


@pytest.mark.parametrize("name", ["q", "sharded"])
def test_a_broadcast_that_breaks_is_told_once_all_have_ended(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    index = list(SHAPES).index(name)
    broadcasts, error = receive(Model(), monkeypatch, fails_at=index)
    assert "connection closed" in str(error)
    assert set(broadcasts.waited) == set(range(len(SHAPES)))


def test_what_else_a_loader_does_is_noticed() -> None:
    found = served_weights.layout(Model(), SHAPES)
    assert {name for name, placement in found.items() if placement.copied_only} == set(SHAPES) - {
        "scaled",
        "other",
    }
