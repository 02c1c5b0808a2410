"""Every numeric limit of the suite that rounding decides is asserted here, so that it is seen.

``within`` and ``close`` say that a difference is small, ``apart`` that a control's is large. Where
the environment variable LOPD_DIFFERENCES names a file, each also appends what it saw as a line of
JSON, from any process: tests/processors runs the suite as several processors would and shows how
far each figure stays from its limit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

FILE = "LOPD_DIFFERENCES"


def within(difference: float, limit: float, name: str = "") -> None:
    """Assert that the difference is at most the limit. A difference that is not a number fails."""
    difference = float(difference)
    _record("limit", name, limit, difference)
    assert difference <= limit, f"{name or 'difference'}: {difference:.3g}; limit: {limit:g}"


def apart(difference: float, least: float, name: str = "") -> None:
    """Assert of a negative control that its difference is at least so large."""
    difference = float(difference)
    _record("control", name, least, difference)
    assert difference >= least, f"{name or 'control'}: {difference:.3g}; at least: {least:g}"


def close(
    actual: Any,
    expected: Any,
    *,
    rel: float = 0.0,
    abs: float = 0.0,
    name: str = "",
) -> None:
    """Assert that all numbers are those expected, but for abs + rel * |expected|.

    actual and expected are numbers, sequences, arrays, tensors or mappings, of the same shape.
    The difference that is recorded is the largest one: relative to what is expected if only rel
    is given, as it is if only abs is given, and otherwise as a share of what is allowed.
    """
    assert rel > 0 or abs > 0, "no limit is given"
    difference = largest_difference(actual, expected, rel=rel, abs=abs)
    within(difference, 1.0 if rel and abs else rel or abs, name)


def largest_difference(actual: Any, expected: Any, *, rel: float, abs: float) -> float:
    """What ``close`` compares with its limit."""
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys()
        actual = [actual[key] for key in expected]
        expected = list(expected.values())
    ours = _numbers(actual)
    theirs = _numbers(expected)
    assert ours.shape == theirs.shape, f"shapes are {ours.shape} and {theirs.shape}"
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.abs(ours - theirs) / (abs + rel * np.abs(theirs))
    share = float(np.where(ours == theirs, 0.0, shares).max(initial=0.0))
    return share if rel and abs else share * (rel or abs)


def _numbers(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def _record(kind: str, name: str, limit: float, difference: float) -> None:
    file = os.environ.get(FILE)
    if not file:
        return
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    row = {"test": test, "name": name, "kind": kind, "limit": limit, "difference": difference}
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, (json.dumps(row) + "\n").encode())  # one write: whole beside other ranks'
    finally:
        os.close(handle)
