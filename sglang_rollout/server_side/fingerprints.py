"""Numbers for the bits of tensors, by which a trainer and its servers compare weights.

A server says which parts of a checkpoint tensor it holds. Both sides then compute the number of the
same part from its elements in row-major order, wherever it lies and in whatever memory layout. Two
parts that differ have the same number with a probability of 2^-30 at most, and usually of 2^-60,
unless they were made for it on purpose. The numbers find mistakes, not attacks.

There are two methods, and the server's device chooses:

xxh3  The 64-bit XXH3 of the bytes, for a processor. It is as fast as the memory.
sums  A weighted sum of 64-bit words, in plain torch, for a GPU: the weights do not go to the host,
      and many tensors are one operation. For pieces of words w[k, i] it is

          sum of a(k) * b(i) * m(w[k, i]) modulo 2^64,

      where a and b are odd pseudo-random numbers and m is a mixing.
"""

from __future__ import annotations

import ctypes
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeAlias

import torch
import xxhash
from torch import Tensor
from torch.nn.functional import pad

Method: TypeAlias = Literal["xxh3", "sums"]

# Bytes of the largest piece, and of the pieces that are computed together. A few times as much is
# the memory that the sums need. On a GPU fewer, larger operations are faster.
_TOGETHER_BYTES = 32 * 2**20
# A part that must be copied first goes through the processor's cache in pieces of this size.
_COPIED_BYTES = 2**18
# Below this, threads cost more than they save.
_THREADED_BYTES = 2**24
_MODULUS = 2**64
_WORD_BYTES = 8
# Bytes of an element -> the integer type of that size.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def method_for(device: torch.device) -> Method:
    """Return the method for weights that are served on a device."""
    return "xxh3" if device.type == "cpu" else "sums"


def fingerprints(
    parts: Sequence[Tensor], dtypes: Sequence[torch.dtype], method: Method
) -> list[int]:
    """Return the number of each part, from 0 to 2^64 - 1.

    Args:
        parts: The values, in any memory layout.
        dtypes: For each part the type to which its values are rounded before.
        method: The method of the server.
    """
    if not parts:
        return []
    if method == "xxh3":
        return _xxh3_of_all(parts, dtypes)
    return [number % _MODULUS for number in sums(parts, dtypes).tolist()]


# ---- xxh3 ----


def _xxh3_of_all(parts: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[int]:
    num_bytes = sum(
        part.numel() * dtype.itemsize for part, dtype in zip(parts, dtypes, strict=True)
    )
    num_threads = len(os.sched_getaffinity(0))
    if num_bytes < _THREADED_BYTES or num_threads == 1:
        return [_xxh3(part, dtype) for part, dtype in zip(parts, dtypes, strict=True)]
    # XXH3 releases the interpreter's lock. These threads are not torch's, on whose number the
    # results of a model may depend.
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(_xxh3, parts, dtypes))


