"""Can these responses have come from this teacher? statistics.py: from scores and entropies.
scores.py: where these come from.
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
