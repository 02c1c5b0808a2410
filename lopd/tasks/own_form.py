"""Reads prompts in our own form: prompt_id, messages or question, answer, domain, hint.

Only the question is needed. A row without a prompt_id gets one from its question.

The form is checked strictly, because a user writes it by hand or with a script: what looks like a
mistake is refused, with the number of the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopd.errors import DataError
from lopd.records import Prompt
from lopd.tasks.messages import content_of, id_from, parsed_messages, refusal_of
from lopd.tasks.rows import Row
from lopd.tasks.values import MISSING_TEXTS

# The remedy of most mistakes in a file of our own form.
OWN_FORM = (
    'write each line as {"prompt_id": "...", "messages": [{"role": "user", '
    '"content": "..."}], "answer": "..."}, or "question" in place of '
    '"messages"'
)


def own_prompt(row: Row, domain: str) -> Prompt:
    """Return the prompt of a row in our own form.

    Args:
        row: The row. Its values are a JSON object.
        domain: The domain of the prompt if the row names none.

    Raises:
        DataError: A field is missing, or it is not what the form says.
    """
    values = row.values
    where = row.where
    # null is what a table with gaps has in place of an id.
    given_id = None if values.get("prompt_id") is None else _text(values, "prompt_id", where)
    given = {name for name in ("messages", "question") if values.get(name) is not None}
    # With both it would be open which one counts.
    if len(given) != 1:
        name = "a prompt" if given_id is None else f"prompt {given_id!r}"
        raise DataError(
            f"{name} must have either messages or question", where=where, remedy=OWN_FORM
        )
    # A question is short for one message of the user.
    told = values.get("messages")
    if told is None:
        told = [{"role": "user", "content": _text(values, "question", where)}]
    messages = _messages(told, where)
    answer = None if values.get("answer") is None else _text(values, "answer", where)
    # "nan" as an answer is the trace of a table with gaps. It would be a wrong prompt.
    if answer is not None and answer.strip() in MISSING_TEXTS:
        what = f"the answer is {answer!r}, which stands for a missing value"
        raise DataError(what, where=where, remedy="remove the answer, or write the correct answer")
    own_domain = domain if values.get("domain") is None else _text(values, "domain", where)
    return Prompt(
        # Of the question alone: it has the same id in every file, whatever its answer.
        prompt_id=given_id or id_from("lopd", messages),
        messages=messages,
        domain=own_domain,
        answer=answer,
        hint=None if values.get("hint") is None else _text(values, "hint", where),
    )


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    """Return a column that must hold text."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        found = f"is {value!r:.60}" if key in row else "is missing"
        raise DataError(
            f"{key} {found}, but it must be a non-empty string", where=where, remedy=OWN_FORM
        )
    return value


def _messages(value: Any, where: str) -> tuple[Mapping[str, str], ...]:
    """Return the messages of a row in our own form.

    A role that is not known here stays as it is, because the chat template may know it.
    """
    # From a Parquet file the messages may come as JSON text.
    if isinstance(value, str):
        value = parsed_messages(value, where, OWN_FORM)
    if not isinstance(value, list) or not value:
        raise DataError("messages must be a non-empty list", where=where, remedy=OWN_FORM)
    messages: list[Mapping[str, str]] = []
    for index, message in enumerate(value):
        content = content_of(message.get("content")) if isinstance(message, dict) else None
        # A further key would be lost in silence: the chat template gets role and content.
        shaped = isinstance(message, dict) and set(message) == {"role", "content"}
        if content is None or not shaped or not isinstance(message["role"], str):
            what = f"messages[{index}] must have role and content, both strings, and nothing else"
            about = message if isinstance(message, dict) else {}
            reason = refusal_of(about.get("role"), about.get("content")) if about else ""
            raise DataError(what + (f": {reason}" if reason else ""), where=where, remedy=OWN_FORM)
        # The known roles may be written in any case.
        role = message["role"]
        known = role.strip().lower() in ("user", "assistant", "system")
        messages.append({"role": role.strip().lower() if known else role, "content": content})
    # The template would add a second answer behind the one that is there.
    if messages[-1]["role"] == "assistant":
        raise DataError(
            "the last message is from the assistant, so there is nothing to answer",
            where=where,
            remedy="let the list end with a message of the user",
        )
    return tuple(messages)
