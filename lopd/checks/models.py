"""Teacher and student: whole, of a known architecture, with positions and a tokenizer that fit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lopd.artifacts import identify_model
from lopd.artifacts import lineage as consistency
from lopd.checks.findings import ROLES, Finding, Shapes, architecture_of, attempt, shapes_of
from lopd.config import Config
from lopd.config.hub import remedy_for
from lopd.errors import ConfigError, DataError
from lopd.megatron.weights.architecture import read_architecture
from lopd.megatron.weights.hf_files import CheckpointReader
from lopd.tasks.tokenizer import load_tokenizer, stop_token_ids


def teacher(config: Config) -> Iterator[Finding]:
    yield _model(config, "teacher")


def student(config: Config) -> Iterator[Finding]:
    yield _model(config, "student")


def _model(config: Config, role: str) -> str:
    """A folder of a known architecture whose safetensors hold every tensor of it."""
    folder: Path = getattr(config.models, role)
    if not folder.is_dir():
        raise ConfigError(
            f"models.{role}: no such folder",
            where=str(folder),
            remedy=remedy_for(folder, "give the folder of a Hugging Face checkpoint"),
        )
    architecture = read_architecture(folder)
    if not (role == "student" and config.sft.init == "random"):
        with CheckpointReader(folder, architecture):  # reads the headers
            pass
    return f"{architecture.family}, {architecture.num_layers} layers, vocabulary {architecture.vocab_size}"


def context(config: Config) -> Iterator[Finding]:
    """The models' positions reach as far as prompt and response together."""
    problems: list[Finding] = [*context_problems(config, shapes_of(config))]
    yield from problems or [f"{config.sglang.context_length} tokens"]


def context_problems(config: Config, shapes: Shapes) -> Iterator[ConfigError]:
    for role, architecture in shapes.items():
        if config.sglang.context_length > architecture.max_position_embeddings:
            section, _, domain = role.partition(".")
            folder = getattr(config.models, section)
            yield ConfigError(
                f"sglang.context_length = {config.sglang.context_length}",
                where=str(folder[domain] if domain else folder),
                limit=f"max_position_embeddings of the {f'teacher of {domain}' if domain else role}: {architecture.max_position_embeddings}",
                remedy="lower sglang.context_length",
            )


def tokenizers(config: Config) -> Iterator[Finding]:
    """The teacher's and the student's are the same, fit the vocabulary, and know how a response
    ends.
    """
    readable = {
        role: getattr(config.models, role)
        for role in ROLES
        if architecture_of(config, role) is not None
    }
    for role, folder in readable.items():
        yield attempt(partial(_tokenizer, role, folder))
    if len(readable) == len(ROLES):
        consistency.check_same_tokenizer(*(identify_model(folder) for folder in readable.values()))
        yield "teacher and student share one tokenizer"


def _tokenizer(role: str, folder: Path) -> str:
    tokenizer, size = load_tokenizer(folder), read_architecture(folder).vocab_size
    if len(tokenizer) > size:
        limit = f"vocab_size of config.json: {size}"
        raise DataError(
            f"the tokenizer of the {role} has {len(tokenizer)} tokens",
            where=str(folder),
            limit=limit,
            remedy="use the model's own tokenizer",
        )
    ends = stop_token_ids(folder, tokenizer)
    if max(ends) >= size:
        raise DataError(
            f"end token {max(ends)} of the {role}",
            where=str(folder),
            limit=f"vocab_size {size}",
            remedy="mend generation_config.json",
        )
    return f"{role}: {len(tokenizer)} tokens, responses end with {', '.join(map(str, ends))}"
