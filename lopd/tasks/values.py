"""Turns values of a row into text.

It defines what counts as missing, and how numbers, dates, bytes and lists read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from lopd.errors import DataError
from lopd.tasks.rows import MISSING

# A missing value that a data frame or Python has written as text. In small letters "none" may be an
# answer, so it is not here.
MISSING_TEXTS = ("None", "nan", "NaN", "null", "NULL", "<NA>", "NaT")


def is_missing(value: Any) -> bool:
    """Return whether a value is None, not a number, or blank text, or holds nothing else."""
    if value is None or value is MISSING:
        return True
    # A Decimal can be not-a-number too.
    if isinstance(value, float | Decimal):
        return math.isnan(value)
    if isinstance(value, str | bytes):
        return not value.strip()
    if isinstance(value, list | tuple):
        return all(map(is_missing, value))
    # An empty object.
    return isinstance(value, Mapping) and not value


def is_no_answer(value: Any) -> bool:
    """Return whether a value is missing, or is the text of a missing value (``None``, ``nan``)."""
    if isinstance(value, list | tuple):
        return all(map(is_no_answer, value))
    return is_missing(value) or (isinstance(value, str) and value.strip() in MISSING_TEXTS)


def as_text(value: Any, where: str) -> str:
    """Return a value as an answer.

    A list of one value is that value. A longer list becomes a JSON list of texts.

    Raises:
        DataError: The value has bytes that are not UTF-8.
    """
    if isinstance(value, list | tuple) and len(value) == 1 and not isinstance(value[0], dict):
        return as_text(value[0], where)
    if isinstance(value, list | tuple) and not any(isinstance(one, list | dict) for one in value):
        return json.dumps([scalar_text(one, where) for one in value], ensure_ascii=False)
    # Nested values stay JSON, for example the tests of a code problem.
    if isinstance(value, list | tuple | Mapping):

        def plain(inner: Any) -> str:
            return scalar_text(inner, where)

        return json.dumps(value, ensure_ascii=False, default=plain)
    return scalar_text(value, where)


def scalar_text(value: Any, where: str) -> str:
    """Return one value as text.

    A whole number that a column with gaps has turned into 18.0 is "18" again.
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            remedy = "store the column as text, or choose another column with prompts.*.fields"
            what = f"the column has bytes that are not UTF-8 text ({error})"
            raise DataError(what, where=where, remedy=remedy) from None
    # Before the numbers, because in Python a bool is an int.
    if isinstance(value, bool):
        return "true" if value else "false"
    # Up to 2^53 a float holds every whole number exactly.
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    # Without an exponent: str() would write 1E+2.
    if isinstance(value, Decimal) and value.is_finite():
        return f"{value:f}"
    # In ISO form, as a user would write it. A datetime is a date too.
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta | str | int | float | Decimal):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def list_in(text: str) -> list[str] | None:
    """Return the texts of a JSON list of texts.

    Returns:
        None for anything else, also for the interval [1, 2].
    """
    # Most answers are no list, and this test is far cheaper than a parser.
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else None
