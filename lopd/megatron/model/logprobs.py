"""Log-probabilities of given tokens, without the logits of all tokens.

They are computed from the hidden states and the output layer's weight. The logits of T tokens are
T * V floats: 7 GB for 12,288 tokens and Qwen3's vocabulary, and a dense loss holds several copies.
Here logits exist for a block of vocabulary rows at a time, in the forward and the backward pass.

The blocks divide rows, not tokens. So the weight gradient of each block is complete and written
once. What is summed over blocks is the small gradient [T, H] of the hidden states, in float32.

The backward pass computes the logits again. A loss may weigh tokens by their log-probabilities, so
the weight of a token is known only after the forward pass. Without it the gradient of the output
layer's weight, a sum over tokens, cannot be formed. Where all logits fit into one block they are
kept instead. Tokens whose gradient is zero (prompts, padding) take no part in the backward pass.

Two kernels compute what lies between the matrix products. "blocks" is plain torch
(logprobs_blocks.py). "triton" is fused with the product of the logits (logprobs_triton.py). Ranks,
padding, and the choice of tokens and rows are the same code for both, in this file.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lopd.megatron.model import logprobs_blocks
from lopd.megatron.model.logprobs_blocks import BlockProducts

# Bytes of the logits, or of their gradients, that exist at once. On a CPU smaller blocks are slower
# (docs/benchmarks.md).
BLOCK_BYTES = {"cpu": 128 * 2**20, "cuda": 256 * 2**20}
# The kernel that measured best on a device. On a GPU nothing has been measured yet
# (docs/gpu_results.md).
KERNELS = {"cpu": "blocks", "cuda": "blocks"}


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
    """Return the log-probabilities of the labels, and the entropy of each distribution if wanted.

    Values are natural logarithms at temperature 1, and differentiable. With L = log sum_j exp x_j
    for the logits x of a token:

        log p_y = x_y - L                its gradient for x_j is 1[j = y] - p_j
        entropy = L - sum_j p_j x_j      its gradient for x_j is -p_j (log p_j + entropy)

    Products, sums and exponentials are in float32. On a CPU this holds for bfloat16 inputs too. On
    CUDA the gradient of the logits is rounded to the type of the inputs for its two products.

    Args:
        hidden: [T, H]. The hidden states of all T tokens, the same on every rank of the group.
        weight: [R, H]. This rank's rows of the output layer. Rank r of the group holds the rows
            r * R to (r + 1) * R.
        labels: int64 [T], or [T, K] for several tokens at each place.
        group: The ranks that divide the vocabulary. None means that this rank has all rows.
        vocab_size: The rows past it are padding and have no probability: such a label has the
            log-probability -inf and no gradient. None means that there is no padding.
        entropy: Whether the entropies are wanted.
        block_bytes: The bytes of logits at a time, at most about. None means BLOCK_BYTES.
        kernel: "blocks" or "triton". None means the one in KERNELS for the device.

    Returns:
        The log-probabilities, float32 in the shape of labels, and the entropies, float32 [T] or
        None. Both are the same on every rank. The gradient for hidden is this rank's share: the
        operation that gathered or copied hidden has to sum it over the group.
    """
    size = 1 if group is None else group.size()
    rank = 0 if group is None else group.rank()
    num_rows = weight.shape[0]
    first = rank * num_rows
    # The last ranks may hold padding only. They have 0 rows of the vocabulary and still take part
    # in the collectives.
    known = size * num_rows if vocab_size is None else vocab_size
    rows = max(0, min(num_rows, known - first))
    # Other accelerators take the sizes of CUDA.
    limit = block_bytes or BLOCK_BYTES.get(hidden.device.type, BLOCK_BYTES["cuda"])
    # [T, K]. Labels of other ranks become negative or too large. No block contains those.
    local_labels = labels.reshape(len(labels), -1) - first
    kernel = kernel or KERNELS.get(hidden.device.type, "blocks")
    logprobs, entropies = _TokenLogprobs.apply(
        hidden, weight, local_labels, rows, group if size > 1 else None, entropy, limit, kernel
    )
    if vocab_size is not None:
        # A label past the vocabulary has no logit, so its probability is 0. A teacher with more
        # rows than the student has such tokens among its K likeliest.
        is_known = local_labels < known - first
        logprobs = torch.where(is_known, logprobs, -torch.inf)
    return logprobs.view(labels.shape), entropies if entropy else None


class _TokenLogprobs(torch.autograd.Function):
    """The forward and the backward pass over blocks of vocabulary rows.

    The labels [T, K] count from this rank's first row. Only the first `rows` rows of the weight
    belong to the vocabulary.
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
    ) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities [T, K] and the entropies [T], or [0] if not wanted."""
        kept = None
        if kernel == "triton":
            # Imported here, because only this kernel needs the package triton.
            from lopd.megatron.model import logprobs_triton

            statistics = logprobs_triton.softmax_statistics(hidden, weight, labels, rows, entropy)
        else:
            # A forward pass without a gradient, as in scoring, must not keep the logits.
            keep = hidden.requires_grad or weight.requires_grad
            block = BlockProducts(hidden, weight, rows, limit)
            *statistics, kept = logprobs_blocks.softmax_statistics(block, labels, entropy, keep)
        max_logits, exp_sums, weighted_sums, chosen = statistics
        log_sum = max_logits + exp_sums.log()
        # With m the maximum: entropy = log sum exp(x - m) - sum p (x - m). The maximum cancels, so
        # it is not added first. That keeps the digits of a small entropy of large logits.
        entropies = exp_sums.log() - weighted_sums / exp_sums if entropy else exp_sums[:0]
        if group is not None:
            # So far the values are those of this rank's rows.
            log_sum, chosen, entropies = _over_ranks(log_sum, chosen, entropies, group)
        # What is kept for the backward pass is [T], except for logits that are one block.
        ctx.save_for_backward(hidden, weight, labels, log_sum, entropies, kept)
        ctx.rows = rows
        ctx.entropy = entropy
        ctx.limit = limit
        ctx.kernel = kernel
        return chosen - log_sum[:, None], entropies

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        all_hidden, weight, all_labels, log_sum, entropies, kept = ctx.saved_tensors
        if not ctx.entropy:
            entropies = None
            grad_entropies = None
        # Prompts and padding have no loss. Their gradients are zero, so they are left out of all
        # products.
        used = _used_tokens(grad_logprobs, grad_entropies)
        hidden = _take(all_hidden, used)
        labels = _take(all_labels, used)
        log_sum = _take(log_sum, used)
        grad_logprobs = _take(grad_logprobs, used)
        entropies = _take(entropies, used)
        grad_entropies = _take(grad_entropies, used)
        kept = _take(kept, used)

        block = BlockProducts(hidden, weight, ctx.rows, ctx.limit)
        # float32 for bfloat16 inputs as well, because many blocks are added to it.
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if grad_weight is not None:
            # No block covers the padding.
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
                    entropies,
                    grad_entropies,
                    grad,
                )
            else:
                # log p. The kept logits are not overwritten: autograd may run this pass again.
                if kept is None:
                    log_p = block.logits(start, stop).sub_(log_sum[:, None])
                else:
                    log_p = kept - log_sum[:, None]
                grad = logprobs_blocks.logit_gradients(
                    log_p, labels - start, grad_logprobs, entropies, grad_entropies
                )
            # The two products of the backward pass. Both use the gradient of the logits while it
            # exists.
            block.add_hidden_gradient(grad_hidden, grad, start, stop)
            if grad_weight is not None:
                block.put_weight_gradient(grad_weight, grad, start, stop)
        # Rounded once, at the end.
        grad_hidden = grad_hidden.to(hidden.dtype)
        if used is not None:
            # The rows of the unused tokens are zeros.
            grad_hidden = torch.zeros_like(all_hidden).index_copy_(0, used, grad_hidden)
        # One entry for each input of forward. Only the first two are differentiable.
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _used_tokens(grad_logprobs: Tensor, grad_entropies: Tensor | None) -> Tensor | None:
    """Return the indices of the tokens that have a gradient, or None if all have one."""
    used = (grad_logprobs != 0).any(1)
    if grad_entropies is not None:
        used |= grad_entropies != 0
    return None if used.all() else used.nonzero()[:, 0]


def _take(rows: Tensor | None, index: Tensor | None) -> Tensor | None:
    return rows if rows is None or index is None else rows[index]


def _over_ranks(
    log_sum: Tensor, chosen: Tensor, entropies: Tensor, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values of the whole vocabulary, made of those of each rank's rows. Collective.

    Args:
        log_sum: [T], the logarithm of the sum of exp x over this rank's rows.
        chosen: [T, K], the logits of the labels. It is 0 for labels of other ranks.
        entropies: [T], the entropies inside of this rank's rows, or [0].
        group: The ranks that divide the vocabulary.

    Returns:
        The same three for the whole vocabulary, equal on every rank.
    """
    # Two all-reduces, of [T] and of [T, 1 + K] or [T, 2 + K], however many blocks there were. The
    # maximum comes first, so that exp cannot overflow.
    max_log_sum = log_sum.clone()
    dist.all_reduce(max_log_sum, op=dist.ReduceOp.MAX, group=group)
    # -inf where a rank has no rows of the vocabulary. Its share is then 0.
    relative = log_sum - max_log_sum
    share = relative.exp()
    columns = [share[:, None], chosen]
    # The entropy of the whole is the entropy of the ranks' shares plus the mean, by share, of the
    # entropies inside of the ranks. `where`, because 0 * -inf is not a number.
    if len(entropies):
        columns.append(torch.where(share > 0, share * (entropies - relative), 0.0)[:, None])
    sums = torch.cat(columns, dim=1)
    dist.all_reduce(sums, group=group)
    log_total = sums[:, 0].log()
    whole = sums[:, -1] / sums[:, 0] + log_total if len(entropies) else entropies
    return max_log_sum + log_total, sums[:, 1 : 1 + chosen.shape[1]], whole
