"""The table of benchmarks/refresh.py: of one seed the figures with their errors, of several their
means and each; made-up figures.
"""

from __future__ import annotations

from typing import Any

from benchmarks.refresh import table


def figures(accuracy: float, tokens: int) -> dict[str, Any]:
    return {
        "accuracy": {"distilled": accuracy},
        "accuracy_standard_error": 0.005,
        "reverse_kl": {"distilled": 0.001},
        "reverse_kl_standard_error": 0.0002,
        "effective_sample_share": [1.0, 0.64, 0.97],
        "distill_seconds": 151.6,
        "distill_load": 7.5,
        "teacher": {"refreshes": 3, "tokens": tokens},
    }


def test_one_seed_has_its_errors_and_several_their_mean_and_each() -> None:
    one = table({"lightning": [figures(0.969, 151_818)]}).splitlines()
    assert one[2] == (
        "| never (Lightning OPD) | 3 | 96.9 ± 0.5 | 0.0010 ± 0.0002 | 0.64 | 152 (7.5) | 151,818 |"
    )
    (several,) = table({"every10": [figures(0.96, 300_000), figures(0.98, 302_000)]}).splitlines()[
        2:
    ]
    assert several.startswith(
        "| every 10 steps | 3/3 | 97.0 (96.0, 98.0) | 0.0010 (0.0010, 0.0010) | 0.64 (0.64, 0.64) |"
    )
    assert several.endswith("| 152 (7.5) / 152 (7.5) | 301,000 (300,000, 302,000) |")
    assert len(one[0].split("|")) == len(one[1].split("|")) == len(several.split("|")), (
        "as many cells as titles"
    )
