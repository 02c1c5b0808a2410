"""Fingerprints of tensors: both sides agree on every part, any difference shows, and few operations
are needed for many tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from benchmarks.launches import BUCKET_BYTES, Launches, counted, in_buckets, weights
from sglang_rollout.server_side import fingerprints as module
from sglang_rollout.server_side.fingerprints import (
    Method,
    fingerprints,
    method_for,
)
from sglang_rollout.server_side.parts import Part, cover

SHAPES = [(48, 32), (7, 5), (40,), (3,), (4, 6, 8), (5, 3, 7), (2, 1), ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.float8_e4m3fn]
METHODS: list[Method] = ["xxh3", "sums"]
in_both_methods = pytest.mark.parametrize("method", METHODS)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (values * 20).abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)


def number(tensor: torch.Tensor, method: Method) -> int:
    (result,) = fingerprints([tensor], [tensor.dtype], method)
    return result


@pytest.fixture(params=[module._TOGETHER_BYTES, 64])
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with pieces as they are, and with pieces of 64 bytes."""
    monkeypatch.setattr(module, "_TOGETHER_BYTES", request.param)
    monkeypatch.setattr(module, "_COPIED_BYTES", request.param)
    monkeypatch.setattr(module, "_THREADED_BYTES", request.param)


@in_both_methods
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("small_pieces")
def test_depends_on_bits_alone(shape: tuple[int, ...], dtype: torch.dtype, method: Method) -> None:
    tensor = random(shape, dtype)
    expected = number(tensor, method)
    assert expected == number(tensor.clone(), method)
    # Other layouts in memory give the same fingerprint: turned, and with gaps.
    turned = tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    gaps = torch.empty((*shape, 2), dtype=dtype)[..., 1].copy_(tensor)
    assert expected == number(turned, method) == number(gaps, method)
    # The neighbours in a call change nothing.
    others = [random((n, 4), dtype, seed=n) for n in range(3)]
    found = fingerprints([*others, tensor, turned], [dtype] * 5, method)
    assert found[-2:] == [expected, expected]
    assert expected != number(random(shape, dtype, seed=1), method)


@in_both_methods
@pytest.mark.usefixtures("small_pieces")
def test_the_values_count_as_the_server_rounds_them(method: Method) -> None:
    tensor = random((24, 40), torch.float32)
    rounded = tensor.to(torch.bfloat16)
    assert fingerprints([tensor], [torch.bfloat16], method) == [number(rounded, method)]
    assert number(tensor, method) != number(rounded, method)


@in_both_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_counts_alone_and_in_pairs(dtype: torch.dtype, method: Method) -> None:
    tensor = random((4, 8), dtype)
    words = tensor.view(torch.int32 if dtype == torch.float32 else torch.int16).view(-1)
    expected = number(tensor, method)
    top = words.element_size() * 8 - 1

    def flipped(*places: tuple[int, int]) -> int:
        for element, bit in places:
            words[element] ^= -(1 << bit) if bit == top else 1 << bit  # as signed numbers
        result = number(tensor, method)
        for element, bit in places:
            words[element] ^= -(1 << bit) if bit == top else 1 << bit
        return result

    single = {flipped(place) for place in itertools.product(range(32), range(top + 1))}
    assert expected not in single
    assert len(single) == 32 * (top + 1), "each of them has a number of its own"
    # Here the signs of two elements are flipped.
    pairs = {
        flipped((one, top), (other, top)) for one, other in itertools.combinations(range(32), 2)
    }
    assert expected not in pairs
    assert flipped() == expected


def test_without_the_mixing_two_signs_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    monkeypatch.setattr(torch.Tensor, "bitwise_xor_", lambda self, other: self)
    tensor = random((4, 8), torch.bfloat16)
    before = number(tensor, "sums")
    tensor.view(-1)[[3, 7]] *= -1
    assert number(tensor, "sums") == before


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows": lambda x: x.flip(0),
    "columns": lambda x: x.flip(1),
    "transposed": lambda x: x.t().contiguous(),
    "moved down": lambda x: x.roll(1, 0),
    "moved aside": lambda x: x.roll(2, 1),
    "negative": lambda x: -x,
    "missing": lambda x: torch.cat([x[:-1], torch.zeros_like(x[:1])]),
    "swapped": lambda x: x[[1, 0, *range(2, len(x))]],
    "halves": lambda x: x.roll(32, 0),
}


