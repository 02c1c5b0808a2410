"""Log-probabilities of given tokens from hidden states and the output layer's weight, without the logits of all tokens.

The logits of T tokens are T * V floats: 7 GB for 12,288 tokens and Qwen3's vocabulary, and a dense loss holds several copies. Here they exist for a block of
vocabulary rows at a time, forward and backward. Blocks of rows, not of tokens: each block's weight gradient is then complete and written once, and what is
summed over blocks is the small [T, H] gradient, in float32.

The backward pass computes the logits again, because a loss may weigh tokens by what their log-probabilities are: that weight is known only after the
forward pass, and without it the weight's gradient, a sum over tokens, cannot be formed. Where all logits fit into one block they are kept instead. Tokens
whose gradient is zero (prompts, padding) take no part in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK_BYTES = {"cpu": 128 * 2**20, "cuda": 256 * 2**20}  # float32 logits that exist at once; on a CPU smaller ones are slower (docs/benchmarks.md)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: Any = None,
    vocab_size: int | None = None,
    entropy: bool = False,
    block_bytes: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(labels[t]), float32 and shaped as labels, and where asked for the entropy of p(. | t), float32 [T]; natural log, temperature 1, differentiable.

    hidden [T, H]: of all T tokens, the same on every rank of group. weight [R, H]: this rank's rows of the output layer, rank r of the group holding rows
    r * R to (r + 1) * R; group None: all of them. labels int64 [T], or [T, K]: several tokens at each
    place. vocab_size: rows past it are padding, which has no probability (None: there are none).
    Its gradient for hidden is this rank's share: whoever gathered or copied hidden sums it. block_bytes: at most about so much for logits at a time.

    Products, sums and exponentials are in float32, on a CPU also of bfloat16 inputs; on CUDA the gradient of the logits is rounded to the inputs' type for
    its two products. log p = x_y - L and entropy = L - sum_j p_j x_j, where L = log sum_j exp x_j; gradients 1[j = y] - p_j and -p_j (log p_j + entropy).
    """
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    num_rows = weight.shape[0]
    first = rank * num_rows
    rows = max(0, min(num_rows, (size * num_rows if vocab_size is None else vocab_size) - first))
    limit = block_bytes or BLOCK_BYTES.get(hidden.device.type, BLOCK_BYTES["cuda"])
    local_labels = labels.reshape(len(labels), -1) - first  # [T, K]
    logprobs, spread = _TokenLogprobs.apply(hidden, weight, local_labels, rows, group if size > 1 else None, entropy, limit)
    return logprobs.view(labels.shape), spread if entropy else None


class _TokenLogprobs(torch.autograd.Function):
    """labels [T, K] count from this rank's first row; only the first `rows` rows of weight are vocabulary."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, group: Any, entropy: bool, limit: int
    ) -> tuple[Tensor, Tensor]:  # [T, K], [T] or [0]
        num_tokens = hidden.shape[0]
        top = hidden.new_full((num_tokens,), -torch.inf, dtype=torch.float32)  # running maximum of the logits
        total = torch.zeros_like(top)  # of exp(x - top)
        chosen = top.new_zeros(labels.shape)  # x of the labels [T, K], 0 where another rank has it
        weighted = torch.zeros_like(top)  # of exp(x - top) * (x - top)
        kept = None
        block = _Block(hidden, weight, rows, limit)
        for start, stop in block.bounds():
            logits = block.logits(start, stop)  # [T, stop - start]
            index, here = _within(labels, start, stop)
            chosen += torch.where(here, logits.gather(1, index), 0.0)
            new_top = torch.maximum(top, logits.amax(1))
            if block.is_whole and (hidden.requires_grad or weight.requires_grad):
                kept = logits
                shifted = logits - new_top[:, None]
            else:
                shifted = logits.sub_(new_top[:, None])
            old = (top - new_top).exp_()
            if entropy:
                exponentials = shifted.exp()
                weighted = old * (weighted + torch.where(total > 0, total * (top - new_top), 0.0)) + shifted.mul_(exponentials).sum(1)
            else:
                exponentials = shifted.exp_()
            total = total * old + exponentials.sum(1)
            top = new_top
        log_sum = top + total.log()
        spread = total.log() - weighted / total if entropy else total[:0]
        if group is not None:
            log_sum, chosen, spread = _over_ranks(log_sum, chosen, spread, group)
        ctx.save_for_backward(hidden, weight, labels, log_sum, spread, kept)
        ctx.rows, ctx.entropy, ctx.limit = rows, entropy, limit
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
            hidden, labels, log_sum, grad_logprobs = hidden[used], labels[used], log_sum[used], grad_logprobs[used]
            kept = None if kept is None else kept[used]
            if ctx.entropy:
                spread, grad_spread = spread[used], grad_spread[used]
        block = _Block(hidden, weight, ctx.rows, ctx.limit)
        pull = grad_logprobs.sum(1)  # on the normalisation, [T]
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if grad_weight is not None:
            grad_weight[ctx.rows :] = 0
        for start, stop in block.bounds():
            log_p = block.logits(start, stop).sub_(log_sum[:, None]) if kept is None else kept - log_sum[:, None]  # [T, stop - start]
            if ctx.entropy:
                factor = (log_p + spread[:, None]).mul_(grad_spread[:, None]).add_(pull[:, None]).neg_()
                grad = log_p.exp_().mul_(factor)
            else:
                grad = log_p.exp_().mul_(-pull[:, None])
            index, here = _within(labels, start, stop)
            grad.scatter_add_(1, index, torch.where(here, grad_logprobs, 0.0))
            block.add_hidden_gradient(grad_hidden, grad, start, stop)
            if grad_weight is not None:
                block.put_weight_gradient(grad_weight, grad, start, stop)
        grad_hidden = grad_hidden.to(hidden.dtype)
        if used is not None:
            grad_hidden = torch.zeros_like(all_hidden).index_copy_(0, used, grad_hidden)
        return grad_hidden, grad_weight, None, None, None, None, None


class _Block:
    """The products of a block of vocabulary rows, and the memory they share.

    On a CPU in float32 whatever the inputs are: exact products, and a buffer that is used again, because fresh memory costs more there than the product.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, rows: int, limit: int) -> None:
        self._wide = hidden.is_cuda and hidden.dtype != torch.float32  # products of half-size inputs with float32 results
        self._hidden = hidden if self._wide else hidden.float()
        self._weight, self._rows = weight, rows
        num_tokens = max(1, hidden.shape[0])
        num_blocks = max(1, -(-rows * num_tokens * 4 // limit))
        self._step = max(1, -(-rows // num_blocks))
        self._buffer = None if self._wide else torch.empty(num_tokens * self._step, device=hidden.device)

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


def _within(labels: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Column of each label in the block [start, stop), clamped, and whether it is there, both [T, K]. No shape depends on the data: nothing waits for a GPU."""
    index = labels - start
    return index.clamp(0, stop - start - 1), (index >= 0) & (index < stop - start)


def _over_ranks(log_sum: Tensor, chosen: Tensor, spread: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same three of the whole vocabulary, from those of each rank's rows: two all-reduces, of [T] and [T, 1 + K (+ 2)], however many blocks there were.

    The entropy of the whole is that of the ranks' shares plus the mean, by share, of the entropies inside them.
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
