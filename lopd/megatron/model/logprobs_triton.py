"""The kernel "triton" of lopd.megatron.model.logprobs: fused with the product of the logits.

It is used by token_logprobs(kernel="triton").

Forward: a program has some tokens and some vocabulary rows. It goes through the rows tile by tile
and keeps of every tile what a softmax needs: the maximum, the sum of exponentials, and for the
entropy their weighted sum. So logits exist only in registers. One pass over [splits, T] joins the
results of the programs.

Backward: a tile of logits is computed again and leaves the registers as its gradient, in the type
of the inputs. The gradients of one block of rows are in memory at a time, and logprobs.py
multiplies them. A kernel that did the two products itself would have two choices. It could compute
every tile once for each slice of the hidden size. Or many programs could add to the same gradients,
in an order that differs from run to run. Nothing here is added atomically, so the same inputs give
the same bits.

This has never run on a GPU (docs/gpu_results.md). The values are tested on a CPU, in Triton's
interpreter (TRITON_INTERPRET=1, set before triton is imported), and the kernels are compiled for an
H100. Neither tells anything about speed, so TILES and the other sizes are a first guess.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """The sizes with which a kernel is compiled.

    Attributes:
        tokens: The tokens of a tile of logits.
        rows: The vocabulary rows of a tile of logits.
        inner: The elements of the hidden size that are multiplied at a time.
        num_warps: The warps of a program.
        num_stages: The loads that are in flight at a time.
    """

    tokens: int
    rows: int
    inner: int
    num_warps: int
    num_stages: int


# Elements of float32 take twice the memory of a program, so their tiles are smaller.
TILES = {
    torch.bfloat16: Tile(128, 256, 64, num_warps=8, num_stages=3),
    torch.float32: Tile(64, 64, 32, num_warps=4, num_stages=2),
}
# The vocabulary rows of one program of the forward pass. The number is fixed, so that the order of
# the sums does not depend on the GPU.
SPLIT_ROWS = 4096
# Programs that follow each other have this many blocks of tokens. They share rows of the weight in
# the cache.
GROUP = 8
# The logit of a row that does not exist. exp of it is 0. It is finite, so that 0 times it is 0.
_NOTHING = tl.constexpr(-1e30)


def softmax_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return maxima and sums of a softmax over the first `rows` rows of weight.

    Args:
        hidden: [T, H].
        weight: [R, H].
        labels: int64 [T, K], indices of rows of weight. They may be outside of the rows.
        rows: The number of rows that belong to the vocabulary. It may be 0.
        entropy: Whether to compute the third result.

    Returns:
        For the logits x of each token: their maximum m, the sum of exp(x - m), and the sum of
        exp(x - m) (x - m), each float32 [T]. Without entropy the third is zeros. Then the logits
        of the labels, float32 [T, K]. A label that is not among the rows has the logit 0.
    """
    num_tokens = len(hidden)
    tile = TILES[hidden.dtype]
    # A rank that holds padding only has no rows. One split then gives the sums of nothing.
    num_splits = max(1, triton.cdiv(rows, SPLIT_ROWS))
    # Each program writes its part, so nothing has to be cleared.
    parts = torch.empty(3, num_splits, num_tokens, dtype=torch.float32, device=hidden.device)
    # Zeros, because only the program that has a label stores its logit.
    chosen = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    grid = (triton.cdiv(num_tokens, tile.tokens) * num_splits,)
    # Triton starts a kernel on the current device, which may be another one.
    with torch.cuda.device_of(hidden):
        _statistics_kernel[grid](
            hidden.contiguous(),
            weight.contiguous(),
            labels.contiguous(),
            parts,
            chosen,
            num_tokens,
            rows,
            hidden.shape[1],
            labels.shape[1],
            num_splits,
            ENTROPY=entropy,
            SPLIT=SPLIT_ROWS,
            **_launch_settings(hidden, tile),
        )
    # Each split has sums relative to its own maximum. They are turned to the common one.
    max_parts, sum_parts, weighted_parts = parts
    max_logits = max_parts.amax(0)
    shift = max_parts - max_logits
    scale = shift.exp()
    exp_sums = (sum_parts * scale).sum(0)
    weighted_sums = ((weighted_parts + sum_parts * shift) * scale).sum(0)
    return max_logits, exp_sums, weighted_sums, chosen