def _xxh3(part: Tensor, dtype: torch.dtype) -> int:
    state = xxhash.xxh3_64()
    # The bytes in memory are already those to hash, so nothing is copied.
    if part.is_contiguous() and part.dtype == dtype and part.device.type == "cpu":
        _add_bytes(state, part)
        return state.intdigest()
    for piece in _pieces(part, _COPIED_BYTES // dtype.itemsize):
        _add_bytes(state, piece.to("cpu", dtype).contiguous())
    return state.intdigest()


def _add_bytes(state: xxhash.xxh3_64, tensor: Tensor) -> None:
    """Add the bytes of a contiguous tensor in host memory to the state of a hash."""
    num_bytes = tensor.numel() * tensor.element_size()
    # Not tensor.numpy(): a storage that numpy has seen can never be resized again, and a server on
    # a CPU empties the storages of its weights while the trainer has the memory.
    state.update((ctypes.c_char * num_bytes).from_address(tensor.data_ptr()))


# ---- sums ----


def sums(parts: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Tensor:
    """Return the sums of the parts as int64 of shape ``[N]``, on the host."""
    by_piece, owners, places = sums_of_pieces(parts, dtypes)
    # The one synchronisation with a GPU. What is left is a number for each piece.
    factors = _odd_numbers(torch.tensor(places) + 2**40)  # [P], a(k)
    totals = torch.zeros(len(parts), dtype=torch.int64)
    return totals.index_add_(0, torch.tensor(owners), by_piece.cpu() * factors)


def sums_of_pieces(
    parts: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> tuple[Tensor, list[int], list[int]]:
    """Return the sums of all pieces of the parts, each without its own factor.

    Returns:
        The sums as int64 of shape ``[P]`` on the device of the parts; for each piece the index of
        its part; and its place in the part.
    """
    # Pieces of the same shape and types are computed together, from whatever parts they are.
    groups: dict[tuple[object, ...], list[tuple[Tensor, int, int]]] = defaultdict(list)
    most = 1
    for number, (part, dtype) in enumerate(zip(parts, dtypes, strict=True)):
        for place, piece in enumerate(_pieces(part, _TOGETHER_BYTES // dtype.itemsize)):
            groups[piece.shape, piece.dtype, dtype].append((piece, number, place))
            most = max(most, _num_words(piece, dtype))
    # Made once for the longest piece. Shorter ones use its beginning.
    by_word = _odd_numbers(torch.arange(most, device=parts[0].device))  # [W], b(i)
    found = [torch.zeros(0, dtype=torch.int64, device=parts[0].device)]
    owners: list[int] = []
    places: list[int] = []
    for group in groups.values():
        dtype = dtypes[group[0][1]]
        # As many as fit into the bound: the words of all of them are in memory together.
        at_once = max(1, _TOGETHER_BYTES // (_WORD_BYTES * _num_words(group[0][0], dtype)))
        for first in range(0, len(group), at_once):
            together = group[first : first + at_once]
            found.append(_sums_of_equals([piece for piece, _, _ in together], dtype, by_word))
            owners += [number for _, number, _ in together]
            places += [place for _, _, place in together]
    return torch.cat(found), owners, places


def _sums_of_equals(pieces: Sequence[Tensor], dtype: torch.dtype, by_word: Tensor) -> Tensor:
    """Return the sums of pieces of one shape, without their own factor."""
    # A copy, on which all that follows works in place.
    stacked = torch.stack(list(pieces)).to(dtype).view(_INTEGERS[dtype.itemsize])
    rows = stacked.view(len(pieces), -1)  # [P, E]
    missing = -rows.shape[1] % (_WORD_BYTES // dtype.itemsize)
    if missing:
        rows = pad(rows, (0, missing))
    # The mixing brings the upper half of a word to the lower one. An odd factor moves a change of
    # the top bit to no other bit, so two changed top bits would cancel. In bfloat16 those are
    # signs. The shift keeps the signs of two float32 in a word apart.
    halves = rows.view(torch.int32).view(len(pieces), -1, 2)  # [P, W, 2]
    halves[..., 0].bitwise_xor_(halves[..., 1] >> 1)
    words = rows.view(torch.int64)  # [P, W]
    # All sums and products wrap at 2^64, as the formula wants.
    return words.mul_(by_word[: words.shape[1]]).sum(1)


def _num_words(piece: Tensor, dtype: torch.dtype) -> int:
    return -(-piece.numel() * dtype.itemsize // _WORD_BYTES)


def _odd_numbers(index: Tensor) -> Tensor:
    """Return odd pseudo-random 64-bit numbers that depend on the index alone."""
    # The mixing of splitmix64, whose constants stand here as signed numbers. Products and sums
    # wrap. The masks make a logical shift of torch's arithmetic one.
    x = (index.to(torch.int64) + 1) * -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    # An odd factor can be undone, so no bit of a word is lost.
    return (x ^ ((x >> 31) & 0x1FFFFFFFF)) | 1


def _pieces(part: Tensor, most: int) -> Iterator[Tensor]:
    """Yield a part in pieces of at most so many elements, in row-major order.

    Where it is cut depends on its shape alone. Both sides cut alike, in any memory layout.
    """
    if part.numel() == 0:
        return
    # A scalar has no first dimension to be cut along.
    if part.dim() == 0:
        part = part.reshape(1)
    row = part.numel() // len(part)
    if row > most:
        for one in part:
            yield from _pieces(one, most)
        return
    step = most // row
    for first in range(0, len(part), step):
        yield part[first : first + step]
