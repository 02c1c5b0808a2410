"""Evaluate one checkpoint on one prompt set, without a run: sample, judge, and write the metrics.

A killed command continues where it was. It publishes:

OUT/answers/         the responses, as an artifact like any other (Parquet shards, manifest)
OUT/transcripts/     a JSONL file for each shard: prompt, response, verdict
OUT/problems.jsonl   a line for each problem
OUT/summary.json     all metrics

Other options of the verifier make the transcripts again, without sampling.
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
from lopd.records import Ints, Manifest, Prompt, Response, ShardInfo
from lopd.report.console import print_line, progress
from lopd.stages.context import Stage, StageContext
from lopd.stages.sample_shards import sample_into, sampling_params
from lopd.stages.truncation import truncation_warning
from lopd.tasks import Task, Verifier, get_task
from lopd.tasks.accuracy import accuracy_figures, ks_of, pass_at, response_figures
from lopd.tasks.prompts import load_prompts
from lopd.tasks.tokenizer import load_tokenizer, response_text
from lopd.tasks.verdict_files import expected_answer
from lopd.tasks.verdicts import Judged, Verdict, judge_all

# What the folder has at the end: one file for figures, one line for each problem, and all answers.
SUMMARY = "summary.json"
PROBLEMS = "problems.jsonl"
TRANSCRIPTS = "transcripts"
# In the folder of the transcripts: for each file the hash of the shard and of the verifier that it
# was made from.
_JUDGED = "judged.json"
# How long a token of one response may take on a busy server. A request that takes longer than that
# for its longest response has failed.
_SECONDS_PER_TOKEN = 0.25

# Its inputs are what decides the responses. The verifier's options are not among them, so judging
# again needs no sampling.
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
    """One response and its verdict, which is None where the task has no verifier."""

    response: Response
    text: str
    verdict: Verdict | None


def evaluate_model(config: Config, *, fit_context: bool, shard_size: int) -> dict[str, Any]:
    """Evaluate models.student on prompts.eval into run.dir.

    Args:
        config: The configuration.
        fit_context: Whether sglang.context_length is set to what the longest prompt and
            evaluate.max_new_tokens need, but at most to the context length of the model.
        shard_size: Responses in a shard.

    Returns:
        What is published in summary.json.

    Raises:
        LopdError: The folder holds answers of other inputs, or something cannot be used.
    """
    # Checked first: a verifier that cannot work here must be known before hours of sampling.
    task = get_task(config.task.name, config.task.options)
    sandbox = _check_machine(task)
    if sandbox:
        # It says how this machine isolates the programs of a code task.
        print_line(sandbox)
    if fit_context:
        config = _fit_context(config, task)
    # Not a stage of the pipeline, but made of the same parts: inputs that decide what is reused,
    # shards that a killed command continues with, and servers.
    context = StageContext(config, ANSWERS)
    prompts, prompt_ids = context.prompts("eval")
    manifest = _sample(context, prompts, prompt_ids, shard_size)
    rows = _judge_answers(context, manifest, prompts, task)
    figures = _figures(rows, prompts)
    summary = {**figures, **_about(context, manifest, sandbox)}
    warning = _truncation(config, rows)
    if warning:
        print_line(f"WARNING: {warning}")
        summary["warnings"] = [warning]
    publish_json(config.run.dir / SUMMARY, summary)
    # Made again each time: it takes seconds, and follows from the transcripts.
    lines = [json.dumps(line, ensure_ascii=False) for line in _problem_lines(rows, prompts)]
    publish_bytes(config.run.dir / PROBLEMS, ("\n".join(lines) + "\n").encode())
    return summary


def _truncation(config: Config, rows: Sequence[_Row]) -> str:
    cut = [len(row.response.token_ids) for row in rows if row.response.finish_reason == "length"]
    return truncation_warning(config, "evaluate", cut, len(rows))


def _check_machine(task: Task) -> str:
    """Return what the verifier says of this machine. ConfigError: It cannot verify here."""
    # Only tasks that run programs have such a check.
    check = getattr(task, "check_machine", None)
    return "" if check is None else str(check())


def _fit_context(config: Config, task: Task) -> Config:
    """Return the configuration with the context, and the timeout, that long responses need."""
    # Prompts are loaded here against the model's own limit, and once more with the fitted one.
    longest = read_architecture(config.models.student).max_position_embeddings
    tokenizer = load_tokenizer(config.models.student)
    _, prompt_ids = load_prompts(
        config.prompts.eval, task, tokenizer, context_length=longest, need_answers=True
    )
    longest_prompt = max(len(ids) for ids in prompt_ids)
    needed = longest_prompt + config.evaluate.max_new_tokens
    if needed > longest:
        # Some responses may be cut off then. The metrics count them, so it is no error.
        print_line(
            f"the model has {longest} positions: the longest prompt leaves "
            f"{longest - longest_prompt} tokens for its response"
        )
    # A long response on a busy server takes long, and must not be taken for a server that hangs.
    sglang = config.sglang
    timeout_s = max(sglang.request_timeout_s, _SECONDS_PER_TOKEN * config.evaluate.max_new_tokens)
    changes = {"context_length": min(needed, longest), "request_timeout_s": timeout_s}
    return config.model_copy(update={"sglang": sglang.model_copy(update=changes)})


def _sample(
    context: StageContext, prompts: Sequence[Prompt], prompt_ids: Sequence[Ints], shard_size: int
) -> Manifest:
    """Publish the answers. A folder with answers of other inputs is refused by the writer."""
    config = context.config
    writer = ArtifactWriter(
        context.folder,
        kind=ANSWERS.kind,
        inputs=context.inputs,
        models={"model": context.identity("student")},
        sampling=context.sampling_record(config.evaluate),
        shard_size=shard_size,
    )
    # The number of shards follows from the shard size that the folder was begun with.
    samples_per_prompt = config.evaluate.samples_per_prompt
    num_shards = -(-len(prompts) * samples_per_prompt // writer.shard_size)
    # Where all answers are there, and only the verifier has changed, no server is started.
    if writer.missing(num_shards):
        with context.serve("model", config.models.student) as engine:
            sample_into(
                writer,
                engine,
                prompts,
                prompt_ids,
                sampling_params(config.evaluate, [config.models.student]),
                samples_per_prompt=samples_per_prompt,
                seed=config.run.seed,
                purpose="answers",
                title="responses",
            )
    return writer.finish()


def _judge_answers(
    context: StageContext, manifest: Manifest, prompts: Sequence[Prompt], task: Task
) -> list[_Row]:
    """Return the verdict of every response.

    The transcripts of a shard are written when all of it is judged. Where they are there already,
    made by the same verifier, the verdicts are read from them.
    """
    config = context.config
    tokenizer = load_tokenizer(config.models.student)
    folder = config.run.dir / TRANSCRIPTS
    judged_file = folder / _JUDGED
    judged = json.loads(judged_file.read_text(encoding="utf-8")) if judged_file.is_file() else {}
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    rows: list[_Row] = []
    with progress("verdicts", total=manifest.rows, unit="responses") as bar:
        for shard in manifest.shards:
            name = shard.name.removesuffix(".parquet") + ".jsonl"
            # Another verifier, or other options of it, may give another verdict.
            source = sha256_json([shard.sha256, task.name, config.task.options])
            table = read_shard(context.folder, shard)
            # Decoded also where the verdicts are known. The metrics need the responses anyway.
            responses = [response for response, _ in cache.from_table(table, where=shard.name)]
            texts = [
                response_text(tokenizer, response.token_ids, response.finish_reason)
                for response in responses
            ]
            # Both are asked: the record is useless where somebody has removed the transcripts.
            if judged.get(name) == source and (folder / name).is_file():
                verdicts = _read_verdicts(folder / name)
                bar.advance(len(verdicts))
            else:
                # One by one, so that the bar moves: a verdict of code may take seconds.
                verdicts = []
                for verdict in _verdicts(task, responses, texts, by_id):
                    verdicts.append(verdict)
                    bar.advance(1)
                _write_transcripts(folder / name, responses, texts, verdicts, by_id)
                # After the transcripts: a kill in between has them judged again.
                judged[name] = source
                publish_json(judged_file, judged)
            rows += [_Row(*row) for row in zip(responses, texts, verdicts, strict=True)]
    return rows


def _verdicts(
    task: Task, responses: Sequence[Response], texts: Sequence[str], prompts: dict[str, Prompt]
) -> Iterator[Verdict | None]:
    """Yield the verdict of each response in order, or None where the task has no verifier."""
    if not isinstance(task, Verifier):
        # A verdict for each response all the same, so that the caller can join the two.
        yield from [None] * len(responses)
        return

    def to_judge() -> Iterator[Judged]:
        for response, text in zip(responses, texts, strict=True):
            yield prompts[response.prompt_id], text, response.finish_reason

    yield from judge_all(task, to_judge())


def _write_transcripts(
    path: Path,
    responses: Sequence[Response],
    texts: Sequence[str],
    verdicts: Sequence[Verdict | None],
    prompts: dict[str, Prompt],
) -> None:
    # Everything that a person needs to see why an answer counts as right or wrong.
    lines: list[str] = []
    for response, text, verdict in zip(responses, texts, verdicts, strict=True):
        prompt = prompts[response.prompt_id]
        # Without a verifier the keys are absent, so that nobody takes an empty verdict for a wrong
        # answer.
        judged: dict[str, Any] = {}
        if verdict is not None:
            judged = {"right": verdict.right, "reason": verdict.reason, "found": verdict.found}
            judged |= expected_answer(prompt)
        line = {
            "prompt_id": response.prompt_id,
            "sample_index": response.sample_index,
            **judged,
            "finish_reason": response.finish_reason,
            "response_len": len(response.token_ids),
            "messages": [dict(message) for message in prompt.messages],
            "response": text,
        }
        lines.append(json.dumps(line, ensure_ascii=False))
    # A prompt may hold half of a surrogate pair, which plain UTF-8 refuses.
    publish_bytes(path, ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))


def _read_verdicts(path: Path) -> list[Verdict | None]:
    # As in lopd.tasks.verdict_files: a prompt may hold half of a surrogate pair.
    lines = path.read_text(encoding="utf-8", errors="surrogatepass").rstrip("\n").split("\n")
    return [
        Verdict(row["right"], row["reason"], row["found"]) if "right" in row else None
        for row in map(json.loads, lines)
    ]


def _figures(rows: Sequence[_Row], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return the metrics of all prompts, and of each domain where there are several domains."""
    by_domain: dict[str, set[str]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, set()).add(prompt.prompt_id)
    figures = _figures_of(rows)
    # With one domain its metrics would be those of all prompts.
    if len(by_domain) > 1:
        figures["by_domain"] = {
            domain: _figures_of([row for row in rows if row.response.prompt_id in ids])
            for domain, ids in sorted(by_domain.items())
        }
    return figures


