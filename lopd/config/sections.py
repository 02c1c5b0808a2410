"""The knobs: one class a section of the TOML file, one line a knob, with default, bound, unit and
one sentence.

Knobs marked ``speed_only`` change how fast or where a stage runs, not what it produces: changing
them re-runs nothing.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lopd.config.base import SPEED_ONLY, Contradiction, FilePath, Section
from lopd.config.engine import SGLangSection, SyncSection
from lopd.config.launch import LaunchSection


class RunSection(Section):
    dir: FilePath = Field(
        description="Run directory: one folder per stage, metrics, summary.",
        json_schema_extra=SPEED_ONLY,
    )
    seed: int = Field(
        default=17,
        ge=0,
        lt=2**31,
        description="Seed of everything: sampling, order of training data.",
    )


class ModelsSection(Section):
    teacher: FilePath = Field(
        description="Hugging Face folder of the teacher (config.json, safetensors, tokenizer)."
    )
    student: FilePath = Field(description="Hugging Face folder of the base student.")
    teachers: dict[str, FilePath] = Field(
        default_factory=dict,
        description="Teacher by domain of the prompts: { math = FOLDER }; teacher: of any other.",
    )
    trust_remote_code: Literal[False] = Field(
        default=False, description="Code shipped inside a checkpoint is never run."
    )


class TaskSection(Section):
    name: str = Field(
        description="Task (lopd/tasks): how prompts are made or read, and how answers are verified."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the task, checked by the task."
    )


class PromptSet(Section):
    file: FilePath | None = Field(
        default=None,
        description="JSONL or Parquet file with prompts, or a folder of them. Absent: the task generates prompts.",
    )
    format: Literal[
        "lopd",
        "fields",
        "openthoughts3",
        "dapo_math_17k",
        "epicoder",
        "gsm8k",
        "math_500",
        "aime_2024",
        "aime_2025",
        "hmmt_2025",
        "livecodebench",
    ] = Field(
        default="lopd",
        description="Whose columns the file has (docs/tasks.md); lopd: prompt_id, messages, answer; fields: as prompts.*.fields says.",
    )
    fields: dict[str, Any] = Field(
        default_factory=dict,
        description="Paths of question, messages, answer, prompt_id, domain, over the format's: answer = reward_model.ground_truth.",
    )
    where: dict[str, Any] = Field(
        default_factory=dict,
        description="Only rows whose column has this value, one of these, or lies in { min, max }.",
    )
    instruction: str | None = Field(
        default=None,
        description="Text around {question}; or plain, boxed. Absent: the format's own.",
    )
    duplicates: Literal["keep", "drop"] | None = Field(
        default=None,
        description="A question that was there before; absent: drop, of our own form keep.",
    )
    max_prompt_chars: int | None = Field(
        default=None, ge=1, description="Leave out prompts of more characters."
    )
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="Leave out prompts of more tokens, chat template included."
    )
    shuffle_seed: int | None = Field(
        default=None,
        ge=0,
        description="Shuffle a file's prompts with this seed before the first ones are taken; absent: not.",
    )
    thinking: bool = Field(
        default=True, description="Tell the chat template to let the model think (enable_thinking)."
    )
    num_prompts: int | None = Field(
        default=None,
        ge=1,
        description="How many prompts; of a file, its first ones. Absent: the whole file.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="Seed of generated prompts; sets with different seeds never share a prompt.",
    )


class PromptsSection(Section):
    sft: PromptSet = Field(description="Prompts the teacher demonstrates.")
    opd: PromptSet = Field(description="Prompts of the rollouts.")
    eval: PromptSet = Field(description="Held-out prompts.")


class Sampling(Section):
    temperature: float = Field(default=1.0, gt=0, le=10, description="Sampling temperature.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus mass.")
    top_k: int = Field(default=-1, ge=-1, description="Number of candidates; -1: all.")
    min_p: float = Field(
        default=0.0, ge=0, lt=1, description="Least probability relative to the most likely token."
    )
    max_new_tokens: int = Field(
        default=4096,
        ge=1,
        description="A response is cut (finish_reason length) after so many tokens.",
    )
    samples_per_prompt: int = Field(default=1, ge=1, description="Responses per prompt.")

    @model_validator(mode="after")
    def _some_candidate(self) -> Sampling:
        if self.top_k == 0:  # a server would say so, at the first request
            raise Contradiction(
                "top_k = 0",
                limit="-1 (all tokens are candidates), or 1 and more",
                remedy="set it to -1 for no such bound",
            )
        return self


class DemonstrateSection(Sampling):
    shard_size: int = Field(
        default=256,
        ge=1,
        description="Responses per Parquet shard: published at a time; a kill loses those in flight.",
        json_schema_extra=SPEED_ONLY,
    )


class RolloutSection(Sampling):
    temperature: float = Field(
        default=0.8, gt=0, le=10, description="Sampling temperature (the paper: 0.8)."
    )
    shard_size: int = Field(
        default=256, ge=1, description="Responses per Parquet shard.", json_schema_extra=SPEED_ONLY
    )


class ParallelSection(Section):
    ranks: int = Field(
        default=1,
        ge=1,
        description="Processes on this machine (one per GPU; on a CPU at most one per core).",
    )
    tensor: int = Field(
        default=1, ge=1, description="Tensor-parallel size; above 1 with sequence parallelism."
    )
    pipeline: int = Field(default=1, ge=1, description="Pipeline-parallel size.")
    context: int = Field(
        default=1,
        ge=1,
        description="Context-parallel size: ranks that each compute a part of every sequence (needs Transformer Engine).",
    )
    expert: int = Field(default=1, ge=1, description="Expert-parallel size.")
    expert_tensor: int = Field(
        default=1, ge=1, description="Tensor-parallel size inside an expert."
    )
    distributed_optimizer: bool = Field(
        default=True, description="Optimizer state sharded over data-parallel ranks."
    )
    nodes: int = Field(
        default=1,
        ge=1,
        description="Machines that the ranks are spread over in equal parts; lopd launch starts them.",
        json_schema_extra=SPEED_ONLY,
    )

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.ranks // (self.tensor * self.pipeline * self.context)


class ForwardSection(Section):
    """Forward passes of a model in Megatron-Core, without training."""

    parallel: ParallelSection = Field(default_factory=ParallelSection)
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Number format of weights and activations."
    )
    max_tokens_per_microbatch: int = Field(
        default=16384,
        ge=8,
        description="Token budget of a packed microbatch, per data rank: context ranks share it.",
        json_schema_extra=SPEED_ONLY,
    )
    timeout_s: float = Field(
        default=600,
        gt=0,
        description="Seconds a collective may wait for a lost rank.",
        json_schema_extra=SPEED_ONLY,
    )
    threads_per_rank: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of a rank. Absent: 1.",
        json_schema_extra=SPEED_ONLY,
    )


class ScoreSection(Section):
    allow_foreign_teacher: bool = Field(
        default=False,
        description="Score with a teacher other than the one of the demonstrations; recorded in the manifest and printed in every summary.",
    )
    logprob_bits: Literal[32, 16] = Field(
        default=32,
        description="Bits per log-probability in the cache; 16 (float16) loses up to 1 part in 2,048, and the manifest says how much it lost.",
    )
    top_k: int = Field(
        default=0,
        ge=0,
        description="Also keep the teacher's so many likeliest tokens at every response token, for the top-K losses; 0: none.",
    )
    engine: Literal["sglang", "megatron"] = Field(
        default="sglang",
        description="What computes the teacher's log-probabilities: an SGLang server, or Megatron-Core, forward only, on score.forward's ranks.",
    )
    entropy: bool = Field(
        default=False,
        description="Also keep the entropy of the teacher's distribution at every response token; with engine megatron only.",
    )
    forward: ForwardSection = Field(default_factory=ForwardSection)


class OptimizerSection(Section):
    lr: float = Field(default=2e-6, gt=0, description="Peak learning rate.")
    min_lr: float = Field(default=0.0, ge=0, description="Learning rate at the end of a decay.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="Shape after the warm-up."
    )
    warmup: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the steps in which the rate rises linearly from 0.",
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Adam's first moment.")
    beta2: float = Field(default=0.98, ge=0, lt=1, description="Adam's second moment.")
    eps: float = Field(default=1e-8, gt=0, description="Adam's epsilon.")
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled weight decay; none on norms and biases."
    )
    router_lr_scale: float = Field(
        default=1.0, gt=0, description="Learning rate of the experts' routers, as a multiple of lr."
    )
    freeze_router: bool = Field(
        default=False,
        description="Leave the routers' weights as they are: the choice of experts changes only with what they see.",
    )
    clip_grad: float = Field(
        default=1.0, ge=0, description="Bound of the global gradient norm; 0: none."
    )


class TrainSection(Section):
    """What sft and distill share."""

    parallel: ParallelSection = Field(default_factory=ParallelSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    num_steps: int = Field(default=150, ge=1, description="Optimizer steps.")
    batch_size: int = Field(default=256, ge=1, description="Responses per step, over all ranks.")
    max_tokens_per_microbatch: int = Field(
        default=16384,
        ge=8,
        description="Token budget of a packed microbatch, per data rank: context ranks share it.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Number format of weights and activations."
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Computed again in the backward pass. selective: experts or MLP (on a GPU in bfloat16), else attention; full: whole layers.",
    )
    moe_aux_loss: float = Field(
        default=0.0, ge=0, description="Coefficient of the load-balancing loss."
    )
    megatron: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other field of Megatron-Core's TransformerConfig, OptimizerConfig or DistributedDataParallelConfig, by name.",
    )
    checkpoint_every: int = Field(
        default=50,
        ge=1,
        description="Steps between checkpoints to resume from.",
        json_schema_extra=SPEED_ONLY,
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="Checkpoints kept.", json_schema_extra=SPEED_ONLY
    )
    checkpoint_in_background: bool = Field(
        default=False,
        description="Write checkpoints while training goes on, from a copy in host memory.",
        json_schema_extra=SPEED_ONLY,
    )
    timeout_s: float = Field(
        default=600,
        gt=0,
        description="Seconds a collective may wait for a lost rank.",
        json_schema_extra=SPEED_ONLY,
    )
    threads_per_rank: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of a rank. Absent: 1, or its share of the machine's cores where the optimizer is offloaded to the CPU.",
        json_schema_extra=SPEED_ONLY,
    )
    log_every: int = Field(
        default=1, ge=1, description="Steps between lines on screen.", json_schema_extra=SPEED_ONLY
    )


class SftSection(TrainSection):
    demonstrations: FilePath | None = Field(
        default=None,
        description="Demonstrations made elsewhere (an artifact folder). Absent: those of demonstrate.",
    )
    declared_teacher: FilePath | None = Field(
        default=None,
        description="Teacher of such demonstrations: recorded as declared, not proven.",
    )
    checkpoint: FilePath | None = Field(
        default=None,
        description="An SFT student made elsewhere (Hugging Face folder): taken over as it is, nothing is trained; declared_teacher: its teacher.",
    )
    init: Literal["checkpoint", "random"] = Field(
        default="checkpoint",
        description="Start from models.student, or from random weights of its config.json.",
    )
    init_std: float = Field(default=0.02, gt=0, description="Standard deviation of random weights.")


class ObjectiveSection(Section):
    """Pieces of the distillation loss (lopd/objective/registry.py, docs/objectives.md)."""

    loss: Literal["lightning", "top_k_reverse_kl", "top_k_forward_kl"] = Field(
        default="lightning",
        description="Loss of a token; the top-K ones need the teacher's top-K in the cache.",
    )
    top_k_support: Literal["tail", "renormalised"] = Field(
        default="tail",
        description="Of a top-K loss: all other tokens are one more outcome, or both sides are divided by their sums over the K.",
    )
    importance_cap: float | None = Field(
        default=None,
        ge=1,
        description="Weigh tokens by student / sampling probability, at most this; absent: no weights.",
    )
    early_token_gain: float = Field(
        default=0.0,
        ge=0,
        description="IW-OPD: the first tokens of a response weigh up to 1 + this; 0: all weigh the same.",
    )
    prefix_share: float | None = Field(
        default=None, gt=0, lt=1, description="Learn only from this first share of each response."
    )
    prefix_tokens: int | None = Field(
        default=None, ge=1, description="Learn only from this many first tokens of each response."
    )
    keep_end_token: bool = Field(
        default=True, description="With a prefix: the end token goes on carrying loss."
    )
    truncated: Literal["learn", "drop"] = Field(
        default="learn", description="Responses cut off at max_new_tokens: learn from them, or not."
    )
    reference_kl: float = Field(
        default=0.0,
        ge=0,
        description="Coefficient of the KL between the student and the policy of the rollouts.",
    )
    reference_direction: Literal["forward", "reverse"] = Field(
        default="forward",
        description="forward: KL(rollouts' policy || student), keeps old habits; reverse: KL(student || rollouts' policy), resists new ones.",
    )


class RefreshSection(Section):
    """When distill renews what it learns from (docs/refresh.md). Nothing set: never, which is
    Lightning OPD.
    """

    every: int = Field(
        default=0,
        ge=0,
        description="Steps between refreshes of the responses by the current student; 1: standard OPD; 0: no such interval.",
    )
    min_effective_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Refresh after a step whose tokens' effective sample share (student over sampling probabilities) is below this.",
    )
    max_chi_square: float | None = Field(
        default=None,
        gt=0,
        description="Refresh after a step whose tokens' chi-square, E[w^2] - 1, is above this.",
    )
    num_responses: int | None = Field(
        default=None,
        ge=1,
        description="Responses of a refresh. Absent: as many as `every` steps learn from, or as the rollout stage made.",
    )
    keep_teacher: bool = Field(
        default=False,
        description="Keep the teacher's server while training runs, instead of starting it for each refresh.",
        json_schema_extra=SPEED_ONLY,
    )

    @property
    def is_on(self) -> bool:
        return (
            self.every > 0
            or self.min_effective_share is not None
            or self.max_chi_square is not None
        )


class DistillSection(TrainSection):
    cache: FilePath | None = Field(
        default=None,
        description="Learn from this cache (merged, split, residualised, imported, of another run), not from that of score; no rollouts are made.",
    )
    allow_foreign_cache: bool = Field(
        default=False,
        description="Even if its responses are not shown to be this SFT student's, or its scores their teacher's; recorded in the manifest.",
    )
    advantage_clip: float = Field(
        default=10.0,
        gt=0,
        description="Advantages are clipped to +- this many nats: the delta of the Huber loss.",
    )
    aggregation: Literal["response_mean", "token_mean", "token_sum"] = Field(
        default="response_mean",
        description="Mean over a response's tokens then over responses; mean over all tokens; sum over tokens, mean over responses.",
    )
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    refresh: RefreshSection = Field(default_factory=RefreshSection)
    student_entropy: bool = Field(
        default=False,
        description="Also report the student's entropy at every step: one more sum over the logits.",
        json_schema_extra=SPEED_ONLY,
    )
    sync_every: int = Field(
        default=10,
        ge=0,
        description="Steps between weight syncs into the running server, each followed by an evaluation; 0: never.",
    )
    sync_num_prompts: int = Field(
        default=128, ge=1, description="Held-out prompts of such an evaluation."
    )


_PRESETS: dict[
    str, dict[str, Any]
] = {  # the paper's evaluation: avg@32 of mathematics, avg@4 of code
    "paper_math": {
        "temperature": 0.6,
        "top_p": 0.95,
        "samples_per_prompt": 32,
        "max_new_tokens": 32768,
    },
    "paper_code": {
        "temperature": 0.6,
        "top_p": 0.95,
        "samples_per_prompt": 4,
        "max_new_tokens": 40960,
    },
}


class EvaluateSection(Sampling):
    preset: Literal["none", "paper_math", "paper_code"] = Field(
        default="none",
        description="The paper's sampling (T 0.6, top-p 0.95; 32 x 32768 tokens, code 4 x 40960) where the other keys are not set.",
    )
    temperature: float = Field(
        default=0.6, gt=0, le=10, description="Sampling temperature (the paper: 0.6)."
    )
    top_p: float = Field(default=0.95, gt=0, le=1, description="Nucleus mass (the paper: 0.95).")
    equal_compute_baseline: bool = Field(
        default=True,
        description="Also go on with SFT for as many tokens as distill used, and evaluate that.",
    )

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        preset = (
            _PRESETS.get(values.get("preset", ""))
            if isinstance(values, dict) and isinstance(values.get("preset", ""), str)
            else None
        )
        return {**preset, **values} if preset else values


class ExportSection(Section):
    dir: FilePath | None = Field(
        default=None,
        description="Where the Hugging Face checkpoint goes. Absent: export/model in the run directory.",
    )
    shard_bytes: int = Field(
        default=4 * 2**30,
        ge=2**20,
        description="Size bound of a safetensors file.",
        json_schema_extra=SPEED_ONLY,
    )


class Config(Section):
    run: RunSection
    models: ModelsSection
    task: TaskSection
    prompts: PromptsSection
    sglang: SGLangSection = Field(default_factory=SGLangSection)
    demonstrate: DemonstrateSection = Field(default_factory=DemonstrateSection)
    sft: SftSection = Field(default_factory=SftSection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    score: ScoreSection = Field(default_factory=ScoreSection)
    distill: DistillSection = Field(default_factory=DistillSection)
    sync: SyncSection = Field(default_factory=SyncSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    export: ExportSection = Field(default_factory=ExportSection)
    launch: LaunchSection = Field(default_factory=LaunchSection)
