"""One chat template renders all prompts: shows where the models' own templates, or the prompt sets,
would give other prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lopd.checks.findings import Finding
from lopd.config import Config, PromptSet
from lopd.errors import DataError, LopdError
from lopd.records import Prompt
from lopd.tasks import get_task
from lopd.tasks.chat_template import render_time, template_folder, template_text
from lopd.tasks.light_tokenizer import light_tokenizer
from lopd.tasks.prompts import read_prompts
from lopd.tasks.rendering import render
from lopd.tasks.tokenizer import decode

# A context length that no prompt reaches.
_NO_LIMIT = 2**31 - 1


def templates(config: Config) -> Iterator[Finding]:
    """Compare how one prompt is rendered by each model's template and by each prompt set."""
    models = config.models
    owner = template_folder(config)
    try:
        prompt = _first_prompt(config)
        own = _Renderer(config, owner)
        rendered = own.text(prompt, config.prompts.opd)
    except LopdError:
        # The checks of the tokenizers and of the prompts say what is wrong.
        return
    yield f"the {models.chat_template}'s chat template renders the prompts of every stage"
    # The clock is fixed for a run. Anything else that changes would make each stage's prompts
    # different ones, although they have the same names.
    if own.text(prompt, config.prompts.opd) != rendered:
        yield DataError(
            "the chat template renders one prompt in two ways",
            where=str(owner),
            remedy="use a template without random choices",
        )
    other = models.student if models.chat_template == "teacher" else models.teacher
    if config.aligns_tokenizers:
        yield from _each_its_own(config, prompt, rendered)
    # Equal texts need no comparison. Different ones may still render a prompt in the same way.
    elif template_text(other) != template_text(owner):
        yield from _difference(config, prompt, rendered, other)
    yield from _thinking(config, prompt, own)


def _each_its_own(config: Config, prompt: Prompt, rendered: str) -> Iterator[Finding]:
    """Show one prompt as the teacher and as the student see it, where their tokenizers differ."""
    try:
        theirs = _Renderer(config, config.models.teacher).text(prompt, config.prompts.opd)
    except LopdError as error:
        # A teacher that cannot read the prompts would be noticed after the rollouts.
        yield error
        return
    name = f"prompt {prompt.prompt_id!r}"
    yield f"{name} is {theirs!r} for the teacher and {rendered!r} for the student"


def _difference(config: Config, prompt: Prompt, rendered: str, other: Path) -> Iterator[Finding]:
    """Show one prompt under both templates, where they differ."""
    name = "student" if config.models.chat_template == "teacher" else "teacher"
    try:
        # repr(), because two renderings may differ in line breaks and spaces alone.
        theirs = repr(_Renderer(config, other).text(prompt, config.prompts.opd))
    except LopdError as error:
        # A base model often has no template at all. It will get one.
        theirs = f"nothing ({error.what})"
    if theirs != repr(rendered):
        yield (
            f"WARNING: the {name}'s own template would render prompt {prompt.prompt_id!r} as "
            f"{theirs}; this run renders it as {rendered!r} (models.chat_template)"
        )


def _thinking(config: Config, prompt: Prompt, own: _Renderer) -> Iterator[Finding]:
    """Show one prompt as rendered for two sets that differ in their knob ``thinking``."""
    sets = {name: getattr(config.prompts, name) for name in ("sft", "opd", "eval")}
    # The same prompt for all sets, so only the knob can make a difference.
    texts = {name: own.text(prompt, chosen) for name, chosen in sets.items()}
    # Compared with the SFT set: the student learns its form, and the others should be asked in it.
    for name in ("opd", "eval"):
        if texts[name] != texts["sft"]:
            yield (
                f"WARNING: prompts.{name}.thinking is {_toml(sets[name].thinking)} and "
                f"prompts.sft.thinking is {_toml(sets['sft'].thinking)}, so a prompt of {name} is "
                f"{texts[name]!r} and one of sft is {texts['sft']!r}"
            )


def _toml(value: bool) -> str:
    return "true" if value else "false"


def _first_prompt(config: Config) -> Prompt:
    task = get_task(config.task.name, config.task.options)
    # One prompt is enough, and the file may have millions.
    chosen = config.prompts.opd.model_copy(update={"num_prompts": 1, "shuffle_seed": None})
    (prompt,) = read_prompts(chosen, task)
    return prompt


@dataclasses.dataclass
class _Renderer:
    """Renders prompts with the template of one folder."""

    config: Config
    folder: Path

    def __post_init__(self) -> None:
        self._tokenizer: Any = light_tokenizer(self.folder)
        # The check writes nothing, so the time is not recorded here.
        self._time = render_time(self.config)

    def text(self, prompt: Prompt, prompt_set: PromptSet) -> str:
        """Return the prompt as the model sees it, with special tokens."""
        (ids,) = render(
            [prompt],
            self._tokenizer,
            context_length=_NO_LIMIT,
            thinking=prompt_set.thinking,
            time=self._time,
        )
        return decode(self._tokenizer, ids)
