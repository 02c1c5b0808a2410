"""Values of a row as text: what counts as missing, and how numbers, dates, bytes and lists read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from lopd.errors import DataError
from lopd.tasks.rows import MISSING

# a missing value that a data frame or Python has written as text; "none" may be an answer
MISSING_TEXTS = ("None", "nan", "NaN", "null", "NULL", "<NA>", "NaT")


def is_missing(value: Any) -> bool:
    """None, not a number, blank text, and what holds nothing but such."""
    if value is None or value is MISSING:
        return True
    if isinstance(value, float | Decimal):
        return math.isnan(value)
    if isinstance(value, str | bytes):
        return not value.strip()
    if isinstance(value, list | tuple):
        return all(map(is_missing, value))
    return isinstance(value, Mapping) and not value


def is_no_answer(value: Any) -> bool:
    """Also the text that a missing value leaves: ``None``, ``nan``."""
    if isinstance(value, list | tuple):
        return all(map(is_no_answer, value))
    return is_missing(value) or (isinstance(value, str) and value.strip() in MISSING_TEXTS)


def as_text(value: Any, where: str) -> str:
    """A value as an answer: a list of one is that one, several are a JSON list.

    DataError: bytes that are no UTF-8.
    """
    if isinstance(value, list | tuple) and len(value) == 1 and not isinstance(value[0], dict):
        return as_text(value[0], where)
    if isinstance(value, list | tuple) and not any(isinstance(one, list | dict) for one in value):
        return json.dumps([scalar_text(one, where) for one in value], ensure_ascii=False)
    if isinstance(value, list | tuple | Mapping):

        def plain(inner: Any) -> str:
            return scalar_text(inner, where)

        return json.dumps(value, ensure_ascii=False, default=plain)
    return scalar_text(value, where)


def scalar_text(value: Any, where: str) -> str:
    """One value. A whole number that a column with gaps has turned into 18.0 is 18 again."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            remedy = "give the column as text, or another column in prompts.*.fields"
            what = f"bytes that are no UTF-8 ({error})"
            raise DataError(what, where=where, remedy=remedy) from None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, Decimal) and value.is_finite():
        return f"{value:f}"
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta | str | int | float | Decimal):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def list_in(text: str) -> list[str] | None:
    """The texts of a JSON list of texts; None of anything else, the interval [1, 2] included."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else None
