"""Prefixes, truncated responses, token weights and the reference KL against dense references, each
with controls that must differ.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lopd.batching import build_microbatch, make_sample
from lopd.objective import (
    Distillation,
    DropTruncated,
    EarlyTokenGain,
    Lightning,
    LossOutput,
    Objective,
    Prefix,
    ReferenceKL,
    TokenBatch,
    TruncatedImportance,
    reduce_metrics,
)
from lopd.records import Response, Sample, float32, int32
from tests.limits import apart, close, within
from tests.objective.dense import TableModel
from tests.objective.pieces import (
    CLIP,
    LENGTHS,
    Row,
    dense,
    gradient,
    gradient_difference,
    huber_losses,
    packed_logprobs,
    packed_output,
    relative_difference,
    rows,
    samples_with_everything,
)

# relative to the largest entry of the gradient
EXACT = 1e-11
DIFFERENT = 1e-2
BASE = Lightning(CLIP)
EVERYTHING = Distillation(
    BASE,
    (Prefix(share=0.5), DropTruncated()),
    (TruncatedImportance(1.5), EarlyTokenGain(2.0, CLIP)),
    ReferenceKL(0.3, "reverse"),
    ("math", "code"),
)


@pytest.fixture
def model() -> TableModel:
    return TableModel()


@pytest.fixture
def samples() -> list[Sample]:
    return samples_with_everything()


def reported(output: LossOutput) -> dict[str, float]:
    return reduce_metrics({name: value.item() for name, value in output.metric_sums.items()})


def prefix_of(row: Row, length: int, *, end_token: bool) -> Row:
    """The first tokens, and the last one of a response that ended by itself."""
    kept = list(range(min(length, len(row.student))))
    if end_token and not row.truncated and len(row.student) > length:
        kept.append(len(row.student) - 1)
    return row[kept]


class TestPrefix:
    @pytest.mark.parametrize("end_token", [True, False])
    def test_share_is_the_loss_of_the_shortened_responses(
        self, model: TableModel, samples: list[Sample], end_token: bool
    ) -> None:
        def reference(share: float, *, end_token: bool) -> Tensor:
            return dense(
                model,
                samples,
                lambda row: huber_losses(
                    prefix_of(row, math.ceil(len(row.student) * share), end_token=end_token)
                ),
            )

        output = packed_output(
            model, samples, Distillation(BASE, (Prefix(share=0.3, keep_end_token=end_token),))
        )
        within(gradient_difference(model, output, reference(0.3, end_token=end_token)), EXACT)
        apart(
            gradient_difference(model, output, reference(0.3, end_token=not end_token)),
            DIFFERENT,
            "the end token",
        )
        apart(
            gradient_difference(model, output, reference(0.5, end_token=end_token)),
            DIFFERENT,
            "another share",
        )

    def test_number_of_tokens(self, model: TableModel, samples: list[Sample]) -> None:
        output = packed_output(model, samples, Distillation(BASE, (Prefix(num_tokens=4),)))
        for length, bound in ((4, (0, EXACT)), (5, (DIFFERENT, math.inf))):
            reference = dense(
                model,
                samples,
                lambda row, length=length: huber_losses(prefix_of(row, length, end_token=True)),
            )
            assert bound[0] <= gradient_difference(model, output, reference) < bound[1]

    def test_a_tenth_of_thirty_tokens_are_three(self) -> None:
        """30 * 0.1 is a little more than 3 in floating point."""
        batch = TokenBatch(
            torch.ones(30, dtype=torch.bool), torch.tensor([0, 30], dtype=torch.int32), 1
        )
        assert Prefix(share=0.1)(batch).sum() == 3


class TestTruncated:
    def test_dropping_is_as_if_the_responses_were_not_there(
        self, model: TableModel, samples: list[Sample]
    ) -> None:
        output = packed_output(model, samples, Distillation(BASE, (DropTruncated(),)))
        finished = [sample for sample in samples if not sample.truncated]
        assert output.num_items == packed_output(model, finished, BASE).num_items
        within(gradient_difference(model, output, dense(model, finished, huber_losses)), EXACT)
        apart(
            gradient_difference(model, output, dense(model, samples, huber_losses)),
            DIFFERENT,
            "with them",
        )

    def test_the_finish_reason_reaches_the_objective(self) -> None:
        def response(finish_reason: str) -> Response:
            return Response(
                "p", 0, int32([1, 2]), int32([3, 4, 5]), float32([-1, -1, -1]), finish_reason, "v"
            )  # type: ignore[arg-type]

        microbatch = build_microbatch(
            [make_sample(response(reason), float32([-1, -2, -3])) for reason in ("stop", "length")],
            pad_multiple=4,
        )
        batch = TokenBatch.from_microbatch(microbatch)
        assert batch.truncated is not None
        assert batch.truncated.tolist() == [False, True, False]  # the last is padding
        logprobs = torch.full((12,), -1.0)
        figures = reported(BASE(logprobs, batch))
        assert figures["num_end_tokens"] == 1
        assert figures["end_token_advantage"] == -2.0  # of token 5 in the first response alone
        assert figures["advantage"] == -1.0


class TestImportance:
    def test_is_the_score_function_form_with_truncated_weights(
        self, model: TableModel, samples: list[Sample]
    ) -> None:
        def weighted(cap: float) -> Tensor:
            return dense(
                model,
                samples,
                lambda row: (
                    -(row.student - row.sampling).detach().exp().clamp(max=cap)
                    * row.advantage
                    * row.student
                ),
            )

        output = packed_output(
            model, samples, Distillation(BASE, weightings=(TruncatedImportance(2.0),))
        )
        within(gradient_difference(model, output, weighted(2.0)), EXACT)
        apart(gradient_difference(model, output, weighted(1e9)), DIFFERENT, "no cap")
        apart(
            gradient_difference(model, output, dense(model, samples, huber_losses)),
            DIFFERENT,
            "no weights",
        )
        capped = (
            torch.cat([(row.student - row.sampling).exp() > 2.0 for row in rows(model, samples)])
            .double()
            .mean()
            .item()
        )
        assert 0.05 < capped < 0.95
        close(reported(output)["importance_capped_share"], capped, rel=1e-12)


class TestEarlyTokenGain:
    def test_is_a_running_sum_of_disagreement(
        self, model: TableModel, samples: list[Sample]
    ) -> None:
        def reference(row: Row, gain: float, *, before: bool = False) -> Tensor:
            factors = []
            passed = 0.0
            total = row.advantage.abs().sum()
            for size in row.advantage.abs():
                factors.append(1 + gain * (1 - (passed if before else passed + size) / total))
                passed = passed + size
            return (
                torch.stack([torch.as_tensor(factor) for factor in factors]) * huber_losses(row)
                if factors
                else row.student
            )

        output = packed_output(
            model, samples, Distillation(BASE, weightings=(EarlyTokenGain(2.0, CLIP),))
        )

        def difference(gain: float, **change: bool) -> float:
            expected = dense(model, samples, lambda row: reference(row, gain, **change))
            return gradient_difference(model, output, expected)

        within(difference(2.0), 1e-8)  # sums in steps of 2^-32 nats
        apart(difference(1.0), DIFFERENT, "another gain")
        apart(difference(2.0, before=True), DIFFERENT, "the sum before t")

    def test_falls_from_one_plus_gain_to_one_within_each_response(
        self, model: TableModel, samples: list[Sample]
    ) -> None:
        logprobs, batch = packed_logprobs(model, samples)
        factors = EarlyTokenGain(2.0, CLIP)(logprobs, batch)
        for start, end in zip(
            batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True
        ):
            mine = factors[start:end][batch.loss_mask[start:end]]
            if len(mine):
                assert torch.all(torch.diff(mine) <= 0)
                assert mine[0] <= 3.0
                assert mine[-1] == 1.0


def enumerated_states(
    seed: int = 0, num_states: int = 4, vocab_size: int = 7
) -> tuple[Tensor, Tensor]:
    """Logits of the student, with gradient, and log pi of the reference, float64 [states, V]."""
    generator = torch.Generator().manual_seed(seed)
    reference, moved = torch.randn(
        2, num_states, vocab_size, generator=generator, dtype=torch.float64
    )
    return (reference + 0.8 * moved).requires_grad_(), torch.log_softmax(reference, -1)


class TestReferenceKL:
    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    def test_expectation_is_the_exact_divergence_and_its_gradient(self, direction: str) -> None:
        """Over every token that the reference can sample, weighted by how often it does."""
        logits, reference = enumerated_states()
        student = torch.log_softmax(logits, -1)
        batch = TokenBatch(
            torch.ones(reference.numel(), dtype=torch.bool),
            torch.tensor([0, reference.numel()]),
            1,
            sampling_logprobs=reference.flatten(),
        )
        term = ReferenceKL(0.7, direction, weight_cap=1e9)  # type: ignore[arg-type]
        terms = term(student.flatten(), batch)
        expected = (reference.exp().flatten() * terms).sum()
        forward = (reference.exp() * (reference - student)).sum()
        reverse = (student.exp() * (student - reference)).sum()
        exact, other = (forward, reverse) if direction == "forward" else (reverse, forward)
        gradients = [
            torch.autograd.grad(value, logits, retain_graph=True)[0]
            for value in (expected, 0.7 * exact, 0.7 * other)
        ]
        assert torch.all(terms >= 0)
        close(expected, 0.7 * exact, rel=1e-12)
        close(gradients[0], gradients[1], rel=1e-10, abs=1e-13)
        apart(relative_difference(gradients[0], gradients[2]), 0.1, "the other direction")

    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    def test_is_added_to_the_loss_with_a_capped_slope(
        self, model: TableModel, samples: list[Sample], direction: str
    ) -> None:
        def reference(row: Row, cap: float) -> Tensor:
            weight = (row.student - row.sampling).detach().exp().clamp(max=cap)
            slope = weight - 1 if direction == "forward" else weight * weight.log()
            return huber_losses(row) + 0.4 * slope * row.student

        output = packed_output(
            model,
            samples,
            Distillation(BASE, reference=ReferenceKL(0.4, direction, weight_cap=3.0)),
        )  # type: ignore[arg-type]
        capped = dense(model, samples, lambda row: reference(row, 3.0))
        free = dense(model, samples, lambda row: reference(row, 1e9))
        within(gradient_difference(model, output, capped), EXACT)
        apart(gradient_difference(model, output, free), DIFFERENT, "no cap")
        apart(
            gradient_difference(model, output, dense(model, samples, huber_losses)),
            DIFFERENT,
            "no reference",
        )

    def test_forward_pulls_at_what_was_given_up_and_reverse_forgives(self) -> None:
        batch = TokenBatch(
            torch.ones(1, dtype=torch.bool),
            torch.tensor([0, 1]),
            1,
            sampling_logprobs=torch.tensor([-1.0]),
        )
        for direction, slope in (("forward", -1.0), ("reverse", 0.0)):
            logprobs = torch.tensor([-31.0], requires_grad=True)
            (found,) = torch.autograd.grad(
                ReferenceKL(1.0, direction)(logprobs, batch).sum(), logprobs
            )  # type: ignore[arg-type]
            close(found.item(), slope, abs=1e-9)


class TestComposition:
    def test_without_pieces_is_lightning_to_the_bit(
        self, model: TableModel, samples: list[Sample]
    ) -> None:
        plain = packed_output(model, samples, BASE)
        composed = packed_output(model, samples, Distillation(BASE))
        assert plain.loss_sum == composed.loss_sum
        assert plain.metric_sums == composed.metric_sums
        assert torch.equal(gradient(model, plain.loss_sum), gradient(model, composed.loss_sum))

    def test_all_pieces_together(self, model: TableModel, samples: list[Sample]) -> None:
        def reference(row: Row) -> Tensor:
            if row.truncated:
                return row.student[:0]
            short = prefix_of(row, math.ceil(len(row.student) * 0.5), end_token=True)
            if not len(short.student):
                return short.student
            ratio = (short.student - short.sampling).detach().exp()
            size = short.advantage.abs()
            factor = ratio.clamp(max=1.5) * (1 + 2.0 * (1 - torch.cumsum(size, 0) / size.sum()))
            pull = 0.3 * (ratio.clamp(max=10.0) * ratio.clamp(max=10.0).log()) * short.student
            return factor * huber_losses(short) + pull

        everything = replace(EVERYTHING, teachers=())
        output = packed_output(model, samples, everything)
        within(gradient_difference(model, output, dense(model, samples, reference)), 1e-8)
        for without in ({"selections": ()}, {"weightings": ()}, {"reference": None}):
            fewer = replace(everything, **without)  # type: ignore[arg-type]
            other = packed_output(model, samples, fewer)
            ours = gradient(model, output.loss_sum / output.num_items)
            theirs = gradient(model, other.loss_sum / other.num_items)
            apart(
                relative_difference(theirs, ours),
                DIFFERENT,
                f"without {next(iter(without))}",
            )

    def test_packing_changes_nothing(self, model: TableModel, samples: list[Sample]) -> None:
        """One microbatch a response gives the same loss, gradient and metrics as one for all."""
        objective = replace(EVERYTHING, teachers=())
        whole = packed_output(model, samples, objective)
        parts = [packed_output(model, [sample], objective) for sample in samples]
        assert whole.num_items == sum(part.num_items for part in parts)
        close(sum(part.loss_sum for part in parts), whole.loss_sum, rel=1e-12)
        close(
            sum(gradient(model, part.loss_sum) for part in parts),
            gradient(model, whole.loss_sum),
            rel=1e-10,
            abs=1e-14,
        )
        for name, value in whole.metric_sums.items():
            close(sum(part.metric_sums[name] for part in parts), value, rel=1e-9, abs=1e-9)

    @pytest.mark.parametrize("poison", [math.nan, 1e30, -1e30])
    def test_what_stands_at_tokens_without_loss_does_not_matter(
        self, model: TableModel, samples: list[Sample], poison: float
    ) -> None:
        logprobs, batch = packed_logprobs(model, samples)
        batch = replace(batch, teacher_index=torch.arange(len(batch.cu_seqlens) - 1) % 2)
        outputs = []
        for values in (logprobs.detach(), torch.where(batch.loss_mask, logprobs.detach(), poison)):
            output = EVERYTHING(values.requires_grad_(), batch)
            (slope,) = torch.autograd.grad(output.loss_sum, values)
            outputs.append((output, slope))
        (clean, clean_gradient), (poisoned, poisoned_gradient) = outputs
        assert clean.loss_sum == poisoned.loss_sum
        assert torch.equal(clean_gradient, poisoned_gradient)
        assert clean.metric_sums == poisoned.metric_sums

    def test_only_padding_gives_zeros_under_the_same_names(
        self, model: TableModel, samples: list[Sample]
    ) -> None:
        def output(chosen: list[Sample]) -> LossOutput:
            logprobs, batch = packed_logprobs(model, chosen)
            return EVERYTHING(
                logprobs,
                replace(
                    batch, teacher_index=torch.zeros(len(batch.cu_seqlens) - 1, dtype=torch.long)
                ),
            )

        empty = output([])
        assert list(empty.metric_sums) == list(output(samples).metric_sums)
        assert all(
            value == 0 for value in (empty.loss_sum, empty.num_items, *empty.metric_sums.values())
        )


class TestTeachers:
    def test_each_teachers_figures_are_those_of_its_responses(
        self, model: TableModel, samples: list[Sample]
    ) -> None:
        names = ("math", "code", "silent")
        by = [index % 2 for index in range(len(LENGTHS))]
        logprobs, batch = packed_logprobs(model, samples)
        batch = replace(
            batch, teacher_index=torch.tensor([*by, *([0] * (len(batch.cu_seqlens) - 1 - len(by)))])
        )
        figures = reported(Distillation(BASE, teachers=names)(logprobs, batch))
        for index in (0, 1):
            alone = reported(
                packed_output(
                    model,
                    [sample for sample, scorer in zip(samples, by, strict=True) if scorer == index],
                    BASE,
                )
            )
            found = {
                name.removesuffix(f"/{names[index]}"): value
                for name, value in figures.items()
                if name.endswith(f"/{names[index]}")
            }
            close(found, alone, rel=1e-9)
        assert figures["advantage/math"] != pytest.approx(figures["advantage/code"], rel=1e-2), (
            "control: they differ"
        )
        assert figures["num_tokens/silent"] == 0
        assert "advantage/silent" not in figures

    def test_the_loss_is_that_of_one_cache(self, model: TableModel, samples: list[Sample]) -> None:
        logprobs, batch = packed_logprobs(model, samples)
        named = replace(
            batch, teacher_index=torch.zeros(len(batch.cu_seqlens) - 1, dtype=torch.long)
        )
        assert (
            Distillation(BASE, teachers=("one",))(logprobs, named).loss_sum
            == BASE(logprobs, batch).loss_sum
        )


def test_pieces_are_objectives() -> None:
    objective: Objective = EVERYTHING
    assert callable(objective)
