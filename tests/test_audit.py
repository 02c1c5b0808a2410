"""Can these responses have come from this teacher? Calibrated on chains whose truth is known; then
the example's own teacher.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from lopd import cache
from lopd.artifacts import ArtifactWriter, identify_model
from lopd.audit import Scores, audit, distribution_scores, token_kind
from lopd.audit.scores import score_with_model
from lopd.records import Response, float32, int32
from lopd.tasks import get_task
from lopd.tasks.tokenizer import load_tokenizer
from tests.cache.rollouts import TINY_TEACHER
from tests.limits import close
from tests.stand_ins import Result, command

# ---- chains of known truth ----


def chain(rng: np.random.Generator, sharpness: float = 1.0, states: int = 24) -> np.ndarray:
    """Log-probabilities [state, next state] of a random Markov chain, some states sure and some
    not.
    """
    logits = rng.normal(0, 2.5, (states, states)) * sharpness
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def walks(rng: np.random.Generator, sampler: np.ndarray, number: int, length: int) -> np.ndarray:
    """States [number, length + 1] of walks by a chain."""
    cumulated = np.exp(sampler).cumsum(1)
    path = [rng.integers(0, len(sampler), number)]
    for _ in range(length):
        path.append(
            np.minimum((rng.random(number)[:, None] > cumulated[path[-1]]).sum(1), len(sampler) - 1)
        )
    return np.stack(path, 1)


def scores_of(teacher: np.ndarray, path: np.ndarray, *, with_variance: bool = True) -> Scores:
    entropy = -(np.exp(teacher) * teacher).sum(1)
    variance = (np.exp(teacher) * teacher**2).sum(1) - entropy**2
    before = path[:, :-1].ravel()
    after = path[:, 1:].ravel()
    lengths = np.full(len(path), path.shape[1] - 1)
    return Scores(
        teacher[before, after],
        entropy[before],
        lengths,
        variance[before] if with_variance else None,
    )


@pytest.mark.parametrize("with_variance", [True, False])
def test_a_true_teacher_is_rarely_accused_and_z_is_normal(with_variance: bool) -> None:
    rng = np.random.default_rng(0)
    results = [
        audit(
            scores_of(teacher, walks(rng, teacher, 40, 50), with_variance=with_variance),
            tolerance=0.08,
        )
        for teacher in (chain(rng) for _ in range(400))
    ]
    z = np.array([result.z for result in results])
    assert abs(z.mean()) < 0.15
    assert z.std() == pytest.approx(1, abs=0.12)
    assert sum(result.verdict == "inconsistent" for result in results) <= 10, "1% of 400 expected"


@pytest.mark.parametrize(("sharpness", "sign"), [(1.15, 1), (0.87, -1)])
def test_another_temperature_is_found_and_its_sign(sharpness: float, sign: int) -> None:
    verdicts = []
    for seed in range(100):
        teacher = chain(np.random.default_rng(seed))
        logits = teacher * sharpness
        sampler = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        result = audit(
            scores_of(teacher, walks(np.random.default_rng(1000 + seed), sampler, 100, 50))
        )
        verdicts.append(result.verdict == "inconsistent" and np.sign(result.z) == sign)
    assert sum(verdicts) >= 95


def test_the_power_is_as_stated() -> None:
    """Tokens whose drift is exactly the tolerance, as many as are said to be needed: found in 95 of
    100 draws, give or take.
    """
    rng = np.random.default_rng(0)
    # the teacher's probability of one outcome, and the sampler's
    p = 0.3
    q = 0.32
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    variance = p * (1 - p) * math.log((1 - p) / p) ** 2
    drift = abs(q * math.log(p) + (1 - q) * math.log(1 - p) + entropy)

    def draw(number: int) -> Scores:
        chosen = rng.random(number) < q
        return Scores(
            np.where(chosen, math.log(p), math.log(1 - p)),
            np.full(number, entropy),
            np.array([number]),
            np.full(number, variance),
        )

    needed = audit(draw(100), tolerance=drift).tokens_needed
    found = np.mean(
        [audit(draw(needed), tolerance=drift).verdict == "inconsistent" for _ in range(600)]
    )
    assert found == pytest.approx(0.95, abs=0.03)
    assert (
        np.mean(
            [
                audit(draw(needed // 4), tolerance=drift).verdict == "inconsistent"
                for _ in range(600)
            ]
        )
        < 0.6
    ), "the control"


def test_few_tokens_cannot_tell_and_say_how_many_would() -> None:
    rng = np.random.default_rng(1)
    teacher = chain(rng)
    few = audit(scores_of(teacher, walks(rng, teacher, 4, 20)), tolerance=0.05)
    assert few.verdict == "cannot tell"
    enough = audit(
        scores_of(teacher, walks(rng, teacher, few.tokens_needed // 50 + 20, 50)), tolerance=0.05
    )
    assert enough.verdict == "consistent"
    assert enough.detectable <= 0.05 < few.detectable


def test_rare_choices_that_did_not_occur_accuse_nobody() -> None:
    """20 tokens at which the teacher takes another road once in 300; none did. Judged by the spread
    seen, z would be enormous.
    """
    p = 1 / 300
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    scores = Scores(np.full(20, math.log(1 - p)), np.full(20, entropy), np.array([20]))
    result = audit(scores)
    assert abs(result.z) < 1
    assert result.verdict == "cannot tell"
    drift = scores.logprobs + scores.entropy
    assert drift.sum() / math.sqrt((drift**2).sum()) > 4, "what would have been believed"


def test_groups_of_a_curve_have_mean_zero_for_the_true_teacher() -> None:
    rng = np.random.default_rng(0)
    off = []
    for _ in range(60):
        teacher = chain(rng)
        path = walks(rng, teacher, 60, 40)
        scores = scores_of(teacher, path)
        kinds = [f"after {state % 3}" for state in path[:, :-1].ravel()]
        result = audit(
            Scores(scores.logprobs, scores.entropy, scores.lengths, scores.variance, kinds)
        )
        off += [
            point.mean / point.standard_error
            for curve in (result.by_position, result.by_entropy, result.by_kind)
            for point in curve
            if point.tokens > 200
        ]
    assert np.mean(off) == pytest.approx(0, abs=0.15)
    assert np.std(off) == pytest.approx(1, abs=0.15)


def test_tokens_outside_the_nucleus_are_impossible() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    kept, entropy, variance = distribution_scores(
        logits, torch.tensor([1]), temperature=1.0, top_p=0.7
    )
    close(kept.item(), math.log(0.3 / 0.8), abs=1e-6)
    close(entropy.item(), -(0.625 * math.log(0.625) + 0.375 * math.log(0.375)), abs=1e-6)
    close(variance.item(), 0.625 * 0.375 * math.log(0.625 / 0.375) ** 2, abs=1e-6)
    outside, _, _ = distribution_scores(logits, torch.tensor([3]), temperature=1.0, top_p=0.7)
    assert outside.item() == -math.inf
    tempered, _, _ = distribution_scores(logits, torch.tensor([0]), temperature=0.5, top_p=1.0)
    close(tempered.item(), math.log(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025)), abs=1e-6)
    result = audit(
        Scores(np.array([-0.5, -np.inf]), np.array([0.5, 0.5]), np.array([2]), np.array([1.0, 1.0]))
    )
    assert (result.verdict, result.impossible) == ("inconsistent", 1)


def test_kinds_of_tokens() -> None:
    assert [token_kind(text) for text in ("<think>", "\n", " ", "17", " the", "ing", "+")] == [
        "special",
        "newline",
        "space",
        "digits",
        "word start",
        "word",
        "signs",
    ]


# ---- the example's teacher ----

END = 2


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


@torch.inference_mode()
def sample(
    model: torch.nn.Module, prompts: torch.Tensor, seed: int
) -> tuple[list[np.ndarray], Scores]:
    """Responses at temperature 1, end token included, and the model's own scores of them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = prompts
    past = None
    steps = []
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(60):
        out = model(inputs, past_key_values=past, use_cache=True)
        past = out.past_key_values
        inputs = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
        steps.append(
            (
                inputs[:, 0],
                *distribution_scores(out.logits[:, -1], inputs[:, 0], temperature=1.0, top_p=1.0),
            )
        )
        done |= inputs[:, 0] == END
        if bool(done.all()):
            break
    tokens, *columns = (torch.stack(column, 1).numpy() for column in zip(*steps, strict=True))
    lengths = np.array(
        [int(np.argmax(row == END)) + 1 if (row == END).any() else len(row) for row in tokens]
    )
    logprobs, entropy, variance = (
        np.concatenate([row[:length] for row, length in zip(column, lengths, strict=True)])
        for column in columns
    )
    return [row[:length] for row, length in zip(tokens, lengths, strict=True)], Scores(
        logprobs, entropy, lengths, variance
    )


