"""Knobs of `lopd launch`: where and how the stages run as jobs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lopd.config.base import SPEED_ONLY, Section


class SlurmSection(Section):
    account: str = Field(
        default="default", description="Account that is charged.", json_schema_extra=SPEED_ONLY
    )
    partition: str | None = Field(
        default=None,
        description="Partition. Absent: the cluster's default.",
        json_schema_extra=SPEED_ONLY,
    )
    minutes: int = Field(
        default=1440,
        ge=1,
        description="Time limit of a job; one that reaches it goes on when it is submitted again.",
        json_schema_extra=SPEED_ONLY,
    )
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other option of sbatch, by name.",
        json_schema_extra=SPEED_ONLY,
    )


class KubernetesSection(Section):
    namespace: str = Field(
        default="default", description="Namespace of the jobs.", json_schema_extra=SPEED_ONLY
    )
    runtime: str = Field(
        default="torch-distributed",
        description="ClusterTrainingRuntime of Kubeflow Trainer.",
        json_schema_extra=SPEED_ONLY,
    )
    pod_field: Literal["runtimePatches", "podTemplateOverrides"] = Field(
        default="runtimePatches",
        description="Field of a TrainJob that mounts the volume: runtimePatches (Kubeflow Trainer 2.2 and later) or podTemplateOverrides (2.1).",
        json_schema_extra=SPEED_ONLY,
    )
    claim: str = Field(
        default="lopd",
        description="PersistentVolumeClaim with the config, the models and run.dir, shared by all nodes.",
        json_schema_extra=SPEED_ONLY,
    )
    mount: str = Field(
        default="/runs",
        description="Where that volume is mounted: paths in the config are under it.",
        json_schema_extra=SPEED_ONLY,
    )


class SkypilotSection(Section):
    infra: str | None = Field(
        default=None,
        description="Where: a cloud, cloud/region, or k8s/context. Absent: SkyPilot chooses.",
        json_schema_extra=SPEED_ONLY,
    )
    gpu: str = Field(
        default="H100", description="SkyPilot's name of the GPU.", json_schema_extra=SPEED_ONLY
    )


class LaunchSection(Section):
    """How lopd launch lays the stages out as jobs; none of it changes a result (docs/launch.md)."""

    workers: int = Field(
        default=1,
        ge=1,
        description="Jobs that share the prompts of demonstrate, rollout and score, each with servers of its own.",
        json_schema_extra=SPEED_ONLY,
    )
    device: Literal["gpu", "cpu"] = Field(
        default="gpu",
        description="What jobs ask for: GPUs, or cores alone. With cpu, lopd doctor looks for no GPU, and on a CPU ranks may share cores (a trial).",
        json_schema_extra=SPEED_ONLY,
    )
    retries: int = Field(
        default=2,
        ge=0,
        description="How often a failed job is submitted again by the cluster.",
        json_schema_extra=SPEED_ONLY,
    )
    image: str | None = Field(
        default=None,
        description="Container image of the jobs. Absent: this environment, at the same path on every node.",
        json_schema_extra=SPEED_ONLY,
    )
    mounts: dict[str, str] = Field(
        default_factory=dict,
        description='Container folders: { "/host" = "/container" }.',
        json_schema_extra=SPEED_ONLY,
    )
    env: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables of the jobs.",
        json_schema_extra=SPEED_ONLY,
    )
    setup: str | None = Field(
        default=None,
        description="Shell lines before each Slurm job, for example module load.",
        json_schema_extra=SPEED_ONLY,
    )
    slurm: SlurmSection = Field(default_factory=SlurmSection)
    kubernetes: KubernetesSection = Field(default_factory=KubernetesSection)
    skypilot: SkypilotSection = Field(default_factory=SkypilotSection)
