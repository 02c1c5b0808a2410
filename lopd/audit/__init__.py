"""Can these responses have come from this teacher?

statistics.py  the test, from scores and entropies
scores.py      where scores and entropies come from
parity.py      how far the log-probabilities of two engines differ
"""

from lopd.audit.statistics import (
    Audit,
    Point,
    Scores,
    as_json,
    audit,
    distribution_scores,
    token_kind,
)

__all__ = ["Audit", "Point", "Scores", "as_json", "audit", "distribution_scores", "token_kind"]
