"""Evaluate: accuracy on held-out prompts, and reverse KL to the teacher, for every model of a run.

Accuracy is pass@1, as the mean over k samples (avg@k). A task without a verifier has none. The
reverse KL per token is
E_{a ~ pi_theta}[log pi_theta(a|s) - log pi_T(a|s)], in nats: the mean over the tokens of responses
that the model itself sampled at temperature 1, with its standard error over responses. The
equal-compute baseline continues with SFT for as many tokens as distill has processed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lopd import cache
from lopd.artifacts import ArtifactWriter
from lopd.config import EvaluateSection
from lopd.records import Ints, Key, Manifest, Prompt, Response
from lopd.stages.context import Stage, StageContext
from lopd.stages.sample_shards import sample_into, sampling_params
from lopd.stages.score_shards import score_into
from lopd.stages.serving import ModelServer
from lopd.stages.sft import demonstrations_of
from lopd.stages.tokenizer_bridge import InStudentTokens, TokenizerBridge, bridge_for
from lopd.stages.training import MODEL, RESULT, TrainingJob, train_on_ranks
from lopd.stages.truncation import truncation_warning
from lopd.stages.vocabulary import num_shared_ids
from lopd.tasks import Verifier, get_task
from lopd.tasks.accuracy import accuracy_figures, response_figures
from lopd.tasks.tokenizer import load_tokenizer, response_text
from lopd.tasks.verdict_files import write_verdicts
from lopd.tasks.verdicts import Judged, judge_all

if TYPE_CHECKING:
    from sglang_rollout.requests.client import SGLangEngine

# The equal-compute baseline: its name and its folder.
LONGER = "sft_longer"
# The name of the teacher among the models.
TEACHER = "teacher"


def run(context: StageContext) -> None:
    """Publish answers, scores, accuracy, lengths and reverse KL of each model."""
    config = context.config
    longer: dict[str, Any] | None = None
    is_trained = (context.folder / LONGER / RESULT).exists()
    if config.evaluate.equal_compute_baseline and context.overlap is not None and not is_trained:
        # Its ranks do their imports while this process reads the prompts.
        context.overlap.prepare_ranks(config.sft)
    prompts, prompt_ids = context.prompts("eval")
    # Before the servers: training and serving need the same GPUs.
    if config.evaluate.equal_compute_baseline:
        longer = _train_longer(context)
    bridge = bridge_for(context, "eval")
    held_out = _HeldOut(context, prompts, prompt_ids, bridge)
    # The record of the whole stage. Each model's answers and scores are artifacts inside of it.
    writer = context.writer(
        models={"teacher": context.identity("teacher")},
        lineage=context.manifest_of("distill").lineage,
    )
    # Where the answers are sampled from the policy as it is, the reverse KL needs no others.
    policy_purpose = "answers" if _samples_policy(config.evaluate) else "policy"
    answers: dict[str, Manifest] = {}
    policies: dict[str, Manifest] = {}
    scores: dict[str, Manifest] = {}
    with ModelServer(context) as server:
        for name, model in models_of(context).items():
            engine = server.use(model, version=name)
            # All that a model has to answer is asked while the server holds it.
            answers[name] = held_out.sample(engine, name, "answers")
            # Answers that were sampled from the policy as it is serve both purposes.
            policies[name] = answers[name]
            if policy_purpose == "policy":
                policies[name] = held_out.sample(engine, name, "policy")
        # The teacher came last, so the server holds it now and can score all models' responses.
        for name, policy in policies.items():
            part = context.writer(
                folder=context.folder / f"scores-{name}", kind="evaluation_scores"
            )
            source = context.folder / f"{policy_purpose}-{name}"
            score_into(part, engine, source, policy, title=f"teacher on {name}", asked=bridge)
            scores[name] = part.finish()
    # No server is needed any more. Verdicts take CPU time only.
    divergence = {
        name: reverse_kl_of(context.folder / f"scores-{name}", manifest)
        for name, manifest in scores.items()
    }
    writer.finish(
        **_figures(context, answers, prompts),
        reverse_kl=divergence,
        num_prompts=len(prompts),
        samples_per_prompt=config.evaluate.samples_per_prompt,
        sft_longer=longer,
    )


def _figures(
    context: StageContext, answers: Mapping[str, Manifest], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Return what the answers of all models come to, for the manifest, and log the warnings.

    Returns:
        responses and, with a verifier, accuracy: the metrics by model. warnings: in words.
    """
    # Without a verifier the manifest has no accuracy, and not an empty one.
    figures: dict[str, Any] = {"responses": {}, "warnings": []}
    for name, manifest in answers.items():
        judged = _judge(context, context.folder / f"answers-{name}", manifest, prompts)
        figures["responses"][name] = response_figures(judged.lengths, judged.truncated)
        if judged.right:
            of_model = accuracy_figures(judged.right, judged.lengths, judged.truncated)
            figures.setdefault("accuracy", {})[name] = of_model
        pairs = zip(judged.lengths, judged.truncated, strict=True)
        cut = [length for length, is_cut in pairs if is_cut]
        warning = truncation_warning(context.config, "evaluate", cut, manifest.rows, of=name)
        if warning:
            context.log(f"WARNING: {warning}")
            figures["warnings"].append(warning)
    return figures


