"""What would be submitted to Slurm, Kubernetes and docker: the reviewed files in golden/ against
what nemo-run renders, and against shellcheck and a schema.

LOPD_WRITE_GOLDEN=1 writes them anew (then read the difference). The comparison needs nemo-run's
environment (requirements/install_launch.sh).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from lopd.errors import LopdError
from lopd.launching import Target, launch
from lopd.launching.bridge import launch_python
from tests.launching.test_plan import plan_of

GOLDEN = Path(__file__).with_name("golden")
CASES: dict[str, tuple[Target, list[str]]] = {
    "slurm": ("slurm", []),
    "slurm_without_container": (
        "slurm",
        [
            "launch.image=",
            "launch.device=cpu",
            "launch.setup=module load python",
            "sft.parallel={ranks=2, nodes=2}",
        ],
    ),
    "docker": (
        "docker",
        ["sft.parallel={ranks=8, tensor=4}", "launch.workers=1", 'launch.env={NOTE="two words"}'],
    ),
    "k8s": ("k8s", []),
    "k8s_trainer_2_1": (
        "k8s",
        ["launch.kubernetes.pod_field=podTemplateOverrides", "launch.workers=1"],
    ),
}
# nemo-run's own lines: unquoted words and arrays of its template, and variables that only a
# torchrun of its own would use
NEMO_RUNS_OWN = "SC2034,SC2086,SC2128,SC2206,SC2207"
STRING = {"type": "string", "minLength": 1}


def table(properties: dict[str, Any]) -> dict[str, Any]:
    """Of exactly these fields: a cluster drops what it does not know."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(properties),
        "properties": properties,
    }


def one(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "maxItems": 1, "items": table(properties)}


def nested(keys: tuple[str, ...], inner: dict[str, Any]) -> dict[str, Any]:
    return table({keys[0]: nested(keys[1:], inner)} if keys else inner)


POD: dict[str, Any] = table(
    {
        "volumes": {"type": "array", "items": {"type": "object", "required": ["name"]}},
        "containers": {
            "type": "array",
            "items": table(
                {"name": {"const": "node"}, "volumeMounts": {"type": "array", "minItems": 1}}
            ),
        },
        "securityContext": {
            "type": "object",
            "required": ["runAsNonRoot"],
            "properties": {"runAsNonRoot": {"const": True}},
        },
    }
)
POD_2_1 = table({key: POD["properties"][key] for key in ("volumes", "containers")})
NODE = {"name": {"const": "node"}, "template": nested(("spec", "template"), {"spec": POD})}
# The part of Kubeflow Trainer's TrainJob (trainer.kubeflow.org/v1alpha1) that is used.
TRAIN_JOB: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "trainer.kubeflow.org/v1alpha1"},
        "kind": {"const": "TrainJob"},
        "metadata": {
            "type": "object",
            "required": ["name", "namespace"],
            "properties": {
                "name": {
                    "type": "string",
                    "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
                    "maxLength": 33,
                },
                "namespace": STRING,
            },
        },
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["runtimeRef", "trainer"],
            "properties": {
                "runtimeRef": {"type": "object", "required": ["name"]},
                "trainer": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["numNodes", "image", "command"],
                    "properties": {
                        "numNodes": {"type": "integer", "minimum": 1},
                        "numProcPerNode": {"type": "integer", "minimum": 1},
                        "image": {"type": "string", "pattern": ":(?!latest)"},
                        "command": {"type": "array", "items": STRING},
                        "env": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["name", "value"],
                                "properties": {"value": {"type": "string"}},
                            },
                        },
                        "resourcesPerNode": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {
                                key: {"type": "object", "additionalProperties": STRING}
                                for key in ("limits", "requests")
                            },
                        },
                    },
                },
                "runtimePatches": one(
                    {
                        "manager": {"const": "lopd"},
                        "trainingRuntimeSpec": nested(
                            ("template", "spec"), {"replicatedJobs": one(NODE)}
                        ),
                    }
                ),
                "podTemplateOverrides": one(
                    {"targetJobs": one({"name": {"const": "node"}}), "spec": POD_2_1}
                ),
            },
        },
    },
}


def plan_for(case: str) -> Any:
    target, overrides = CASES[case]
    return plan_of(target, overrides)


