"""The kernel "blocks" of lopd.megatron.model.logprobs: plain torch, on every device.

BlockProducts has the matrix products of a block of vocabulary rows. Both kernels use it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Blocks of more rows than this have a multiple of it. Rows of bfloat16 that do not begin at a
# multiple of 16 bytes are slow to multiply on a GPU.
ROWS_ALIGNED = 256


class BlockProducts:
    """The matrix products of a block of vocabulary rows, and the memory that blocks share."""

    def __init__(self, hidden: Tensor, weight: Tensor, rows: int, limit: int) -> None:
        """Choose the size of the blocks.

        Args:
            hidden: [T, H].
            weight: [R, H]. Its first `rows` rows belong to the vocabulary.
            rows: The rows that the blocks cover. It may be 0.
            limit: The bytes of a block's float32 logits, at most about.
        """
        # On a GPU products of 16-bit inputs give float32 results. torch has no such product on a
        # CPU, so everything is in float32 there, whatever the inputs are.
        self._wide = hidden.is_cuda and hidden.dtype != torch.float32
        self._hidden = hidden if self._wide else hidden.float()
        self._weight = weight
        self._rows = rows
        num_tokens = max(1, hidden.shape[0])
        # Blocks of nearly equal size. A short last block would cost almost as much as a full one.
        num_blocks = max(1, -(-rows * num_tokens * 4 // limit))
        self._step = max(1, -(-rows // num_blocks))
        if self._step > ROWS_ALIGNED:
            self._step = -(-self._step // ROWS_ALIGNED) * ROWS_ALIGNED
        # On a CPU fresh memory costs more than the product, because the system has to clear its
        # pages. So all blocks use one buffer. On a GPU torch's allocator gives freed memory again.
        self._buffer = None
        if not self._wide:
            self._buffer = torch.empty(num_tokens * self._step, device=hidden.device)

    @property
    def is_whole(self) -> bool:
        """Return whether one block holds all rows."""
        return self._step >= self._rows

    def bounds(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of each block of rows."""
        for start in range(0, self._rows, self._step):
            yield start, min(start + self._step, self._rows)

    def logits(self, start: int, stop: int) -> Tensor:
        """Return the logits, float32 [T, stop - start]. They are valid until the next call."""
        rows = self._weight[start:stop].t()
        if self._buffer is None:
            return torch.mm(self._hidden, rows, out_dtype=torch.float32)
        return torch.mm(self._hidden, rows.float(), out=self._buffer_view(start, stop))

    def empty_gradient(self, start: int, stop: int) -> Tensor:
        """Return memory for the gradient of the logits, [T, stop - start].

        It has the type in which it is multiplied, and it is valid until the next call.
        """
        if self._buffer is None:
            shape = (self._hidden.shape[0], stop - start)
            return torch.empty(shape, dtype=self._hidden.dtype, device=self._hidden.device)
        return self._buffer_view(start, stop)

    def _buffer_view(self, start: int, stop: int) -> Tensor:
        # The last block may be shorter. A slice of columns of the buffer would not be contiguous.
        assert self._buffer is not None
        num_tokens = self._hidden.shape[0]
        num_rows = stop - start
        return self._buffer[: num_tokens * num_rows].view(num_tokens, num_rows)

    def add_hidden_gradient(self, total: Tensor, grad: Tensor, start: int, stop: int) -> None:
        """Add the block's part to the gradient of the hidden states.

        Args:
            total: float32 [T, H]. It is changed in place.
            grad: The gradient of the block's logits, [T, stop - start].
            start: The first row of the block.
            stop: The row after the last one.
        """
        rows = self._weight[start:stop]
        if self._wide:
            # The gradient of the logits is rounded to 16 bits here. The sum stays in float32.
            total += torch.mm(grad.to(rows.dtype), rows, out_dtype=torch.float32)
        else:
            # In place: no tensor of the size of the result is made.
            total.addmm_(grad, rows.float())

    def put_weight_gradient(self, target: Tensor, grad: Tensor, start: int, stop: int) -> None:
        """Write the block's rows of the weight gradient.

        Args:
            target: [R, H], in the type of the weight. Its rows of this block are overwritten.
            grad: The gradient of the block's logits, [T, stop - start].
            start: The first row of the block.
            stop: The row after the last one.
        """
        # No addition: no other block has these rows.
        if self._wide:
            torch.mm(grad.to(target.dtype).t(), self._hidden, out=target[start:stop])
        elif target.dtype == torch.float32:
            torch.mm(grad.t(), self._hidden, out=target[start:stop])
        else:
            # bfloat16 on a CPU: the product is in float32, and the assignment rounds it.
            target[start:stop] = grad.t() @ self._hidden


