"""Prompts can be read, no held-out prompt is trained on, and answers can be verified here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lopd.checks.findings import Finding
from lopd.checks.training import batch_problem
from lopd.config import Config
from lopd.errors import DataError, LopdError
from lopd.records import Prompt
from lopd.tasks import Verifier, get_task
from lopd.tasks.chat_template import render_time, template_folder
from lopd.tasks.light_tokenizer import light_tokenizer
from lopd.tasks.prompts import load_prompts, read_prompts
from lopd.tasks.rendered import kept_in

# Prompt set -> the training that learns from its responses, and the stage that samples them.
_TRAININGS = {"sft": ("sft", "demonstrate"), "opd": ("distill", "rollout")}
WITHOUT_VERIFIER = "the reverse KL, the length of responses and the share that was cut off"


def prompts(config: Config) -> Iterator[Finding]:
    """Check that every prompt set can be read and rendered, and that none has a held-out prompt."""
    # The held-out prompts come first, because the others are compared with them.
    names = ["eval", "opd"] if config.evaluate.enabled else ["opd"]
    # With given demonstrations or a given student, nobody answers the SFT prompts.
    if config.sft.demonstrations is None and config.sft.checkpoint is None:
        names.append("sft")
    task = get_task(config.task.name, config.task.options)
    try:
        tokenizer = light_tokenizer(template_folder(config))
    except LopdError:
        # The check of the tokenizers has said so. The prompts can still be read.
        tokenizer = None
    held_out: set[str] = set()
    for name in names:
        try:
            chosen = _read(config, name, task, tokenizer)
        except LopdError as error:
            # Some errors know a file and a line, others only that a prompt is wrong.
            place = f"prompts.{name}"
            where = place if error.where == "prompts" else f"{place}: {error.where}"
            yield type(error)(error.what, where=where, limit=error.limit, remedy=error.remedy)
            continue
        # Nothing is held out from the held-out prompts themselves.
        if name == "eval":
            held_out = {_question(prompt) for prompt in chosen}
            yield f"{name}: {len(chosen)}"
            continue
        # A file says how many prompts there are only when it is read. A given cache has responses
        # of its own, and its check counts them.
        if name == "sft" or config.distill.cache is None:
            training, sampling = _TRAININGS[name]
            samples = getattr(config, sampling).samples_per_prompt
            yield from batch_problem(config, training, len(chosen) * samples)
        # Equal questions only. lopd prompts prepare also finds similar ones.
        shared = [prompt.prompt_id for prompt in chosen if _question(prompt) in held_out]
        if shared:
            yield DataError(
                f"{len(shared)} prompts are also held-out prompts of prompts.eval, for "
                f"example {shared[0]!r}",
                where=f"prompts.{name}",
                limit="exactly 0",
                remedy="remove these prompts, or give the two prompt sets different seeds",
            )
        else:
            yield f"{name}: {len(chosen)}"


def _read(config: Config, name: str, task: Any, tokenizer: Any) -> list[Prompt]:
    """Read a prompt set. With a tokenizer, also check that each prompt fits into the context."""
    chosen = getattr(config.prompts, name)
    # Only held-out prompts are verified.
    need_answers = name == "eval"
    if tokenizer is None:
        return read_prompts(chosen, task, need_answers=need_answers)
    # Rendered with the chat template, since the template's tokens count for the context too.
    read, _ = load_prompts(
        chosen,
        task,
        tokenizer,
        context_length=config.sglang.context_length,
        need_answers=need_answers,
        time=render_time(config),
        # Read, or held for the stages that follow in this command. A check writes nothing.
        kept=kept_in(config.run.dir, name),
    )
    return read


def _question(prompt: Prompt) -> str:
    """Return what a prompt asks. Two sets may have one question under different ids."""
    return json.dumps([dict(message) for message in prompt.messages], sort_keys=True)


def verifier(config: Config) -> Iterator[Finding]:
    """Check that this machine can verify answers. Code that a model wrote needs a sandbox."""
    if not config.evaluate.enabled:
        yield "evaluation is off (evaluate.enabled): no accuracy, no reverse KL at the end"
        return
    task = get_task(config.task.name, config.task.options)
    # No mistake, but a user who expects an accuracy must read here that there will be none.
    if not isinstance(task, Verifier):
        yield f"task {task.name} has no verifier: evaluations report {WITHOUT_VERIFIER}"
        return
    check_machine = getattr(task, "check_machine", None)
    yield str(check_machine()) if check_machine is not None else f"task {task.name}"
