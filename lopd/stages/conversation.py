"""Asks a model as a person does: a question in, the answer as text while it comes.

It is for a look at a model. Whatever is measured is sampled by the stages.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.artifacts import identify_tokenizer, read_manifest
from lopd.config import Config, SGLangSection
from lopd.errors import ConfigError, LopdError
from lopd.megatron.weights.architecture import read_architecture
from lopd.records import Prompt
from lopd.stages.sample_shards import end_token_ids
from lopd.stages.training import MODEL
from lopd.tasks.chat_template import template_folder
from lopd.tasks.rendering import render
from lopd.tasks.tokenizer import load_tokenizer, token_texts
from sglang_rollout.requests.live import stream_tokens
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest, request_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sglang_rollout.requests.client import SGLangEngine

# The models of a run by their names, as folders of the run directory.
_OF_RUN = {
    "distilled": Path("distill") / MODEL,
    "sft": Path("sft") / MODEL,
    "sft_longer": Path("evaluate/sft_longer") / MODEL,
}
# The models that a run was given: their names, and the stage and the role of a manifest that has
# their folder.
_GIVEN = {"base": ("sft", "student"), "teacher": ("demonstrate", "teacher")}
NAMES = (*_OF_RUN, *_GIVEN)
# Of a model outside of a run, if it has so many positions.
_CONTEXT_LENGTH = 4096


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model that can be asked.

    Attributes:
        folder: The Hugging Face folder.
        template_from: The folder whose tokenizer and chat template make the prompts.
    """

    folder: Path
    template_from: Path


def speaker_of(place: Path, name: str | None, config: Config | None = None) -> Speaker:
    """Return the model of a Hugging Face folder or of a run directory.

    Args:
        place: The folder.
        name: The name of a model of the run. None means "distilled".
        config: The configuration of the run, if it is at hand.

    Raises:
        ConfigError: The folder is neither, or the run has no such model yet.
    """
    if config is None and is_model(place):
        if name is not None:
            raise ConfigError(
                f"--model {name} names a model of a run",
                where=str(place),
                limit="a run directory",
                remedy="leave --model out: this folder is a model",
            )
        return Speaker(place, place)
    name = name or "distilled"
    if name not in NAMES:
        raise ConfigError(
            f"there is no model {name!r:.60}",
            where="--model",
            limit=f"one of {', '.join(NAMES)}",
            remedy="give one of these names",
        )
    folder = _folder_of(place, name, config)
    if not is_model(folder):
        # A run that is not finished has some of its models, and those can be asked already.
        there = [one for one in NAMES if is_model(_folder_of(place, one, config))]
        remedy = "give a Hugging Face folder, a run directory or its TOML file"
        if there:
            remedy = f"run the stage that makes it, or give --model {' or '.join(there)}"
        raise ConfigError(
            f"there is no model {name!r} in {folder}", where=str(place), remedy=remedy
        )
    # The run asks all of its models with one template. A student that was trained has it.
    trained = [place / path for path in _OF_RUN.values() if is_model(place / path)]
    own = [template_folder(config)] if config is not None else trained
    # A teacher with another tokenizer reads no ids but its own.
    tokenizers = {identify_tokenizer(one).tokenizer for one in (folder, *own[:1])}
    if name == "teacher" and len(tokenizers) > 1:
        return Speaker(folder, folder)
    return Speaker(folder, next(iter(own), folder))


def is_model(folder: Path) -> bool:
    """Return whether a folder is a Hugging Face checkpoint. A run directory is none."""
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # The run directory has a file of this name too, with the knobs of the run.
    return isinstance(about, dict) and "model_type" in about


def _folder_of(run: Path, name: str, config: Config | None) -> Path:
    """Return where a model of a run is, whether it is there or not."""
    if name in _OF_RUN:
        return run / _OF_RUN[name]
    if config is not None:
        # The configuration goes before a manifest, which may name folders of another machine.
        return config.models.student if name == "base" else config.models.teacher
    stage, role = _GIVEN[name]
    try:
        return Path(read_manifest(run / stage).models[role].path)
    except (LopdError, KeyError):
        # A stage that has not begun has no manifest.
        return run / stage / role


