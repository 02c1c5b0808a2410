"""Turns a launch plan into one nemo-run experiment. Runs in nemo-run's own environment, by path:
imports nothing of ours.

    python -I nemo.py PLAN.json RESULT.json [--render FOLDER]

--render writes what would be submitted (Slurm: batch scripts, Kubernetes: TrainJobs, others:
commands as JSON) and submits nothing.
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

Job = dict[str, Any]
Plan = dict[str, Any]
# id of an experiment that is only rendered: nothing of a clock in what is compared
EXPERIMENT = "lopd_rendered"


def mounts_of(settings: dict[str, Any]) -> list[str]:
    return [f"{outside}:{inside}" for outside, inside in settings["mounts"].items()]


def after_shares(job: Job, plan: Plan) -> bool:
    """Whether the jobs before are workers' parts, for which this job makes up."""
    shares = {other["name"]: other["share"] for other in plan["jobs"]}
    return bool(job["after"]) and all(shares[name] for name in job["after"])


def slurm_executor(job: Job, plan: Plan) -> Any:
    settings, slurm = plan["settings"], plan["settings"]["slurm"]
    hours, minutes = divmod(slurm["minutes"], 60)
    return run.SlurmExecutor(
        account=slurm["account"],
        partition=slurm["partition"],
        time=f"{hours:02d}:{minutes:02d}:00",
        nodes=job["nodes"],
        # lopd starts the ranks of a node itself: it watches them and goes on from the newest
        # checkpoint
        ntasks_per_node=1,
        cpus_per_task=job["cpus"],
        gpus_per_node=job["gpus"] or None,
        array=f"0-{job['workers'] - 1}" if job["workers"] > 1 else None,
        job_name_prefix="lopd.",
        container_image=settings["image"] or None,
        container_mounts=mounts_of(settings),
        env_vars={key: shlex.quote(value) for key, value in settings["env"].items()},
        setup_lines=settings["setup"],
        srun_args=[
            f"--cpus-per-task={job['cpus']}"
        ],  # since Slurm 22.05 a step does not inherit it from its job
        additional_parameters={"kill-on-invalid-dep": "yes", **slurm["extra"]},
        # nemo-run requeues by SLURM_JOB_ID, which for one task of an array is the whole array: a
        # failure would end the other tasks and repeat them
        retries=settings["retries"] if job["workers"] == 1 else 0,
        dependency_type="afterany" if after_shares(job, plan) else "afterok",
        poll_estimated_start_time=False,
        packager=run.Packager(),
        tunnel=LocalTunnel(job_dir=f"{plan['home']}/experiments"),
    )


def kubernetes_executor(job: Job, plan: Plan) -> Any:
    settings, cluster = plan["settings"], plan["settings"]["kubernetes"]
    return run.KubeflowExecutor(
        runtime_ref=cluster["runtime"],
        namespace=cluster["namespace"],
        image=settings["image"],
        num_nodes=max(
            job["nodes"], job["workers"]
        ),  # an array is a job of as many pods; each learns its index from its environment
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
    """What the runtime's pods are given besides image and command."""
    return {
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": cluster["claim"]}},
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
        "securityContext": {
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "runAsNonRoot": True,
        },
    }


def pod_patch(pod: dict[str, Any], field: str) -> dict[str, Any]:
    """The field of a TrainJob's spec that says so. A cluster drops what its version of Kubeflow
    Trainer does not know: podTemplateOverrides, which is all that nemo-run 0.11.1 writes, is 2.1's,
    and cannot say who the pods run as (the image does).
    """
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
        num_gpus=-1 if job["gpus"] else None,
        ipc_mode="host",
        ulimits=["memlock:-1"],
        volumes=[*mounts_of(settings), f"{plan['run_dir']}:{plan['run_dir']}"],
        env_vars=dict(settings["env"]),
        packager=run.Packager(),
        additional_kwargs={"security_opt": ["no-new-privileges:true"]},
    )


