"""Tokens without loss, such as those of a tool, count in no figure: neither the zeros that stand in
place of their log-probabilities, which would be perfect agreement, nor anything else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lopd import cache
from lopd.artifacts import ArtifactWriter, read_manifest, read_shard
from lopd.audit.scores import score_from_columns, score_with_model
from lopd.batching import build_microbatch, make_sample
from lopd.cache.checks import check_cache
from lopd.cache.reader import CacheReader
from lopd.cache.residualise import residualise
from lopd.cache.statistics import inspect_cache
from lopd.cache.style import Settings
from lopd.objective import (
    Distillation,
    EarlyTokenGain,
    Lightning,
    Prefix,
    ReferenceKL,
    StepDivergence,
    TokenBatch,
    TruncatedImportance,
    reduce_metrics,
)
from lopd.records import Response, TeacherScores, float32, token_hash
from lopd.report.cache_view import _inspection_lines
from lopd.report.html.responses import Answers
from lopd.report.html.tokens import Deviations
from lopd.report.html.transcripts import Scanned, _milli
from lopd.verbs.parity import _of_loss
from lopd.verbs.run_transcripts import _disagreement
from tests.cache.rollouts import (
    END,
    SAMPLING,
    TEACHER,
    TINY_TEACHER,
    VOCABULARY,
    some_responses,
)
from tests.limits import close

Rows = list[tuple[Response, TeacherScores]]
# What stands at tokens of a tool: by the sampler and by the teacher. The first is what others
# write.
ZEROS = (0.0, 0.0)
JUNK = (-0.7, -6.5)


def rows_with(at_masked: tuple[float, float], *, with_mask: bool = True) -> Rows:
    """Responses of three turns with tool tokens between them, 40 to 70% of each response."""
    rng = np.random.default_rng(3)
    rows: Rows = []
    for response in some_responses(40):
        length = len(response.token_ids)
        mask = np.ones(length, bool)
        mask[length // 6 : length // 2] = False
        mask[2 * length // 3 : length - 2] = False
        teacher = np.minimum(0, response.sampling_logprobs + rng.normal(-0.5, 0.4, length))
        sampling = np.where(mask, response.sampling_logprobs, at_masked[0])
        teacher = np.where(mask, teacher, at_masked[1])
        entropy = float32(np.where(mask, rng.exponential(0.3, length), -at_masked[1] / 4))
        kept = replace(
            response,
            sampling_logprobs=float32(sampling),
            loss_mask=mask if with_mask else None,
        )
        name = token_hash(response.prompt_ids, response.token_ids)
        rows.append((kept, TeacherScores(*response.key, name, float32(teacher), entropy=entropy)))
    return rows


def publish(folder: Path, rows: Rows) -> Path:
    responses, scores = zip(*rows, strict=True)
    writer = ArtifactWriter(
        folder,
        kind="teacher_cache",
        inputs={},
        models={"teacher": TEACHER},
        sampling=SAMPLING,
        lineage={"consistent": False},
    )
    for index in range(2):
        part = slice(20 * index, 20 * index + 20)
        writer.publish_shard(index, cache.to_table(responses[part], scores[part]))
    writer.finish(vocab_size=VOCABULARY, end_token_ids=[END])
    return folder


@pytest.fixture
def caches(tmp_path: Path) -> dict[str, Path]:
    """The same cache with zeros and with junk at the tool's tokens, and with zeros and no mask."""
    return {
        "zeros": publish(tmp_path / "zeros", rows_with(ZEROS)),
        "junk": publish(tmp_path / "junk", rows_with(JUNK)),
        "trap": publish(tmp_path / "trap", rows_with(ZEROS, with_mask=False)),
    }


def figures_of(folder: Path) -> dict[str, Any]:
    """What ``lopd cache inspect`` says of log-probabilities."""
    found = inspect_cache(folder)
    names = (
        "teacher_logprobs",
        "sampling_logprobs",
        "advantage_at_start",
        "teacher_entropy",
        "loss_tokens",
        "turns",
    )
    return {name: found[name] for name in names}


def test_inspect_does_not_look_at_them(caches: dict[str, Path]) -> None:
    zeros = figures_of(caches["zeros"])
    assert zeros == figures_of(caches["junk"])
    # The control: without a mask the zeros look like agreement.
    trap = figures_of(caches["trap"])
    assert abs(trap["advantage_at_start"]["mean"]) < 0.7 * abs(zeros["advantage_at_start"]["mean"])
    rows = rows_with(ZEROS)
    masks = [response.loss_mask for response, _ in rows]
    assert zeros["loss_tokens"] == sum(int(mask.sum()) for mask in masks if mask is not None)
    assert zeros["turns"] == 3 * len(rows)
    assert trap["turns"] == len(rows)


