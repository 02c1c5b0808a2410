"""Turns a launch plan into one nemo-run experiment.

    python -I nemo.py PLAN.json RESULT.json [--render FOLDER]

It runs in nemo-run's own environment, by its path, so it imports nothing of ours. --render writes
what would be submitted and submits nothing. That is a batch script for Slurm, a TrainJob for
Kubernetes, a task for SkyPilot, and a command as JSON for the others.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import nemo_run as run
from nemo_run.core.tunnel.client import LocalTunnel

# lopd.launching.plan's records, as they come out of JSON.
Job = dict[str, Any]
Plan = dict[str, Any]
# The id of an experiment that is only rendered. nemo-run's own ids have the time in them, and
# tests compare what is rendered.
EXPERIMENT = "lopd_rendered"


def mounts_of(settings: dict[str, Any]) -> list[str]:
    """Return mounts as OUTSIDE:INSIDE."""
    return [f"{outside}:{inside}" for outside, inside in settings["mounts"].items()]


def after_shares(job: Job, plan: Plan) -> bool:
    """Return whether a job follows workers and makes what they leave out."""
    shares = {other["name"]: other["share"] for other in plan["jobs"]}
    return bool(job["after"]) and all(shares[name] for name in job["after"])


def slurm_executor(job: Job, plan: Plan) -> Any:
    settings = plan["settings"]
    slurm = settings["slurm"]
    # Slurm's format of a time limit is HH:MM:SS.
    hours, minutes = divmod(slurm["minutes"], 60)
    return run.SlurmExecutor(
        account=slurm["account"],
        partition=slurm["partition"],
        time=f"{hours:02d}:{minutes:02d}:00",
        nodes=job["nodes"],
        # One task on each node: lopd starts the ranks of a node itself and watches them.
        # It would start as many copies of lopd otherwise.
        ntasks_per_node=1,
        cpus_per_task=job["cpus"],
        gpus_per_node=job["gpus"] or None,
        array=f"0-{job['workers'] - 1}" if job["workers"] > 1 else None,
        job_name_prefix="lopd.",
        container_image=settings["image"] or None,
        container_mounts=mounts_of(settings),
        # nemo-run writes them into a shell script without quotes.
        env_vars={key: shlex.quote(value) for key, value in settings["env"].items()},
        setup_lines=settings["setup"],
        # Since Slurm 22.05 a step does not inherit this from its job.
        srun_args=[f"--cpus-per-task={job['cpus']}"],
        # A job whose predecessor has failed can never start. Without this it would wait for ever.
        additional_parameters={"kill-on-invalid-dep": "yes", **slurm["extra"]},
        # nemo-run requeues by SLURM_JOB_ID, which for one task of an array is the whole array. One
        # failure would end the other tasks and repeat them.
        retries=settings["retries"] if job["workers"] == 1 else 0,
        dependency_type="afterany" if after_shares(job, plan) else "afterok",
        # Nobody reads the estimated start, which nemo-run would ask the scheduler for.
        poll_estimated_start_time=False,
        # This packager copies no code: the jobs use the environment, or the image, as it is.
        packager=run.Packager(),
        tunnel=LocalTunnel(job_dir=f"{plan['home']}/experiments"),
    )


def kubernetes_executor(job: Job, plan: Plan) -> Any:
    settings = plan["settings"]
    cluster = settings["kubernetes"]
    return run.KubeflowExecutor(
        runtime_ref=cluster["runtime"],
        namespace=cluster["namespace"],
        # On Kubernetes nothing runs without an image. lopd.launching.plan has refused the plan
        # otherwise.
        image=settings["image"],
        # Kubernetes has no arrays of jobs. An array is one job of as many pods, and each pod reads
        # its index from its environment (lopd.launching.place).
        num_nodes=max(job["nodes"], job["workers"]),
        # One process: lopd starts the ranks of a node itself.
        nprocs_per_node=1,
        gpus_per_node=job["gpus"] or None,
        cpu_requests=str(job["cpus"]),
        labels={"app.kubernetes.io/name": "lopd", "app.kubernetes.io/component": job["name"]},
        spec_kwargs=pod_patch(pod_spec(cluster), cluster["pod_field"]),
        env_vars=dict(settings["env"]),
        train_job_basename=f"lopd-{job['name']}",
        packager=run.Packager(),
        retries=settings["retries"],
    )


def pod_spec(cluster: dict[str, Any]) -> dict[str, Any]:
    """Return what the runtime's pods are given besides image and command."""
    return {
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": cluster["claim"]}},
            # Without a volume of its own, /dev/shm of a pod has 64 MiB. NCCL needs more.
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
        "containers": [
            {
                "name": "node",
                "volumeMounts": [
                    {"name": "runs", "mountPath": cluster["mount"]},
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        # The user of the image (docker/).
        "securityContext": {
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "runAsNonRoot": True,
        },
    }


def pod_patch(pod: dict[str, Any], field: str) -> dict[str, Any]:
    """Return the field of a TrainJob's spec that changes its pods.

    A cluster drops fields that its version of Kubeflow Trainer does not know. podTemplateOverrides
    belongs to version 2.1, and it is the only one that nemo-run 0.11.1 writes itself. It cannot say
    as which user the pods run. The image says so then.

    Args:
        pod: The resources and the environment of the pods.
        field: The name of the field: podTemplateOverrides or runtimePatches.
    """
    # Only volumes and containers: this field has no security context.
    if field == "podTemplateOverrides":
        return {
            field: [
                {
                    "targetJobs": [{"name": "node"}],
                    "spec": {key: pod[key] for key in ("volumes", "containers")},
                }
            ]
        }
    jobs = [{"name": "node", "template": {"spec": {"template": {"spec": pod}}}}]
    return {
        field: [
            {
                "manager": "lopd",
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}},
            }
        ]
    }


def docker_executor(job: Job, plan: Plan) -> Any:
    settings = plan["settings"]
    return run.DockerExecutor(
        container_image=settings["image"],
        # -1 gives the container all GPUs of the machine.
        num_gpus=-1 if job["gpus"] else None,
        # NCCL needs more shared memory than the 64 MiB of a container, and pinned memory.
        ipc_mode="host",
        ulimits=["memlock:-1"],
        # The run directory has the same path inside, so that manifests and logs name real files.
        volumes=[*mounts_of(settings), f"{plan['run_dir']}:{plan['run_dir']}"],
        env_vars=dict(settings["env"]),
        packager=run.Packager(),
        additional_kwargs={"security_opt": ["no-new-privileges:true"]},
    )


def skypilot_executor(job: Job, plan: Plan) -> Any:
    settings = plan["settings"]
    sky = settings["skypilot"]
    return run.SkypilotExecutor(
        container_image=f"docker:{settings['image']}",
        infra=sky["infra"],
        gpus=sky["gpu"] if job["gpus"] else None,
        gpus_per_node=job["gpus"] or None,
        cpus=job["cpus"],
        num_nodes=max(job["nodes"], job["workers"]),
        # A name by which a user finds it, and by which the same command finds it again.
        cluster_name=f"lopd-{job['name']}",
        # SkyPilot names the path inside first, unlike the other targets.
        file_mounts={inside: outside for outside, inside in settings["mounts"].items()},
        env_vars=dict(settings["env"]),
        retries=settings["retries"],
        # Each stage has a cluster of its own, which must not cost money after its end.
        autodown=True,
    )


def local_executor(job: Job, plan: Plan) -> Any:
    return run.LocalExecutor(env_vars=dict(plan["settings"]["env"]), packager=run.Packager())


# By the targets of lopd.launching.plan.TARGETS, and so are the renderers below.
EXECUTORS = {
    "slurm": slurm_executor,
    "k8s": kubernetes_executor,
    "docker": docker_executor,
    "skypilot": skypilot_executor,
    "local": local_executor,
}


def script_of(job: Job, target: str) -> Any:
    """Return a job's command as nemo-run takes it, quoted as the target needs it."""
    words = list(job["command"])
    # For these targets nemo-run joins the words to a line of shell without quotes.
    if target in ("slurm", "skypilot", "docker"):
        words = [shlex.quote(word) for word in words]
    # For docker that line stands between double quotes, which docker's client takes apart first.
    if target == "docker":
        words = [word.replace("\\", "\\\\").replace('"', '\\"') for word in words]
    entrypoint, path, *arguments = words
    return run.Script(path=path, args=arguments, entrypoint=entrypoint)


def render(experiment: Any, plan: Plan, folder: Path) -> None:
    """Write what would be submitted, one file for each job.

    Args:
        experiment: nemo-run's experiment, with all jobs added.
        plan: The plan.
        folder: The folder to write the files to.
    """
    # A dry run leaves in each job the request that would be sent.
    experiment.dryrun(log=False, delete_exp_dir=False)
    for job, submitted in zip(plan["jobs"], experiment.jobs, strict=True):
        ending, text = RENDERERS[plan["target"]](job, plan, submitted)
        (folder / f"{job['name']}{ending}").write_text(text, encoding="utf-8")


def render_slurm(job: Job, plan: Plan, submitted: Any) -> tuple[str, str]:
    """Return the ending of the file and the batch script."""
    text = submitted._dryrun_info.request.materialize()
    # The ids of the jobs before are known only when these are submitted. A comment names them.
    condition = "afterany" if after_shares(job, plan) else "afterok"
    dependencies = "".join(f"\n# {condition} {name}" for name in job["after"])
    text = text.replace("# Parameters", f"# Parameters{dependencies}", 1)
    return ".sh", text.rstrip() + "\n"


def render_kubernetes(job: Job, plan: Plan, submitted: Any) -> tuple[str, str]:
    """Return the ending of the file and the TrainJob."""
    body = submitted.executor.get_job_body(f"lopd-{job['name']}", list(job["command"]))
    return ".yaml", as_yaml(job, body)


def render_skypilot(job: Job, plan: Plan, submitted: Any) -> tuple[str, str]:
    """Return the ending of the file and SkyPilot's task."""
    # The table is asked for, because str() of the request fails with SkyPilot 0.14.
    return ".yaml", as_yaml(job, submitted._dryrun_info.request.task.to_yaml_config())


def render_docker(job: Job, plan: Plan, submitted: Any) -> tuple[str, str]:
    """Return the ending of the file and the arguments of docker's client."""
    return ".json", as_json_text({"after": job["after"], **docker_call(submitted)})


def render_local(job: Job, plan: Plan, submitted: Any) -> tuple[str, str]:
    """Return the ending of the job file's name, and the command that runs the file."""
    return ".json", as_json_text({"after": job["after"], "command": job["command"]})


RENDERERS = {
    "slurm": render_slurm,
    "k8s": render_kubernetes,
    "docker": render_docker,
    "skypilot": render_skypilot,
    "local": render_local,
}


def as_yaml(job: Job, table: dict[str, Any]) -> str:
    """Return a table as YAML, with the jobs before as comments."""
    # nemo-run's environment has PyYAML. It is imported here, because only rendering needs it.
    import yaml

    before = "".join(f"# after {name}\n" for name in job["after"])
    text: str = yaml.safe_dump(table, sort_keys=False)
    return before + text


def as_json_text(table: dict[str, Any]) -> str:
    return json.dumps(table, indent=1) + "\n"


def docker_call(submitted: Any) -> dict[str, Any]:
    """Return what docker's client would be asked to run. No docker is asked."""
    asked: dict[str, Any] = {}

    # It stands in for docker's client, and notes what is asked of it.

    # nemo-run asks the client for its networks and its containers.
    class Recorder:
        @property
        def containers(self) -> Recorder:
            return self

        networks = containers

        def create(self, **network: Any) -> None:
            asked["network"] = network["name"]

        def run(self, image: str, command: str, **options: Any) -> None:
            asked.update(
                image=image,
                command=command,
                **{key: value for key, value in options.items() if value},
            )

    # One container for each job, since every job is a command of its own.
    [container] = submitted._dryrun_info.request.containers
    container.run(client=Recorder(), id=EXPERIMENT)
    return asked


def main() -> int:
    """Read a plan, submit or render it, and write the result."""
    # The files are the whole interface: this program runs in nemo-run's environment, without lopd.
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--render", type=Path)
    options = parser.parse_args()
    plan = json.loads(options.plan.read_text(encoding="utf-8"))
    # Without an id of ours, nemo-run makes one from the title and the time.
    rendered = {"id": EXPERIMENT} if options.render is not None else {}
    # nemo-run keeps the state of the experiment under NEMORUN_HOME, which the caller sets.
    with run.Experiment(
        plan["title"],
        log_level="WARN",
        skip_status_at_exit=True,
        enable_goodbye_message=False,
        **rendered,
    ) as experiment:
        for job in plan["jobs"]:
            executor = EXECUTORS[plan["target"]](job, plan)
            experiment.add(
                script_of(job, plan["target"]),
                executor=executor,
                name=job["name"],
                dependencies=list(job["after"]) or None,
                # The logs are files under the run directory. On screen they would mix.
                tail_logs=False,
            )
        if options.render is not None:
            render(experiment, plan, options.render)
        else:
            # These two clusters start one job after the other themselves. For the others nemo-run
            # must stay and wait.
            experiment.run(detach=plan["target"] in ("slurm", "skypilot"))
    jobs = [
        {
            "name": job.id,
            "handle": job.handle,
            "state": str(job.state),
            "log_dir": job.executor.job_dir,
        }
        for job in experiment.jobs
    ]
    result = as_json_text({"experiment": experiment._id, "jobs": jobs})
    options.result.write_text(result, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
