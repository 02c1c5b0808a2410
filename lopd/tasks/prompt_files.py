"""Makes a prompt file from a data set: the work of ``lopd prompts prepare``.

The file is in our own form. A report beside it says what was left out, and why.
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
from lopd.config.hub import PREFIX
from lopd.errors import ConfigError, DataError
from lopd.records import Prompt
from lopd.tasks.decontamination import EvaluationIndex, Match, question_of
from lopd.tasks.formats import FORMATS
from lopd.tasks.gold import REMEDY, Fault, ReadsAnswers, fault, task_for
from lopd.tasks.interface import Task, get_task
from lopd.tasks.prompts import load_prompts, read_prompts
from lopd.tasks.readers import ReadCounts, read_candidates
from lopd.tasks.rendering import render
from lopd.tasks.rows import content_hash
from lopd.tasks.tokenizer import decode, load_tokenizer

# The reasons that the report counts.
_CONTAMINATED = "in an evaluation set"
_UNUSABLE = "with an answer that cannot be used"
# How many examples the report holds, and how many of them are shown on screen.
_MATCHES_SHOWN = 200
_FAULTS_SHOWN = 200
_ROWS_SHOWN = 5
_MATCHES_ON_SCREEN = 3
_BOILERPLATE_SHOWN = 50
# A context length that no prompt reaches: a file is made for models with any context.
_NO_LIMIT = 2**31 - 1


def prompt_set(settings: dict[str, Any]) -> PromptSet:
    """Return a prompt set with these settings.

    Args:
        settings: Values by the names of prompts.*. A value None means that the setting is absent.

    Raises:
        ConfigError: A setting is wrong. The message says what is allowed.
    """
    try:
        return PromptSet(**{key: value for key, value in settings.items() if value is not None})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        # Pydantic's first finding is enough: the settings come from a few options of a command.
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{key} = {first['input']!r:.80} is not allowed",
            where="lopd prompts",
            limit=str(first.get("ctx", {}).get("expected") or first["msg"]),
            remedy="see lopd prompts formats",
        ) from None


class _Filter:
    """Decides which prompts are left out, and remembers why.

    Attributes:
        matches: The prompts that share n-grams with an evaluation prompt.
        faults: The prompts with an answer that cannot be used.
        counts: What happened to the rows. The reader fills it.
    """

    def __init__(self, index: EvaluationIndex | None, judge: Task | None) -> None:
        self._index = index
        self._judge = judge
        self.matches: list[Match] = []
        self.faults: list[Fault] = []
        self.counts = ReadCounts()

    def leave_out(self, prompt: Prompt) -> str:
        """Return why a prompt is left out, or "" to keep it."""
        # Contamination first: it needs no other process.
        match = self._index.match(prompt) if self._index is not None else None
        if match is not None:
            self.matches.append(match)
            return _CONTAMINATED
        # A prompt without an answer is of use for rollouts, so it stays.
        reader = task_for(prompt, self._judge)
        what = ""
        if prompt.answer is not None and isinstance(reader, ReadsAnswers):
            what = reader.answer_fault(prompt)
        if what:
            self.faults.append(fault(prompt, what, self.counts))
        return _UNUSABLE if what else ""


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
    """Write a prompt file and its report.

    It does nothing if the file stands there already with a report of the same inputs.

    Args:
        chosen: The source: file, format, columns, choice of rows.
        out: The prompt file. The report is ``out``.report.json.
        against: Evaluation sets as FILE or FILE:FORMAT. Prompts that share n-grams with one of
            their prompts are left out.
        ngram: The number of words of an n-gram.
        min_coverage: See EvaluationIndex.
        tokenizer: A Hugging Face folder. Prompts are then also counted in tokens.
        task: The task that will judge the responses. None means the task of each prompt's domain,
            math or code. A prompt whose answer that task cannot use is left out, and the report
            names its row.

    Returns:
        The report. Its key ``reused`` says whether the file stood there already.

    Raises:
        DataError: The source cannot be read (see lopd.tasks.prompts), or ``out`` is a file that
            this function has not written.
    """
    evaluation = [evaluation_set(text) for text in against]
    inputs = _inputs(chosen, evaluation, (ngram, min_coverage), tokenizer, task)
    report_path = out.with_name(f"{out.name}.report.json")
    # This comes before any reading, so that a repeated call takes no time and a wrong --out is seen
    # at once.
    standing = _standing(out, report_path)
    if standing is not None and standing["inputs"] == inputs:
        return {**standing, "reused": True}
    index = EvaluationIndex(ngram, min_coverage=min_coverage)
    for one in evaluation:
        index.add(str(one.file), read_prompts(one, ""))
    # The filter works while the file is read, so that num_prompts counts only what is kept.
    filtered = _Filter(index if evaluation else None, None if task is None else get_task(task, {}))
    prompts, lengths = _read(chosen, tokenizer, filtered)
    # The file first and the report last: a report says that its file is complete.
    _write(out, prompts)
    report: dict[str, Any] = {
        "inputs": inputs,
        "sha256": sha256_file(out),
        "source": str(chosen.file),
        "format": chosen.format,
        **_read_figures(prompts, lengths, filtered),
        "decontamination": None,
    }
    if evaluation:
        report["decontamination"] = _decontamination(index, evaluation, filtered.matches)
    # publish_json renames too, so a report is never half written.
    publish_json(report_path, report)
    return {**report, "reused": False}


def _read(
    chosen: PromptSet, tokenizer: Path | None, filtered: _Filter
) -> tuple[list[Prompt], list[int] | None]:
    """Return the prompts that are kept, and with a tokenizer their lengths in tokens."""
    # An empty domain: the rows or the format name it, or the file stays without one.
    more: dict[str, Any] = {"leave_out": filtered.leave_out, "counts": filtered.counts}
    try:
        if tokenizer is None:
            return read_prompts(chosen, "", **more), None
        loaded = load_tokenizer(tokenizer)
        prompts, ids = load_prompts(chosen, "", loaded, context_length=_NO_LIMIT, **more)
        return prompts, [len(one) for one in ids]
    except DataError as error:
        # The set is too small. If unusable answers are a reason for that, the first one is named.
        if not filtered.faults:
            raise
        what = f"{error.what}; first: {filtered.faults[0].line()}"
        raise DataError(what, where=error.where, limit=error.limit, remedy=REMEDY) from None


def _read_figures(
    prompts: Sequence[Prompt], lengths: Sequence[int] | None, filtered: _Filter
) -> dict[str, Any]:
    """Return the part of the report that says what was read, kept and left out."""
    counts = filtered.counts
    # At most so many of the faults: a data set may have thousands.
    faults = filtered.faults[:_FAULTS_SHOWN]
    return {
        "rows": counts.rows,
        "prompts": len(prompts),
        "with_answer": sum(prompt.answer is not None for prompt in prompts),
        "left_out": counts.left_out,
        "left_out_examples": counts.examples,
        "unusable_answers": [{**asdict(one), "remedy": REMEDY} for one in faults],
        "chars": _quantiles([len(question_of(prompt)) for prompt in prompts]),
        "tokens": None if lengths is None else _quantiles(lengths),
    }


def shown(chosen: PromptSet, num_prompts: int, tokenizer: Path | None) -> Iterator[str]:
    """Yield lines that show the first prompts.

    Args:
        chosen: The source.
        num_prompts: The number of prompts.
        tokenizer: A Hugging Face folder. With it the prompts are shown as the text that a model
            sees, otherwise as messages.
    """
    # Only as many rows as are shown are read.
    for prompt in itertools.islice(read_candidates(chosen, "", ReadCounts()), num_prompts):
        answer = prompt.answer or "none"
        # Tests of a code problem may fill many screens.
        answer = answer if len(answer) <= 200 else f"{answer[:200]}..."
        yield f"--- {prompt.prompt_id} ({prompt.domain or 'no domain'}), answer: {answer}"
        if tokenizer is None:
            yield from (f"[{message['role']}] {message['content']}" for message in prompt.messages)
        else:
            loaded = load_tokenizer(tokenizer)
            (ids,) = render([prompt], loaded, context_length=_NO_LIMIT, thinking=chosen.thinking)
            yield f"{decode(loaded, ids)}\n--- {len(ids)} tokens"


def evaluation_set(text: str) -> PromptSet:
    """Return the prompt set of FILE or FILE:FORMAT.

    It has the questions alone, because an instruction around them would hide a copy.
    """
    name, colon, form = text.rpartition(":")
    # A path may hold a colon. Only the name of a format behind it is one.
    path, form = (name, form) if colon and form in FORMATS else (text, "lopd")
    # A name on the hub stays as it is: the prompt set knows where its download lies.
    file = path if path.startswith(PREFIX) else Path(path).expanduser().absolute()
    return prompt_set({"file": file, "format": form, "instruction": "plain", "duplicates": "drop"})


def _inputs(
    chosen: PromptSet,
    evaluation: Sequence[PromptSet],
    match: tuple[int, float],
    tokenizer: Path | None,
    task: str | None,
) -> str:
    """Return a fingerprint of everything that decides the file's content."""
    # Files count by their content: the same file under another path gives the same prompts.
    about: list[Any] = []
    for one in (chosen, *evaluation):
        content = content_hash(one.file) if one.file else None
        about.append([one.model_dump(mode="json", exclude={"file"}), content])
    files: list[str | None] = []
    if tokenizer is not None:
        # The files that decide how many tokens a prompt has.
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        files = [content_hash(tokenizer / name) for name in names]
    # Without evaluation sets the n-grams decide nothing.
    return sha256_json([about, match if evaluation else None, files, task])


