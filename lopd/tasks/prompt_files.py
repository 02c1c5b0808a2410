"""A prompt file made from a data set: what ``lopd prompts prepare`` does. The file is in our own
form; a report beside it says what was left out, and why.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from lopd.artifacts import publish_json, sha256_file, sha256_json, storage_errors
from lopd.config import PromptSet
from lopd.errors import ConfigError, DataError
from lopd.records import Prompt
from lopd.tasks.decontamination import EvaluationIndex, Match, question_of
from lopd.tasks.formats import FORMATS
from lopd.tasks.gold import REMEDY, Fault, ReadsAnswers, fault, task_for
from lopd.tasks.interface import get_task
from lopd.tasks.prompts import load_prompts, read_prompts, render
from lopd.tasks.readers import ReadCounts, read_candidates
from lopd.tasks.rows import content_hash
from lopd.tasks.tokenizer import decode, load_tokenizer

_CONTAMINATED = "in an evaluation set"
_UNUSABLE = "with an answer that cannot be used"
_MATCHES_SHOWN = 200
_FAULTS_SHOWN = 200  # in the report; on screen the first _ROWS_SHOWN
_ROWS_SHOWN = 5
_NO_LIMIT = 2**31 - 1


def prompt_set(settings: dict[str, Any]) -> PromptSet:
    """A prompt set of these settings, absent ones left out. ConfigError: a wrong one, with what is
    allowed.
    """
    try:
        return PromptSet(**{key: value for key, value in settings.items() if value is not None})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{key} = {first['input']!r:.80}",
            where="lopd prompts",
            limit=first["msg"],
            remedy="see: lopd prompts formats",
        ) from None


def prepare(
    chosen: PromptSet,
    out: Path,
    *,
    against: Sequence[str] = (),
    ngram: int = 13,
    min_coverage: float = 0.0,
    tokenizer: Path | None = None,
    task: str | None = None,
) -> dict[str, Any]:
    """Writes ``out`` and ``out``.report.json; returns the report. Does nothing where a report of
    the same inputs stands there.

    task: who will judge the responses; None: the task of each prompt's domain, math or code. A
    prompt whose answer that task cannot use is left out, and its row stands in the report.

    DataError: see lopd.tasks.prompts; or ``out`` is a file that was not written here.
    """
    evaluation = [evaluation_set(text) for text in against]
    inputs = _inputs(chosen, evaluation, (ngram, min_coverage), tokenizer, task)
    report_path = out.with_name(f"{out.name}.report.json")
    standing = _standing(out, report_path)
    if standing is not None and standing["inputs"] == inputs:
        return {**standing, "reused": True}
    index = EvaluationIndex(ngram, min_coverage=min_coverage)
    for one in evaluation:
        index.add(str(one.file), read_prompts(one, ""))
    matches: list[Match] = []
    faults: list[Fault] = []
    counts = ReadCounts()
    judge = None if task is None else get_task(task, {})

    def leave_out(prompt: Prompt) -> str:
        match = index.match(prompt) if evaluation else None
        if match is not None:
            matches.append(match)
            return _CONTAMINATED
        reader = task_for(prompt, judge)
        what = ""
        if prompt.answer is not None and isinstance(reader, ReadsAnswers):
            what = reader.answer_fault(prompt)
        if what:
            faults.append(fault(prompt, what, counts))
        return _UNUSABLE if what else ""

    lengths: list[int] | None = None
    try:
        if tokenizer is None:
            prompts = read_prompts(chosen, "", leave_out=leave_out, counts=counts)
        else:
            loaded = load_tokenizer(tokenizer)
            more: dict[str, Any] = {"leave_out": leave_out, "counts": counts}
            prompts, ids = load_prompts(chosen, "", loaded, context_length=_NO_LIMIT, **more)
            lengths = [len(one) for one in ids]
    except DataError as error:
        if not faults:
            raise
        what = f"{error.what}; first: {faults[0].line()}"
        raise DataError(what, where=error.where, limit=error.limit, remedy=REMEDY) from None
    _write(out, prompts)
    report = {
        "inputs": inputs,
        "sha256": sha256_file(out),
        "source": str(chosen.file),
        "format": chosen.format,
        "rows": counts.rows,
        "prompts": len(prompts),
        "with_answer": sum(prompt.answer is not None for prompt in prompts),
        "left_out": counts.left_out,
        "left_out_examples": counts.examples,
        "unusable_answers": [{**asdict(one), "remedy": REMEDY} for one in faults[:_FAULTS_SHOWN]],
        "chars": _quantiles([len(question_of(prompt)) for prompt in prompts]),
        "tokens": None if lengths is None else _quantiles(lengths),
        "decontamination": _decontamination(index, evaluation, matches) if evaluation else None,
    }
    publish_json(report_path, report)
    return {**report, "reused": False}


def shown(chosen: PromptSet, num_prompts: int, tokenizer: Path | None) -> Iterator[str]:
    """Lines that show the first prompts: as messages, or with a tokenizer as the text that a model
    sees.
    """
    for prompt in itertools.islice(read_candidates(chosen, "", ReadCounts()), num_prompts):
        answer = prompt.answer or "none"
        yield f"--- {prompt.prompt_id} ({prompt.domain or 'no domain'}), answer: {answer if len(answer) <= 200 else answer[:200] + '...'}"
        if tokenizer is None:
            yield from (f"[{message['role']}] {message['content']}" for message in prompt.messages)
        else:
            loaded = load_tokenizer(tokenizer)
            (ids,) = render([prompt], loaded, context_length=_NO_LIMIT, thinking=chosen.thinking)
            yield f"{decode(loaded, ids)}\n--- {len(ids)} tokens"


def evaluation_set(text: str) -> PromptSet:
    """``FILE`` or ``FILE:FORMAT``; the questions alone, without instruction."""
    name, colon, form = text.rpartition(":")
    path, form = (name, form) if colon and form in FORMATS else (text, "lopd")
    return prompt_set(
        {
            "file": Path(path).expanduser().absolute(),
            "format": form,
            "instruction": "plain",
            "duplicates": "drop",
        }
    )


def _inputs(
    chosen: PromptSet,
    evaluation: Sequence[PromptSet],
    match: tuple[int, float],
    tokenizer: Path | None,
    task: str | None,
) -> str:
    """Names what a file is made from, by content."""
    about = [
        [
            one.model_dump(mode="json", exclude={"file"}),
            content_hash(one.file) if one.file else None,
        ]
        for one in (chosen, *evaluation)
    ]
    files = (
        []
        if tokenizer is None
        else [
            content_hash(tokenizer / name)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        ]
    )
    return sha256_json([about, match if evaluation else None, files, task])


def _standing(out: Path, report_path: Path) -> dict[str, Any] | None:
    """The report of a file that was written here and has not changed since. DataError: the file is
    somebody else's.
    """
    if not out.exists():
        return None
    try:
        report: dict[str, Any] = json.loads(report_path.read_text(encoding="utf-8"))
        ours = report["sha256"] == sha256_file(out)
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise DataError(
            "is there already, and is not as lopd prompts has left it",
            where=str(out),
            remedy="give another --out, or remove it",
        )
    return report


def _write(out: Path, prompts: Sequence[Prompt]) -> None:
    """Line by line (tests of code problems are large), then renamed into place."""
    partial = out.with_name(f"{out.name}.partial")
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", errors="surrogatepass") as handle:
            for prompt in prompts:
                line: dict[str, Any] = {
                    "prompt_id": prompt.prompt_id,
                    "messages": [dict(message) for message in prompt.messages],
                }
                line |= {
                    name: value
                    for name, value in (("answer", prompt.answer), ("domain", prompt.domain))
                    if value
                }
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        partial.rename(out)


def _quantiles(lengths: Sequence[int]) -> dict[str, float]:
    values = np.quantile(np.asarray(lengths), [0.0, 0.5, 0.9, 0.99, 1.0])
    return {
        "mean": float(np.mean(lengths)),
        **dict(zip(("least", "0.5", "0.9", "0.99", "most"), map(float, values), strict=True)),
    }


def _decontamination(
    index: EvaluationIndex, evaluation: Sequence[PromptSet], matches: Sequence[Match]
) -> dict[str, Any]:
    worst = sorted(matches, key=lambda match: (-match.coverage, match.prompt_id))
    touched = {(match.evaluation_set, match.evaluation_id) for match in matches}
    return {
        "ngram": index.ngram,
        "min_coverage": index.min_coverage,
        "evaluation_sets": [{"file": str(one.file), "format": one.format} for one in evaluation],
        "num_left_out": len(matches),
        "num_evaluation_prompts_touched": len(touched),
        "too_short_to_recognise": index.too_short,
        "boilerplate": index.boilerplate[:50],
        "matches": [asdict(match) for match in worst[:_MATCHES_SHOWN]],
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report for a reader."""
    left_out = (
        ", ".join(f"{count:,} {reason}" for reason, count in report["left_out"].items()) or "none"
    )
    lines = [
        f"{report['prompts']:,} prompts of {report['rows']:,} rows read"
        + (" (unchanged, nothing done)" if report["reused"] else ""),
        f"left out: {left_out}",
    ]
    for one in report["unusable_answers"][:_ROWS_SHOWN]:
        line = f"{one['where']}: field {one['field']}: {one['what']}"
        lines.append(f"    {line}; remedy: {one['remedy']}")
    for unit in ("chars", "tokens"):
        if report[unit] is not None:
            figures = report[unit]
            lines.append(
                f"{unit}: mean {figures['mean']:,.0f}, median {figures['0.5']:,.0f}, 99% {figures['0.99']:,.0f}, longest {figures['most']:,.0f}"
            )
    about = report["decontamination"]
    if about is not None:
        lines.append(
            f"{about['num_left_out']:,} prompts share {about['ngram']} words with {about['num_evaluation_prompts_touched']:,} evaluation prompts"
        )
        for match in about["matches"][:3]:
            what = f"{match['prompt_id']} has {100 * match['coverage']:.0f}% of {match['evaluation_id']}"
            lines.append(f"    {what}: {match['ngram']}")
    return lines