def test_zeros_without_a_mask_are_shown(caches: dict[str, Path]) -> None:
    def lines(name: str) -> dict[str, str]:
        return dict(_inspection_lines(inspect_cache(caches[name])))

    assert "in 3.00 turns per response" in lines("zeros")["carry loss"]
    assert "  exactly 0" not in lines("zeros")
    assert "tokens of a tool need a loss_mask" in lines("trap")["  exactly 0"]
    assert "carry loss" not in lines("trap")


OBJECTIVE = Distillation(
    Lightning(10.0),
    (Prefix(share=0.7),),
    (TruncatedImportance(1.5), EarlyTokenGain(1.0), StepDivergence(1.2)),
    ReferenceKL(0.1),
)


def learnt_from(rows: Sequence[tuple[Response, TeacherScores]]) -> dict[str, Any]:
    """Loss, gradient and every figure of a step on these rows."""
    samples = [make_sample(response, scores) for response, scores in rows]
    batch = TokenBatch.from_microbatch(build_microbatch(samples, pad_multiple=8))
    generator = torch.Generator().manual_seed(0)
    student = -torch.rand(len(batch.loss_mask), generator=generator, dtype=torch.float64)
    student.requires_grad_()
    output = OBJECTIVE(student, batch)
    (gradient,) = torch.autograd.grad(output.loss_sum, student)
    sums = {name: float(value) for name, value in output.metric_sums.items()}
    return {
        "loss": float(output.loss_sum.detach()),
        "items": int(output.num_items),
        "gradient": gradient,
        "figures": reduce_metrics(sums),
    }


def test_the_objective_does_not_look_at_them() -> None:
    """Not in the loss, an advantage, a weight, the effective sample share, or what is divided by.

    To the bit: what stands at these tokens must not even be rounded into a sum.
    """
    zeros = learnt_from(rows_with(ZEROS))
    junk = learnt_from(rows_with(JUNK))
    assert (zeros["loss"], zeros["items"]) == (junk["loss"], junk["items"])
    assert zeros["figures"] == junk["figures"]
    assert torch.equal(zeros["gradient"], junk["gradient"])
    # The control: as tokens with loss they change everything.
    trap = learnt_from(rows_with(ZEROS, with_mask=False))
    assert trap["figures"]["num_tokens"] > 1.5 * zeros["figures"]["num_tokens"]
    for name in ("advantage", "effective_sample_share", "reverse_kl", "step_weight"):
        assert abs(trap["figures"][name] / zeros["figures"][name] - 1) > 0.003, name


def test_no_gradient_reaches_them() -> None:
    rows = rows_with(JUNK)
    samples = [make_sample(response, scores) for response, scores in rows]
    mask = build_microbatch(samples, pad_multiple=8).loss_mask
    gradient = learnt_from(rows)["gradient"].numpy()
    assert not gradient[~mask].any()
    assert gradient[mask].any()


