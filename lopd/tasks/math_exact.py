r"""Beside math-verify, which rounds to six decimals: exact numbers are compared exactly.

``1/2^{98}`` is not ``1/2^{99}``. Where a decimal fraction stands on one side, the two may differ
by a millionth of the larger. A set in braces is not a tuple or an interval.
"""

from __future__ import annotations

from typing import Any

from sympy import Eq, Expr, FiniteSet, Float, Interval, Rational, Symbol, Tuple

_DECIMAL = 1e-6  # relative, where one side is a decimal fraction
_EXACT = 1e-30  # relative, of exact numbers that are no fractions, evaluated to 60 digits
_DIGITS = 60
_ORDERED = (Tuple, tuple, Interval)


def contradicts(gold: Any, answer: Any) -> bool:
    """Whether two answers that math-verify takes for equal differ; False where nobody can tell."""
    try:
        return _differ(gold, answer)
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError):
        return False  # what sympy cannot evaluate is left to math-verify


def unlike(gold: Any, answer: Any) -> bool:
    """Whether one is a set where the other is a tuple or an interval, or their members are so."""
    if isinstance(gold, FiniteSet) != isinstance(answer, FiniteSet):
        pair = answer if isinstance(gold, FiniteSet) else gold
        return isinstance(pair, _ORDERED)
    return unlike_members(gold, answer)


def unlike_members(gold: Any, answer: Any) -> bool:
    """The same of the members of both alone."""
    kinds = [sorted(map(_kind, _members(side))) for side in (gold, answer)]
    return kinds[0] != kinds[1] and len(kinds[0]) == len(kinds[1])


def _kind(member: Any) -> str:
    if isinstance(member, FiniteSet):
        return "set"
    return "ordered" if isinstance(member, _ORDERED) else "other"


def _members(side: Any) -> list[Any]:
    if isinstance(side, Interval):
        return [side.start, side.end]
    return list(side.args) if isinstance(side, FiniteSet | Tuple) else []


def _differ(gold: Any, answer: Any) -> bool:
    gold, answer = _value(gold), _value(answer)
    mine, theirs = _members(gold), _members(answer)
    if mine and len(mine) == len(theirs):
        if isinstance(gold, FiniteSet) and isinstance(answer, FiniteSet):
            return not all(any(not _differ(one, other) for other in theirs) for one in mine)
        return any(_differ(one, other) for one, other in zip(mine, theirs, strict=True))
    if not isinstance(gold, Expr) or not isinstance(answer, Expr):
        return False
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    values = {symbol: Rational(7 + 4 * index, 5) for index, symbol in enumerate(symbols)}
    return _numbers_differ(gold.subs(values), answer.subs(values))


def _value(side: Any) -> Any:
    """Of ``x = 2`` the 2."""
    if isinstance(side, Eq) and isinstance(side.lhs, Symbol):
        return side.rhs
    return side


def _numbers_differ(gold: Expr, answer: Expr) -> bool:
    gold, answer = gold.doit(), answer.doit()
    if isinstance(gold, Rational) and isinstance(answer, Rational):
        return bool(gold != answer)
    tolerance = _DECIMAL if gold.has(Float) or answer.has(Float) else _EXACT
    one, other = gold.evalf(_DIGITS), answer.evalf(_DIGITS)
    if not (one.is_number and other.is_number and one.is_finite and other.is_finite):
        return False
    larger = max(abs(one), abs(other))
    if larger < 10 ** -(_DIGITS // 2) and not gold.has(Float) and not answer.has(Float):
        return (gold - answer).equals(0) is False  # digits that cancel leave nothing to divide by
    return bool(abs(one - other) > tolerance * larger)
