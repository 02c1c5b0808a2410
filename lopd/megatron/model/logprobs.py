"""Log-probabilities of given tokens from hidden states and the output layer's weight, without the
logits of all tokens.

The logits of T tokens are T * V floats: 7 GB for 12,288 tokens and Qwen3's vocabulary, and a dense
loss holds several copies. Here they exist for a block of vocabulary rows at a time, forward and
backward. Blocks of rows, not of tokens: each block's weight gradient is then complete and written
once, and what is summed over blocks is the small [T, H] gradient, in float32.

The backward pass computes the logits again, because a loss may weigh tokens by what their
log-probabilities are: that weight is known only after the forward pass, and without it the weight's
gradient, a sum over tokens, cannot be formed. Where all logits fit into one block they are kept
instead. Tokens whose gradient is zero (prompts, padding) take no part in the backward pass.

Two kernels do what lies between the matrix products: "blocks", plain torch, here; "triton", fused
with the product of the logits (logprobs_triton.py). What belongs to the contract, ranks, padding,
which tokens and rows there are, is the same code for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK_BYTES = {
    "cpu": 128 * 2**20,
    "cuda": 256 * 2**20,
}  # logits or their gradients that exist at once; on a CPU less is slower (docs/benchmarks.md)
# blocks of more rows have a multiple of it: rows of bfloat16 that do not begin at 16 bytes are slow
# to multiply on a GPU
ROWS_ALIGNED = 256
KERNELS = {
    "cpu": "blocks",
    "cuda": "blocks",
}  # what measured best on a device; on a GPU nothing has been measured yet (docs/gpu_results.md)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: Any = None,
    vocab_size: int | None = None,
    entropy: bool = False,
    block_bytes: int | None = None,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(labels[t]), float32 and shaped as labels, and where asked for the entropy of p(. | t),
    float32 [T]; natural log, temperature 1, differentiable.

    hidden [T, H]: of all T tokens, the same on every rank of group. weight [R, H]: this rank's rows
    of the output layer, rank r of the group holding rows
    r * R to (r + 1) * R; group None: all of them. labels int64 [T], or [T, K]: several tokens at
    each
    place. vocab_size: rows past it are padding, which has no probability (None: there are none).
    Its gradient for hidden is this rank's share: whoever gathered or copied hidden sums it.
    block_bytes: at most about so much for logits at a time.
    kernel: "blocks" or "triton"; None: KERNELS of the device.

    Products, sums and exponentials are in float32, on a CPU also of bfloat16 inputs; on CUDA the
    gradient of the logits is rounded to the inputs' type for its two products. log p = x_y - L and
    entropy = L - sum_j p_j x_j, where L = log sum_j exp x_j; gradients 1[j = y] - p_j and -p_j (log
    p_j + entropy).
    """
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    num_rows = weight.shape[0]
    first = rank * num_rows
    rows = max(0, min(num_rows, (size * num_rows if vocab_size is None else vocab_size) - first))
    limit = block_bytes or BLOCK_BYTES.get(hidden.device.type, BLOCK_BYTES["cuda"])
    local_labels = labels.reshape(len(labels), -1) - first  # [T, K]
    kernel = kernel or KERNELS.get(hidden.device.type, "blocks")
    logprobs, spread = _TokenLogprobs.apply(
        hidden, weight, local_labels, rows, group if size > 1 else None, entropy, limit, kernel
    )
    return logprobs.view(labels.shape), spread if entropy else None


