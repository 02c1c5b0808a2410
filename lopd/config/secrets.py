"""What in the settings is nobody's business: by the names of keys, also inside values, and by the
form of a URL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_WORD = re.compile(
    r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+"
)  # of snake_case, kebab-case, camelCase and NAMES_OF_VARIABLES
_ANYWHERE = {
    "secret",
    "secrets",
    "password",
    "passwords",
    "passwd",
    "passphrase",
    "credential",
    "credentials",
    "authorization",
    "apikey",
}
_AT_THE_END = {"key", "keys", "token"}  # not max_total_tokens, and not page_first
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def scrubbed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with what may be a secret replaced by ``***``, for whatever is written: a
    user's sglang.extra_args can hold one.

    Looks into tables, lists and strings that are JSON; hides user and password of a URL. What hides
    nothing is returned as it is, a string to the letter.
    """
    return {
        name: HIDDEN if _is_secret(name) and _tells(value) else _within(value)
        for name, value in arguments.items()
    }


def scrubbed_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's inputs (flat knobs) for its manifest, where only the servers' arguments are
    scrubbed: two values of a task's option must still differ there, or a result would be taken for
    that of the other.
    """
    key = "sglang.extra_args"
    return {**inputs, key: scrubbed(inputs[key])} if inputs.get(key) else dict(inputs)


def holds_secret(arguments: Mapping[str, Any]) -> bool:
    """Whether scrubbed would hide something."""
    return scrubbed(arguments) != dict(arguments)


def _is_secret(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    return bool(words) and (
        words[-1] in _AT_THE_END or words[-2:] == ["key", "id"] or not _ANYWHERE.isdisjoint(words)
    )


def _tells(value: Any) -> bool:
    return not (value is None or value == "" or isinstance(value, bool))


def _within(value: Any) -> Any:
    if isinstance(value, Mapping):
        return scrubbed(value)
    if isinstance(value, (list, tuple)):
        return [_within(one) for one in value]
    return _within_text(value) if isinstance(value, str) else value


def _within_text(text: str) -> str:
    if text.lstrip().startswith(("{", "[")):
        try:
            value = json.loads(text)
        except ValueError:
            pass
        else:
            hidden = _within(value)
            return text if hidden == value else json.dumps(hidden)
    return _USER_IN_URL.sub(HIDDEN, text)
