"""Fingerprints of tensors: parts add up to the whole, and any difference shows."""

from __future__ import annotations

import itertools

import pytest
import torch

from sglang_rollout.server_side.fingerprints import fingerprint, part_fingerprint

SHAPES = [(48, 32), (7, 5), (40,), (3,), (4, 6, 8), ()]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_depends_on_bits_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = random(shape, dtype)
    expected = fingerprint(tensor)
    assert expected == fingerprint(tensor.clone())
    # Another layout in memory gives the same fingerprint.
    assert expected == fingerprint(tensor.t().contiguous().t() if tensor.dim() == 2 else tensor)
    assert expected != fingerprint(random(shape, dtype, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_rows_and_columns_add_up(dtype: torch.dtype) -> None:
    tensor = random((48, 64), dtype)
    total = 0
    for rows, columns in itertools.product(
        (slice(0, 16), slice(16, 48)), (slice(0, 16), slice(16, 24), slice(24, 64))
    ):
        part = tensor[rows, columns]
        total += part_fingerprint(part.clone(), part.storage_offset(), part.stride(), 64)
    assert total % 2**64 == fingerprint(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_counts_alone_and_in_pairs(dtype: torch.dtype) -> None:
    tensor = random((4, 8), dtype)
    words = tensor.view(torch.int32 if dtype == torch.float32 else torch.int16).view(-1)
    expected = fingerprint(tensor)
    top = words.element_size() * 8 - 1

    def flipped(*places: tuple[int, int]) -> int:
        for element, bit in places:
            words[element] ^= -(1 << bit) if bit == top else 1 << bit  # as signed numbers
        result = fingerprint(tensor)
        for element, bit in places:
            words[element] ^= -(1 << bit) if bit == top else 1 << bit
        return result

    assert all(
        flipped((element, bit)) != expected
        for element, bit in itertools.product(range(32), range(top + 1))
    )
    # Here the signs of two elements are flipped.
    assert all(
        flipped((one, top), (other, top)) != expected
        for one, other in itertools.combinations(range(32), 2)
    )
    assert flipped() == expected


def test_order_counts() -> None:
    tensor = random((64, 64), torch.float32)
    assert (
        len(
            {
                fingerprint(x)
                for x in (
                    tensor,
                    tensor.flip(0),
                    tensor.flip(1),
                    tensor.t().contiguous(),
                    tensor.roll(1, 0),
                    tensor.roll(2, 1),
                )
            }
        )
        == 6
    )


def test_a_part_that_cannot_be_placed_is_refused() -> None:
    tensor = random((8, 8), torch.bfloat16)
    with pytest.raises(ValueError, match="cannot be told"):
        part_fingerprint(tensor[:, 1:5], 1, (8, 1), 8)  # cuts a 64-bit word
    with pytest.raises(ValueError, match="do not go by rows"):
        part_fingerprint(tensor[:, :4], 0, (5, 1), 8)