def settings_for(
    speaker: Speaker, place: Path, config: Config | None, *, has_gpu: bool
) -> dict[str, Any]:
    """Return the knobs of [sglang] for one server that one person asks.

    Args:
        speaker: The model.
        place: The run directory, or the model's folder.
        config: The configuration of the run, if it is at hand.
        has_gpu: Whether the machine has a GPU.
    """
    # A server refuses a context that the model has no positions for.
    longest = read_architecture(speaker.folder).max_position_embeddings
    section: dict[str, Any] = {
        # A CPU computes float32 as fast as bfloat16, and exactly.
        "dtype": "bfloat16" if has_gpu else "float32",
        "context_length": min(_CONTEXT_LENGTH, longest),
    }
    if config is not None:
        section = config.sglang.model_dump()
        # Servers of the user keep the weights that they have.
        section |= {"teacher_urls": [], "student_urls": []}
    else:
        section |= _recorded(place)
    # One reader needs one server and little memory, whatever the run needs.
    context_length = section["context_length"]
    return section | {
        "replicas": 1,
        "max_running_requests": 2,
        "max_total_tokens": max(64, 2 * context_length),
    }


def _recorded(run: Path) -> Mapping[str, Any]:
    """Return the knobs of [sglang] that decide an answer, from the record of a run."""
    path = run / "config.json"
    keys = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # Speed knobs of the run are left out. They fit its servers, and not one server for one reader.
    names = ("dtype", "tensor", "expert", "context_length")
    return {name: keys[f"sglang.{name}"] for name in names if f"sglang.{name}" in keys}


@contextlib.contextmanager
def served(speaker: Speaker, settings: SGLangSection, log: Path) -> Iterator[SGLangEngine]:
    """Serve a model as long as the block lasts.

    Raises:
        EngineError: The server does not start.
    """
    # Imported here, as the stages do: it takes seconds, and mistakes are said before.
    from sglang_rollout.requests.fleet import serve

    with serve(speaker.folder, settings, log=log, name="conversation") as engine:
        yield engine


@dataclass
class Conversation:
    """Questions to one model and its answers.

    Attributes:
        messages: What was said so far.
        was_cut: Whether the last answer was cut off at its limit.
    """

    engine: SGLangEngine
    tokenizer: PreTrainedTokenizerBase
    params: SamplingParams
    context_length: int
    seed: int
    thinking: bool = True
    messages: list[dict[str, str]] = field(default_factory=list)
    was_cut: bool = False

    def ask(self, question: str) -> Generator[str, None, None]:
        """Yield the pieces of the answer as they come. The whole answer is remembered.

        An answer that is not read to its end is forgotten together with its question.

        Raises:
            LopdError: The server fails, or the conversation fills the context.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        prompt = Prompt("conversation", tuple(asked), "", None)
        # The whole conversation is rendered again for each question: a template may write earlier
        # turns in another way than the newest one.
        (ids,) = render(
            [prompt], self.tokenizer, context_length=self.context_length, thinking=self.thinking
        )
        # Another seed for each turn: the same question twice may be answered in two ways.
        seed = request_seed(self.seed, "conversation", len(self.messages), "conversation")
        request = SamplingRequest("conversation", len(self.messages), ids, seed)
        ends = set(self.params.stop_token_ids)
        # True until the end token comes: an answer that reaches its limit has none.
        self.was_cut = True

        def tokens() -> Iterator[int]:
            for new in stream_tokens(self.engine, request, self.params):
                for token in new:
                    # The end token is found by its id: a model may write its text in an answer.
                    if token in ends:
                        self.was_cut = False
                    else:
                        yield token

        pieces = []
        for piece in token_texts(self.tokenizer, tokens()):
            pieces.append(piece)
            yield piece
        # Only now, behind the last piece: a reader who stops before leaves the conversation as it
        # was.
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def conversation_with(
    speaker: Speaker,
    engine: SGLangEngine,
    *,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    context_length: int,
    seed: int,
    thinking: bool,
) -> Conversation:
    """Return a conversation that has not begun."""
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=-1,
        min_p=0.0,
        max_new_tokens=max_new_tokens,
        # A base student may name no end of a turn, although the template of the run uses one.
        stop_token_ids=end_token_ids([speaker.folder, speaker.template_from]),
    )
    tokenizer = load_tokenizer(speaker.template_from)
    return Conversation(engine, tokenizer, params, context_length, seed, thinking)
