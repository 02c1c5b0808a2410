"""Knobs of `lopd launch`: where and how the stages run as jobs (docs/launch.md)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lopd.config.base import SPEED_ONLY, Section


class SlurmSection(Section):
    """The table [launch.slurm]: jobs of a Slurm cluster."""

    # nemo-run demands one, also where a cluster has none.
    account: str = Field(
        default="default",
        description="The account that pays for the jobs.",
        json_schema_extra=SPEED_ONLY,
    )

    # Names of partitions are those of one cluster, so there is no default that fits two.
    partition: str | None = Field(
        default=None,
        description="The partition of the jobs. If absent, it is the cluster's default.",
        json_schema_extra=SPEED_ONLY,
    )

    # A day. Clusters end longer jobs, and a stage resumes where it was.
    minutes: int = Field(
        default=1440,
        ge=1,
        description=(
            "The time limit of a job, in minutes. A job that reaches it resumes when it is "
            "submitted again."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # For example { qos = "high" }.
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other option of sbatch, by its name.",
        json_schema_extra=SPEED_ONLY,
    )


class KubernetesSection(Section):
    """The table [launch.kubernetes]: jobs of Kubeflow Trainer."""

    namespace: str = Field(
        default="default",
        description="The namespace of the jobs.",
        json_schema_extra=SPEED_ONLY,
    )

    # The one that Kubeflow Trainer installs for torch.
    runtime: str = Field(
        default="torch-distributed",
        description="The name of a ClusterTrainingRuntime of Kubeflow Trainer.",
        json_schema_extra=SPEED_ONLY,
    )

    # Kubeflow Trainer has renamed the field.
    pod_field: Literal["runtimePatches", "podTemplateOverrides"] = Field(
        default="runtimePatches",
        description=(
            "The field of a TrainJob that mounts the volume: runtimePatches in Kubeflow Trainer "
            "2.2 and later, podTemplateOverrides in 2.1."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # All nodes must see the same files under the same paths, so one volume holds everything.

    claim: str = Field(
        default="lopd",
        description=(
            "The PersistentVolumeClaim that all nodes share. It holds the config, the models and "
            "run.dir."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # The same path in every job, because manifests and the configuration name paths.
    mount: str = Field(
        default="/runs",
        description="The folder where that volume is mounted. The config's paths are below it.",
        json_schema_extra=SPEED_ONLY,
    )


class SkypilotSection(Section):
    """The table [launch.skypilot]: jobs of SkyPilot."""

    infra: str | None = Field(
        default=None,
        description=(
            "Where the jobs run: a cloud, cloud/region, or k8s/context. "
            "If absent, SkyPilot chooses."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # SkyPilot chooses machines by their GPU.
    gpu: str = Field(
        default="H100",
        description="The GPU of the jobs, by SkyPilot's name.",
        json_schema_extra=SPEED_ONLY,
    )


class LaunchSection(Section):
    """The table [launch]: how the stages become jobs. It changes no result (docs/launch.md)."""

    # Only these three stages can be shared: each prompt is a piece of work of its own.
    workers: int = Field(
        default=1,
        ge=1,
        description=(
            "The number of jobs that share the prompts of demonstrate, rollout and score. "
            "Each has its own servers."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # The cpu is for a trial of the whole chain of jobs without GPUs.
    device: Literal["gpu", "cpu"] = Field(
        default="gpu",
        description=(
            "What a job asks for: gpu, or cpu for cores alone. With cpu, lopd doctor looks for no "
            "GPU, lopd plan estimates no hours, and ranks may share cores, which suits a trial."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # A failed job resumes from the newest checkpoint, so a repetition costs little.
    retries: int = Field(
        default=2,
        ge=0,
        description="How often the cluster submits a failed job again. 0 means never.",
        json_schema_extra=SPEED_ONLY,
    )

    # The environment inside a job.

    image: str | None = Field(
        default=None,
        description=(
            "The container image of the jobs. If absent, they use this environment, which must "
            "be at the same path on every node."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    mounts: dict[str, str] = Field(
        default_factory=dict,
        description='The folders that a container sees: { "/host" = "/container" }.',
        json_schema_extra=SPEED_ONLY,
    )

    # Values of secrets do not belong here: they would stand in the scripts of the jobs.
    env: dict[str, str] = Field(
        default_factory=dict,
        description="The environment variables of the jobs.",
        json_schema_extra=SPEED_ONLY,
    )

    # Clusters make compilers and drivers visible by modules, which a job has to load.
    setup: str | None = Field(
        default=None,
        description="Shell lines that run before each Slurm job, for example module load.",
        json_schema_extra=SPEED_ONLY,
    )

    # The three targets.

    slurm: SlurmSection = Field(default_factory=SlurmSection)
    kubernetes: KubernetesSection = Field(default_factory=KubernetesSection)
    skypilot: SkypilotSection = Field(default_factory=SkypilotSection)
