"""Evaluate: pass@1 (the mean over k samples, avg@k) on held-out prompts, and reverse KL per token
to the teacher, for every model of the run.

Reverse KL: E_{a ~ pi_theta}[log pi_theta(a|s) - log pi_T(a|s)], the mean over the tokens of
responses sampled at temperature 1 from the model itself, with its standard error over responses.
The equal-compute baseline goes on with SFT for as many tokens as distill processed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lopd import cache
from lopd.records import Manifest
from lopd.stages.context import Stage, StageContext
from lopd.stages.sampling import sample_into, sampling_params, score_into
from lopd.stages.serving import ModelServer
from lopd.stages.sft import demonstrations_of
from lopd.stages.training import MODEL, TrainingJob, train
from lopd.tasks import get_task
from lopd.tasks.accuracy import accuracy_figures
from lopd.tasks.tokenizer import decode, load_tokenizer
from lopd.tasks.verdicts import Judged, judge_all

LONGER = "sft_longer"  # the equal-compute baseline: its name and its folder
ORDER = (
    "base",
    "sft",
    "sft_longer",
    "distilled",
    "teacher",
)  # the teacher last: it then scores all the others


def models_of(context: StageContext) -> dict[str, Path]:
    """Name -> Hugging Face folder, in the order of evaluation."""
    folders = {
        "base": context.config.models.student,
        "sft": context.folder_of("sft") / MODEL,
        "sft_longer": context.folder / "sft_longer" / MODEL,
        "distilled": context.folder_of("distill") / MODEL,
        "teacher": context.config.models.teacher,
    }
    return {
        name: folders[name]
        for name in ORDER
        if name != "sft_longer" or context.config.evaluate.equal_compute_baseline
    }


def train_longer(context: StageContext) -> dict[str, Any]:
    """SFT gone on from the SFT student, with a fresh optimizer and another order, for as many
    tokens as distill processed (rounded up to a step).
    """
    sft, distilled = context.manifest_of("sft").extra, context.manifest_of("distill").extra
    tokens_per_step = sft["num_tokens"] / sft["num_steps"]
    demonstrations, _ = demonstrations_of(context)
    job = TrainingJob(
        objective="sft",
        config=context.config,
        folder=context.folder / LONGER,
        data=demonstrations,
        initial=context.folder_of("sft") / MODEL,
        init="checkpoint",
        num_steps=math.ceil(distilled["num_tokens"] / tokens_per_step),
        order_seed=context.config.run.seed + 1,
    )
    return train(job)


def run(context: StageContext) -> None:
    config = context.config
    longer = train_longer(context) if config.evaluate.equal_compute_baseline else None
    models = models_of(context)
    prompts, prompt_ids = context.prompts("eval", config.models.student)
    policy_sampling = (
        config.evaluate.temperature == 1.0
        and config.evaluate.top_p == 1.0
        and config.evaluate.top_k == -1
        and config.evaluate.min_p == 0.0
    )
    writer = context.writer(
        models={"teacher": context.identity("teacher")},
        lineage=context.manifest_of("distill").lineage,
    )
    answers: dict[str, Manifest] = {}
    policies: dict[str, Manifest] = {}
    scored: dict[str, Manifest] = {}
    with ModelServer(context) as server:
        for name, model in models.items():
            engine = server.use(model, version=name)

            def sample(
                purpose: str,
                samples_per_prompt: int,
                name: str = name,
                engine: Any = engine,
                **changes: Any,
            ) -> Manifest:
                part = context.writer(
                    folder=context.folder / f"{purpose}-{name}",
                    kind="evaluation",
                    shard_size=len(prompts),
                )
                sample_into(
                    part,
                    engine,
                    prompts,
                    prompt_ids,
                    sampling_params(config.evaluate, context.end_models, **changes),
                    samples_per_prompt=samples_per_prompt,
                    seed=config.run.seed,
                    purpose=purpose,
                    title=f"{purpose} {name}",
                )
                return part.finish()

            answers[name] = sample("answers", config.evaluate.samples_per_prompt)
            policies[name] = (
                answers[name]
                if policy_sampling
                else sample("policy", 1, temperature=1.0, top_p=1.0, top_k=-1, min_p=0.0)
            )
        kind = "answers" if policy_sampling else "policy"
        for name in models:  # the server holds the teacher now
            part = context.writer(
                folder=context.folder / f"scores-{name}", kind="evaluation_scores"
            )
            score_into(
                part,
                engine,
                context.folder / f"{kind}-{name}",
                policies[name],
                title=f"teacher on {name}",
            )
            scored[name] = part.finish()
    accuracy = {
        name: accuracy_of(context, context.folder / f"answers-{name}", manifest)
        for name, manifest in answers.items()
    }
    divergence = {
        name: reverse_kl(context.folder / f"scores-{name}", manifest)
        for name, manifest in scored.items()
    }
    writer.finish(
        accuracy=accuracy,
        reverse_kl=divergence,
        num_prompts=len(prompts),
        samples_per_prompt=config.evaluate.samples_per_prompt,
        sft_longer=longer,
    )


def accuracy_of(context: StageContext, folder: Path, manifest: Manifest) -> dict[str, Any]:
    """See lopd.tasks.accuracy.accuracy_figures: avg@k with its spread over prompts, pass@k,
    lengths, share of truncated responses.
    """
    task, tokenizer = (
        get_task(context.config.task.name, context.config.task.options),
        load_tokenizer(context.config.models.student),
    )
    by_id = {
        prompt.prompt_id: prompt
        for prompt in context.prompts("eval", context.config.models.student)[0]
    }
    keys: list[str] = []
    lengths, truncated = [], []

    def responses() -> Iterator[Judged]:
        for response, _ in cache.read_rows(folder, manifest):
            keys.append(response.prompt_id)
            lengths.append(len(response.token_ids))
            truncated.append(response.finish_reason == "length")
            yield (
                by_id[response.prompt_id],
                decode(tokenizer, response.token_ids),
                response.finish_reason,
            )

    verdicts = [verdict.right for verdict in judge_all(task, responses())]
    right: dict[str, list[bool]] = {}
    for prompt_id, verdict in zip(keys, verdicts, strict=True):
        right.setdefault(prompt_id, []).append(verdict)
    return accuracy_figures([*right.values()], lengths, truncated)


def reverse_kl(folder: Path, manifest: Manifest) -> dict[str, float]:
    """Mean over tokens of log pi_theta - log pi_T on responses of pi_theta, in nats, and its
    standard error (responses are the independent units).
    """
    sums, counts = [], []
    for response, teacher_logprobs in cache.read_rows(folder, manifest):
        assert teacher_logprobs is not None, "scored shards carry teacher log-probabilities"
        sums.append(float(np.sum(response.sampling_logprobs - teacher_logprobs, dtype=np.float64)))
        counts.append(len(response.token_ids))
    total, tokens, number = sum(sums), sum(counts), len(sums)
    mean = total / tokens
    residuals = np.array(sums) - mean * np.array(counts)  # of a ratio estimator
    error = math.sqrt(float(residuals @ residuals) * number / max(1, number - 1)) / tokens
    return {"mean": mean, "standard_error": error}


STAGE = Stage(
    name="evaluate",
    summary="pass@1 on held-out prompts and reverse KL to the teacher, for teacher, base, SFT, longer SFT and distilled student.",
    kind="evaluation",
    knobs=("task", "sglang", "evaluate"),
    models=("teacher", "student"),
    prompts=("eval",),
    parents=lambda config: ("sft", "distill"),
    run=run,
)