def skypilot_executor(job: Job, plan: Plan) -> Any:
    settings, sky = plan["settings"], plan["settings"]["skypilot"]
    return run.SkypilotExecutor(
        container_image=f"docker:{settings['image']}",
        infra=sky["infra"],
        gpus=sky["gpu"] if job["gpus"] else None,
        gpus_per_node=job["gpus"] or None,
        cpus=job["cpus"],
        num_nodes=max(job["nodes"], job["workers"]),
        cluster_name=f"lopd-{job['name']}",
        file_mounts={inside: outside for outside, inside in settings["mounts"].items()},
        env_vars=dict(settings["env"]),
        retries=settings["retries"],
        autodown=True,
    )


def local_executor(job: Job, plan: Plan) -> Any:
    return run.LocalExecutor(env_vars=dict(plan["settings"]["env"]), packager=run.Packager())


EXECUTORS = {
    "slurm": slurm_executor,
    "k8s": kubernetes_executor,
    "docker": docker_executor,
    "skypilot": skypilot_executor,
    "local": local_executor,
}


def script_of(job: Job, target: str) -> Any:
    entrypoint, *arguments = job["command"]
    if target in ("slurm", "skypilot"):  # they join the words to a line of shell without quoting
        entrypoint, *arguments = (shlex.quote(word) for word in job["command"])
    elif (
        target == "docker"
    ):  # to one between double quotes, which docker's client takes apart first
        entrypoint, *arguments = (
            shlex.quote(word).replace("\\", "\\\\").replace('"', '\\"') for word in job["command"]
        )
    return run.Script(path=arguments[0], args=arguments[1:], entrypoint=entrypoint)


def render(experiment: Any, plan: Plan, folder: Path) -> None:
    """Writes what would be submitted, one file a job."""
    import yaml

    experiment.dryrun(log=False, delete_exp_dir=False)
    for job, submitted in zip(plan["jobs"], experiment.jobs, strict=True):
        if plan["target"] == "slurm":
            request = submitted._dryrun_info.request
            text = request.materialize()
            word = (
                "afterany" if after_shares(job, plan) else "afterok"
            )  # their ids are known when they are submitted
            text = text.replace(
                "# Parameters",
                "# Parameters" + "".join(f"\n# {word} {name}" for name in job["after"]),
                1,
            )
            (folder / f"{job['name']}.sh").write_text(text.rstrip() + "\n", encoding="utf-8")
        elif plan["target"] == "k8s":
            body = submitted.executor.get_job_body(f"lopd-{job['name']}", list(job["command"]))
            text = "".join(f"# after {name}\n" for name in job["after"]) + yaml.safe_dump(
                body, sort_keys=False
            )
            (folder / f"{job['name']}.yaml").write_text(text, encoding="utf-8")
        elif plan["target"] == "skypilot":
            text = "".join(f"# after {name}\n" for name in job["after"]) + yaml.safe_dump(
                submitted._dryrun_info.request.task.to_yaml_config(), sort_keys=False
            )  # str() of it fails with SkyPilot 0.14
            (folder / f"{job['name']}.yaml").write_text(text, encoding="utf-8")
        else:
            about = {
                "after": job["after"],
                **(
                    docker_call(submitted)
                    if plan["target"] == "docker"
                    else {"command": job["command"]}
                ),
            }
            (folder / f"{job['name']}.json").write_text(
                json.dumps(about, indent=1) + "\n", encoding="utf-8"
            )


def docker_call(submitted: Any) -> dict[str, Any]:
    """What docker's client would be asked to run; no docker is asked."""
    asked: dict[str, Any] = {}

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

    [container] = submitted._dryrun_info.request.containers
    container.run(client=Recorder(), id=EXPERIMENT)
    return asked


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--render", type=Path)
    options = parser.parse_args()
    plan = json.loads(options.plan.read_text(encoding="utf-8"))
    rendered = {"id": EXPERIMENT} if options.render is not None else {}
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
                tail_logs=False,
            )
        if options.render is not None:
            render(experiment, plan, options.render)
        else:
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
    options.result.write_text(
        json.dumps({"experiment": experiment._id, "jobs": jobs}, indent=1) + "\n", encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