def softmax_statistics(
    block: BlockProducts, labels: Tensor, entropy: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return what a softmax over all rows needs, computed in one pass over the blocks.

    Args:
        block: The products.
        labels: int64 [T, K], counted from the first row.
        entropy: Whether the third result is wanted.
        keep: Whether the logits are wanted after this pass.

    Returns:
        For the logits x of each token: their maximum m, the sum of exp(x - m), and the sum of
        exp(x - m) (x - m), or 0 if not wanted, each float32 [T]. Then the logits of the labels,
        float32 [T, K], which are 0 for labels that are not among the rows. Last the logits of all
        rows, if they are to be kept and are one block, else None.
    """
    max_logits = torch.full((len(labels),), -torch.inf, dtype=torch.float32, device=labels.device)
    exp_sums = torch.zeros_like(max_logits)
    weighted_sums = torch.zeros_like(max_logits)
    chosen = max_logits.new_zeros(labels.shape)
    kept = None
    for start, stop in block.bounds():
        # [T, stop - start]
        logits = block.logits(start, stop)
        # First, because what follows overwrites the logits.
        index, is_here = _within(labels - start, stop - start)
        chosen += torch.where(is_here, logits.gather(1, index), 0.0)
        new_max = torch.maximum(max_logits, logits.amax(1))
        if block.is_whole and keep:
            kept = logits
            shifted = logits - new_max[:, None]
        else:
            shifted = logits.sub_(new_max[:, None])
        # The sums so far refer to the old maximum. exp(old - new) turns them to the new one. It is
        # 0 at the first block, where the old maximum is -inf.
        scale = (max_logits - new_max).exp_()
        if entropy:
            exponentials = shifted.exp()
            # Each x - m of the earlier blocks changes by old - new. `where`, because at the first
            # block that is -inf, and 0 * -inf is not a number.
            moved = torch.where(exp_sums > 0, exp_sums * (max_logits - new_max), 0.0)
            weighted_sums = scale * (weighted_sums + moved) + shifted.mul_(exponentials).sum(1)
        else:
            exponentials = shifted.exp_()
        # No term is larger than 1, so the sum cannot overflow.
        exp_sums = exp_sums * scale + exponentials.sum(1)
        max_logits = new_max
    return max_logits, exp_sums, weighted_sums, chosen, kept


def logit_gradients(
    log_p: Tensor,
    labels: Tensor,
    grad_logprobs: Tensor,
    entropies: Tensor | None,
    grad_entropies: Tensor | None,
) -> Tensor:
    """Return the gradient of a block's logits, [T, R].

    Args:
        log_p: The log-probabilities of the block's rows, [T, R]. They are overwritten.
        labels: int64 [T, K], counted from the block's first row.
        grad_logprobs: The gradient of the labels' log-probabilities, [T, K].
        entropies: The entropies of the whole vocabulary, [T]. None means that there is no gradient
            by the entropy.
        grad_entropies: The gradient of the entropies, [T] or None.
    """
    # [T]. Every log-probability holds -L, so the gradient of L is the sum over the labels.
    grad_sum = grad_logprobs.sum(1)
    index, is_here = _within(labels, log_p.shape[1])
    # With g = grad_sum and h = grad_entropies, for every row: -p (g + h (log p + entropy)).
    if entropies is not None and grad_entropies is not None:
        factor = (log_p + entropies[:, None]).mul_(grad_entropies[:, None])
        factor = factor.add_(grad_sum[:, None]).neg_()
        grad = log_p.exp_().mul_(factor)
    else:
        grad = log_p.exp_().mul_(-grad_sum[:, None])
    # The rows of the labels get their own gradient in addition. One label after the other: a token
    # may be there twice, and in one call a GPU would add the two in any order.
    for column in range(labels.shape[1]):
        part = slice(column, column + 1)
        added = torch.where(is_here[:, part], grad_logprobs[:, part], 0.0)
        grad.scatter_add_(1, index[:, part], added)
    return grad


def _within(labels: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the labels clamped to a block of this many rows, and whether they are in it.

    Both are [T, K]. No shape depends on the data, so the CPU does not have to wait for a GPU.
    """
    return labels.clamp(0, num_rows - 1), (labels >= 0) & (labels < num_rows)