def as_responses(prompts: list[np.ndarray], rows: list[np.ndarray]) -> list[Response]:
    return [
        Response(f"p{index}", 0, prompt, int32(row), float32(np.zeros(len(row))), "stop", "0")
        for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
    ]


def test_the_examples_teacher_and_another_temperature() -> None:
    """Scores of a pass over whole sequences are those of sampling; at the temperature it was
    sampled at the teacher is not accused, at another it is.
    """
    from lopd.tasks.rendering import render

    prompts = render(
        get_task("register_arithmetic", {}).generate_prompts(80, 5),
        load_tokenizer(TINY_TEACHER),
        context_length=128,
    )
    own, own_scores = sample(
        load(TINY_TEACHER), torch.from_numpy(np.stack(prompts).astype(np.int64)), seed=11
    )
    responses = as_responses(prompts, own)
    found = score_with_model(TINY_TEACHER, responses, temperature=1.0, top_p=1.0)
    for name in ("logprobs", "entropy", "variance"):
        close(getattr(found, name), getattr(own_scores, name), abs=1e-4)
    assert found.token_kinds is not None
    assert set(found.token_kinds) == {"digits", "newline", "signs", "special"}
    assert audit(found).verdict != "inconsistent"
    warmer = audit(score_with_model(TINY_TEACHER, responses, temperature=2.0, top_p=1.0))
    assert warmer.verdict == "inconsistent"
    assert warmer.z > 0, "likelier than what temperature 2 would draw"