def test_a_correction_of_style_is_fitted_without_them(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    for name in caches:
        residualise(caches[name], tmp_path / f"{name}-corrected", Settings())

    def corrected(name: str) -> list[np.ndarray]:
        reader = CacheReader(tmp_path / f"{name}-corrected")
        return [scores.teacher_logprobs for _, scores in reader.scored_rows() if scores is not None]

    masks = [response.loss_mask for response, _ in rows_with(ZEROS)]
    for zeros, junk, mask in zip(corrected("zeros"), corrected("junk"), masks, strict=True):
        assert mask is not None
        np.testing.assert_array_equal(zeros[mask], junk[mask])
        # Of what nobody wrote nothing is taken away.
        np.testing.assert_array_equal(zeros[~mask], np.float32(ZEROS[1]))
        np.testing.assert_array_equal(junk[~mask], np.float32(JUNK[1]))
    # The control: the zeros pull the tables towards agreement.
    moved = [
        np.abs(zeros[mask] - trap[mask]).max()
        for zeros, trap, mask in zip(corrected("zeros"), corrected("trap"), masks, strict=True)
    ]
    assert max(moved) > 0.05


def test_reports_and_audits_do_not_look_at_them(caches: dict[str, Path]) -> None:
    def seen(name: str) -> dict[str, Any]:
        deviations = Deviations()
        disagreement = []
        for response, scores in CacheReader(caches[name]).rows():
            assert scores is not None
            deviations.add(response, scores)
            disagreement.append(_disagreement(response, scores))
        audited = score_from_columns(
            read_shard(caches[name], read_manifest(caches[name]).shards[0])
        )
        assert audited is not None
        figures = deviations.figures(str, set())
        assert figures is not None
        return {
            "overall": figures.overall,
            "positions": figures.positions,
            "disagreement": disagreement,
            "audited": (audited.logprobs.tolist(), audited.entropy.tolist()),
        }

    zeros = seen("zeros")
    assert zeros == seen("junk")
    trap = seen("trap")
    assert trap["overall"]["mean_abs"] < 0.7 * zeros["overall"]["mean_abs"]
    assert len(trap["audited"][0]) > 1.5 * len(zeros["audited"][0])


def test_the_page_of_a_report_shows_no_values_of_theirs(caches: dict[str, Path]) -> None:
    def scanned(name: str) -> tuple[Scanned, list[list[int | None]]]:
        found = Scanned(Answers("rollouts", "sft", "SFT student", caches[name], {}))
        values = []
        for index, (response, scored) in enumerate(CacheReader(caches[name]).scored_rows()):
            found.add(index, response, scored)
            values.append(_milli(response.sampling_logprobs, response.loss_mask))
        return found, values

    zeros, values = scanned("zeros")
    junk, others = scanned("junk")
    assert zeros.disagreement == junk.disagreement
    assert values == others
    masks = [response.loss_mask for response, _ in rows_with(ZEROS)]
    for mask, shown in zip(masks, values, strict=True):
        assert mask is not None
        assert [value is not None for value in shown] == mask.tolist()
    trap, shown_without = scanned("trap")
    assert sum(trap.disagreement.values()) < 0.8 * sum(zeros.disagreement.values())
    assert not any(value is None for row in shown_without for value in row)


def test_what_16_bits_lose_is_a_mean_over_what_was_sampled() -> None:
    """Zeros do not change in 16 bits, so they would make the loss look smaller."""

    def loss(*, with_mask: bool) -> dict[str, float]:
        responses, scores = zip(*rows_with(ZEROS, with_mask=with_mask), strict=True)
        table = cache.to_table(responses, scores, logprob_bits=16)
        found: dict[str, float] = json.loads(table.schema.metadata[b"lopd.logprob_loss"])
        return found

    masked = loss(with_mask=True)
    trap = loss(with_mask=False)
    assert masked["sum_abs"] == trap["sum_abs"], "zeros add nothing"
    assert masked["max_abs"] == trap["max_abs"]
    assert masked["num_values"] < 0.7 * trap["num_values"]


def test_two_engines_are_not_compared_on_them() -> None:
    mask = np.array([True, False, True])
    np.testing.assert_allclose(_of_loss(float32([-1, 0, -2]), mask), [-1, -2])
    np.testing.assert_allclose(_of_loss(float32([-1, 0, -2]), None), [-1, 0, -2])


def test_an_audit_by_a_model_leaves_them_out() -> None:
    """Its scores are those of the whole responses, without the tool's tokens."""
    rows = [response for response, _ in rows_with(ZEROS)[:4]]
    whole = [replace(response, loss_mask=None) for response in rows]
    masked = score_with_model(TINY_TEACHER, rows, temperature=1.0, top_p=1.0)
    every = score_with_model(TINY_TEACHER, whole, temperature=1.0, top_p=1.0)
    masks = [response.loss_mask for response in rows]
    kept = np.concatenate([mask for mask in masks if mask is not None])
    for name in ("logprobs", "entropy", "variance"):
        np.testing.assert_array_equal(getattr(masked, name), getattr(every, name)[kept])
    assert masked.lengths.tolist() == [int(mask.sum()) for mask in masks if mask is not None]
    assert masked.token_kinds is not None
    assert len(masked.token_kinds) == len(masked.logprobs) < len(every.logprobs)


def test_a_teacher_without_weights_is_found_behind_the_zeros(tmp_path: Path) -> None:
    """The control is a teacher that is only near uniform."""

    def cache_of(name: str, logprob: float) -> Path:
        rows = [
            (
                response,
                replace(
                    scores,
                    teacher_logprobs=float32(np.where(response.loss_mask, logprob, 0.0)),
                ),
            )
            for response, scores in rows_with(ZEROS)
        ]
        return publish(tmp_path / name, rows)

    uniform = -float(np.log(VOCABULARY))
    findings, _ = check_cache(cache_of("uniform", uniform))
    assert [finding.kind for finding in findings] == ["uniform teacher"]
    assert not [*check_cache(cache_of("near", uniform + 0.1))[0]]


def test_the_mean_advantage_is_that_of_the_turns() -> None:
    rows = rows_with(ZEROS)
    expected = np.concatenate(
        [
            (scores.teacher_logprobs.astype(np.float64) - response.sampling_logprobs)[
                response.loss_mask
            ]
            for response, scores in rows
        ]
    )
    samples = [make_sample(response, scores) for response, scores in rows]
    batch = TokenBatch.from_microbatch(build_microbatch(samples))
    assert batch.sampling_logprobs is not None
    sums = Lightning(10.0)(batch.sampling_logprobs, batch).metric_sums
    figures = reduce_metrics({name: float(value) for name, value in sums.items()})
    close(figures["advantage"], float(expected.mean()), rel=1e-6)
    close(figures["weight"], 1.0, rel=1e-9)
