#!/usr/bin/env bash
# `datasets` in numpy format gives one float64 column two types: a row's value is float64, the same
# value in a slice of rows float32. So data[0]["x"] and data[:1]["x"][0] are different numbers.
# Size: 0.5 GB on disk.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq datasets==5.2.0 pyarrow==26.0.1 numpy==2.4.6 pandas==3.1.1
cd "$folder"
export HF_HOME="$folder/cache" HF_HUB_OFFLINE=1
"$folder/venv/bin/python" -I - <<'PYTHON'
import sys

import datasets
import numpy as np

data = datasets.Dataset.from_dict({"score": [-0.1, -16777217.0]}).with_format("numpy")
print("datasets", datasets.__version__, "numpy", np.__version__)
print("the column's declared type:", data.features["score"].dtype)
same = []
for place in range(2):
    row = data[place]["score"]
    slice_ = data[place : place + 1]["score"]
    same.append(bool(row == slice_[0].item()))
    print(f"row {place}: {row.item()!r} ({row.dtype}), as a slice {slice_[0].item()!r}", end=" ")
    print(f"({slice_.dtype}), equal: {same[-1]}")
print("expected: float64 both ways, as declared; or float32 both ways")
print("seen: float64 for a row, float32 for a slice of the same row")
if row.dtype != np.float64 or slice_.dtype != np.float32:
    sys.exit("no longer so: the types are others")
if any(same):
    sys.exit("no longer so: the numbers are equal")
PYTHON