@in_both_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_pieces")
def test_order_counts(dtype: torch.dtype, method: Method) -> None:
    tensor = random((64, 64), dtype)
    found = {name: number(change(tensor), method) for name, change in CHANGES.items()}
    assert len({*found.values(), number(tensor, method)}) == len(CHANGES) + 1


def test_a_processor_and_a_gpu_have_methods_of_their_own() -> None:
    assert method_for(torch.device("cpu")) == "xxh3"
    assert method_for(torch.device("cuda")) == "sums"


# ---- parts ----


def part_of(view: torch.Tensor) -> Part:
    return Part(int(view.storage_offset()), tuple(view.shape), view.stride())


@in_both_methods
@pytest.mark.usefixtures("small_pieces")
def test_a_part_of_the_tensor_has_the_number_of_the_same_values_elsewhere(method: Method) -> None:
    tensor = random((6, 8, 10), torch.bfloat16)
    for view in (
        tensor[2:4],
        tensor[:, 3:8],
        tensor[..., 5:],
        tensor[1],
        tensor.transpose(0, 2),
        tensor.view(48, 10)[::2],
        tensor[:1].expand(4, 8, 10),
    ):
        part = part_of(view)
        of_trainer = part.of(tensor)
        of_turned = part.of(tensor.mT.contiguous().mT)
        values = number(view.clone(), method)
        assert number(of_trainer, method) == number(of_turned, method) == values
        assert Part.from_json([part.offset, list(part.shape), list(part.strides)]) == part


def test_parts_that_leave_elements_out_are_noticed() -> None:
    tensor = torch.zeros(48, 64)
    halves = [part_of(tensor[:, :32]), part_of(tensor[:, 32:])]
    uneven = [part_of(tensor[:7]), part_of(tensor[7:, :24]), part_of(tensor[7:, 24:])]
    assert cover(halves, tensor.numel())
    assert cover(uneven, tensor.numel())
    # Replicated heads overlap. Fused gates come interleaved.
    assert cover([*halves, halves[0], part_of(tensor[3:5])], tensor.numel())
    assert cover([part_of(tensor[::2]), part_of(tensor[1::2])], tensor.numel())
    assert cover([part_of(tensor.t())], tensor.numel())
    assert cover([Part(0, (), ())], 1)
    assert not cover(halves[:1], tensor.numel())
    assert not cover([halves[0], halves[0]], tensor.numel())
    assert not cover(uneven[1:], tensor.numel())
    assert not cover([part_of(tensor[::2])], tensor.numel())
    assert not cover([part_of(tensor)], tensor.numel() - 1), "outside"
    assert not cover([], tensor.numel())


# ---- operations ----


def test_operations_of_a_sync_of_30b_a3b() -> None:
    """Tensors without data: the operations are counted, not computed."""
    tensors = weights()
    assert len(tensors) == 18867
    # The trainer has the tensors bucket by bucket, and a server has all of them.
    trainer = counted(in_buckets(tensors, BUCKET_BYTES))
    server = counted([tensors])
    assert trainer.counts.total() + server.counts.total() <= 25_000
    assert max(trainer.largest_bytes, server.largest_bytes) <= module._TOGETHER_BYTES
    # The control: a tensor at a time, as one would write it first.
    one_by_one = counted([[tensor] for tensor in tensors[:500]])
    assert one_by_one.counts.total() * len(tensors) / 500 > 250_000


def test_one_synchronisation_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (waits.append(1), original(self))[1])
    parts = [random(shape, torch.bfloat16) for shape in SHAPES]
    with Launches() as launches:
        fingerprints(parts, [torch.bfloat16] * len(parts), "sums")
    assert len(waits) == 1
    assert launches.counts["aten::_local_scalar_dense"] == 0, "no .item()"
    # The control: what one tensor at a time would do.
    for part in parts:
        fingerprints([part], [part.dtype], "sums")
    assert len(waits) == 1 + len(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_storage_can_be_emptied_afterwards(dtype: torch.dtype) -> None:
    """A server on a CPU empties its weights while the trainer has the memory (sync.colocate)."""
    weight = torch.ones(4, 6, dtype=dtype)
    fingerprints([weight, weight[:, 1:3]], [dtype, torch.float32], "xxh3")
    weight.untyped_storage().resize_(0)
    # The control: numpy holds on to a storage that it has seen.
    seen = torch.ones(4, 6)
    seen.numpy()
    with pytest.raises(RuntimeError, match="not resizable"):
        seen.untyped_storage().resize_(0)
