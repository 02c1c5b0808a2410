"""Hands a launch plan to nemo-run in its own environment, and brings back what became of it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, cast

from lopd.artifacts import publish_json, storage_errors
from lopd.config.secrets import holds_secret
from lopd.errors import LopdError
from lopd.launching.plan import LaunchPlan
from lopd.processes import GuardedProcess, last_lines

PYTHON = "LOPD_LAUNCH_PYTHON"  # environment variable: python of nemo-run's environment
_PLACES = (
    Path(__file__).parents[2] / ".venv-launch/bin/python",
    Path("/opt/launch/bin/python"),
)  # of a checkout, of the image


def launch_python() -> Path:
    """Python of nemo-run's environment. LopdError: there is none."""
    named = os.environ.get(PYTHON)
    places = (Path(named),) if named else _PLACES
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        remedy = f"make it: bash requirements/install_launch.sh, or name its python in {PYTHON}"
        raise LopdError(
            "nemo-run's environment is missing", where=" or ".join(map(str, places)), remedy=remedy
        )
    return found


def launch(plan: LaunchPlan, *, render_to: Path | None = None) -> dict[str, Any]:
    """Submits the plan (on a cluster), or runs it to its end (local, docker, k8s: nemo-run waits
    there for one job to start the next).

    render_to: writes what would be submitted into this folder instead. Returns the experiment's id
    and per job name, handle, state and log_dir. Everything is under run.dir/launch. LopdError: no
    environment, nemo-run refused, or jobs that did not succeed.
    """
    python, folder = launch_python(), Path(plan.folder)
    if render_to is not None:
        with (
            storage_errors(render_to),
            tempfile.TemporaryDirectory(prefix="lopd-launch-") as scratch,
        ):
            _make_folder(render_to, plan)
            return _call(python, plan, Path(scratch), "--render", str(render_to))
    with storage_errors(folder):
        _make_folder(folder, plan)
    (
        Path(plan.run_dir) / ".lock"
    ).touch()  # marks the folder as a run's: the jobs would take this one's files for a stranger's
    result = _call(python, plan, folder)
    made_up = {job.name for job in plan.jobs if job.share}
    failed = [
        job["name"]
        for job in result["jobs"]
        if job["name"] not in made_up and ("FAILED" in job["state"] or "CANCELLED" in job["state"])
    ]
    if failed:
        remedy = "see its log; the same command goes on from what is published"
        raise LopdError(
            f"job {failed[0]} failed (of {len(failed)}: {', '.join(failed)})",
            where=_log_of(result, failed[0]),
            remedy=remedy,
        )
    return result


def _make_folder(folder: Path, plan: LaunchPlan) -> None:
    """For the owner alone where launch.env has what may be a secret: it stands in the scripts of
    the jobs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if holds_secret(plan.settings):
        folder.chmod(0o700)


def _call(python: Path, plan: LaunchPlan, folder: Path, *options: str) -> dict[str, Any]:
    """Runs nemo.py with its files in folder and reads what it leaves."""
    plan_file, result_file, log = (
        folder / "plan.json",
        folder / "result.json",
        folder / "nemo_run.log",
    )
    publish_json(plan_file, plan.as_json(), private=True)  # it has launch.env
    result_file.unlink(missing_ok=True)
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    environment["NEMORUN_HOME"] = str(folder / "nemo")
    if options and plan.target == "k8s":
        environment["KUBECONFIG"] = str(_placeholder_cluster(folder))
    command = [
        str(python),
        "-I",
        str(Path(__file__).with_name("nemo.py")),
        str(plan_file),
        str(result_file),
    ]
    with log.open("ab") as output:
        process = GuardedProcess([*command, *options], env=environment, output=output)
        try:
            code = process.wait()
        finally:
            process.stop()
    if code != 0 or not result_file.is_file():
        raise LopdError(
            f"nemo-run ended with code {code}: {' | '.join(last_lines(log, 2))[:400]}",
            where=str(log),
            remedy="see the log",
        )
    return cast(dict[str, Any], json.loads(result_file.read_text(encoding="utf-8")))


def _log_of(result: dict[str, Any], name: str) -> str:
    return next(str(job["log_dir"]) for job in result["jobs"] if job["name"] == name)


def _placeholder_cluster(folder: Path) -> Path:
    """nemo-run reads a cluster's address before it renders a job for it; rendering talks to nobody."""
    name, path = "none", folder / "kubeconfig.json"
    cluster = {"name": name, "cluster": {"server": "https://127.0.0.1:1"}}
    context = {"name": name, "context": {"cluster": name, "user": name}}
    about = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name,
        "clusters": [cluster],
        "contexts": [context],
        "users": [{"name": name, "user": {}}],
    }
    publish_json(path, about)
    return path
