"""Teacher and student are whole, of a known architecture, and their tokenizers fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lopd.artifacts import identify_tokenizer
from lopd.artifacts import lineage as consistency
from lopd.checks.findings import ROLES, Finding, Shapes, attempt, shapes_of
from lopd.config import Config
from lopd.config.hub import absent
from lopd.errors import ConfigError, DataError, LopdError
from lopd.megatron.weights.architecture import read_architecture
from lopd.megatron.weights.checkpoint_files import inspect_checkpoint
from lopd.tasks.light_tokenizer import light_tokenizer
from lopd.tasks.tokenizer import stop_token_ids

# What a chat template has between angle brackets, such as <think> and <|im_start|>.
_SIGN = re.compile(r"<[^<>\s]+>")


def teacher(config: Config) -> Iterator[Finding]:
    """Check that the teacher's checkpoint is whole."""
    yield from _check_model(config, "teacher")


def student(config: Config) -> Iterator[Finding]:
    """Check that the student's checkpoint is whole."""
    yield from _check_model(config, "student")


def _check_model(config: Config, role: str) -> Iterator[Finding]:
    """Check that a folder has a known architecture, and safetensors with every tensor of it."""
    folder: Path = getattr(config.models, role)
    # A name on the hub has become a path by now, and the remedy says how to fetch it.
    if not folder.is_dir():
        raise absent(
            folder,
            f"models.{role}: no such folder",
            otherwise="give the folder of a Hugging Face checkpoint",
        )
    architecture = read_architecture(folder)
    # A student with random weights needs no files of weights.
    needs_weights = role == "teacher" or config.sft.init != "random"
    if needs_weights:
        # Headers name every tensor, its shape and its dtype. Every fault is a finding of its own.
        problems = inspect_checkpoint(folder, architecture).problems
        yield from problems
        if problems:
            return
    yield (
        f"{architecture.family}, {architecture.num_layers} layers, "
        f"vocabulary {architecture.vocab_size}"
    )


def context(config: Config) -> Iterator[Finding]:
    """Check that the models have positions for a prompt and its response together."""
    problems: list[Finding] = [*context_problems(config, shapes_of(config))]
    yield from problems or [f"{config.sglang.context_length} tokens"]


def context_problems(config: Config, shapes: Shapes) -> Iterator[ConfigError]:
    """Yield the models whose positions are too few.

    Args:
        config: The configuration.
        shapes: The shapes of the models by role.
    """
    for role, architecture in shapes.items():
        positions = architecture.max_position_embeddings
        # SGLang would refuse to start, or the model would see positions that it never learnt.
        if config.sglang.context_length <= positions:
            continue
        # teachers.math is the teacher of the domain math. teacher and student have no domain.
        section, _, domain = role.partition(".")
        folder = getattr(config.models, section)
        title = f"teacher of {domain}" if domain else role
        yield ConfigError(
            f"sglang.context_length = {config.sglang.context_length} is too large",
            where=str(folder[domain] if domain else folder),
            limit=f"at most max_position_embeddings of the {title}: {positions}",
            remedy="lower sglang.context_length",
        )


def tokenizers(config: Config) -> Iterator[Finding]:
    """Check that teacher and student share one tokenizer.

    It must also fit the rows of every model, and the models must know how a response ends.
    """
    rows = {role: architecture.vocab_size for role, architecture in shapes_of(config).items()}
    aligned = config.aligns_tokenizers
    problems = 0
    # A tokenizer that is wrong does not keep the other one from being looked at.
    for role in rows:
        # A teacher with another tokenizer has ids of its own, which no other model needs to know.
        known = {role: rows[role]} if aligned else rows
        found = attempt(partial(_check_tokenizer, role, _folder_of(config, role), known))
        problems += isinstance(found, LopdError)
        yield found
        if not isinstance(found, LopdError):
            yield from _about_signs(role, _folder_of(config, role))
    if aligned:
        return
    # The teacher scores the token ids that the student sampled, so both must mean the same text.
    if rows.keys() >= set(ROLES):
        folders = [_folder_of(config, role) for role in ROLES]
        consistency.check_same_tokenizer(
            *map(identify_tokenizer, folders), remedy=consistency.OR_ALIGNED
        )
        yield "teacher and student share one tokenizer"
    if len(rows) > 1 and not problems:
        yield _about_rows(rows, len(light_tokenizer(config.models.student)))


