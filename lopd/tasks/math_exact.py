"""Compares exact numbers exactly. math-verify rounds to six decimals.

``1/2^{98}`` is not ``1/2^{99}``. If one side is a decimal fraction, the two may differ by a
millionth of the larger. A set in braces is not a tuple, and it is not an interval.
"""

from __future__ import annotations

from typing import Any

from sympy import Eq, Expr, FiniteSet, Float, Interval, Rational, Symbol, Tuple

# Relative tolerances: if one side is a decimal fraction; and for exact numbers that are no
# fractions (roots, logarithms), which are evaluated to so many digits.
_DECIMAL = 1e-6
_EXACT = 1e-30
_DIGITS = 60
# Types in which the order of the members counts.
_ORDERED = (Tuple, tuple, Interval)


def contradicts(gold: Any, answer: Any) -> bool:
    """Return whether two answers differ although math-verify takes them for equal.

    It returns False if nobody can tell.
    """
    try:
        return _differ(gold, answer)
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError):
        # sympy cannot evaluate one of them, so the decision of math-verify stands.
        return False


def unlike(gold: Any, answer: Any) -> bool:
    """Return whether one is a set and the other is ordered, or whether their members are so.

    A tuple and an interval are ordered.
    """
    if isinstance(gold, FiniteSet) != isinstance(answer, FiniteSet):
        pair = answer if isinstance(gold, FiniteSet) else gold
        return isinstance(pair, _ORDERED)
    return unlike_members(gold, answer)


def unlike_members(gold: Any, answer: Any) -> bool:
    """Return whether the members of both differ like that.

    The two themselves are not compared.
    """
    # Sorted, because the members of a set have no order.
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
    gold = _value(gold)
    answer = _value(answer)
    mine = _members(gold)
    theirs = _members(answer)
    if mine and len(mine) == len(theirs):
        if isinstance(gold, FiniteSet) and isinstance(answer, FiniteSet):
            # In a set the order does not count: every member needs an equal one on the other side.
            return not all(any(not _differ(one, other) for other in theirs) for one in mine)
        return any(_differ(one, other) for one, other in zip(mine, theirs, strict=True))
    if not isinstance(gold, Expr) or not isinstance(answer, Expr):
        return False
    # Two expressions with variables are compared at one point. The values are fractions without a
    # pattern (7/5, 11/5, ...), so that different expressions rarely agree there.
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    values = {symbol: Rational(7 + 4 * index, 5) for index, symbol in enumerate(symbols)}
    return _numbers_differ(gold.subs(values), answer.subs(values))


def _value(side: Any) -> Any:
    """Return the 2 of ``x = 2``."""
    if isinstance(side, Eq) and isinstance(side.lhs, Symbol):
        return side.rhs
    return side


def _numbers_differ(gold: Expr, answer: Expr) -> bool:
    # doit() computes what is only written down, for example a sum.
    gold = gold.doit()
    answer = answer.doit()
    if isinstance(gold, Rational) and isinstance(answer, Rational):
        return bool(gold != answer)
    # A decimal is rounded by the one who wrote it. An exact form is not.
    tolerance = _DECIMAL if gold.has(Float) or answer.has(Float) else _EXACT
    one = gold.evalf(_DIGITS)
    other = answer.evalf(_DIGITS)
    # Formulas with variables are left to math-verify.
    if not (one.is_number and other.is_number and one.is_finite and other.is_finite):
        return False
    larger = max(abs(one), abs(other))
    if larger < 10 ** -(_DIGITS // 2) and not gold.has(Float) and not answer.has(Float):
        # Both are nearly 0. After so much cancellation the digits mean nothing, so sympy must prove
        # the difference.
        return (gold - answer).equals(0) is False
    return bool(abs(one - other) > tolerance * larger)
