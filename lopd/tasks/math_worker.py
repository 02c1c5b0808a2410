"""Are two mathematical answers equal? A worker (lopd.tasks.workers) around math-verify, whose
parsing and simplification may take for ever.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from lopd.tasks.workers import serve


def main() -> None:
    logging.disable(logging.CRITICAL)
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from sympy import Eq

    from lopd.tasks.math_exact import contradicts, unlike, unlike_members
    from lopd.tasks.math_text import is_braced_set

    in_box = [LatexExtractionConfig(boxed_match_priority=0)]
    anywhere = [LatexExtractionConfig(), ExprExtractionConfig()]

    @lru_cache(maxsize=256)
    def gold_of(text: str) -> Any:
        return parse(f"${text}$", anywhere, parsing_timeout=None) or parse(
            text, anywhere, parsing_timeout=None
        )

    sample = parse("\\boxed{7}", in_box, parsing_timeout=None)

    def equal(gold: Any, answer: Any) -> bool:
        return bool(
            verify(gold, answer, timeout_seconds=None)
        )  # the worker's own limit holds; math-verify's would need the alarm for itself

    def compute(job: dict[str, Any]) -> dict[str, Any]:
        gold = gold_of(job["gold"])
        if not gold:
            return {"failed": "gold"}
        if job.get("gold_only"):
            equal(gold, sample)  # what any comparison costs, within the limits of one
            return {}
        answer = parse(f"\\boxed{{{job['answer']}}}", in_box, parsing_timeout=None)
        if not answer:
            return {"failed": "parse"}
        right = equal(gold, answer)
        if right and isinstance(answer[0], Eq) and not answer[0].lhs.free_symbols:
            right = equal(
                gold, [answer[0].lhs]
            )  # math-verify looks at the right side of an equation alone: 205=204 would be right for 204
        if right:
            right = not wrongly_right(gold[0], answer[0], job)
        return {"right": right}

    def wrongly_right(gold: Any, answer: Any, job: dict[str, Any]) -> bool:
        """Whether math-verify is too kind: it rounds, and takes a set for a tuple."""
        texts = (job["gold"], job["answer"])
        braces = any(is_braced_set(text) for text in texts)
        if (unlike if braces else unlike_members)(gold, answer):
            return True
        # 50\% is both 0.5 and 50 (docs/tasks.md), so there is no one number to compare
        return not any("%" in text for text in texts) and contradicts(gold, answer)

    compute(
        {"gold": "\\frac{1}{2}", "answer": "0.5"}
    )  # what is built at the first use is built before the first limit runs
    serve(compute)


if __name__ == "__main__":
    main()
