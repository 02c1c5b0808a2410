"""The plan of a configuration on a node: memory, operations and hours of every stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from lopd.config import Config
from lopd.megatron.weights.architecture import layout_problems, scorer_problems
from lopd.planning.assumptions import Assumptions
from lopd.planning.disk import disk_bytes
from lopd.planning.hardware import Node
from lopd.planning.hours import Amounts, StageTime, prompt_len
from lopd.planning.memory import MemoryUse
from lopd.planning.models import PlannedModel, teacher_roles
from lopd.planning.parameters import (
    CountJob,
    StageParameters,
    count_parameters,
    parameters_by_formula,
    total_and_active,
)
from lopd.planning.stage_memory import StageMemory
from lopd.planning.stage_time import StageTimes
from lopd.planning.stages import TRAINED, given_stages
from lopd.planning.verdict import Problem, find_problems

# Share of a GPU. Above it, what a plan cannot know may make a training fail.
TIGHT = 0.92


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Attributes:
        config: The configuration.
        node: The machine.
        models: The models by role.
        assumed: What cannot be known before the run.
        amounts: Numbers of prompts and lengths of responses.
        total: Parameters of the student.
        active: Parameters of the student that one token meets.
        per_rank: For each training the parameters of a rank, by pipeline stage.
        memory: Memory by stage. A stage whose result is given is not in it.
        times: Time by stage. A stage whose result is given takes none.
        syncs: The part of distill that is weight syncs and the evaluations after them.
        disk: Bytes on disk by what takes them.
        problems: Why the run does not fit. It is empty if the run fits.
        has_gpus: Whether the run is one on GPUs. Without them memory and times mean nothing, and
            only tokens, operations and disk are shown.
    """

    config: Config
    node: Node
    models: Mapping[str, PlannedModel]
    assumed: Assumptions
    amounts: Amounts
    total: int
    active: int
    per_rank: Mapping[str, list[StageParameters]]
    memory: Mapping[str, MemoryUse]
    times: Mapping[str, StageTime]
    syncs: StageTime
    disk: Mapping[str, float]
    problems: list[Problem] = field(default_factory=list)
    has_gpus: bool = True

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def tight(self) -> list[str]:
        """The trainings that fit, but barely."""
        # A server's memory is what mem_fraction says, so it needs no such margin.
        limit = self.node.gpu.memory
        return [
            stage for stage in self.trained if TIGHT * limit < self.memory[stage].gpu_total <= limit
        ]

    @property
    def trained(self) -> list[str]:
        """The trainings of this run. sft is none if its student is given."""
        return [stage for stage in TRAINED if stage in self.memory]

    @property
    def teacher_total(self) -> int:
        """Parameters of the teacher."""
        return total_and_active(self.models["teacher"].arch)[0]

    def gpu_hours(self, stage: str) -> float:
        """Return the GPU hours of a stage, idle GPUs included."""
        # While a stage runs, the whole node is held, or as many nodes as a training has.
        nodes = getattr(self.config, stage).parallel.nodes if stage in TRAINED else 1
        return float(self.times[stage].seconds * self.node.num_gpus * nodes / 3600)


def make_plan(
    config: Config,
    models: Mapping[str, PlannedModel],
    node: Node,
    assumed: Assumptions,
    *,
    build: bool = True,
    cohost: bool = False,
    has_gpus: bool = True,
) -> Plan:
    """Plan a run on a node.

    Args:
        config: The configuration.
        models: The models by role.
        node: The machine.
        assumed: What cannot be known before the run.
        build: Whether to count parameters on the model as Megatron-Core builds it, which takes
            seconds. Otherwise a formula gives them.
        cohost: Whether servers of both models run beside the trainer, as standard OPD needs.
        has_gpus: Whether the run is one on GPUs. Otherwise whether it fits the node is not asked.

    Raises:
        ConfigError: A layout does not divide its model.
    """
    # Everything below divides by the sizes of the layouts, so a wrong one must end here.
    _check_layouts(config, models)
    student = models["student"].arch
    # The table of assumptions then shows the length that is computed with.
    assumed = dataclasses.replace(assumed, prompt_len=prompt_len(config, assumed))
    per_rank = _count(config, models, build=build)
    # The amounts are the same for memory, time and disk.
    amounts = Amounts.of(config, assumed)
    # Memory comes before time, because a server's KV cache limits its batch.
    stage_memory = StageMemory(config, models, node, assumed, amounts, per_rank)
    memory = stage_memory.all_stages(cohost=cohost)
    stage_times = StageTimes(stage_memory)
    times = stage_times.all_stages()
    # The trainer waits while weights are synced and answers are sampled.
    syncs = stage_times.syncs(memory["distill"])
    times["distill"] += syncs
    # These are the published sizes, without the padding of the vocabulary.
    total, active = total_and_active(student)
    # A checkpoint has the whole student, whatever its layout.
    disk = disk_bytes(config, student, amounts, assumed)
    return Plan(
        config,
        node,
        models,
        assumed,
        amounts,
        total,
        active,
        per_rank,
        memory,
        times,
        syncs,
        disk,
        find_problems(config, memory, disk, node) if has_gpus else [],
        has_gpus,
    )


def _check_layouts(config: Config, models: Mapping[str, PlannedModel]) -> None:
    """Raise the first problem of a layout that is used."""
    given = given_stages(config)
    for name in TRAINED:
        if name in given:
            continue
        # Only the first problem: it is raised before anything is computed.
        parallel = getattr(config, name).parallel
        for problem in layout_problems(models["student"].arch, parallel, where=f"{name}.parallel"):
            raise problem
    if config.score.engine == "megatron" and "score" not in given:
        for role in teacher_roles(models):
            for problem in scorer_problems(config.score, models[role].arch):
                raise problem


def _count(
    config: Config, models: Mapping[str, PlannedModel], *, build: bool
) -> dict[str, list[StageParameters]]:
    """Return for each training what a rank of each pipeline stage holds."""
    student = models["student"].arch
    given = given_stages(config)
    # Context ranks hold the same parameters. They can only be built where Transformer Engine is.
    layouts = {
        name: getattr(config, name).parallel.model_copy(update={"context": 1})
        for name in TRAINED
        if name not in given
    }
    # The formula serves the search of layouts and the doctor, which must answer at once.
    if not build:
        return {name: parameters_by_formula(student, layout) for name, layout in layouts.items()}
    counted = count_parameters([CountJob(student, layout) for layout in layouts.values()])
    # The search of layouts trusts the formula, so every real count is a check of it.
    # They can differ only after a change of Megatron-Core, which must not go unnoticed.
    for layout, found in zip(layouts.values(), counted, strict=True):
        assert found == parameters_by_formula(student, layout), (
            "the formula and Megatron-Core disagree about the parameters of a rank"
        )
    # One process has counted for both trainings, since most of its time is imports.
    return dict(zip(layouts, counted, strict=True))