def _standing(out: Path, report_path: Path) -> dict[str, Any] | None:
    """Return the report of a file that was written here and has not changed since.

    Returns:
        None if there is no such file.

    Raises:
        DataError: There is a file, but it is not ours or it was changed.
    """
    if not out.exists():
        return None
    try:
        report: dict[str, Any] = json.loads(report_path.read_text(encoding="utf-8"))
        # By its content: a file that somebody has edited since is not ours any more.
        ours = report["sha256"] == sha256_file(out)
    except (OSError, ValueError, KeyError, TypeError):
        # No report, or one that we have not written. A file of the user is never replaced.
        ours = False
    if not ours:
        raise DataError(
            "the file exists, and its content was not written by lopd prompts",
            where=str(out),
            remedy="set --out to another file, or remove this file",
        )
    return report


def _write(out: Path, prompts: Sequence[Prompt]) -> None:
    """Write line by line, then rename the file into its place.

    Tests of code problems are large, so the text of all lines is never held at once.
    """
    # Beside the file, because a rename works only inside one file system.
    partial = out.with_name(f"{out.name}.partial")
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        # surrogatepass: JSON may hold half of a surrogate pair, which UTF-8 does not allow.
        with partial.open("w", encoding="utf-8", errors="surrogatepass") as handle:
            for prompt in prompts:
                line: dict[str, Any] = {
                    "prompt_id": prompt.prompt_id,
                    "messages": [dict(message) for message in prompt.messages],
                }
                # Our form has no empty fields: absent means absent.
                if prompt.answer:
                    line["answer"] = prompt.answer
                if prompt.domain:
                    line["domain"] = prompt.domain
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
            # On disk before the rename: after a power failure the file is complete or absent.
            handle.flush()
            os.fsync(handle.fileno())
        partial.rename(out)