def models_of(context: StageContext) -> dict[str, Path]:
    """Return the Hugging Face folder of each model by its name, in the order of evaluation."""
    models = {
        "base": context.config.models.student,
        "sft": context.folder_of("sft") / MODEL,
        LONGER: context.folder / LONGER / MODEL,
        "distilled": context.folder_of("distill") / MODEL,
        # Last, because it then scores the responses of all the others.
        TEACHER: context.config.models.teacher,
    }
    if not context.config.evaluate.equal_compute_baseline:
        del models[LONGER]
    return models


def _train_longer(context: StageContext) -> dict[str, Any]:
    """Go on with SFT from the SFT student for as many tokens as distill has processed."""
    # Without this baseline it could be said that distill only gains by training longer. Tokens are
    # prompt and response tokens that go through the model, which is what a training costs.
    sft = context.manifest_of("sft").extra
    distilled = context.manifest_of("distill").extra
    # The mean over the first SFT, whose data the baseline goes through again.
    tokens_per_step = sft["num_tokens"] / sft["num_steps"]
    demonstrations, _ = demonstrations_of(context)
    job = TrainingJob(
        objective="sft",
        config=context.config,
        folder=context.folder / LONGER,
        data=demonstrations,
        initial=context.folder_of("sft") / MODEL,
        init="checkpoint",
        # Rounded up: the baseline never gets less compute than distill had.
        num_steps=math.ceil(distilled["num_tokens"] / tokens_per_step),
        # With the same seed it would begin with the responses that the first SFT began with.
        order_seed=context.config.run.seed + 1,
    )
    return train_on_ranks(job)


def _samples_policy(section: EvaluateSection) -> bool:
    """Return whether these sampling parameters leave the policy as it is."""
    # The reverse KL is an expectation under pi_theta. A response at another temperature, or with
    # the unlikely tokens cut off, comes from another distribution.
    is_whole = section.top_p == 1.0 and section.top_k == -1 and section.min_p == 0.0
    return is_whole and section.temperature == 1.0


@dataclass(frozen=True)
class _HeldOut:
    """Samples the held-out prompts of this run."""

    context: StageContext
    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Ints]
    # Where the teacher has another tokenizer.
    bridge: TokenizerBridge | None

    def sample(self, engine: SGLangEngine, name: str, purpose: str) -> Manifest:
        """Publish a model's responses to all prompts.

        Args:
            engine: The servers of the model.
            name: The model's name.
            purpose: "answers" with the knobs of evaluate, or "policy": one response a prompt,
                sampled from the policy as it is.
        """
        config = self.context.config
        section = config.evaluate
        samples_per_prompt = section.samples_per_prompt
        changes: dict[str, Any] = {}
        if purpose == "policy":
            # One response for each prompt: the reverse KL is a mean over tokens, and has many of
            # them already.
            samples_per_prompt = 1
            changes = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
        part = self.context.writer(
            folder=self.context.folder / f"{purpose}-{name}",
            kind="evaluation",
            # A shard holds as many responses as there are prompts. It is what a kill loses.
            shard_size=len(self.prompts),
        )
        writer: ArtifactWriter = part
        prompt_ids = self.prompt_ids
        ends: Sequence[Path] = self.context.end_models
        # The teacher sees its own template, and what it answers is kept in the student's tokens.
        is_other = self.bridge is not None and name == TEACHER
        if self.bridge is not None and is_other:
            writer = InStudentTokens(part, self.bridge, self.prompts, self.prompt_ids)
            prompt_ids = [self.bridge.teacher_prompt(prompt.prompt_id) for prompt in self.prompts]
            ends = (config.models.teacher,)
        sample_into(
            writer,
            engine,
            self.prompts,
            prompt_ids,
            sampling_params(section, ends, **changes),
            samples_per_prompt=samples_per_prompt,
            seed=config.run.seed,
            # It is part of a request's seed: the policy's responses are not the answers again.
            purpose=purpose,
            title=f"{purpose} {name}",
            # The teacher scores the policy's responses, and the student may have more rows.
            num_ids=None if is_other else num_shared_ids(config),
        )
        return part.finish()


