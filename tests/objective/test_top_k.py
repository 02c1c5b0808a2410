"""Top-K KL against divergences over whole vocabularies, written with torch's own functions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from lopd.errors import ConfigError
from lopd.objective import (
    Distillation,
    EarlyTokenGain,
    Lightning,
    TokenBatch,
    TopKKL,
    TruncatedImportance,
    reduce_metrics,
)
from tests.limits import apart, close, within
from tests.objective.pieces import relative_difference

NUM_TOKENS = 12
VOCAB_SIZE = 13
K = 4
Direction = Literal["reverse", "forward"]
Support = Literal["tail", "renormalised", "generalised"]
SUPPORTS: tuple[Support, ...] = ("tail", "renormalised", "generalised")


def logits_and_teacher(seed: int = 0, distance: float = 1.0) -> tuple[Tensor, Tensor]:
    """The student's logits with gradient and the teacher's log-probabilities, float64 [T, V]; at
    distance 0 they are the same distribution.
    """
    generator = torch.Generator().manual_seed(seed)
    common, moved = 2 * torch.randn(
        2, NUM_TOKENS, VOCAB_SIZE, generator=generator, dtype=torch.float64
    )
    return (common + distance * moved).requires_grad_(), torch.log_softmax(common, -1)


def batch_of(logits: Tensor, teacher: Tensor, num_chosen: int) -> TokenBatch:
    """Two responses, the second of which has two tokens without loss."""
    top, ids = teacher.topk(num_chosen, -1)
    return TokenBatch(
        loss_mask=torch.tensor([True] * (NUM_TOKENS - 2) + [False] * 2),
        cu_seqlens=torch.tensor([0, 5, NUM_TOKENS], dtype=torch.int32),
        num_sequences=2,
        teacher_logprobs=teacher[:, 0],
        teacher_top_logprobs=top,
        student_top_logprobs=torch.log_softmax(logits, -1).gather(1, ids),
    )


def loss_of(objective: TopKKL, logits: Tensor, teacher: Tensor, num_chosen: int) -> Tensor:
    output = Distillation(objective)(
        torch.log_softmax(logits, -1)[:, 0], batch_of(logits, teacher, num_chosen)
    )
    return output.loss_sum / output.num_items


def coarse(logprobs: Tensor, ids: Tensor, support: Support) -> Tensor:
    """Probabilities on the chosen tokens, and what becomes of the others: one more outcome, nothing
    after a division by the sum, or nothing at all. A plain loop.
    """
    found = []
    for row, chosen in zip(logprobs.exp(), ids, strict=True):
        inside = row[chosen]
        outside = row.sum() - inside.sum()
        made = {
            "tail": torch.cat([inside, outside[None]]),
            "renormalised": inside / inside.sum(),
            "generalised": inside,
        }
        found.append(made[support])
    return torch.stack(found)


def dense_kl(
    logits: Tensor, teacher: Tensor, direction: Direction, support: Support, num_chosen: int
) -> Tensor:
    """Mean over the two responses of the mean over their loss tokens."""
    ids = teacher.topk(num_chosen, -1).indices
    student = coarse(torch.log_softmax(logits, -1), ids, support)
    target = coarse(teacher, ids, support)
    first, second = (student, target) if direction == "reverse" else (target, student)
    # This is KL(first || second), with shape [T].
    each = torch.nn.functional.kl_div(second.log(), first, reduction="none").sum(-1)
    if support == "generalised":
        each = each - first.sum(-1) + second.sum(-1)
    return torch.stack([each[:5].mean(), each[5 : NUM_TOKENS - 2].mean()]).mean()


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_loss_and_gradient_equal_the_dense_reference(
    direction: Direction, support: Support
) -> None:
    logits, teacher = logits_and_teacher()
    loss = loss_of(TopKKL(direction, support), logits, teacher, K)
    (gradient,) = torch.autograd.grad(loss, logits)
    for other_direction in ("reverse", "forward"):
        for other_support in SUPPORTS:
            reference = dense_kl(
                logits,
                teacher,
                other_direction,  # type: ignore[arg-type]
                other_support,
                K,
            )
            (expected,) = torch.autograd.grad(reference, logits)
            if (other_direction, other_support) == (direction, support):
                close(loss, reference, rel=1e-10)
                within(relative_difference(gradient, expected), 1e-9)
            else:
                apart(
                    relative_difference(gradient, expected),
                    1e-2,
                    f"{other_direction}, {other_support}",
                )
    assert torch.all(gradient[NUM_TOKENS - 2 :] == 0), "tokens without loss"


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_with_a_tail_it_is_a_lower_bound_that_k_of_the_whole_vocabulary_reaches(
    direction: Direction,
) -> None:
    logits, teacher = logits_and_teacher()
    bounds = [
        loss_of(TopKKL(direction, "tail"), logits, teacher, num_chosen).item()
        for num_chosen in range(1, VOCAB_SIZE + 1)
    ]
    assert all(larger > smaller - 1e-12 for smaller, larger in itertools.pairwise(bounds))
    whole = dense_kl(logits, teacher, direction, "renormalised", VOCAB_SIZE).item()
    close(bounds[-1], whole, rel=1e-9)
    assert bounds[K] < 0.99 * whole


def test_only_the_renormalised_kl_does_not_see_what_leaks_out_of_the_chosen_tokens() -> None:
    """A student with the teacher's proportions inside of the K tokens and far more probability
    outside: no loss after renormalising.
    """
    _, teacher = logits_and_teacher()
    ids = teacher.topk(K, -1).indices
    leaking = torch.full_like(teacher, 3.0).scatter(1, ids, teacher.gather(1, ids)).requires_grad_()
    tail, renormalised, generalised = (
        loss_of(TopKKL("reverse", support), leaking, teacher, K) for support in SUPPORTS
    )
    within(abs(renormalised.item()), 1e-12)
    within(torch.autograd.grad(renormalised, leaking)[0].abs().max(), 1e-12)
    assert tail > 1.0
    # Not the tail itself, but what is missing at the K tokens.
    assert generalised > 0.5


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_vanishes_where_student_equals_teacher(direction: Direction, support: Support) -> None:
    logits, teacher = logits_and_teacher(distance=0.0)
    loss = loss_of(TopKKL(direction, support), logits, teacher, K)
    within(abs(loss.item()), 1e-12)
    within(torch.autograd.grad(loss, logits)[0].abs().max(), 1e-12)
    moved, _ = logits_and_teacher(distance=0.1)
    apart(loss_of(TopKKL(direction, support), moved, teacher, K), 1e-4)


class PlainSum(TopKKL):
    """The sum over the K tokens without the terms that make it a generalised KL."""

    def token_losses(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        student, teacher = self._on_support(batch)
        first, second = (student, teacher) if self.direction == "reverse" else (teacher, student)
        return (first.exp() * (first - second)).sum(-1)


def lowest(objective: TopKKL) -> tuple[float, float]:
    """The lowest loss that descent finds, and how far the K probabilities are from the teacher's
    there.
    """
    logits, teacher = logits_and_teacher()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def value() -> float:
        optimizer.zero_grad()
        loss = loss_of(objective, logits, teacher, K)
        loss.backward()
        return loss.item()

    optimizer.step(value)
    ids = teacher.topk(K, -1).indices[:-2]
    student = torch.softmax(logits, -1)[:-2].gather(1, ids)
    return value(), (student - teacher[:-2].exp().gather(1, ids)).abs().max().item()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_generalised_kl_is_lowest_at_the_teachers_own_probabilities(
    direction: Direction,
) -> None:
    loss, distance = lowest(TopKKL(direction, "generalised"))
    within(abs(loss), 1e-5)
    within(distance, 1e-3)
    # The control goes below 0 and leaves the teacher's probabilities.
    loss, distance = lowest(PlainSum(direction, "generalised"))
    assert loss < -1e-2
    apart(distance, 1e-2)


def test_float32_scores_that_add_up_to_more_than_one_stay_finite() -> None:
    teacher = torch.log(torch.tensor([[0.7, 0.3 + 1e-6]]))
    student = torch.log(torch.tensor([[0.6, 0.4]])).requires_grad_()
    batch = TokenBatch(
        torch.ones(1, dtype=torch.bool),
        torch.tensor([0, 1]),
        1,
        teacher_top_logprobs=teacher,
        student_top_logprobs=student,
    )
    for direction, support in itertools.product(("reverse", "forward"), SUPPORTS):
        objective = TopKKL(direction, support)  # type: ignore[arg-type]
        losses = objective.token_losses(torch.zeros(1), batch)
        (gradient,) = torch.autograd.grad(losses.sum(), student)
        assert torch.all(torch.isfinite(losses))
        assert torch.all(torch.isfinite(gradient))


def test_reports_the_divergence_and_both_tails() -> None:
    logits, teacher = logits_and_teacher()
    batch = batch_of(logits, teacher, K)
    output = Distillation(TopKKL("forward", "tail", "token_mean"))(
        torch.log_softmax(logits, -1)[:, 0], batch
    )
    figures = reduce_metrics({name: value.item() for name, value in output.metric_sums.items()})
    close(figures["top_k_kl"], (output.loss_sum / output.num_items).item(), rel=1e-12)
    ids = teacher.topk(K, -1).indices[:-2]
    close(
        figures["teacher_tail"],
        (1 - teacher[:-2].exp().gather(1, ids).sum(-1)).mean().item(),
        rel=1e-9,
    )
    close(
        figures["student_tail"],
        (1 - torch.softmax(logits, -1)[:-2].gather(1, ids).sum(-1)).mean().item(),
        rel=1e-9,
    )
    assert figures["clipped_share"] == 0


def test_token_weights_are_refused() -> None:
    for weighting in (TruncatedImportance(), EarlyTokenGain()):
        with pytest.raises(ConfigError, match="sampled token"):
            Distillation(TopKKL(), weightings=(weighting,))
        Distillation(Lightning(), weightings=(weighting,))


# ---- a student with fewer rows than the teacher ----

KNOWN = 9


def fewer_rows(num_chosen: int) -> tuple[Tensor, Tensor, TokenBatch]:
    """The student's logits over its own rows, the teacher over all, and their batch: a token past
    the student's rows has the log-probability -inf, as the trainer gives it.
    """
    all_logits, teacher = logits_and_teacher()
    logits = all_logits[:, :KNOWN].detach().requires_grad_()
    top, ids = teacher.topk(num_chosen, -1)
    padded = torch.nn.functional.pad(torch.log_softmax(logits, -1), (0, VOCAB_SIZE - KNOWN))
    student = torch.where(ids < KNOWN, padded.gather(1, ids), -torch.inf)
    assert ((ids >= KNOWN).any(1)).sum() > 3
    batch = TokenBatch(
        loss_mask=torch.tensor([True] * (NUM_TOKENS - 2) + [False] * 2),
        cu_seqlens=torch.tensor([0, 5, NUM_TOKENS], dtype=torch.int32),
        num_sequences=2,
        teacher_logprobs=teacher[:, 0],
        teacher_top_logprobs=top,
        student_top_logprobs=student,
    )
    return logits, teacher, batch


@pytest.mark.parametrize("with_tail", [False, True], ids=["tail computed", "tail of the cache"])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_tokens_past_the_students_rows_are_other_tokens(
    direction: Direction, support: Support, with_tail: bool
) -> None:
    logits, teacher, batch = fewer_rows(K)
    if with_tail:
        outside = 1 - batch.teacher_top_logprobs.exp().sum(-1)  # type: ignore[union-attr]
        batch = replace(batch, teacher_tail_logprob=outside.log())
    output = Distillation(TopKKL(direction, support))(torch.log_softmax(logits, -1)[:, 0], batch)
    loss = output.loss_sum / output.num_items
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    # The reference: of the K tokens those that the student has, one row at a time.
    ids = [row[row < KNOWN] for row in teacher.topk(K, -1).indices]
    each = []
    for row, own in enumerate(ids):
        student = coarse(torch.log_softmax(logits, -1)[row : row + 1], own[None], support)
        target = coarse(teacher[row : row + 1], own[None], support)
        first, second = (student, target) if direction == "reverse" else (target, student)
        terms = first * (first.log() - second.log())
        if support == "generalised":
            terms = terms - first + second
        each.append(terms.sum())
    mean = torch.stack([torch.stack(each[:5]).mean(), torch.stack(each[5:10]).mean()]).mean()
    (expected,) = torch.autograd.grad(mean, logits)
    close(loss, mean, rel=1e-9)
    within(relative_difference(gradient, expected), 1e-9)
    # Control: a made-up value of such a token, as a padded row would give it, is noticed.
    phantom = torch.where(
        torch.isneginf(batch.student_top_logprobs),  # type: ignore[arg-type]
        -torch.logsumexp(logits, -1, keepdim=True),
        batch.student_top_logprobs,  # type: ignore[arg-type]
    )
    wrong = Distillation(TopKKL(direction, support))(
        torch.log_softmax(logits, -1)[:, 0], replace(batch, student_top_logprobs=phantom)
    )
    (untrue,) = torch.autograd.grad(wrong.loss_sum / wrong.num_items, logits)
    apart(relative_difference(untrue, expected), 1e-3, "phantom")


def test_the_figures_count_such_tokens_in_the_tails() -> None:
    logits, _, batch = fewer_rows(K)
    sums = Distillation(TopKKL())(torch.log_softmax(logits, -1)[:, 0], batch).metric_sums
    known = torch.isfinite(batch.student_top_logprobs)  # type: ignore[arg-type]
    inside = (batch.teacher_top_logprobs.exp() * known).sum(-1)  # type: ignore[union-attr]
    close(sums["teacher_tail"], (1 - inside)[:-2].sum(), rel=1e-9)
    assert all(torch.isfinite(value) for value in sums.values())
