"""The two steps of lopd.megatron.model.logprobs between matrix products, fused with the product of
the logits, as Triton kernels: token_logprobs(kernel="triton").

Forward: a program has some tokens and some vocabulary rows, goes through the rows tile by tile and
keeps of every tile what a softmax needs (maximum, sum of exponentials, for the entropy their
weighted sum), so that logits exist only in registers. One pass over [splits, T] joins the programs.

Backward: a tile of logits is computed again and leaves the registers as its gradient, in the type
of the inputs. Those of one block of rows are in memory at a time, and logprobs.py multiplies them:
a kernel that did the two products itself would either have to compute every tile once per slice of
the hidden size, or add to the same gradients from many programs, in an order that differs from run
to run. Nothing here is added atomically: same inputs, same bits.

Never run on a GPU (docs/gpu_results.md). Values are tested on a CPU, in Triton's interpreter
(TRITON_INTERPRET=1, set before triton is imported), and the kernels are compiled for an H100;
neither tells of speed, so TILES and the rest are a first guess.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    tokens: int
    rows: int  # of the vocabulary
    inner: int  # of the hidden size, at a time
    num_warps: int
    num_stages: int  # loads in flight


TILES = {
    torch.bfloat16: Tile(128, 256, 64, num_warps=8, num_stages=3),
    torch.float32: Tile(64, 64, 32, num_warps=4, num_stages=2),
}
# vocabulary rows of one program of the forward pass; fixed, so that the order of sums does not
# depend on the GPU
SPLIT_ROWS = 4096
# programs that follow each other have this many blocks of tokens, and share rows of the weight in
# the cache
GROUP = 8
_NOTHING = tl.constexpr(
    -1e30
)  # logit of what is not there: exp of it is 0, and it is finite, so that 0 times it is 0


def softmax_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the logits x = hidden @ weight[:rows].T: their maximum, sum exp(x - maximum), where asked
    for sum exp(x - maximum) (x - maximum), else 0, each float32 [T]; and x of the labels [T, K],
    which count from the first row, 0 where it is not among these rows.
    """
    num_tokens, tile = len(hidden), TILES[hidden.dtype]
    num_splits = max(
        1, triton.cdiv(rows, SPLIT_ROWS)
    )  # of no rows: nothing, as of a rank that has only padding
    parts = torch.empty(3, num_splits, num_tokens, dtype=torch.float32, device=hidden.device)
    chosen = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    grid = (triton.cdiv(num_tokens, tile.tokens) * num_splits,)
    with torch.cuda.device_of(hidden):
        _statistics_kernel[grid](
            hidden.contiguous(), weight.contiguous(), labels.contiguous(), parts, chosen, num_tokens, rows, hidden.shape[1], labels.shape[1], num_splits,
            ENTROPY=entropy, SPLIT=SPLIT_ROWS, **_launch_settings(hidden, tile),
        )  # fmt: skip
    tops, totals, weighteds = parts
    top = tops.amax(0)
    share = (tops - top).exp()
    return (
        top,
        (totals * share).sum(0),
        ((weighteds + totals * (tops - top)) * share).sum(0),
        chosen,
    )


def logit_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    log_sum: Tensor,
    grad_logprobs: Tensor,
    spread: Tensor | None,
    grad_spread: Tensor | None,
    out: Tensor,
) -> Tensor:
    """out [T, R], filled with the gradient of the logits of weight's R rows, 1[j = y] - p_j and
    -p_j (log p_j + entropy) times what comes from above.

    labels [T, K] count from the first of these rows. log_sum, spread [T]: of the whole vocabulary.
    spread and grad_spread None: no gradient by the entropy.
    """
    num_tokens, num_rows, tile = len(hidden), len(weight), TILES[hidden.dtype]
    pull = grad_logprobs.sum(1)
    grid = (triton.cdiv(num_tokens, tile.tokens) * triton.cdiv(num_rows, tile.rows),)
    with torch.cuda.device_of(hidden):
        _gradient_kernel[grid](
            hidden.contiguous(), weight.contiguous(), labels.contiguous(), log_sum, pull, grad_logprobs.contiguous(),
            log_sum if spread is None else spread, pull if grad_spread is None else grad_spread.contiguous(),
            out, num_tokens, num_rows, hidden.shape[1], labels.shape[1], ENTROPY=spread is not None, **_launch_settings(hidden, tile),
        )  # fmt: skip
    return out


