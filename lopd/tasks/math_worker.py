"""Compares two mathematical answers. This module is the program of a worker (lopd.tasks.workers).

It runs math-verify, whose parsing and simplification may take forever.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from lopd.tasks.workers import serve


def main() -> None:
    """Answer jobs until the input ends.

    A job is ``{"gold": ..., "answer": ...}``, both as LaTeX. The reply is ``{"right": true or
    false}``, or ``{"failed": "gold"}`` or ``{"failed": "parse"}`` for a text that cannot be read.
    With ``"gold_only": true`` the job only finds out whether ``gold`` can be read; the reply is
    then ``{}``.
    """
    # math-verify logs every text that it cannot parse.
    logging.disable(logging.CRITICAL)
    # These take seconds. Only a worker imports them.
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from sympy import Eq

    in_box = [LatexExtractionConfig(boxed_match_priority=0)]
    anywhere = [LatexExtractionConfig(), ExprExtractionConfig()]

    # Many responses answer the same prompt, so its answer is parsed once.
    @lru_cache(maxsize=256)
    def gold_of(text: str) -> Any:
        # As a formula first, because that is what most data sets write without the dollars.
        as_formula = parse(f"${text}$", anywhere, parsing_timeout=None)
        return as_formula or parse(text, anywhere, parsing_timeout=None)

    sample = parse("\\boxed{7}", in_box, parsing_timeout=None)

    def equal(gold: Any, answer: Any) -> bool:
        # math-verify's own timeout would use the alarm signal, which the worker's limit needs.
        return bool(verify(gold, answer, timeout_seconds=None))

    def compute(job: dict[str, Any]) -> dict[str, Any]:
        gold = gold_of(job["gold"])
        if not gold:
            return {"failed": "gold"}
        if job.get("gold_only"):
            # The comparison with a sample costs what any comparison costs, under the same limits.
            equal(gold, sample)
            return {}
        answer = parse(f"\\boxed{{{job['answer']}}}", in_box, parsing_timeout=None)
        if not answer:
            return {"failed": "parse"}
        # math-verify first, then what it accepts too easily.
        right = equal(gold, answer)
        if right and isinstance(answer[0], Eq) and not answer[0].lhs.free_symbols:
            # math-verify looks only at the right side of an equation. Without this, 205=204 would
            # be right for 204.
            right = equal(gold, [answer[0].lhs])
        if right:
            right = not _wrongly_right(gold[0], answer[0], job)
        return {"right": right}

    # What is built at the first use is built here, before the first limit runs.
    compute({"gold": "\\frac{1}{2}", "answer": "0.5"})
    serve(compute)


def _wrongly_right(gold: Any, answer: Any, job: dict[str, Any]) -> bool:
    """Return whether math-verify accepts too much: it rounds, and takes a set for a tuple."""
    from lopd.tasks.math_exact import contradicts, unlike, unlike_members
    from lopd.tasks.math_text import is_braced_set

    texts = (job["gold"], job["answer"])
    # Without written braces the list 3,4 is parsed as a set too. Then only its members count.
    braces = any(is_braced_set(text) for text in texts)
    if (unlike if braces else unlike_members)(gold, answer):
        return True
    # 50\% is both 0.5 and 50 (docs/tasks.md), so there is no one number to compare.
    return not any("%" in text for text in texts) and contradicts(gold, answer)


if __name__ == "__main__":
    main()
