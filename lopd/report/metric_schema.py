"""The metrics of a run: every name, its unit and its meaning, in one place.

metrics.jsonl, TensorBoard, W&B, MLflow, ``lopd watch`` and docs/metrics.md all use these names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# Which trainings report a metric: every training, SFT alone (sft, sft_longer), or distill alone.
Stages = Literal["all", "sft", "distill"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of a step or of an evaluation.

    Attributes:
        name: Its key in metrics.jsonl. A tracker's key is ``KIND/NAME``.
        unit: What one unit of it is.
        stages: The trainings that report it.
        meaning: What it is.
        kind: "train" for a metric of each step, "eval" for one of each weight sync.
    """

    name: str
    unit: str
    stages: Stages
    meaning: str
    kind: Literal["train", "eval"] = "train"


_NATS = "nats per token"
_SHARE = "share, 0 to 1"
METRICS: tuple[Metric, ...] = (
    # What decides the update.
    Metric("loss", "nats", "all", "the loss of the objective"),
    Metric("grad_norm", "L2 norm", "all", "the gradient before it is clipped"),
    Metric("lr", "per update", "all", "the learning rate of the step"),
    Metric("num_tokens", "tokens", "all", "tokens that carry loss"),
    Metric("num_responses", "responses", "all", "responses with such a token"),
    Metric("nll", _NATS, "sft", "the negative log-likelihood of the demonstrations"),
    Metric("perplexity", "tokens", "sft", "e to the power of nll"),
    # How far student and teacher are apart.
    Metric("advantage", _NATS, "distill", "the mean of log pi_T - log pi_S before the clip"),
    Metric("advantage_std", _NATS, "distill", "its standard deviation over tokens"),
    Metric("advantage_p01", _NATS, "distill", "its 1% quantile over tokens, interpolated"),
    Metric("advantage_p05", _NATS, "distill", "its 5% quantile"),
    Metric("advantage_p50", _NATS, "distill", "its median"),
    Metric("advantage_p95", _NATS, "distill", "its 95% quantile"),
    Metric("advantage_p99", _NATS, "distill", "its 99% quantile"),
    Metric("clipped_share", _SHARE, "distill", "tokens with an advantage beyond the clip"),
    Metric("reverse_kl", _NATS, "distill", "KL(student, teacher) at the rollouts' states"),
    Metric("num_end_tokens", "tokens", "distill", "sampled end tokens"),
    Metric("end_token_advantage", _NATS, "distill", "the mean advantage of end tokens"),
    Metric("student_entropy", _NATS, "distill", "the entropy of the student's distribution"),
    Metric("num_entropy_tokens", "tokens", "distill", "tokens whose entropy is known"),
    # How far the student is from the policy that sampled.
    Metric("weight", "ratio", "distill", "the mean of w = pi_S / pi_sampling of a token"),
    Metric("weight_squared", "ratio", "distill", "the mean of w squared"),
    Metric("chi_square", "ratio", "distill", "the mean of w squared, less 1"),
    Metric("effective_sample_share", _SHARE, "distill", "(sum w)^2 / (n sum w^2)"),
    Metric("gradient_gap", "nats", "distill", "E abs((w - 1) A), for a token's advantage A"),
    Metric("gradient_gap_bound", "nats", "distill", "sqrt(E[A^2] E[(w - 1)^2]), at least the gap"),
    Metric("sequence_log_weight", "nats", "distill", "the mean of log w of whole responses"),
    Metric("sequence_log_weight_std", "nats", "distill", "its standard deviation over responses"),
    Metric("num_weighted_tokens", "tokens", "distill", "tokens whose w is known"),
    Metric("num_weighted_responses", "responses", "distill", "responses whose w is known"),
    # Where their pieces of the objective are on.
    Metric("importance_capped_share", _SHARE, "distill", "tokens with a capped importance weight"),
    Metric("step_weight", "ratio", "distill", "the mean weight of a token by its step (SOD)"),
    Metric("reference_kl", _NATS, "distill", "the KL of the reference term"),
    Metric("top_k_kl", _NATS, "distill", "the KL on the top-K support"),
    Metric("student_tail", _SHARE, "distill", "the student's probability outside of the top-K"),
    Metric("teacher_tail", _SHARE, "distill", "the teacher's probability outside of the top-K"),
    Metric("refreshes", "refreshes", "distill", "refreshes so far"),
    # The experts of a mixture.
    Metric("expert_entropy_share", _SHARE, "all", "how even tokens are over experts; 1 is even"),
    Metric("expert_entropy_share_min", _SHARE, "all", "the same in the worst layer"),
    Metric("expert_max_load", "ratio", "all", "the busiest expert's tokens over the mean"),
    Metric("expert_dropped_share", _SHARE, "all", "choices that the capacity factor dropped"),
    # What the step cost.
    Metric("seconds", "seconds", "all", "the duration of the step"),
    Metric("tokens_per_s", "tokens per second", "all", "tokens of all sequences, of the trainer"),
    Metric("processed_tokens", "tokens", "all", "prompt and response tokens of the step"),
    Metric("processed_tokens_per_s", "tokens per second", "all", "the same for each second"),
    Metric(
        "data_wait_share", _SHARE, "all", "the step's time in which the first rank waited for data"
    ),
    Metric("padding_share", _SHARE, "all", "padding among the tokens computed"),
    Metric("load_imbalance", "ratio", "all", "the most work of a data rank over the mean"),
    Metric("model_tflops_per_s", "10^12 operations per second", "all", "over all ranks"),
    Metric("mfu", _SHARE, "all", "the same over the peak of all GPUs, where it is known"),
    Metric("peak_memory_gib", "GiB", "all", "memory of the rank that used most"),
    # The student's answers to held-out prompts at a weight sync.
    Metric("accuracy", _SHARE, "distill", "right answers to held-out prompts", "eval"),
    Metric(
        "accuracy_interval",
        "two shares",
        "distill",
        "95% (Wilson); in metrics.jsonl alone, because trackers hold single numbers",
        "eval",
    ),
    Metric("num_prompts", "prompts", "distill", "held-out prompts asked", "eval"),
    Metric("response_len", "tokens", "distill", "the mean length of an answer", "eval"),
    Metric("truncated_share", _SHARE, "distill", "answers cut off at the limit", "eval"),
    Metric(
        "training_reverse_kl", _NATS, "distill", "reverse_kl since the last weight sync", "eval"
    ),
)
# By kind and name: a training and a weight sync may report the same name.
_BY_KEY: dict[tuple[str, str], Metric] = {(one.kind, one.name): one for one in METRICS}


def metric_of(kind: str, name: str) -> Metric | None:
    """Return the metric of a key of metrics.jsonl; None for the metric of somebody's own objective.

    Args:
        kind: "train" or "eval".
        name: The key. ``X/NAME`` is the X of the teacher NAME.
    """
    return _BY_KEY.get((kind, name.partition("/")[0]))


def metric_lines() -> Iterator[str]:
    """Yield the lines of the table in docs/metrics.md."""
    # A test compares this with the page, so that neither can lack a metric.
    yield "| metric | unit | reported by | meaning |"
    yield "|---|---|---|---|"
    reported = {"all": "every training", "sft": "sft", "distill": "distill"}
    for one in METRICS:
        by = "weight syncs" if one.kind == "eval" else reported[one.stages]
        yield f"| `{one.kind}/{one.name}` | {one.unit} | {by} | {one.meaning} |"