@pytest.mark.parametrize("case", CASES)
def test_golden_files(case: str, tmp_path: Path) -> None:
    try:
        launch_python()
    except LopdError as error:
        pytest.skip(str(error))
    launch(plan_for(case), render_to=tmp_path)
    rendered = {
        path.name: path.read_text().replace(sys.executable, "/environment/bin/python")
        for path in tmp_path.iterdir()
    }
    if os.environ.get("LOPD_WRITE_GOLDEN") == "1":
        shutil.rmtree(GOLDEN / case, ignore_errors=True)
        (GOLDEN / case).mkdir(parents=True)
        for name, text in rendered.items():
            (GOLDEN / case / name).write_text(text)
    assert rendered == {path.name: path.read_text() for path in (GOLDEN / case).iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_golden_files_are_of_this_plan(case: str) -> None:
    """Holds without nemo-run too: one file a job, with the job's command, dependencies and size."""
    plan = plan_for(case)
    assert sorted(path.stem for path in (GOLDEN / case).iterdir()) == sorted(
        job.name for job in plan.jobs
    )
    for job in plan.jobs:
        text = next((GOLDEN / case).glob(f"{job.name}.*")).read_text()
        if case == "docker":
            about = json.loads(text)
            assert about["after"] == list(job.after)
            # The command is split as docker's client does it, and then as bash does it.
            [shell, _, line] = shlex.split(about["command"])
            assert (shell, shlex.split(line.partition(" 2>&1")[0])) == ("bash", list(job.command))
            assert ("device_requests" in about) == (job.gpus > 0)
            assert f"{plan.run_dir}:{plan.run_dir}" in about["volumes"]
            continue
        shares = {other.name: other.share for other in plan.jobs}
        word = (
            "after"
            if case.startswith("k8s")
            else "afterany"
            if job.after and all(shares[name] for name in job.after)
            else "afterok"
        )
        assert re.findall(rf"^# {word} (.*)$", text, re.MULTILINE) == list(job.after)
        command = [
            "/environment/bin/python" if word == sys.executable else word for word in job.command
        ]
        if case.startswith("k8s"):
            body = yaml.safe_load(text)
            assert body["spec"]["trainer"]["command"] == command
            assert body["spec"]["trainer"]["numNodes"] == max(job.nodes, job.workers)
        else:
            assert "/shared/math.toml" in text
            assert re.search(
                rf"^srun .* {re.escape(job.stage)} /shared/math.toml", text, re.MULTILINE
            )
            assert f"#SBATCH --nodes={job.nodes}\n" in text
            assert (f"#SBATCH --array=0-{job.workers - 1}\n" in text) == (job.workers > 1)
            assert ("TORCHX_MAX_RETRIES=0\n" in text) == (job.workers > 1), (
                "an array must not be requeued as a whole"
            )
            assert (f"#SBATCH --gpus-per-node={job.gpus}\n" in text) == (job.gpus > 0)


def shellcheck(*files: Path, exclude: str) -> str:
    checker = Path(sys.executable).with_name("shellcheck")
    return subprocess.run(
        [checker, f"--exclude={exclude}", *files], capture_output=True, text=True, check=False
    ).stdout


def test_batch_scripts_pass_shellcheck(tmp_path: Path) -> None:
    files = sorted(GOLDEN.glob("slurm*/*.sh"))
    assert files
    assert shellcheck(*files, exclude=NEMO_RUNS_OWN) == ""
    broken = tmp_path / "broken.sh"
    broken.write_text(files[0].read_text().replace("exitcode=$?", 'exitcode="$?'))
    assert shellcheck(broken, exclude=NEMO_RUNS_OWN) != ""


@pytest.mark.parametrize(
    ("case", "field"), [("k8s", "runtimePatches"), ("k8s_trainer_2_1", "podTemplateOverrides")]
)
def test_train_jobs_follow_the_schema(case: str, field: str) -> None:
    files = sorted((GOLDEN / case).glob("*.yaml"))
    bodies = [yaml.safe_load(path.read_text()) for path in files]
    assert bodies
    for body in bodies:
        jsonschema.validate(body, TRAIN_JOB)
        assert set(body["spec"]) == {"runtimeRef", "trainer", field}, (
            "what mounts the volumes, in the words of this version of the trainer"
        )
    bodies[0]["spec"]["trainer"]["env"] = [{"name": "A", "value": 1}]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bodies[0], TRAIN_JOB)
    bodies[1]["spec"][field][0]["target"] = "node"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bodies[1], TRAIN_JOB)


def test_scripts_of_the_documentation_pass_shellcheck() -> None:
    assert shellcheck(*sorted(Path(__file__).parent.glob("*.sh")), exclude="") == ""
