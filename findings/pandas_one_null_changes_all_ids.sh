#!/usr/bin/env bash
# One null in one list of integers makes pandas read the lists of all other rows as float64 too,
# from other row groups of the Parquet file as well, and then integers above 2^53 come back
# as other integers. A cache keyed by 64-bit hashes no longer finds its rows.
# Size: 430 MB on disk.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq pandas==3.1.1 pyarrow==26.0.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -I - <<'PYTHON'
import sys

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

print("pandas", pd.__version__, "pyarrow", pa.__version__)
HASH = 9007199254740993


def read(rows):
    """The first row's list, from a file with a row group for each row."""
    table = pa.table({"keys": pa.array(rows, type=pa.list_(pa.int64()))})
    pq.write_table(table, "keys.parquet", row_group_size=1)
    return pd.read_parquet("keys.parquet")["keys"][0]


without = read([[HASH], [1, 2]])
with_null = read([[HASH], [1, None]])
print(f"written in row 0: {HASH}")
print(f"read, no null in the file:     {int(without[0])} ({without.dtype})")
print(f"read, a null in another row:   {int(with_null[0])} ({with_null.dtype})")
print("expected: row 0 is int64 in both files, since it has no null; the other row may be float64")
print("seen: row 0 is float64, and its integer another one, for a null that it does not have")
if str(without.dtype) != "int64" or int(without[0]) != HASH:
    sys.exit("no longer so: the file without a null is read otherwise")
if str(with_null.dtype) != "float64" or int(with_null[0]) == HASH:
    sys.exit("no longer so: the integer is kept")
PYTHON