# ---- the verb ----


def published(folder: Path, scores: Scores, sampling: dict[str, object]) -> Path:
    """Demonstrations with the teacher's scores and entropies as columns."""
    starts = np.cumsum(scores.lengths) - scores.lengths
    parts = [
        slice(start, start + length) for start, length in zip(starts, scores.lengths, strict=True)
    ]
    responses = [
        Response(
            f"p{index}",
            0,
            int32([1]),
            int32(np.full(part.stop - part.start, 5)),
            float32(scores.logprobs[part]),
            "length",
            "0",
        )
        for index, part in enumerate(parts)
    ]
    table = cache.to_table(responses)
    for name, column in (
        ("teacher_logprobs", scores.logprobs),
        ("teacher_entropy", scores.entropy),
    ):
        table = table.append_column(
            name, pa.array([column[part].tolist() for part in parts], pa.list_(pa.float32()))
        )
    writer = ArtifactWriter(folder, kind="demonstrations", inputs={}, sampling=sampling)
    writer.publish_shard(0, table)
    writer.finish()
    return folder


@pytest.fixture
def lopd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    return command(monkeypatch, capsys)


def test_the_verb(lopd: Callable[..., Result], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    teacher = chain(rng)
    at_one: dict[str, object] = {"temperature": 1.0, "top_p": 1.0}
    true = published(tmp_path / "true", scores_of(teacher, walks(rng, teacher, 300, 50)), at_one)
    shown = (
        lopd("audit", true, "--tolerance", "0.05", "--picture", tmp_path / "audit.png")
        .succeeded()
        .out
    )
    assert shown.startswith("consistent: z =")
    assert (tmp_path / "audit.png").stat().st_size > 10_000
    sharper = teacher * 1.3 - np.log(np.exp(teacher * 1.3).sum(1, keepdims=True))
    foreign = published(
        tmp_path / "foreign", scores_of(teacher, walks(rng, sharper, 300, 50)), at_one
    )
    refused = lopd("audit", foreign, "--json")
    assert refused.code == 2
    figures = json.loads(refused.out)
    assert figures["verdict"] == "inconsistent"
    assert {"z", "p_value", "tokens_needed", "by_position", "by_entropy"} <= set(figures)


def test_of_demonstrations_by_several_teachers_each_is_asked_about_its_own(
    lopd: Callable[..., Result], tmp_path: Path
) -> None:
    from lopd.tasks.rendering import render

    prompts = render(
        get_task("register_arithmetic", {}).generate_prompts(40, 5),
        load_tokenizer(TINY_TEACHER),
        context_length=128,
    )
    own, _ = sample(
        load(TINY_TEACHER), torch.from_numpy(np.stack(prompts).astype(np.int64)), seed=11
    )
    rng = np.random.default_rng(0)
    others = [np.append(rng.integers(4, 32, 20), END) for _ in prompts]
    responses = as_responses(prompts, own) + [
        replace(response, sample_index=1) for response in as_responses(prompts, others)
    ]
    table = cache.to_table(responses)
    named = table.append_column(
        "teacher", pa.array([identify_model(TINY_TEACHER).weights] * 40 + ["0" * 64] * 40)
    )
    for name, rows in (("named", named), ("nameless", table)):
        writer = ArtifactWriter(
            tmp_path / name,
            kind="demonstrations",
            inputs={},
            sampling={"temperature": 1.0, "top_p": 1.0},
        )
        writer.publish_shard(0, rows)
        writer.finish()
    figures = json.loads(
        lopd("audit", tmp_path / "named", "--teacher", TINY_TEACHER, "--json").succeeded().out
    )
    assert figures["responses"] == 40
    mixed = lopd("audit", tmp_path / "nameless", "--teacher", TINY_TEACHER, "--json")
    assert (mixed.code, json.loads(mixed.out)["responses"]) == (2, 80), "control: all of them"


def test_what_the_verb_refuses(lopd: Callable[..., Result], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    teacher = chain(rng)
    scores = scores_of(teacher, walks(rng, teacher, 10, 20))
    lopd("audit", published(tmp_path / "a", scores, {}), "--json").refused(
        "--temperature and --top-p"
    )
    lopd("audit", published(tmp_path / "b", scores, {"temperature": 0.7, "top_p": 1.0})).refused(
        "add --teacher FOLDER: lopd then computes"
    )
    lopd(
        "audit", published(tmp_path / "c", scores, {"temperature": 1.0, "top_p": 1.0, "top_k": 5})
    ).refused("top_k 5")
    lopd("audit", tmp_path / "c", "--temperature", "1", "--teacher", tmp_path / "nothing").refused(
        "top_k 5"
    )
    lopd(
        "audit",
        published(tmp_path / "d", scores, {"temperature": 1.0, "top_p": 1.0}),
        "--teacher",
        tmp_path / "nothing",
    ).refused("cannot be loaded")
