"""The teacher's own prompt: what the student is asked, with more around it (score.teacher_prompt).

The teacher may see a reference answer, a hint or instructions that the student never sees. It then
scores the student's response as a continuation of its own prompt. The response keeps its tokens.

This is the setting of on-policy self-distillation (OPSD) with privileged information. The teacher
may be the student itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from lopd.errors import ConfigError, DataError
from lopd.records import Prompt

# What a template may contain. {prompt} is the last message, as the student sees it.
FIELDS = ("prompt", "answer", "hint")
# Words of one or two letters are no fields, so that braces of LaTeX such as {x} stay text.
_FIELD = re.compile(r"\{([a-z_]{3,})\}")
_WHERE = "score.teacher_prompt"


def check_template(template: str) -> None:
    """Refuse a template that leaves out the prompt, adds nothing, or names an unknown field.

    Raises:
        ConfigError: See above.
    """
    named = _FIELD.findall(template)
    unknown = [name for name in named if name not in FIELDS]
    what = ""
    if unknown:
        what = f"{{{unknown[0]}}} is no field"
    elif "prompt" not in named:
        what = f"{template!r:.80} does not contain {{prompt}}"
    elif template.strip() == "{prompt}":
        what = "the template adds nothing to the prompt"
    if what:
        fields = ", ".join(f"{{{name}}}" for name in FIELDS)
        raise ConfigError(
            what,
            where=_WHERE,
            limit=f"a text with {{prompt}}, and perhaps other fields of {fields}",
            remedy="correct score.teacher_prompt, or remove it",
        )


def teacher_prompts(prompts: Sequence[Prompt], template: str) -> list[Prompt]:
    """Return the prompts as the teacher sees them: the template in place of the last message.

    Args:
        prompts: The prompts of the student, with their answers and hints.
        template: The text with {prompt}, {answer} or {hint} in it.

    Raises:
        ConfigError: See check_template.
        DataError: A prompt lacks what the template names.
    """
    # Checked again here, because the library may be used without a configuration.
    check_template(template)
    return [_asked(prompt, template) for prompt in prompts]


def _asked(prompt: Prompt, template: str) -> Prompt:
    *before, last = prompt.messages

    def value(found: re.Match[str]) -> str:
        name = found[1]
        text = last["content"] if name == "prompt" else getattr(prompt, name)
        # A prompt without the field would reach the teacher with the word None in it.
        if text is None:
            raise DataError(
                f"prompt {prompt.prompt_id!r} has no {name}, which score.teacher_prompt names",
                where="prompts.opd",
                remedy=f"add {name} to this prompt, name its column in prompts.opd.fields, or take "
                f"{{{name}}} out of score.teacher_prompt",
            )
        return str(text)

    # One pass: a field that stands in a prompt or in a hint is text, and is not filled in again.
    content = _FIELD.sub(value, template)
    return replace(prompt, messages=(*before, {"role": last["role"], "content": content}))
