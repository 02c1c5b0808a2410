"""The configuration makes the objective: every knob changes it, and what means nothing is refused
with the reason.
"""

from __future__ import annotations

from typing import Any

import pytest

from lopd.config import DistillSection, ObjectiveSection
from lopd.errors import ConfigError
from lopd.objective import (
    Distillation,
    DropTruncated,
    EarlyTokenGain,
    Lightning,
    Prefix,
    ReferenceKL,
    TopKKL,
    TruncatedImportance,
    objective_from_config,
)
from lopd.objective.registry import (
    AVAILABLE,
    BASE,
    LOSSES,
    REFERENCE,
    SELECTIONS,
    SHIFTS,
    TOP_K,
    VERDICTS,
    WEIGHTINGS,
)

WITH_ALL = AVAILABLE | BASE | TOP_K | VERDICTS
# knob -> (others that it needs, a value that is not the default)
OTHER_VALUES: dict[str, tuple[dict[str, Any], Any]] = {
    "loss": ({}, "top_k_reverse_kl"),
    "importance_cap": ({}, 2.0),
    "early_token_gain": ({}, 1.0),
    "step_divergence_cap": ({}, 1.2),
    "prefix_share": ({}, 0.3),
    "prefix_tokens": ({}, 64),
    "keep_end_token": ({"prefix_share": 0.3}, False),
    "truncated": ({}, "drop"),
    "reference_kl": ({}, 0.1),
    "reference_direction": ({"reference_kl": 0.1}, "reverse"),
    "top_k_support": ({"loss": "top_k_reverse_kl"}, "renormalised"),
    "advantage": ({}, "delta"),
    "wrong": ({}, "drop"),
    "wrong_weight": ({}, 0.5),
    "verdict_reward": ({}, 0.5),
}


def section(**knobs: Any) -> DistillSection:
    return DistillSection(
        advantage_clip=3.0, aggregation="token_sum", objective=ObjectiveSection(**knobs)
    )


def test_the_default_is_plain_lightning() -> None:
    assert objective_from_config(DistillSection()) == Lightning(10.0, "response_mean")
    assert objective_from_config(section()) == Lightning(3.0, "token_sum")


def test_pieces_are_built_with_their_knobs() -> None:
    knobs = {
        "truncated": "drop",
        "prefix_tokens": 64,
        "keep_end_token": False,
        "importance_cap": 2.0,
        "early_token_gain": 0.5,
    }
    built = objective_from_config(
        section(**knobs, reference_kl=0.1, reference_direction="reverse"), teachers=("math", "code")
    )
    assert built == Distillation(
        Lightning(3.0, "token_sum"),
        (DropTruncated(), Prefix(num_tokens=64, keep_end_token=False)),
        (TruncatedImportance(2.0), EarlyTokenGain(0.5, 3.0)),
        ReferenceKL(0.1, "reverse"),
        ("math", "code"),
    )
    top_k = objective_from_config(section(loss="top_k_forward_kl"), WITH_ALL)
    assert top_k == Distillation(TopKKL("forward", "tail", "token_sum"))


@pytest.mark.parametrize("knob", ObjectiveSection.model_fields)
def test_every_knob_is_read(knob: str) -> None:
    """Another value makes another objective."""
    needed, value = OTHER_VALUES[knob]
    assert value != ObjectiveSection.model_fields[knob].default
    assert objective_from_config(
        section(**needed, **{knob: value}), WITH_ALL
    ) != objective_from_config(section(**needed), WITH_ALL)


def test_the_registry_and_the_configuration_know_the_same_names() -> None:
    modifiers = {"loss", "keep_end_token", "reference_direction", "top_k_support"}
    assert set(SELECTIONS | WEIGHTINGS | SHIFTS | REFERENCE) | modifiers == set(
        ObjectiveSection.model_fields
    )
    assert ObjectiveSection.model_fields["loss"].annotation is not None
    for loss in LOSSES:
        assert ObjectiveSection(loss=loss).loss == loss  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        (
            {"loss": "top_k_reverse_kl"},
            (
                "loss = top_k_reverse_kl cannot be used: it needs teacher_top_logprobs: the "
                "cache has none; with score.top_k = 16, for example,"
            ),
        ),
        ({"loss": "top_k_forward_kl"}, "it needs teacher_top_logprobs: the cache has none"),
        (
            {"prefix_share": 0.3, "prefix_tokens": 64},
            "prefix_tokens also sets the length of the prefix",
        ),
        ({"keep_end_token": False}, "has no effect without prefix_share or prefix_tokens"),
        ({"reference_direction": "reverse"}, "has no effect without reference_kl"),
        ({"top_k_support": "renormalised"}, "has no effect with loss = lightning"),
        (
            {"advantage": "delta"},
            (
                "it needs base_logprobs: the cache has no column teacher_base_logprobs; "
                "with models.teacher_base the score stage writes it"
            ),
        ),
        ({"loss": "top_k_reverse_kl", "advantage": "delta"}, "does not use the sampled token"),
        (
            {"loss": "top_k_reverse_kl", "importance_cap": 2.0},
            "does not use the sampled token",
        ),
        (
            {"loss": "top_k_reverse_kl", "early_token_gain": 1.0},
            "does not use the sampled token",
        ),
        (
            {"loss": "top_k_reverse_kl", "step_divergence_cap": 1.2},
            "does not use the sampled token",
        ),
    ],
)
def test_what_means_nothing_or_cannot_be_had_is_refused_by_name(
    knobs: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match="remedy") as caught:
        objective_from_config(section(**knobs))
    assert expected in str(caught.value)
    assert str(caught.value).startswith("[distill.objective]: ")


def test_a_cache_without_sampling_logprobs_refuses_what_needs_them() -> None:
    lacking = AVAILABLE - {"sampling_logprobs"}
    assert isinstance(objective_from_config(section(), lacking), Lightning)
    for knobs in ({"importance_cap": 2.0}, {"reference_kl": 0.1}):
        with pytest.raises(ConfigError, match="needs sampling_logprobs"):
            objective_from_config(section(**knobs), lacking)
        objective_from_config(section(**knobs))