def logit_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    log_sum: Tensor,
    grad_logprobs: Tensor,
    entropies: Tensor | None,
    grad_entropies: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Fill `out` with the gradient of the logits of weight's R rows, and return it.

    With g the sum of a token's grad_logprobs and h its grad_entropies, the gradient of a row is
    -p (g + h (log p + entropy)). A row that is a label gets its grad_logprobs in addition.

    Args:
        hidden: [T, H].
        weight: [R, H], the rows of the block.
        labels: int64 [T, K], counted from the first of these rows.
        log_sum: [T], the logarithm of the sum of exp x over the whole vocabulary.
        grad_logprobs: The gradient of the labels' log-probabilities, [T, K].
        entropies: The entropies of the whole vocabulary, [T]. None means that there is no gradient
            by the entropy.
        grad_entropies: The gradient of the entropies, [T] or None.
        out: [T, R].
    """
    num_tokens = len(hidden)
    num_rows = len(weight)
    tile = TILES[hidden.dtype]
    # A label's gradient also reaches every other row of the vocabulary, through the sum in the
    # denominator.
    grad_sum = grad_logprobs.sum(1)
    grid = (triton.cdiv(num_tokens, tile.tokens) * triton.cdiv(num_rows, tile.rows),)
    with torch.cuda.device_of(hidden):
        _gradient_kernel[grid](
            hidden.contiguous(),
            weight.contiguous(),
            labels.contiguous(),
            log_sum,
            grad_sum,
            grad_logprobs.contiguous(),
            # Without a gradient by the entropy the kernel does not read these two. It still needs a
            # pointer for each.
            log_sum if entropies is None else entropies,
            grad_sum if grad_entropies is None else grad_entropies.contiguous(),
            out,
            num_tokens,
            num_rows,
            hidden.shape[1],
            labels.shape[1],
            ENTROPY=entropies is not None,
            **_launch_settings(hidden, tile),
        )
    return out


def _launch_settings(hidden: Tensor, tile: Tile) -> dict[str, int | bool]:
    return {
        "BLOCK_T": tile.tokens,
        "BLOCK_V": tile.rows,
        "BLOCK_H": tile.inner,
        "GROUP_T": GROUP,
        # In float32 on a CPU, whatever the inputs are, as the other kernel does it. The interpreter
        # could not multiply bfloat16.
        "UPCAST": not hidden.is_cuda,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@triton.jit
def _place(num_token_blocks, num_parts, GROUP_T: tl.constexpr):
    """Return (block of tokens, part of the rows) of this program."""
    # The programs that run at the same time have GROUP_T blocks of tokens and the same few rows of
    # the weight, so each row is loaded into the cache once. Then follow the next blocks of tokens.
    program = tl.program_id(0)
    group = program // (GROUP_T * num_parts)
    # The last group may be smaller.
    size = tl.minimum(num_token_blocks - group * GROUP_T, GROUP_T)
    within = program % (GROUP_T * num_parts)
    return group * GROUP_T + within % size, within // size


@triton.jit
def _tile_of_logits(
    hidden,
    weight,
    first_token,
    first_row,
    num_tokens,
    num_rows,
    hidden_size,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return float32 [BLOCK_T, BLOCK_V]: 0 past the last token, _NOTHING past the last row."""
    tokens = tl.arange(0, BLOCK_T)
    rows = tl.arange(0, BLOCK_V)
    inner = tl.arange(0, BLOCK_H)
    # A whole weight may have more than 2 ** 31 entries, so the start of a tile is counted with 64
    # bits. Inside of a tile 32 bits are enough.
    hidden += tl.cast(first_token, tl.int64) * hidden_size
    weight += tl.cast(first_row, tl.int64) * hidden_size
    # The last tiles of either side may be only partly filled.
    is_token = first_token + tokens < num_tokens
    is_row = first_row + rows < num_rows
    logits = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        is_inner = start + inner < hidden_size
        # Entries past the last token, row or element are 0 and add nothing to the product.
        left = tl.load(
            hidden + tokens[:, None] * hidden_size + (start + inner)[None, :],
            mask=is_token[:, None] & is_inner[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + rows[None, :] * hidden_size + (start + inner)[:, None],
            mask=is_row[None, :] & is_inner[:, None],
            other=0.0,
        )
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        # "ieee": float32 inputs are not rounded to TF32.
        logits = tl.dot(left, right, logits, input_precision="ieee")
    return tl.where(is_row[None, :], logits, _NOTHING)


@triton.jit
def _statistics_kernel(
    hidden,
    weight,
    labels,
    parts,
    chosen,
    num_tokens,
    num_rows,
    hidden_size,
    num_labels,
    num_splits,
    ENTROPY: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # One block of tokens and one split of the rows.
    block, split = _place(tl.cdiv(num_tokens, BLOCK_T), num_splits, GROUP_T)
    first_token = block * BLOCK_T
    end = tl.minimum((split + 1) * SPLIT, num_rows)
    tokens = first_token + tl.arange(0, BLOCK_T)
    is_token = tokens < num_tokens
    # _NOTHING and not -inf: a difference of two maxima must be a number.
    max_logits = tl.full((BLOCK_T,), _NOTHING, dtype=tl.float32)
    exp_sums = tl.zeros((BLOCK_T,), dtype=tl.float32)
    weighted_sums = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for first_row in range(split * SPLIT, end, BLOCK_V):
        # The split ends at `end`, so the rows of the next split count as missing here.
        logits = _tile_of_logits(
            hidden,
            weight,
            first_token,
            first_row,
            num_tokens,
            end,
            hidden_size,
            BLOCK_T,
            BLOCK_V,
            BLOCK_H,
            UPCAST,
        )
        rows = first_row + tl.arange(0, BLOCK_V)
        # A label is in exactly one tile. That tile alone stores its logit.
        for k in tl.range(0, num_labels, num_stages=1):
            label = tl.load(labels + tokens * num_labels + k, mask=is_token, other=-1).to(tl.int32)
            is_here = (label >= first_row) & (label < tl.minimum(first_row + BLOCK_V, end))
            # A tile cannot be indexed by data. The sum over one row that is not 0 is its value.
            is_label = rows[None, :] == label[:, None]
            label_logits = tl.sum(tl.where(is_label, logits, 0.0), axis=1)
            tl.store(chosen + tokens * num_labels + k, label_logits, mask=is_here)
        # The sums so far are turned from the old maximum to the new one. The formulas are those of
        # logprobs_blocks.softmax_statistics. The first tile needs no case of its own, because
        # _NOTHING is finite.
        new_max = tl.maximum(max_logits, tl.max(logits, axis=1))
        scale = tl.exp(max_logits - new_max)
        logits -= new_max[:, None]
        exponentials = tl.exp(logits)
        if ENTROPY:
            moved = exp_sums * (max_logits - new_max)
            added = tl.sum(logits * exponentials, axis=1)
            weighted_sums = scale * (weighted_sums + moved) + added
        exp_sums = exp_sums * scale + tl.sum(exponentials, axis=1)
        max_logits = new_max
    # parts is [3, splits, T].
    place = parts + split * num_tokens + tokens
    tl.store(place, max_logits, mask=is_token)
    tl.store(place + num_splits * num_tokens, exp_sums, mask=is_token)
    tl.store(place + 2 * num_splits * num_tokens, weighted_sums, mask=is_token)


@triton.jit
def _gradient_kernel(
    hidden,
    weight,
    labels,
    log_sum,
    grad_sum,
    grad_logprobs,
    entropies,
    grad_entropies,
    out,
    num_tokens,
    num_rows,
    hidden_size,
    num_labels,
    ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr,
    UPCAST: tl.constexpr,
):
    block, part = _place(tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(num_rows, BLOCK_V), GROUP_T)
    # A program makes one tile of the gradient.
    first_token = block * BLOCK_T
    first_row = part * BLOCK_V
    tokens = first_token + tl.arange(0, BLOCK_T)
    rows = first_row + tl.arange(0, BLOCK_V)
    is_token = tokens < num_tokens
    log_p = _tile_of_logits(
        hidden,
        weight,
        first_token,
        first_row,
        num_tokens,
        num_rows,
        hidden_size,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        UPCAST,
    )
    # log p = x - L. Rows past the end become very small, and their gradient 0.
    log_p -= tl.load(log_sum + tokens, mask=is_token, other=0.0)[:, None]
    factor = tl.load(grad_sum + tokens, mask=is_token, other=0.0)[:, None]
    if ENTROPY:
        entropy = tl.load(entropies + tokens, mask=is_token, other=0.0)[:, None]
        grad_entropy = tl.load(grad_entropies + tokens, mask=is_token, other=0.0)[:, None]
        factor += (log_p + entropy) * grad_entropy
    grad = -tl.exp(log_p) * factor
    # One label after the other. A token may be there twice, and then both are added.
    for k in tl.range(0, num_labels, num_stages=1):
        label = tl.load(labels + tokens * num_labels + k, mask=is_token, other=-1).to(tl.int32)
        label_grad = tl.load(grad_logprobs + tokens * num_labels + k, mask=is_token, other=0.0)
        grad += tl.where(rows[None, :] == label[:, None], label_grad[:, None], 0.0)
    # The store rounds to the type of `out`, the one in which logprobs.py multiplies. The start of
    # the tile is counted with 64 bits.
    out += tl.cast(first_token, tl.int64) * num_rows
    place = out + (tokens - first_token)[:, None] * num_rows + rows[None, :]
    tl.store(place, grad, mask=is_token[:, None] & (rows < num_rows)[None, :])
