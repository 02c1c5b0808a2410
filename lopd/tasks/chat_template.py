"""The chat template of a run: one template renders the prompts of every stage.

Teacher and student have one tokenizer, but their folders may have different chat templates. A
published example is a thinking teacher, whose template ends the prompt with ``<think>``, beside a
base student, whose template does not. If each stage rendered with the folder at hand, the student
would be fine-tuned on prompts that it is never asked again. So ``models.chat_template`` names the
folder whose template decides, and the student gets that template (``complete_student_files``).

Nothing here imports transformers, except where a prompt is rendered.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.artifacts import publish_bytes, publish_json
from lopd.config import Config
from lopd.errors import DataError
from lopd.tasks.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The file in the run directory that keeps what a template could read from outside.
RECORD = "chat_template.json"
_FILE = "chat_template.jinja"
# The function of transformers' templates that gives the current time.
CLOCK = "strftime_now"
_COPY_AGAIN = "copy the file again from its source"


def template_folder(config: Config) -> Path:
    """Return the model folder whose chat template renders all prompts of the run."""
    models = config.models
    return models.teacher if models.chat_template == "teacher" else models.student


def template_text(folder: Path) -> str:
    """Return the chat template of a model folder as text; "" if it has none.

    Raises:
        DataError: A file is damaged.
    """
    path = folder / _FILE
    # The file wins over the field, as in transformers.
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _read_table(folder / "tokenizer_config.json").get("chat_template")
    # Some checkpoints have several templates by name, for example one for tools.
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else ""


def template_inputs(config: Config) -> dict[str, Any]:
    """Return what of the template decides the result of a stage, for the manifest."""
    text = template_text(template_folder(config))
    inputs: dict[str, Any] = {"chat_template": hashlib.sha256(text.encode()).hexdigest()}
    # A template that reads the clock renders other prompts at another time.
    if CLOCK in text:
        inputs["chat_template.time"] = render_time(config).isoformat()
    return inputs


def prompt_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Return the tokenizer that renders all prompts of the run.

    Raises:
        DataError: A file of the tokenizer is missing or damaged.
    """
    return load_tokenizer(template_folder(config))


def render_time(config: Config, *, record: bool = False) -> datetime.datetime:
    """Return the time that the template gets when it asks for the current time.

    Prompts must be the same in every stage, and tomorrow. So the time of the first stage is kept in
    the run directory.

    Args:
        config: The configuration.
        record: Write the time into the run directory if none is there.
    """
    path = config.run.dir / RECORD
    recorded = _read_table(path).get("time") if path.is_file() else None
    if isinstance(recorded, str):
        return datetime.datetime.fromisoformat(recorded)
    now = datetime.datetime.now().replace(microsecond=0)
    if record:
        publish_json(path, {"time": now.isoformat()})
    return now


def complete_student_files(folder: Path, template_from: Path, end_ids: Sequence[int]) -> None:
    """Make the files of a trained student say what its training has made true.

    They are copies of the base model's files. After SFT the student has prompts of the run's
    template and ends its responses as the teacher does, so these three change: the chat template,
    the end token of the tokenizer, and eos_token_id of generation_config.json. The call changes
    nothing if they are right already.

    Args:
        folder: The student's folder.
        template_from: The folder whose template and end token are taken.
        end_ids: The ids that ended a response in this run.

    Raises:
        ArtifactError: A file cannot be written.
        DataError: A file is damaged.
    """
    # Each file is published only if it changes. A second call leaves names and times of change
    # alone, so no checksum has to be computed again.
    config_path = folder / "tokenizer_config.json"
    about = _read_table(config_path)
    source = _read_table(template_from / "tokenizer_config.json")
    text = template_text(template_from)
    # One place for the template: a second one in tokenizer_config.json could contradict it.
    changed = {key: value for key, value in about.items() if key != "chat_template"}
    for key in ("eos_token", "eos_token_id"):
        if key in source:
            changed[key] = source[key]
    if changed != about:
        publish_json(config_path, changed)
    # A source without a template is no reason to take away the one that the student has.
    if text and template_text(folder) != text:
        publish_bytes(folder / _FILE, text.encode())
    generation_path = folder / "generation_config.json"
    generation = _read_table(generation_path) if generation_path.is_file() else {}
    ids = sorted(end_ids)
    # transformers takes one id or a list. One id stays a number, because other readers expect it.
    ends = ids[0] if len(ids) == 1 else ids
    if generation.get("eos_token_id") != ends:
        publish_json(generation_path, {**generation, "eos_token_id": ends})


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the file cannot be read ({error})", where=str(path), remedy=_COPY_AGAIN
        ) from None
    if not isinstance(table, dict):
        raise DataError("the file does not hold a JSON object", where=str(path), remedy=_COPY_AGAIN)
    return table