def _folder_of(config: Config, role: str) -> Path:
    """Return the folder of a model. teachers.math is the teacher of the domain math."""
    section, _, domain = role.partition(".")
    folder = getattr(config.models, section)
    return Path(folder[domain] if domain else folder)


def _about_signs(role: str, folder: Path) -> Iterator[Finding]:
    """Warn of signs of the chat template that are tokens, and that the tokenizer cuts into pieces.

    A sign is read as one token only if the tokenizer has it as an added token. transformers up to
    5.12 makes three added tokens of the 26 of a GGUF file of Qwen3. The prompts, and a text such as
    <think>, then have other tokens than the model has learned.
    """
    tokenizer = light_tokenizer(folder)
    template = tokenizer.chat_template
    # A folder may have several templates by name. The checks of the templates speak of that.
    signs = sorted(set(_SIGN.findall(template))) if isinstance(template, str) else []
    cut = [sign for sign in signs if _is_cut(tokenizer, sign)]
    if cut:
        yield (
            f"WARNING: the tokenizer of the {role} cuts {', '.join(cut)} into pieces, although its "
            "vocabulary has a token for each. Prompts and responses then have other tokens than "
            "those that the model has learned. A tokenizer that was read from a GGUF file is like "
            "this: copy the tokenizer.json and tokenizer_config.json of the original model into "
            f"{folder}"
        )


def _is_cut(tokenizer: Any, sign: str) -> bool:
    """Return whether a text is a token of the vocabulary, and is not read as one."""
    number = tokenizer.convert_tokens_to_ids(sign)
    if number is None or number == tokenizer.unk_token_id:
        return False
    return bool(tokenizer.encode(sign, add_special_tokens=False) != [number])


def _about_rows(rows: Mapping[str, int], num_tokens: int) -> str:
    """Return how many rows each model has for the tokens, and what follows if they differ."""
    each = ", ".join(f"{role} {count:,}" for role, count in rows.items())
    least = min(rows.values())
    # Checkpoints pad their vocabulary differently, so differing numbers are no mistake.
    line = f"rows of the embeddings: {each}; tokens of the tokenizer: {num_tokens:,}"
    if least == max(rows.values()):
        return f"{line}. Every token has a row, and all models know the same ids"
    return (
        f"{line}. This is fine: every token has a row in each model, and the rows past the tokens "
        f"mean no text. A response is cut before an id from {least:,} on, which not all models "
        "know, and a top-K loss counts such an id among the other tokens"
    )


def _check_tokenizer(role: str, folder: Path, rows: Mapping[str, int]) -> str:
    """Check that all tokens, the end tokens too, have a row in the model's embedding."""
    tokenizer = light_tokenizer(folder)
    size = rows[role]
    # A vocabulary may be larger than the tokenizer (it is padded), never smaller.
    if len(tokenizer) > size:
        raise DataError(
            f"the tokenizer of the {role} has {len(tokenizer)} tokens",
            where=str(folder),
            limit=f"at most vocab_size of config.json: {size}",
            remedy="put the tokenizer files of this model into the folder",
        )
    # Without an end token every response would run into its limit.
    ends = stop_token_ids(folder, tokenizer)
    # generation_config.json names the end tokens, and may be left over from another model. The end
    # tokens of every model end the responses of all, so each must have a row everywhere.
    least = min(rows.values())
    if max(ends) >= least:
        owner = next(name for name, count in rows.items() if count == least)
        raise DataError(
            f"the end token {max(ends)} of the {role} has no row in the embeddings of every model",
            where=str(folder),
            limit=f"below vocab_size of the {owner}: {least}",
            remedy="correct eos_token_id in generation_config.json",
        )
    return f"{role}: {len(tokenizer)} tokens, responses end with {', '.join(map(str, ends))}"