def _quantiles(lengths: Sequence[int]) -> dict[str, float]:
    # The tail is what matters for the context length, hence 99% and the longest.
    values = np.quantile(np.asarray(lengths), [0.0, 0.5, 0.9, 0.99, 1.0])
    names = ("least", "0.5", "0.9", "0.99", "most")
    return {"mean": float(np.mean(lengths)), **dict(zip(names, values.tolist(), strict=True))}


def _decontamination(
    index: EvaluationIndex, evaluation: Sequence[PromptSet], matches: Sequence[Match]
) -> dict[str, Any]:
    # The largest coverage first; the id makes the order of equal ones the same in every run.
    worst = sorted(matches, key=lambda match: (-match.coverage, match.prompt_id))
    # Many training prompts may be copies of the same evaluation prompt.
    touched = {(match.evaluation_set, match.evaluation_id) for match in matches}
    return {
        "ngram": index.ngram,
        "min_coverage": index.min_coverage,
        "evaluation_sets": [{"file": str(one.file), "format": one.format} for one in evaluation],
        "num_left_out": len(matches),
        "num_evaluation_prompts_touched": len(touched),
        "too_short_to_recognise": index.too_short,
        "boilerplate": index.boilerplate[:_BOILERPLATE_SHOWN],
        "matches": [asdict(match) for match in worst[:_MATCHES_SHOWN]],
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """Return the report as lines for the screen."""
    reasons = [f"{count:,} {reason}" for reason, count in report["left_out"].items()]
    unchanged = " (unchanged, nothing done)" if report["reused"] else ""
    lines = [
        f"{report['prompts']:,} prompts of {report['rows']:,} rows read{unchanged}",
        f"left out: {', '.join(reasons) or 'none'}",
    ]
    # A few rows are enough to see what is wrong with the column. The report has more.
    for one in report["unusable_answers"][:_ROWS_SHOWN]:
        line = f"{one['where']}: field {one['field']}: {one['what']}"
        lines.append(f"    {line}; remedy: {one['remedy']}")
    # Tokens are missing if no tokenizer was given.
    for unit in ("chars", "tokens"):
        if report[unit] is not None:
            figures = report[unit]
            lines.append(
                f"{unit}: mean {figures['mean']:,.0f}, median {figures['0.5']:,.0f}, "
                f"99% {figures['0.99']:,.0f}, longest {figures['most']:,.0f}"
            )
    about = report["decontamination"]
    if about is not None:
        touched = about["num_evaluation_prompts_touched"]
        what = f"{about['num_left_out']:,} prompts share {about['ngram']} words"
        lines.append(f"{what} with {touched:,} evaluation prompts")
        # The worst matches show best whether the copies are real.
        for match in about["matches"][:_MATCHES_ON_SCREEN]:
            share = f"{100 * match['coverage']:.0f}% of {match['evaluation_id']}"
            lines.append(f"    {match['prompt_id']} has {share}: {match['ngram']}")
    return lines
