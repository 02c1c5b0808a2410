"""The cache of teacher log-probabilities, and the responses before it.

docs/cache_format.md is the specification. This package is one implementation of it.

The pipeline uses:

    table.py             records as rows of Parquet, and back
    columns.py           columns as numpy arrays, and back
    half_precision.py    log-probabilities in 16 bits
    reader.py            any row by its index, in bounded memory
    teachers.py          which teachers a cache has

What is done to a finished cache, and which no stage needs:

    checks.py            is the cache what it says it is? row_checks.py has the rules for rows
    statistics.py        the statistics of a cache
    regime.py            how far the teacher is from the student that wrote the responses
    recommendation.py    which loss suits that
    merging.py           one cache from several
    splitting.py         several caches from one, by prompt
    reference_import.py  a cache from the file of the paper's code
    reference_export.py  the file of the paper's code from a cache
    verdicts.py          the verdicts of a verifier beside a cache
    residualise.py       the correction of a foreign teacher's style (Lightning OPD 2.0)
    style.py             the statistics of that correction
"""

from lopd.cache.columns import column_bytes
from lopd.cache.half_precision import halve, logprob_loss
from lopd.cache.table import from_table, read_rows, scored_rows, to_table, write_responses

__all__ = [
    "column_bytes",
    "from_table",
    "halve",
    "logprob_loss",
    "read_rows",
    "scored_rows",
    "to_table",
    "write_responses",
]
