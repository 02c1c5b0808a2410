#!/usr/bin/env bash
# The value that an MLflow run shows for a metric is not the last one logged: of values with the
# same step and the same millisecond it is the largest. A trainer that logs several losses under
# one step shows its worst one, and of several accuracies its best one. Size: 200 MB on disk.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq mlflow-skinny==3.17.2 sqlalchemy==2.1.9 alembic==1.20.1
cd "$folder"
export MLFLOW_DISABLE_TELEMETRY=true
"$folder/venv/bin/python" -I - 2>log <<'PYTHON' || { cat log >&2; exit 1; }
import sys

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric

client = MlflowClient("sqlite:///runs.db", registry_uri="sqlite:///runs.db")
run = client.create_run(client.create_experiment("one")).info.run_id


def latest(key, *logged):
    for value, step in logged:
        client.log_batch(run, metrics=[Metric(key, value, 1_000, step)])
    return client.get_run(run).data.metrics[key]


print("mlflow", mlflow.__version__)
same_step = latest("loss", (1.0, 5), (9.0, 5), (4.0, 5))
print("logged 1, 9, 4 at step 5 of the same millisecond: the latest is", same_step)
print("expected: 4, the one logged last")
print("seen:", same_step, "the largest")
if same_step != 9.0:
    sys.exit("no longer so")
PYTHON
