"""Messages of a row: in a list or as text, with the names of roles and the contents in use."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from lopd.errors import DataError

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",  # the newer name of the same message
}


def opened_turns(text: str, where: str, remedy: str) -> Any:
    """Messages that a column holds as JSON text, or as the text of a Python list.

    Other text is a question. DataError: text that begins like such a list and is none.
    """
    start = text.lstrip()
    if not start.startswith(("[", "{")):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(start)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        turns = found if isinstance(found, list) else [found]
        if turns and all(isinstance(one, dict) and _has_role(one) for one in turns):
            return turns
        return text
    if start.replace(" ", "").startswith(('[{"role"', '[{"from"', "[{'role'", "[{'from'")):
        raise DataError("messages as text that cannot be read", where=where, remedy=remedy)
    return text


def _has_role(turn: Mapping[str, Any]) -> bool:
    return "role" in turn or "from" in turn


def role_of(role: Any) -> str | None:
    """Our name of a role, whatever its case; None of one that no prompt here has."""
    return _ROLES.get(role.strip().lower()) if isinstance(role, str) else None


def content_of(content: Any) -> str | None:
    """The text of a message, also of one in parts; None where it has something else than text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if not isinstance(text, str) or kind not in ("text", "input_text", "output_text"):
            return None
        texts.append(text)
    return "".join(texts)


def refusal_of(role: Any, content: Any) -> str:
    """Why a message cannot be read; "" where it can."""
    if role is None:
        return "it has no role"
    if role_of(role) is None:
        known = ", ".join(dict.fromkeys(_ROLES))
        return f"the role {role!r:.40} is none of {known}: a prompt holds no results of tools"
    if content is None:
        return "it has no content"
    if content_of(content) is None:
        kinds = [type(content).__name__]
        if isinstance(content, list):
            kinds = [str(part.get("type")) for part in content if isinstance(part, dict)]
        return f"its content is no text ({', '.join(kinds):.60})"
    return ""
