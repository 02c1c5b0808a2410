"""Reads the messages of a row, in a list or as text.

It knows the names of roles and the forms of contents that data sets use.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lopd.errors import DataError

# The names of roles in data sets, and ours. A role of tool results is missing on purpose: a prompt
# with such results would need the tool.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    # The newer name of the same message.
    "developer": "system",
}


def id_from(prefix: str, messages: Sequence[Mapping[str, str]]) -> str:
    """Return the prompt id of messages that have none: a prefix and a hash of the messages.

    The same question has the same id in every run and in every file of the same form.
    """
    text = json.dumps([dict(message) for message in messages], ensure_ascii=False)
    # 16 digits: among a million questions no two have the same id by chance. surrogatepass: JSON
    # may hold half of a surrogate pair, which UTF-8 does not allow.
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"{prefix}-{digest[:16]}"


def parsed_messages(text: str, where: str, remedy: str) -> Any:
    """Return the messages that a column holds as JSON text, or as the text of a Python list.

    Args:
        text: The column. Any other text is a question and is returned as it is.
        where: The place of the row, for a message.
        remedy: The remedy, for a message.

    Raises:
        DataError: The text begins like a list of messages and cannot be read.
    """
    # Most columns are plain questions and end here.
    start = text.lstrip()
    if not start.startswith(("[", "{")):
        return text
    # Data frames write a list as Python does, with single quotes, which JSON does not allow.
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(start)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        messages = found if isinstance(found, list) else [found]
        if messages and all(isinstance(one, dict) and _has_role(one) for one in messages):
            return messages
        # A question may begin with a list of numbers, or consist of JSON.
        return text
    # Nobody asks a question that begins like this. To take it for one would train on broken text.
    if start.replace(" ", "").startswith(('[{"role"', '[{"from"', "[{'role'", "[{'from'")):
        raise DataError(
            "the messages are text that cannot be read as JSON or as a Python list",
            where=where,
            remedy=remedy,
        )
    return text


def _has_role(message: Mapping[str, Any]) -> bool:
    return "role" in message or "from" in message


def role_of(role: Any) -> str | None:
    """Return our name of a role in any case, or None if prompts have no such role."""
    return _ROLES.get(role.strip().lower()) if isinstance(role, str) else None


def content_of(content: Any) -> str | None:
    """Return the text of a message, also of one in parts.

    Returns:
        None if it has something else than text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    # The form of chat APIs: a list of parts, which may be images too.
    texts = []
    for part in content:
        # A part is text, or an object with a type.
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if not isinstance(text, str) or kind not in ("text", "input_text", "output_text"):
            return None
        texts.append(text)
    return "".join(texts)


def refusal_of(role: Any, content: Any) -> str:
    """Return why a message cannot be read, or "" if it can."""
    if role is None:
        return "it has no role"
    if role_of(role) is None:
        # All known roles, in case it was only written differently.
        known = ", ".join(dict.fromkeys(_ROLES))
        return f"the role {role!r:.40} is none of {known}: a prompt holds no results of tools"
    # A call of a tool has no content, for example.
    if content is None:
        return "it has no content"
    if content_of(content) is None:
        kinds = [type(content).__name__]
        if isinstance(content, list):
            kinds = [str(part.get("type")) for part in content if isinstance(part, dict)]
        return f"its content is not text ({', '.join(kinds):.60})"
    return ""
