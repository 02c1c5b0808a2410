#!/usr/bin/env bash
# polars adds a float32 column with care, but the same column in group_by without: beside a mean
# that is right to the last bit, the sum of the same group is off by 15%. Log-probabilities of a
# corpus are such columns. One thread, so the order of additions is fixed; with more threads the
# error is smaller and depends on their number. Size: 300 MB on disk.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq polars==2.1.0 polars-runtime-32==2.1.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -I - <<'PYTHON'
import os

os.environ["POLARS_MAX_THREADS"] = "1"

import sys

import numpy as np
import polars as pl

COUNT = 1 << 24
values = np.full(COUNT, -0.1, np.float32)
true = values.astype(np.float64).sum()
frame = pl.DataFrame({"teacher": np.zeros(COUNT, np.int32), "logprob": values})
column = pl.col("logprob")
grouped = frame.group_by("teacher").agg(column.sum().alias("sum"), column.mean().alias("mean"))

print("polars", pl.__version__, "numpy", np.__version__)
figures = {
    "sum of the column": frame["logprob"].sum(),
    "sum in group_by": grouped["sum"].item(),
    "mean in group_by, times the count": grouped["mean"].item() * COUNT,
}
errors = {}
for name, figure in figures.items():
    errors[name] = abs(figure / true - 1)
    print(f"{name:34} {figure:15.1f}, relative error {errors[name]:.1e}")
print(f"{COUNT} values in one group; the sum in float64 is {true:.1f}")
print("expected: the same sum with and without a group, and sum / count = mean, to about 1e-6")
print(f"seen: sum and mean of one group contradict each other by {errors['sum in group_by']:.0%}")
if errors["sum of the column"] > 1e-5 or errors["mean in group_by, times the count"] > 1e-5:
    sys.exit("no longer so: the other ways are as far off")
if errors["sum in group_by"] < 1e-2:
    sys.exit("no longer so: the grouped sum is right")
PYTHON
