"""Evaluates one checkpoint on one prompt set, apart from a pipeline: samples, judges, and writes
down figures, problems and transcripts. Resumable.

OUT/answers/       the responses, an artifact like any other (Parquet shards, manifest)
OUT/transcripts/   one JSONL file a shard: prompt, response, verdict; made again when the verifier's options change, without sampling again
OUT/problems.jsonl one line a problem; OUT/summary.json all figures
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopd import cache
from lopd.artifacts import (
    ArtifactWriter,
    publish_bytes,
    publish_json,
    read_shard,
    sha256_json,
    software_versions,
)
from lopd.config import Config
from lopd.config.secrets import scrubbed
from lopd.megatron.weights.architecture import read_architecture
from lopd.records import Manifest, Prompt, Response, ShardInfo
from lopd.report.console import progress, say
from lopd.stages.context import Stage, StageContext
from lopd.stages.sampling import sample_into, sampling_params
from lopd.tasks import Task, get_task
from lopd.tasks.accuracy import accuracy_figures, ks_of, pass_at
from lopd.tasks.prompts import load_prompts
from lopd.tasks.tokenizer import decode, load_tokenizer
from lopd.tasks.verdicts import Verdict, judge_all

SUMMARY, PROBLEMS, TRANSCRIPTS = "summary.json", "problems.jsonl", "transcripts"
_SECONDS_PER_TOKEN = (
    0.25  # of one response among many on a busy server: more is taken for a failure
)
_JUDGED = "judged.json"  # transcript file -> hash of the shard and the verifier it is made from

# what decides the responses; the verifier's options are not among it, so that judging anew needs no
# sampling
ANSWERS = Stage(
    name="answers",
    summary="Responses of one checkpoint to one prompt set.",
    kind="evaluation",
    knobs=("sglang", "evaluate"),
    models=("student",),
    prompts=("eval",),
    parents=lambda config: (),
    run=lambda context: None,
)


@dataclass(frozen=True, slots=True)
class _Row:
    """One response and its verdict."""

    response: Response
    text: str
    verdict: Verdict


def evaluate_model(config: Config, *, fit_context: bool, shard_size: int) -> dict[str, Any]:
    """Evaluates models.student on prompts.eval into run.dir; returns what is in summary.json.

    fit_context: set sglang.context_length to what the longest prompt and evaluate.max_new_tokens
    need, at most what the model has.
    """
    task = get_task(config.task.name, config.task.options)
    machine = check_machine(task)
    if machine:
        say(machine)
    if fit_context:
        config = fitted(config, task)
    context = StageContext(config, ANSWERS)
    prompts, prompt_ids = context.prompts("eval", config.models.student)
    samples = config.evaluate.samples_per_prompt
    writer = ArtifactWriter(  # refuses a folder with answers of other inputs
        context.folder,
        kind=ANSWERS.kind,
        inputs=context.inputs,
        models={"model": context.identity("student")},
        sampling=context.sampling_record(config.evaluate),
        shard_size=shard_size,
    )
    if writer.missing(-(-len(prompts) * samples // writer.shard_size)):
        with context.serve("model", config.models.student) as engine:
            params = sampling_params(config.evaluate, [config.models.student])
            sample_into(
                writer,
                engine,
                prompts,
                prompt_ids,
                params,
                samples_per_prompt=samples,
                seed=config.run.seed,
                purpose="answers",
                title="responses",
            )
    manifest = writer.finish()
    rows = judge_answers(context, manifest, prompts, task)
    summary = {**figures_of(rows, prompts), **about(context, manifest, machine)}
    publish_json(config.run.dir / SUMMARY, summary)
    lines = [json.dumps(line, ensure_ascii=False) for line in problem_lines(rows, prompts)]
    publish_bytes(config.run.dir / PROBLEMS, ("\n".join(lines) + "\n").encode())
    return summary


def check_machine(task: Task) -> str:
    """What the task's verifier says of this machine, before anything is sampled. ConfigError: it
    cannot verify here.
    """
    check = getattr(task, "check_machine", None)
    return "" if check is None else str(check())


def fitted(config: Config, task: Task) -> Config:
    """The configuration with a context as long as needed and possible, and patience for responses
    of that length.
    """
    most = read_architecture(config.models.student).max_position_embeddings
    tokenizer = load_tokenizer(config.models.student)
    _, ids = load_prompts(
        config.prompts.eval, task, tokenizer, context_length=most, need_answers=True
    )
    needed = max(len(one) for one in ids) + config.evaluate.max_new_tokens
    if needed > most:
        say(
            f"the model has {most} positions: the longest prompt leaves {most - max(len(one) for one in ids)} tokens for its response"
        )
    patience = max(
        config.sglang.request_timeout_s, _SECONDS_PER_TOKEN * config.evaluate.max_new_tokens
    )
    return config.model_copy(
        update={
            "sglang": config.sglang.model_copy(
                update={"context_length": min(needed, most), "request_timeout_s": patience}
            )
        }
    )


# ---- verdicts and transcripts ---------------------------------------------------------------------------------------------------------------------


def judge_answers(
    context: StageContext, manifest: Manifest, prompts: Sequence[Prompt], task: Task
) -> list[_Row]:
    """The verdict of every response; a shard's transcripts are written when all of it is judged,
    and read where they stand.
    """
    config, tokenizer = context.config, load_tokenizer(context.config.models.student)
    folder = config.run.dir / TRANSCRIPTS
    judged = (
        json.loads((folder / _JUDGED).read_text(encoding="utf-8"))
        if (folder / _JUDGED).is_file()
        else {}
    )
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    rows: list[_Row] = []
    with progress("verdicts", total=manifest.rows, unit="responses") as bar:
        for shard in manifest.shards:
            name = shard.name.removesuffix(".parquet") + ".jsonl"
            source = sha256_json([shard.sha256, task.name, config.task.options])
            responses = [
                response
                for response, _ in cache.from_table(
                    read_shard(context.folder, shard), where=shard.name
                )
            ]
            texts = [decode(tokenizer, response.token_ids) for response in responses]
            if judged.get(name) == source and (folder / name).is_file():
                verdicts = _read_verdicts(folder / name)
                bar.advance(len(verdicts))
            else:
                pieces = (
                    (by_id[one.prompt_id], text, one.finish_reason)
                    for one, text in zip(responses, texts, strict=True)
                )
                verdicts = []
                for verdict in judge_all(task, pieces):
                    verdicts.append(verdict)
                    bar.advance(1)
                _write_transcripts(folder / name, responses, texts, verdicts, by_id)
                judged[name] = source
                publish_json(folder / _JUDGED, judged)
            rows += [_Row(*row) for row in zip(responses, texts, verdicts, strict=True)]
    return rows


def _write_transcripts(
    path: Path,
    responses: Sequence[Response],
    texts: Sequence[str],
    verdicts: Sequence[Verdict],
    prompts: dict[str, Prompt],
) -> None:
    lines = []
    for response, text, verdict in zip(responses, texts, verdicts, strict=True):
        prompt = prompts[response.prompt_id]
        line = {
            "prompt_id": response.prompt_id,
            "sample_index": response.sample_index,
            "right": verdict.right,
            "reason": verdict.reason,
            "found": verdict.found,
            "finish_reason": response.finish_reason,
            "response_len": len(response.token_ids),
            "messages": [dict(message) for message in prompt.messages],
            "response": text,
        }
        lines.append(json.dumps(line, ensure_ascii=False))
    publish_bytes(path, ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))


def _read_verdicts(path: Path) -> list[Verdict]:
    lines = path.read_text(encoding="utf-8", errors="surrogatepass").rstrip("\n").split("\n")
    return [Verdict(row["right"], row["reason"], row["found"]) for row in map(json.loads, lines)]


# ---- figures --------------------------------------------------------------------------------------------------------------------------------------


def figures_of(rows: Sequence[_Row], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """See lopd.tasks.accuracy.accuracy_figures; besides, how often responses are wrong for which
    reason, and the same figures by domain where there are several.
    """
    by_domain: dict[str, set[str]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, set()).add(prompt.prompt_id)
    figures = _figures(rows)
    if len(by_domain) > 1:
        figures["by_domain"] = {
            domain: _figures([row for row in rows if row.response.prompt_id in ids])
            for domain, ids in sorted(by_domain.items())
        }
    return figures


def _figures(rows: Sequence[_Row]) -> dict[str, Any]:
    right: dict[str, list[bool]] = {}
    for row in rows:
        right.setdefault(row.response.prompt_id, []).append(row.verdict.right)
    lengths = [len(row.response.token_ids) for row in rows]
    reasons = Counter(row.verdict.reason for row in rows if not row.verdict.right)
    return {
        "num_problems": len(right),
        **accuracy_figures(
            [*right.values()], lengths, [row.response.finish_reason == "length" for row in rows]
        ),
        "reasons": dict(reasons.most_common()),
    }


def problem_lines(rows: Sequence[_Row], prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
    """One line a problem, in the order of the prompts."""
    of: dict[str, list[_Row]] = {}
    for row in rows:
        of.setdefault(row.response.prompt_id, []).append(row)
    for prompt in prompts:
        mine = of[prompt.prompt_id]
        num_right = sum(row.verdict.right for row in mine)
        answer = prompt.answer or ""
        yield {
            "prompt_id": prompt.prompt_id,
            "domain": prompt.domain,
            "answer": answer if len(answer) <= 200 else f"{answer[:200]}...",
            "num_samples": len(mine),
            "num_right": num_right,
            "pass_at": {str(k): pass_at(len(mine), num_right, k) for k in ks_of(len(mine))},
            "found": [row.verdict.found for row in mine],
            "reasons": dict(Counter(row.verdict.reason for row in mine if not row.verdict.right)),
            "response_len": float(np.mean([len(row.response.token_ids) for row in mine])),
            "truncated": sum(row.response.finish_reason == "length" for row in mine),
        }


def about(context: StageContext, manifest: Manifest, machine: str) -> dict[str, Any]:
    """What the figures are of."""
    config = context.config
    prompt_set = config.prompts.eval.model_dump(mode="json", exclude_defaults=True)
    shards: tuple[ShardInfo, ...] = manifest.shards
    return {
        "samples_per_problem": config.evaluate.samples_per_prompt,
        "num_tokens": sum(shard.tokens for shard in shards),
        "model": {
            "path": str(config.models.student),
            "weights": context.identity("student").weights,
        },
        "task": {"name": config.task.name, "options": scrubbed(config.task.options)},
        "prompts": prompt_set,
        "sampling": dict(manifest.sampling),
        "context_length": config.sglang.context_length,
        "seed": config.run.seed,
        "sandbox": machine,
        "answers": manifest.fingerprint,
        "versions": {**software_versions()},
    }