class _TokenLogprobs(torch.autograd.Function):
    """labels [T, K] count from this rank's first row; only the first `rows` rows of weight are
    vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        rows: int,
        group: Any,
        entropy: bool,
        limit: int,
        kernel: str,
    ) -> tuple[Tensor, Tensor]:  # [T, K], [T] or [0]
        kept = None
        if kernel == "triton":
            from lopd.megatron.model import (
                logprobs_triton,
            )  # here, because only this kernel needs triton

            top, total, weighted, chosen = logprobs_triton.softmax_statistics(
                hidden, weight, labels, rows, entropy
            )
        else:
            keep = hidden.requires_grad or weight.requires_grad
            top, total, weighted, chosen, kept = _softmax_statistics(
                _Block(hidden, weight, rows, limit), labels, entropy, keep
            )
        log_sum = top + total.log()
        spread = total.log() - weighted / total if entropy else total[:0]
        if group is not None:
            log_sum, chosen, spread = _over_ranks(log_sum, chosen, spread, group)
        ctx.save_for_backward(hidden, weight, labels, log_sum, spread, kept)
        ctx.rows, ctx.entropy, ctx.limit, ctx.kernel = rows, entropy, limit, kernel
        return chosen - log_sum[:, None], spread

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_spread: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_sum, spread, kept = ctx.saved_tensors
        all_hidden, used = hidden, None
        wanted = (grad_logprobs != 0).any(1)
        if ctx.entropy:
            wanted |= grad_spread != 0
        if not wanted.all():
            used = wanted.nonzero()[:, 0]
            hidden, labels, log_sum, grad_logprobs = (
                hidden[used],
                labels[used],
                log_sum[used],
                grad_logprobs[used],
            )
            kept = None if kept is None else kept[used]
            if ctx.entropy:
                spread, grad_spread = spread[used], grad_spread[used]
        if not ctx.entropy:
            spread = grad_spread = None
        block = _Block(hidden, weight, ctx.rows, ctx.limit)
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if grad_weight is not None:
            grad_weight[ctx.rows :] = 0
        for start, stop in block.bounds():
            if ctx.kernel == "triton":
                from lopd.megatron.model import logprobs_triton

                grad = block.empty_gradient(start, stop)
                logprobs_triton.logit_gradients(
                    hidden,
                    weight[start:stop],
                    labels - start,
                    log_sum,
                    grad_logprobs,
                    spread,
                    grad_spread,
                    grad,
                )
            else:
                log_p = (
                    block.logits(start, stop).sub_(log_sum[:, None])
                    if kept is None
                    else kept - log_sum[:, None]
                )
                grad = _logit_gradients(log_p, labels - start, grad_logprobs, spread, grad_spread)
            block.add_hidden_gradient(grad_hidden, grad, start, stop)
            if grad_weight is not None:
                block.put_weight_gradient(grad_weight, grad, start, stop)
        grad_hidden = grad_hidden.to(hidden.dtype)
        if used is not None:
            grad_hidden = torch.zeros_like(all_hidden).index_copy_(0, used, grad_hidden)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _softmax_statistics(
    block: _Block, labels: Tensor, entropy: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Of all rows: maximum of the logits x, sum exp(x - maximum), where asked for sum exp(x -
    maximum) (x - maximum), else 0, each float32 [T]; x of the labels [T, K], 0 where another rank
    has it; and the logits, where they are to be kept and are one block.
    """
    top = torch.full((len(labels),), -torch.inf, dtype=torch.float32, device=labels.device)
    total = torch.zeros_like(top)
    chosen = top.new_zeros(labels.shape)
    weighted = torch.zeros_like(top)
    kept = None
    for start, stop in block.bounds():
        logits = block.logits(start, stop)  # [T, stop - start]
        index, here = _within(labels - start, stop - start)
        chosen += torch.where(here, logits.gather(1, index), 0.0)
        new_top = torch.maximum(top, logits.amax(1))
        if block.is_whole and keep:
            kept = logits
            shifted = logits - new_top[:, None]
        else:
            shifted = logits.sub_(new_top[:, None])
        old = (top - new_top).exp_()
        if entropy:
            exponentials = shifted.exp()
            weighted = old * (
                weighted + torch.where(total > 0, total * (top - new_top), 0.0)
            ) + shifted.mul_(exponentials).sum(1)
        else:
            exponentials = shifted.exp_()
        total = total * old + exponentials.sum(1)
        top = new_top
    return top, total, weighted, chosen, kept


def _logit_gradients(
    log_p: Tensor,
    labels: Tensor,
    grad_logprobs: Tensor,
    spread: Tensor | None,
    grad_spread: Tensor | None,
) -> Tensor:
    """Of a block's log-probabilities [T, R], which it overwrites; labels [T, K] count from the
    block's first row; spread None: no gradient by the entropy.
    """
    pull = grad_logprobs.sum(1)  # on the normalisation, [T]
    index, here = _within(labels, log_p.shape[1])
    if spread is not None:
        factor = (log_p + spread[:, None]).mul_(grad_spread[:, None]).add_(pull[:, None]).neg_()
        grad = log_p.exp_().mul_(factor)
    else:
        grad = log_p.exp_().mul_(-pull[:, None])
    for column in range(
        labels.shape[1]
    ):  # one by one: a token may be there twice, and a GPU would add the two in any order
        part = slice(column, column + 1)
        grad.scatter_add_(
            1, index[:, part], torch.where(here[:, part], grad_logprobs[:, part], 0.0)
        )
    return grad


