"""Knobs of the stage distill: the loss, the refreshes, and the evaluations while it trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lopd.config.base import SPEED_ONLY, FilePath, Section
from lopd.config.training import TrainSection

# The values of distill.objective.loss in words: by what a student was distilled. A top-K loss uses
# the rollouts and the cache of Lightning OPD too, but its update is another one.
LOSS_TITLES = {
    "lightning": "Lightning OPD",
    "top_k_reverse_kl": "the top-K reverse KL",
    "top_k_forward_kl": "the top-K forward KL",
}


class ObjectiveSection(Section):
    """The parts of the distillation loss (lopd/objective/registry.py, docs/objectives.md)."""

    # lightning needs one log-probability per token, which makes the cache small.
    loss: Literal["lightning", "top_k_reverse_kl", "top_k_forward_kl"] = Field(
        default="lightning",
        description=(
            "The loss of a token. The two top-K losses need the teacher's most likely tokens in "
            "the cache (score.top_k)."
        ),
    )

    top_k_support: Literal["tail", "renormalised", "generalised"] = Field(
        default="tail",
        description=(
            "How a top-K loss treats all other tokens. tail: together they are one more outcome. "
            "renormalised: they are ignored, and the K probabilities are divided by their sum. "
            "generalised: they are ignored, and the sum over the K has the terms - p + q of the "
            "generalised KL, which is lowest where student and teacher agree on each of the K."
        ),
    )

    # A teacher's log-probability mixes what its last training taught with what it knew before.
    advantage: Literal["teacher", "delta"] = Field(
        default="teacher",
        description=(
            "What a token's advantage is. teacher: teacher minus student. delta: teacher minus "
            "its own base (models.teacher_base), anchored at the policy of the rollouts (OPD2)."
        ),
    )

    # Weights: a token's loss is multiplied.

    # The cap bounds the variance: one unlikely token could otherwise outweigh a batch.
    importance_cap: float | None = Field(
        default=None,
        ge=1,
        description=(
            "Multiply a token's loss by its probability under the student over that at sampling, "
            "but by no more than this. If absent, there are no such weights."
        ),
    )

    # Late tokens of a long response often stand on a wrong track.
    early_token_gain: float = Field(
        default=0.0,
        ge=0,
        description=(
            "Multiply the loss of the first tokens of a response by up to 1 + this (IW-OPD). "
            "0 means that all tokens weigh the same."
        ),
    )

    # After a wrong call of a tool, the teacher scores states that it would hardly have reached.
    step_divergence_cap: float | None = Field(
        default=None,
        ge=1,
        description=(
            "Multiply the loss of each step of a response with tools by the mean abs(advantage) "
            "of its first step over that of the step, but by no more than this (SOD; 1.2 there). "
            "If absent, all steps weigh the same."
        ),
    )

    # Selections: which tokens carry loss at all.

    # At most one of the two prefixes may be set.
    prefix_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description=(
            "Learn only from this first share of each response. If absent, from all of it."
        ),
    )

    prefix_tokens: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Learn only from this number of first tokens of each response. "
            "If absent, from all of them."
        ),
    )

    # A student that never learns from end tokens may forget to stop.
    keep_end_token: bool = Field(
        default=True,
        description="With a prefix, also learn from the end token of a finished response.",
    )

    # They teach how to continue, but they hold no end.
    truncated: Literal["learn", "drop"] = Field(
        default="learn",
        description=(
            "What happens to responses that were cut off at max_new_tokens: learn from them, or "
            "drop them."
        ),
    )

    # Verdicts of the responses (distill.verdicts): left out, weighted, or added to the advantage.

    # Like truncated: what the teacher says of a response that went wrong may teach little.
    wrong: Literal["learn", "drop"] = Field(
        default="learn",
        description=(
            "What happens to responses whose answer was wrong by distill.verdicts: learn from "
            "them, or drop them."
        ),
    )

    wrong_weight: float = Field(
        default=1.0,
        ge=0,
        description=(
            "Multiply the loss of responses whose answer was wrong by this. 1 means that all "
            "responses weigh the same."
        ),
    )

    # In nats, like the advantage itself.
    verdict_reward: float = Field(
        default=0.0,
        ge=0,
        description=(
            "Add this many nats to the advantage of every token of a right response, and take "
            "them from that of a wrong one. 0 means that the teacher alone decides."
        ),
    )

    # A second loss that is added: it holds the student near the policy that wrote the rollouts.

    # For trainings in which lengths or the entropy run away.
    reference_kl: float = Field(
        default=0.0,
        ge=0,
        description=(
            "The coefficient of the KL divergence between the student and the policy of the "
            "rollouts. 0 means none."
        ),
    )

    reference_direction: Literal["forward", "reverse"] = Field(
        default="forward",
        description=(
            "forward means KL(rollouts' policy || student), which keeps old behaviour; reverse "
            "means KL(student || rollouts' policy), which resists new behaviour."
        ),
    )


class RefreshSection(Section):
    """This table decides when distill replaces the rollouts that it learns from (docs/refresh.md).

    If nothing is set, distill never replaces them. That is Lightning OPD.
    """

    # Three reasons for a refresh. Each of them is enough.

    every: int = Field(
        default=0,
        ge=0,
        description=(
            "The number of steps between two refreshes, in which the current student writes new "
            "responses. 1 is standard OPD; 0 means no fixed interval."
        ),
    )

    # The next two measure how far the student has moved away from the policy of the rollouts.
    min_effective_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description=(
            "Refresh after a step whose effective sample share is below this. The weights are the "
            "student's probabilities over those at sampling. If absent, never."
        ),
    )

    # The same drift by another measure: it reacts to few tokens with large weights.
    max_chi_square: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Refresh after a step whose chi-square, E[w^2] - 1 over its tokens, is above this. "
            "If absent, never."
        ),
    )

    # What a refresh does.

    # A refresh costs rollouts and scores of this many responses.
    num_responses: int | None = Field(
        default=None,
        ge=1,
        description=(
            "The number of responses of a refresh. If absent, it is what distill.refresh.every "
            "steps learn from, or without that knob what the stage rollout made."
        ),
    )

    # Early rollouts of a weak student are worth little beyond their first tokens.
    horizons: list[int] = Field(
        default_factory=list,
        description=(
            "The longest response of the first, second, ... refresh, in tokens; the last number "
            "holds for all later refreshes. If empty, it is rollout.max_new_tokens."
        ),
    )

    # It needs memory for teacher and trainer at the same time.
    keep_teacher: bool = Field(
        default=False,
        description=(
            "Keep the teacher's server while the training runs. "
            "Otherwise each refresh starts it and ends it."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    @property
    def is_on(self) -> bool:
        """Return whether a knob is set that can cause a refresh."""
        return (
            # Any of the three rules can ask for a refresh.
            self.every > 0
            or self.min_effective_share is not None
            or self.max_chi_square is not None
        )


class DistillSection(TrainSection):
    """The table [distill]: the student learns from the teacher cache."""

    # The data.

    # A cache of scores is expensive, and may serve many trainings.
    cache: FilePath | None = Field(
        default=None,
        description=(
            "Learn from this cache (of another run, merged, split, residualised or imported). "
            "No rollouts are made then. If absent, the cache of the stage score is used."
        ),
    )

    # Responses of another student make the update off-policy from the first step.
    allow_foreign_cache: bool = Field(
        default=False,
        description=(
            "Accept a cache even if nothing shows that this SFT student wrote its responses, or "
            "that its teacher scored them. The manifest records it."
        ),
    )

    # Verdicts of a verifier beside the teacher (lopd cache judge).

    verdicts: FilePath | None = Field(
        default=None,
        description=(
            "Verdicts of the responses, for distill.objective.wrong, wrong_weight or "
            "verdict_reward: a folder that lopd cache judge has made. If absent, none."
        ),
    )

    # A teacher that cannot solve a prompt scores the student's attempts at it with authority.
    teacher_verdicts: FilePath | None = Field(
        default=None,
        description=(
            "Verdicts of the teacher's own answers to the prompts: a folder that lopd cache judge "
            "has made. Prompts that the teacher fails are left out. If absent, all prompts stay."
        ),
    )

    teacher_right_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description=(
            "With distill.teacher_verdicts, a prompt stays if at least this share of the "
            "teacher's answers to it is right."
        ),
    )

    # The loss.

    # The clip makes the update the gradient of a Huber loss (docs/objectives.md).
    advantage_clip: float = Field(
        default=10.0,
        gt=0,
        description=(
            "The advantages are clipped to +- this many nats, which is the delta of the Huber loss."
        ),
    )

    # With token_mean and token_sum long responses count more. The paper's numbers were made with
    # response_mean.
    aggregation: Literal["response_mean", "token_mean", "token_sum"] = Field(
        default="response_mean",
        description=(
            "How the tokens' losses become one number. response_mean: the mean over a response's "
            "tokens, then over the responses; token_mean: the mean over all tokens; token_sum: "
            "the sum over a response's tokens, then the mean over the responses."
        ),
    )

    # Two engines round differently, so near a tie their routers choose differently.
    routing_replay: bool = Field(
        default=False,
        description=(
            "Let every router choose the experts that the rollouts were sampled with (R3). Their "
            "weights are those of the present router. It needs rollout.routed_experts."
        ),
    )

    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    refresh: RefreshSection = Field(default_factory=RefreshSection)

    # What is measured while the student trains.

    student_entropy: bool = Field(
        default=False,
        description=(
            "Also report the student's entropy at every step, in nats. "
            "It costs one more sum over the logits."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # The curve of accuracy over steps comes from these evaluations.
    sync_every: int = Field(
        default=10,
        ge=0,
        description=(
            "The number of steps between two weight syncs into the running server. "
            "An evaluation follows each of them. 0 means never, as does evaluate.enabled = false."
        ),
    )

    # Few, because the training waits for each of these evaluations.
    sync_num_prompts: int = Field(
        default=128,
        ge=1,
        description="The number of held-out prompts of such an evaluation.",
    )
