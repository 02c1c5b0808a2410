"""Knobs of the stages that generate responses or score them: demonstrate, rollout and score."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lopd.config.base import SPEED_ONLY, Contradiction, FilePath, Section
from lopd.config.training import ForwardSection


class Sampling(Section):
    """How an SGLang server samples a response.

    The sections demonstrate, rollout and evaluate share these knobs.
    """

    # 1 is the policy itself, so that the sampled tokens are an unbiased sample of it.
    temperature: float = Field(
        default=1.0,
        gt=0,
        le=10,
        description="The sampling temperature.",
    )

    # The next three leave tokens out. Log-probabilities are still those of all tokens.
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description=(
            "Sample from the most likely tokens that together have this probability. "
            "1 means all tokens."
        ),
    )

    top_k: int = Field(
        default=-1,
        ge=-1,
        description="Sample from this number of most likely tokens. -1 means all tokens.",
    )

    min_p: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description=(
            "Sample only tokens with at least this share of the probability of the most likely "
            "token. 0 means all tokens."
        ),
    )

    # The paper's length of rollouts. Evaluations need more.
    max_new_tokens: int = Field(
        default=4096,
        ge=1,
        description=(
            "The longest response, in tokens. A longer one is cut off (finish_reason length)."
        ),
    )

    # One in the paper's rollouts.
    samples_per_prompt: int = Field(
        default=1,
        ge=1,
        description="The number of responses to each prompt.",
    )

    @model_validator(mode="after")
    def _some_candidate(self) -> Sampling:
        # A server would refuse this too, but only at the first request, after it has started.
        if self.top_k == 0:
            raise Contradiction(
                "top_k = 0 is not allowed",
                limit="exactly -1 (all tokens are candidates), or at least 1",
                remedy="set top_k to -1 to make all tokens candidates",
            )
        return self


class DemonstrateSection(Sampling):
    """The table [demonstrate]: the teacher answers the SFT prompts."""

    # A published shard is never written again, so this is also what a kill can lose.
    shard_size: int = Field(
        default=256,
        ge=1,
        description=(
            "The number of responses in a Parquet shard. A shard is published as a whole: "
            "a killed stage loses the shards that it has not published."
        ),
        json_schema_extra=SPEED_ONLY,
    )


class RolloutSection(Sampling):
    """The table [rollout]: the SFT student answers the OPD prompts."""

    # An agent: between two turns something else writes, which carries no loss (docs/multi_turn.md).

    environment: FilePath | None = Field(
        default=None,
        description=(
            "The function that replies between two turns of the student, as FILE.py:FUNCTION or "
            "MODULE:FUNCTION. If absent, a response has one turn."
        ),
    )

    # max_new_tokens bounds the whole response, tokens of the environment included.
    max_turns: int = Field(
        default=8,
        ge=2,
        description="With rollout.environment, the most turns of the student in a response.",
    )

    environment_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="The seconds in which rollout.environment must reply.",
        json_schema_extra=SPEED_ONLY,
    )

    # Transcripts that another program has made with the student, for example.
    responses: FilePath | None = Field(
        default=None,
        description=(
            "Take the responses of this folder (lopd cache import, or rollouts of another run) in "
            "place of sampling. If absent, the student answers the OPD prompts."
        ),
    )

    # Responses of another model make the update off-policy from the first step.
    allow_foreign_responses: bool = Field(
        default=False,
        description=(
            "Accept rollout.responses even if nothing shows that this SFT student wrote them. "
            "The manifest records it."
        ),
    )

    temperature: float = Field(
        default=0.8,
        gt=0,
        le=10,
        description="The sampling temperature (0.8 in the paper).",
    )

    shard_size: int = Field(
        default=256,
        ge=1,
        description=(
            "The number of responses in a Parquet shard. A shard is published as a whole: "
            "a killed stage loses the shards that it has not published."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # layers x experts per token numbers at every position, prompts included.
    routed_experts: bool = Field(
        default=False,
        description=(
            "Also keep the experts that the student's routers chose at every position, for "
            "distill.routing_replay. It needs a student with experts."
        ),
    )


class ScoreSection(Section):
    """The table [score]: the teacher's log-probabilities of the rollouts' tokens."""

    # Who scores, and by which engine.

    # With another teacher the gradient keeps an error that no training removes.
    allow_foreign_teacher: bool = Field(
        default=False,
        description=(
            "Score with a teacher that did not make the demonstrations. "
            "The manifest records it, and every summary prints it."
        ),
    )

    # Megatron-Core computes like the trainer, and it can give entropies.
    engine: Literal["sglang", "megatron"] = Field(
        default="sglang",
        description=(
            "The engine of the teacher: sglang means an SGLang server; megatron means "
            "Megatron-Core, forward only, on the ranks of score.forward."
        ),
    )

    forward: ForwardSection = Field(default_factory=ForwardSection)

    # With one tokenizer the teacher scores the very ids that were sampled, which is always better.
    tokenizer: Literal["same", "aligned"] = Field(
        default="same",
        description=(
            "same: the teacher must have the student's tokenizer. aligned: it has another one; it "
            "scores the text, and its scores are brought to the student's tokens by their bytes."
        ),
    )

    # What the teacher sees. It may be more than the student: an answer, a hint, instructions.
    teacher_prompt: str | None = Field(
        default=None,
        description=(
            "The text around {prompt} that the teacher sees in place of the student's last "
            "message; {answer} and {hint} are those of the prompt. The response stays as it is. "
            "If absent, the teacher sees what the student saw."
        ),
    )

    # What the cache keeps of a response token, besides the log-probability of the token itself.

    # A cache has a token id and two log-probabilities per token, all of 32 bits by default.
    logprob_bits: Literal[32, 16] = Field(
        default=32,
        description=(
            "The bits of a log-probability in the cache. 16 (float16) loses up to 1 part in "
            "2,048; the manifest records the loss."
        ),
    )

    top_k: int = Field(
        default=0,
        ge=0,
        description=(
            "Also keep this number of the teacher's most likely tokens at every response token. "
            "The top-K losses need them. 0 means none."
        ),
    )

    # SGLang does not return it.
    entropy: bool = Field(
        default=False,
        description=(
            "Also keep the entropy of the teacher's distribution at every response token, "
            'in nats. It needs score.engine = "megatron".'
        ),
    )