class _Block:
    """The products of a block of vocabulary rows, and the memory they share.

    On a CPU in float32 whatever the inputs are: exact products, and a buffer that is used again,
    because fresh memory costs more there than the product.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, rows: int, limit: int) -> None:
        self._wide = (
            hidden.is_cuda and hidden.dtype != torch.float32
        )  # products of half-size inputs with float32 results
        self._hidden = hidden if self._wide else hidden.float()
        self._weight, self._rows = weight, rows
        num_tokens = max(1, hidden.shape[0])
        num_blocks = max(1, -(-rows * num_tokens * 4 // limit))
        self._step = max(1, -(-rows // num_blocks))
        if self._step > ROWS_ALIGNED:
            self._step = -(-self._step // ROWS_ALIGNED) * ROWS_ALIGNED
        self._buffer = (
            None if self._wide else torch.empty(num_tokens * self._step, device=hidden.device)
        )

    @property
    def is_whole(self) -> bool:
        """One block holds all rows."""
        return self._step >= self._rows

    def bounds(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self._rows, self._step):
            yield start, min(start + self._step, self._rows)

    def logits(self, start: int, stop: int) -> Tensor:
        """float32 [T, stop - start]; valid until the next call."""
        rows = self._weight[start:stop].t()
        if self._buffer is None:
            return torch.mm(self._hidden, rows, out_dtype=torch.float32)
        num_tokens = self._hidden.shape[0]
        out = self._buffer[: num_tokens * (stop - start)].view(num_tokens, stop - start)
        return torch.mm(self._hidden, rows.float(), out=out)

    def empty_gradient(self, start: int, stop: int) -> Tensor:
        """[T, stop - start] for the gradient of the logits, in the type of its products; valid
        until the next call.
        """
        shape = (self._hidden.shape[0], stop - start)
        if self._buffer is None:
            return torch.empty(shape, dtype=self._hidden.dtype, device=self._hidden.device)
        return self._buffer[: shape[0] * shape[1]].view(shape)

    def add_hidden_gradient(self, total: Tensor, grad: Tensor, start: int, stop: int) -> None:
        """total [T, H] += grad [T, stop - start] of the logits times the block's rows."""
        rows = self._weight[start:stop]
        if self._wide:
            total += torch.mm(grad.to(rows.dtype), rows, out_dtype=torch.float32)
        else:
            total.addmm_(grad, rows.float())

    def put_weight_gradient(self, target: Tensor, grad: Tensor, start: int, stop: int) -> None:
        """target [R, H]: the block's rows."""
        if self._wide:
            torch.mm(grad.to(target.dtype).t(), self._hidden, out=target[start:stop])
        elif target.dtype == torch.float32:
            torch.mm(grad.t(), self._hidden, out=target[start:stop])
        else:
            target[start:stop] = grad.t() @ self._hidden


def _within(labels: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Labels clamped to a block of so many rows, and whether they are there, both [T, K]. No shape
    depends on the data: nothing waits for a GPU.
    """
    return labels.clamp(0, num_rows - 1), (labels >= 0) & (labels < num_rows)


def _over_ranks(
    log_sum: Tensor, chosen: Tensor, spread: Tensor, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The same three of the whole vocabulary, from those of each rank's rows: two all-reduces, of
    [T] and [T, 1 + K (+ 2)], however many blocks there were.

    The entropy of the whole is that of the ranks' shares plus the mean, by share, of the entropies
    inside them.
    """
    top = log_sum.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    relative = log_sum - top  # -inf where a rank has no rows
    share = relative.exp()
    columns = [share[:, None], chosen]
    if len(spread):
        columns.append(torch.where(share > 0, share * (spread - relative), 0.0)[:, None])
    sums = torch.cat(columns, dim=1)
    dist.all_reduce(sums, group=group)
    log_total = sums[:, 0].log()
    whole = sums[:, -1] / sums[:, 0] + log_total if len(spread) else spread
    return top + log_total, sums[:, 1 : 1 + chosen.shape[1]], whole
