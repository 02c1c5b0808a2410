"""Hands a launch plan to nemo-run in its own environment, and brings the result back.

nemo-run has an environment of its own, so its packages need not fit those of the trainer and the
servers. The two processes exchange JSON files.
"""

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

# The environment variable that names the Python of nemo-run's environment.
PYTHON = "LOPD_LAUNCH_PYTHON"
# Where it is otherwise: beside a checkout, or in the image.
_PLACES = (
    Path(__file__).parents[2] / ".venv-launch/bin/python",
    Path("/opt/launch/bin/python"),
)
# Variables that would lead nemo-run's Python to packages of this environment.
_PYTHON_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def launch_python() -> Path:
    """Return the Python of nemo-run's environment.

    Raises:
        LopdError: There is none.
    """
    named = os.environ.get(PYTHON)
    places = (Path(named),) if named else _PLACES
    # A place that the user names is the only one: a wrong name must not be hidden by another find.
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise LopdError(
            "the Python environment of nemo-run is missing",
            where=" or ".join(map(str, places)),
            remedy=f"run bash requirements/install_launch.sh, or set {PYTHON} to the python of "
            "this environment",
        )
    return found


def launch(plan: LaunchPlan, *, render_to: Path | None = None) -> dict[str, Any]:
    """Submit a plan to a cluster, or run it to its end.

    On local, docker and k8s, nemo-run waits for one job before it starts the next, so this function
    returns at the end of the run. Everything about the launch is under run.dir/launch.

    Args:
        plan: The jobs.
        render_to: A folder. What would be submitted is written there, and nothing is submitted.

    Returns:
        The id of nemo-run's experiment, and for each job its name, handle, state and log_dir.

    Raises:
        LopdError: nemo-run's environment is missing, nemo-run refused the plan, or a job failed.
    """
    python = launch_python()
    if render_to is not None:
        return _render(python, plan, render_to)
    folder = Path(plan.folder)
    # A full or forbidden disk becomes one line.
    with storage_errors(folder):
        _make_folder(folder, plan)
    # The lock file marks the folder as a run's. Without it the jobs would take the files of this
    # launch for those of a stranger, and refuse the folder.
    (Path(plan.run_dir) / ".lock").touch()
    result = _run_nemo(python, plan, folder)
    # What a lost share leaves out, the job after it makes.
    # A share that fails is no failure of the launch.
    shares = {job.name for job in plan.jobs if job.share}
    failed = [
        job["name"]
        for job in result["jobs"]
        if job["name"] not in shares and ("FAILED" in job["state"] or "CANCELLED" in job["state"])
    ]
    if failed:
        raise LopdError(
            f"job {failed[0]} failed (failed jobs: {', '.join(failed)})",
            where=_log_of(result, failed[0]),
            remedy="read the log, then run the same command again: finished work is kept",
        )
    return result


def _render(python: Path, plan: LaunchPlan, folder: Path) -> dict[str, Any]:
    """Write what would be submitted. nemo-run's own files go into a folder that is removed."""
    with storage_errors(folder), tempfile.TemporaryDirectory(prefix="lopd-launch-") as scratch:
        _make_folder(folder, plan)
        return _run_nemo(python, plan, Path(scratch), "--render", str(folder))


def _make_folder(folder: Path, plan: LaunchPlan) -> None:
    """Make the folder of the jobs' scripts.

    If launch.env has what may be a secret, the scripts have it too. The folder is then for its
    owner alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if holds_secret(plan.settings):
        folder.chmod(0o700)


def _run_nemo(python: Path, plan: LaunchPlan, folder: Path, *options: str) -> dict[str, Any]:
    """Run nemo.py, and return its result.

    Args:
        python: The Python of nemo-run's environment.
        plan: The jobs.
        folder: The folder for the files that the two processes exchange.
        options: Options of nemo.py. Without any, the jobs are submitted.
    """
    plan_file = folder / "plan.json"
    result_file = folder / "result.json"
    log = folder / "nemo_run.log"
    # Private, because the plan has launch.env.
    publish_json(plan_file, plan.as_json(), private=True)
    # The folder is the same for every launch of a run. An earlier result must not count for this
    # one.
    result_file.unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if key not in _PYTHON_VARIABLES}
    # Its default is a folder in the user's home, which nodes of a cluster may not share.
    environment["NEMORUN_HOME"] = str(folder / "nemo")
    # Only rendering has options. A real submission needs the user's own cluster.
    if options and plan.target == "k8s":
        environment["KUBECONFIG"] = str(_placeholder_cluster(folder))
    # -I: nemo.py imports nothing of ours, so the folder beside it must not be on its path.
    script = Path(__file__).with_name("nemo.py")
    command = [str(python), "-I", str(script), str(plan_file), str(result_file), *options]
    with log.open("ab") as output:
        # Ctrl-C here must end nemo-run too, with the jobs that it runs on this machine.
        process = GuardedProcess(command, env=environment, output=output)
        try:
            code = process.wait()
        finally:
            process.stop()
    if code != 0 or not result_file.is_file():
        raise LopdError(
            f"nemo-run ended with code {code}: {' | '.join(last_lines(log, 2))[:400]}",
            where=str(log),
            remedy="read the log",
        )
    return cast(dict[str, Any], json.loads(result_file.read_text(encoding="utf-8")))


def _log_of(result: dict[str, Any], name: str) -> str:
    return next(str(job["log_dir"]) for job in result["jobs"] if job["name"] == name)


def _placeholder_cluster(folder: Path) -> Path:
    """Write the address of a cluster that does not exist.

    nemo-run reads an address before it renders a job, but it talks to nobody while it renders.
    """
    # The file must have the form that the Kubernetes client reads, although nothing is asked of a
    # cluster.
    name = "none"
    path = folder / "kubeconfig.json"
    # Port 1 of this machine: nobody listens there.
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
