"""The cache of teacher log-probabilities, and the responses before it: docs/cache_format.md is the
specification, this package one implementation.

table.py: records as Parquet rows and back, which the pipeline uses. reader.py: any row by its
index, in bounded memory. What is done to a finished cache, and which no stage needs: checks.py,
statistics.py, tools.py (merge, split, export, import), style.py and residualise.py (Lightning OPD
2.0).
"""

from lopd.cache.table import (
    column_bytes,
    from_table,
    halve,
    logprob_loss,
    read_rows,
    scored_rows,
    to_table,
    write_responses,
)

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