def _figures_of(rows: Sequence[_Row]) -> dict[str, Any]:
    """Return lopd.tasks.accuracy.accuracy_figures, and how often answers are wrong for what.

    Without a verifier there are only those of response_figures.
    """
    verdicts: dict[str, list[Verdict]] = {}
    for row in rows:
        of_prompt = verdicts.setdefault(row.response.prompt_id, [])
        of_prompt += [row.verdict] if row.verdict is not None else []
    lengths = [len(row.response.token_ids) for row in rows]
    truncated = [row.response.finish_reason == "length" for row in rows]
    if not any(verdicts.values()):
        return {"num_problems": len(verdicts), **response_figures(lengths, truncated)}
    right = [[verdict.right for verdict in of_prompt] for of_prompt in verdicts.values()]
    return {
        "num_problems": len(right),
        **accuracy_figures(right, lengths, truncated),
        "reasons": _reasons(rows),
    }


def _reasons(rows: Sequence[_Row]) -> dict[str, int]:
    """Return how many answers are wrong for each reason, the commonest first."""
    # "No answer found" and "wrong answer" call for different remedies.
    verdicts = [row.verdict for row in rows if row.verdict is not None]
    return dict(Counter(one.reason for one in verdicts if not one.right).most_common())


def _problem_lines(rows: Sequence[_Row], prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
    """Yield a line for each problem, in the order of the prompts."""
    # Rows come shard by shard. A prompt's samples may lie in two shards.
    by_prompt: dict[str, list[_Row]] = {}
    for row in rows:
        by_prompt.setdefault(row.response.prompt_id, []).append(row)
    for prompt in prompts:
        answers = by_prompt[prompt.prompt_id]
        count = len(answers)
        # The answer of a code task is all of its tests.
        expected = prompt.answer or ""
        if len(expected) > 200:
            expected = f"{expected[:200]}..."
        yield {
            "prompt_id": prompt.prompt_id,
            "domain": prompt.domain,
            "answer": expected,
            "num_samples": count,
            **_verdict_figures(answers),
            "response_len": float(np.mean([len(row.response.token_ids) for row in answers])),
            "truncated": sum(row.response.finish_reason == "length" for row in answers),
        }


def _verdict_figures(answers: Sequence[_Row]) -> dict[str, Any]:
    """Return the metrics of one problem's verdicts; none where the task has no verifier."""
    verdicts = [row.verdict for row in answers if row.verdict is not None]
    if not verdicts:
        return {}
    count = len(verdicts)
    num_right = sum(verdict.right for verdict in verdicts)
    return {
        "num_right": num_right,
        "pass_at": {str(k): pass_at(count, num_right, k) for k in ks_of(count)},
        "found": [verdict.found for verdict in verdicts],
        "reasons": _reasons(answers),
    }


def _about(context: StageContext, manifest: Manifest, sandbox: str) -> dict[str, Any]:
    """Return what the metrics were made from."""
    # With these fields two summaries can be compared, or it can be seen that they cannot.
    config = context.config
    shards: tuple[ShardInfo, ...] = manifest.shards
    return {
        "samples_per_problem": config.evaluate.samples_per_prompt,
        "num_tokens": sum(shard.tokens for shard in shards),
        "model": {
            "path": str(config.models.student),
            # The fingerprint and not only the path: another model may lie there tomorrow.
            "weights": context.identity("student").weights,
        },
        "task": {"name": config.task.name, "options": scrubbed(config.task.options)},
        "prompts": config.prompts.eval.model_dump(mode="json", exclude_defaults=True),
        "sampling": dict(manifest.sampling),
        "context_length": config.sglang.context_length,
        "seed": config.run.seed,
        "sandbox": sandbox,
        "answers": manifest.fingerprint,
        "versions": {**software_versions()},
    }
