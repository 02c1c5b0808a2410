"""Prompts can be read, none of them is held out and trained on, and answers can be verified here."""

from __future__ import annotations

import json
from collections.abc import Iterator

from lopd.checks.findings import Finding
from lopd.config import Config
from lopd.errors import DataError, LopdError
from lopd.records import Prompt
from lopd.tasks import get_task
from lopd.tasks.prompts import load_prompts, read_prompts
from lopd.tasks.tokenizer import load_tokenizer


def prompts(config: Config) -> Iterator[Finding]:
    """Every set can be read and rendered, and no held-out prompt is trained on."""
    task = get_task(config.task.name, config.task.options)
    try:
        tokenizer = load_tokenizer(config.models.student)
    except LopdError:  # ``tokenizers`` has said so
        tokenizer = None
    sets: dict[str, list[Prompt]] = {}
    for name in (
        "eval",
        "opd",
        *(("sft",) if config.sft.demonstrations is None and config.sft.checkpoint is None else ()),
    ):
        try:
            chosen, answers = getattr(config.prompts, name), name == "eval"
            if tokenizer is None:
                sets[name] = read_prompts(chosen, task, need_answers=answers)
            else:
                sets[name], _ = load_prompts(
                    chosen,
                    task,
                    tokenizer,
                    context_length=config.sglang.context_length,
                    need_answers=answers,
                )
        except LopdError as error:
            where = (
                f"prompts.{name}: {error.where}" if error.where != "prompts" else f"prompts.{name}"
            )
            yield type(error)(error.what, where=where, limit=error.limit, remedy=error.remedy)
            continue
        held_out = (
            {_question(prompt) for prompt in sets["eval"]}
            if name != "eval" and "eval" in sets
            else set()
        )
        shared = [prompt.prompt_id for prompt in sets[name] if _question(prompt) in held_out]
        if shared:
            what = f"{len(shared)} prompts are also held-out prompts of prompts.eval, first {shared[0]!r}"
            yield DataError(
                what,
                where=f"prompts.{name}",
                limit="0",
                remedy="remove them, or give the sets different seeds",
            )
        else:
            yield f"{name}: {len(sets[name])}"


def _question(prompt: Prompt) -> str:
    return json.dumps([dict(message) for message in prompt.messages], sort_keys=True)


def verifier(config: Config) -> Iterator[Finding]:
    """This machine can verify answers: code that a model wrote needs a sandbox."""
    task = get_task(config.task.name, config.task.options)
    machine = getattr(task, "check_machine", None)
    yield str(machine()) if machine is not None else f"task {task.name}"
