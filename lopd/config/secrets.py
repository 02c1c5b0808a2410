"""Hides secrets in settings that are written or printed.

A secret is recognised by the name of its key, also inside nested values, and by the form of a URL
with user and password. The value itself is never judged: a secret has no form of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

# A word of a name in snake_case, kebab-case, camelCase or UPPER_CASE.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# A name with one of these words, at any place, holds a secret.
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
# These words tell a secret only at the end: api_key is one, but max_total_tokens is not.
_AT_THE_END = {"key", "keys", "token"}
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def scrubbed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with ``***`` in place of everything that may be a secret.

    Tables, lists and strings with JSON are searched too. A URL loses its user and password. What
    holds no secret is returned unchanged, a string to the letter. Everything that is written must
    pass here, because a user's sglang.extra_args can hold a secret.
    """
    return {
        name: HIDDEN if _is_secret(name) and _has_content(value) else _within(value)
        for name, value in arguments.items()
    }


def scrubbed_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's inputs (flat knobs) for its manifest.

    Only the servers' arguments are scrubbed. Two values of a task's option must remain different
    there, or the result of one would be reused for the other.
    """
    key = "sglang.extra_args"
    return {**inputs, key: scrubbed(inputs[key])} if inputs.get(key) else dict(inputs)


def holds_secret(arguments: Mapping[str, Any]) -> bool:
    """Return whether ``scrubbed`` would hide something."""
    # Arguments that hide nothing come back equal.
    return scrubbed(arguments) != dict(arguments)


def _is_secret(name: str) -> bool:
    # By whole words: "token" in num_tokens must not hide a number.
    words = [word.lower() for word in _WORD.findall(name)]
    # ["key", "id"] is the end of aws_access_key_id.
    return bool(words) and (
        words[-1] in _AT_THE_END or words[-2:] == ["key", "id"] or not _ANYWHERE.isdisjoint(words)
    )


def _has_content(value: Any) -> bool:
    # A switch or an absent value tells nothing, and a reader wants to see it.
    return not (value is None or value == "" or isinstance(value, bool))


def _within(value: Any) -> Any:
    if isinstance(value, Mapping):
        return scrubbed(value)
    if isinstance(value, (list, tuple)):
        return [_within(one) for one in value]
    return _within_text(value) if isinstance(value, str) else value


def _within_text(text: str) -> str:
    if text.lstrip().startswith(("{", "[")):
        # Some of SGLang's arguments are JSON in a string.
        try:
            value = json.loads(text)
        except ValueError:
            pass
        else:
            hidden = _within(value)
            # Spaces and the order of keys stay as the user wrote them if nothing is hidden.
            return text if hidden == value else json.dumps(hidden)
    # Only the part before "@" is hidden, so that the machine stays readable.
    return _USER_IN_URL.sub(HIDDEN, text)