def _launch_settings(hidden: Tensor, tile: Tile) -> dict[str, int | bool]:
    """UPCAST: in float32 whatever the inputs are, as logprobs.py does on a CPU; the interpreter
    could not multiply bfloat16.
    """
    sizes = {"BLOCK_T": tile.tokens, "BLOCK_V": tile.rows, "BLOCK_H": tile.inner, "GROUP_T": GROUP}
    return {
        **sizes,
        "UPCAST": not hidden.is_cuda,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@triton.jit
def _place(num_token_blocks, num_parts, GROUP_T: tl.constexpr):
    """(block of tokens, part of the rows) of this program: all parts for GROUP_T blocks of tokens,
    then for the next ones.
    """
    program = tl.program_id(0)
    group = program // (GROUP_T * num_parts)
    size = tl.minimum(num_token_blocks - group * GROUP_T, GROUP_T)
    within = program % (GROUP_T * num_parts)
    return group * GROUP_T + within % size, within // size


@triton.jit
def _tile_of_logits(
    hidden, weight, first_token, first_row, num_tokens, num_rows, hidden_size,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_T, BLOCK_V]; 0 beyond the last token, _NOTHING beyond the last row."""
    tokens, rows, inner = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_H)
    hidden += (
        tl.cast(first_token, tl.int64) * hidden_size
    )  # a whole weight may have more than 2 ** 31 entries, a tile has not
    weight += tl.cast(first_row, tl.int64) * hidden_size
    is_token, is_row = first_token + tokens < num_tokens, first_row + rows < num_rows
    logits = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        is_inner = start + inner < hidden_size
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
            left, right = left.to(tl.float32), right.to(tl.float32)
        logits = tl.dot(left, right, logits, input_precision="ieee")  # not TF32 for float32
    return tl.where(is_row[None, :], logits, _NOTHING)


@triton.jit
def _statistics_kernel(
    hidden, weight, labels, parts, chosen, num_tokens, num_rows, hidden_size, num_labels, num_splits,
    ENTROPY: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    block, split = _place(tl.cdiv(num_tokens, BLOCK_T), num_splits, GROUP_T)
    first_token, end = block * BLOCK_T, tl.minimum((split + 1) * SPLIT, num_rows)
    tokens = first_token + tl.arange(0, BLOCK_T)
    is_token = tokens < num_tokens
    top = tl.full((BLOCK_T,), _NOTHING, dtype=tl.float32)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for first_row in range(split * SPLIT, end, BLOCK_V):
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
        for k in tl.range(
            0, num_labels, num_stages=1
        ):  # a label is in one tile, which alone stores its logit
            label = tl.load(labels + tokens * num_labels + k, mask=is_token, other=-1).to(tl.int32)
            here = (label >= first_row) & (label < tl.minimum(first_row + BLOCK_V, end))
            tl.store(
                chosen + tokens * num_labels + k,
                tl.sum(tl.where(rows[None, :] == label[:, None], logits, 0.0), axis=1),
                mask=here,
            )
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        old = tl.exp(top - new_top)
        logits -= new_top[:, None]
        exponentials = tl.exp(logits)
        if ENTROPY:
            weighted = old * (weighted + total * (top - new_top)) + tl.sum(
                logits * exponentials, axis=1
            )
        total = total * old + tl.sum(exponentials, axis=1)
        top = new_top
    place = parts + split * num_tokens + tokens
    tl.store(place, top, mask=is_token)
    tl.store(place + num_splits * num_tokens, total, mask=is_token)
    tl.store(place + 2 * num_splits * num_tokens, weighted, mask=is_token)


@triton.jit
def _gradient_kernel(
    hidden, weight, labels, log_sum, pull, grad_logprobs, spread, grad_spread, out, num_tokens, num_rows, hidden_size, num_labels,
    ENTROPY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    block, part = _place(tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(num_rows, BLOCK_V), GROUP_T)
    first_token, first_row = block * BLOCK_T, part * BLOCK_V
    tokens, rows = first_token + tl.arange(0, BLOCK_T), first_row + tl.arange(0, BLOCK_V)
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
    log_p -= tl.load(log_sum + tokens, mask=is_token, other=0.0)[:, None]
    factor = tl.load(pull + tokens, mask=is_token, other=0.0)[:, None]
    if ENTROPY:
        factor += (log_p + tl.load(spread + tokens, mask=is_token, other=0.0)[:, None]) * tl.load(
            grad_spread + tokens, mask=is_token, other=0.0
        )[:, None]
    grad = -tl.exp(log_p) * factor
    for k in tl.range(0, num_labels, num_stages=1):
        label = tl.load(labels + tokens * num_labels + k, mask=is_token, other=-1).to(tl.int32)
        chosen = tl.load(grad_logprobs + tokens * num_labels + k, mask=is_token, other=0.0)
        grad += tl.where(rows[None, :] == label[:, None], chosen[:, None], 0.0)
    out += tl.cast(first_token, tl.int64) * num_rows
    place = out + (tokens - first_token)[:, None] * num_rows + rows[None, :]
    tl.store(place, grad, mask=is_token[:, None] & (rows < num_rows)[None, :])
