"""The values in a code problem's tests: how columns are opened, unpacked, read and compared."""

from __future__ import annotations

import ast
import base64
import json
import math
import pickletools
import zlib
from typing import Any

from lopd.errors import DataError

# The most bytes of a problem's packed tests: a small packed text may unpack to any size.
_UNPACKED_MAX = 1 << 30
# Operations of a pickle that make no object. Any other one could call a function.
_HARMLESS = ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP")


class OtherFormError(Exception):
    """A value cannot be read in this way."""


def only_element(output: Any) -> Any:
    """Return the only element of a list. APPS and TACO put each result into a list of its own."""
    output = value_of(output)
    if not isinstance(output, list) or len(output) != 1:
        raise OtherFormError
    return output[0]


def value_of(text: Any, *, strict: bool = False) -> Any:
    """Return what JSON or a Python literal means. Other text stays as it is.

    Args:
        text: A text, or any other value, which is returned.
        strict: Whether other text is refused.

    Raises:
        DataError: ``strict`` is set, and the text is neither JSON nor Python.
    """
    if not isinstance(text, str):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    # An argument that nobody can read would be passed as text, and a right program would fail.
    if strict:
        raise unreadable(f"an argument is neither JSON nor Python ({text[:40]!r})")
    return text


def plain(value: Any) -> Any:
    """Return a value as JSON has it, so that tuples and sets are lists."""
    try:
        # The same way that results take in the sandbox, so both sides change alike.
        return json.loads(json.dumps(value, default=listed))
    except (TypeError, ValueError):
        raise unreadable(
            f"a value has the type {type(value).__name__}, which JSON does not have"
        ) from None


def listed(value: Any) -> list[Any]:
    """Return a set or another iterable as a list, in an order that does not depend on chance."""
    try:
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    except TypeError:
        return list(value)


def same_result(result: Any, expected: Any) -> bool:
    """Return whether a result is right.

    A decimal fraction may be wrong by rounding in double precision.
    """
    # Only where a fraction is expected: a count must be exact.
    if isinstance(expected, float) and isinstance(result, int | float):
        # The absolute tolerance is for results that should be 0.
        close = math.isclose(result, expected, rel_tol=1e-9, abs_tol=1e-12)
        return close or (math.isnan(result) and math.isnan(expected))
    if isinstance(expected, list) and isinstance(result, list):
        return len(result) == len(expected) and all(map(same_result, result, expected))
    if isinstance(expected, dict) and isinstance(result, dict):
        if result.keys() != expected.keys():
            return False
        return all(same_result(result[key], expected[key]) for key in expected)
    return bool(result == expected)


def opened(value: Any) -> Any:
    """Return what JSON text, or the text of a Python list or dict, holds.

    Other values are returned as they are.
    """
    if not isinstance(value, str):
        return value
    stripped = value.strip()
    # A data frame writes a missing value so.
    if stripped in ("null", "None", "nan", "NaN"):
        return []
    # A number stays text: input is text, and "007" is not 7.
    if stripped[:1] not in ("{", "[", '"'):
        return value
    # JSON first: in both languages most texts mean the same, but true and null are only JSON.
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(stripped)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return value


def unpacked(value: Any) -> Any:
    """Return a column as a list or object.

    It is JSON text, or JSON text in a pickled string that is compressed and in base64.
    LiveCodeBench packs its hidden tests like that.
    """
    inner = opened(value)
    if not isinstance(inner, str) or not inner.strip():
        return inner
    try:
        # Unpacked in one call with a limit, so that a small text cannot fill the memory.
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(inner, validate=True), _UNPACKED_MAX)
        # The limit was reached and something is left: no data set has tests of this size.
        if unpacker.unconsumed_tail:
            raise unreadable(
                f"they have more than {_UNPACKED_MAX >> 20} MiB when they are unpacked"
            )
        return json.loads(_only_string(content))
    except (ValueError, zlib.error) as error:
        raise unreadable(f"they cannot be unpacked ({error})") from None


def _only_string(content: bytes) -> str:
    """Return the text in a pickle that holds one string and nothing else.

    The operations of the pickle are listed and not executed. No pickle is ever loaded, because that
    would run any code.
    """
    found: list[str] = []
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"):
            found.append(str(argument))
        elif operation.name not in _HARMLESS:
            # For example GLOBAL or REDUCE, which name and call a function.
            raise ValueError(f"the pickle does more than hold a string ({operation.name})")
    if len(found) != 1:
        raise ValueError(f"the pickle holds {len(found)} strings")
    return found[0]


def unreadable(what: str) -> DataError:
    remedy = "write the tests in one of the forms of docs/tasks.md"
    return DataError(
        f"the tests of a problem cannot be used: {what}", where="the prompt's answer", remedy=remedy
    )