@dataclass(frozen=True)
class _Judged:
    """What the metrics need of one model's answers."""

    # The tokens of each answer, and whether it was cut off.
    lengths: list[int]
    truncated: list[bool]
    # The verdicts of each prompt's answers; empty where the task has no verifier.
    right: list[list[bool]]


def _judge(
    context: StageContext, folder: Path, manifest: Manifest, prompts: Sequence[Prompt]
) -> _Judged:
    """Read a model's answers. If the task has a verifier, judge them and publish the verdicts."""
    config = context.config
    task = get_task(config.task.name, config.task.options)
    tokenizer = load_tokenizer(config.models.student)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    keys: list[Key] = []
    lengths: list[int] = []
    truncated: list[bool] = []

    def responses() -> Iterator[Response]:
        # The verifier's workers judge earlier responses while later ones are read.
        for response, _ in cache.read_rows(folder, manifest):
            keys.append(response.key)
            lengths.append(len(response.token_ids))
            truncated.append(response.finish_reason == "length")
            yield response

    def to_judge() -> Iterator[Judged]:
        for response in responses():
            text = response_text(tokenizer, response.token_ids, response.finish_reason)
            yield by_id[response.prompt_id], text, response.finish_reason

    # By prompt: avg@k and pass@k are means over prompts, whose samples belong together.
    right: dict[str, list[bool]] = {}
    if isinstance(task, Verifier):
        # Verdicts come in the order of the responses.
        verdicts = [*judge_all(task, to_judge())]
        # So that anybody can read later why an answer counts as right or wrong.
        write_verdicts(folder, zip(keys, verdicts, strict=True), by_id)
        for (prompt_id, _), verdict in zip(keys, verdicts, strict=True):
            right.setdefault(prompt_id, []).append(verdict.right)
    else:
        # Read for their lengths alone.
        for _ in responses():
            pass
    return _Judged(lengths, truncated, [*right.values()])


def reverse_kl_of(folder: Path, manifest: Manifest) -> dict[str, float]:
    """Return mean and standard error of the reverse KL per token, in nats.

    The mean over tokens of log pi_theta - log pi_T, on responses of pi_theta.
    """
    sums: list[float] = []
    counts: list[int] = []
    for response, teacher_logprobs in cache.read_rows(folder, manifest):
        assert teacher_logprobs is not None, "scored shards carry teacher log-probabilities"
        # The sampling log-probabilities are at temperature 1, as the teacher's are.
        difference = response.sampling_logprobs - teacher_logprobs  # [R]
        # Where the teacher has another tokenizer, some tokens have no value of it.
        if response.loss_mask is not None:
            difference = difference[response.loss_mask]
        sums.append(float(np.sum(difference, dtype=np.float64)))
        counts.append(len(difference))
    num_tokens = max(1, sum(counts))
    num_responses = len(sums)
    mean = sum(sums) / num_tokens
    # The mean is a ratio of two sums over responses, which are the independent units: tokens of a
    # response depend on each other. This is the ratio estimator's standard error.
    residuals = np.array(sums) - mean * np.array(counts)
    squares = float(residuals @ residuals)
    error = math.sqrt(squares * num_responses / max(1, num_responses - 1)) / num_tokens
    return {"mean": mean, "standard_error": error}


# The servers' knobs are among the inputs: number format and context decide what is sampled.
STAGE = Stage(
    name="evaluate",
    summary=(
        "pass@1 on held-out prompts and reverse KL to the teacher, "
        "for teacher, base, SFT, distilled student and, if asked for, longer SFT."
    ),
    kind="evaluation",
    knobs=("task", "sglang", "evaluate"),
    models=("teacher", "student"),
    prompts=("eval",),
    parents=lambda config: ("sft", "distill"),
    run=run,
)
