"""The plan of a configuration on a node: stage by stage memory, operations, hours, and whether it
fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lopd.config import Config, TrainSection
from lopd.megatron.weights.architecture import layout_problems, scorer_problems
from lopd.planning.assumptions import Assumptions
from lopd.planning.disk import disk_bytes
from lopd.planning.hardware import Node
from lopd.planning.hours import (
    Amounts,
    Work,
    baseline_steps,
    sampling_work,
    scoring_work,
    sync_work,
    training_work,
)
from lopd.planning.memory import (
    AWAY,
    SIZES,
    Data,
    MemoryUse,
    forward_memory,
    in_turns,
    server_memory,
    trainer_memory,
)
from lopd.planning.models import PlannedModel, teacher_roles
from lopd.planning.parameters import (
    CountJob,
    StageParameters,
    count_parameters,
    parameters_by_formula,
    total_and_active,
)

STAGES = ("demonstrate", "sft", "rollout", "score", "distill", "evaluate")
LIGHTNING = ("rollout", "score", "distill")  # what the paper's GPU hours count
TRAINED = ("sft", "distill")
TIGHT = 0.92  # of a GPU: above it, what a plan cannot know may break it


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a stage does not fit: the largest term of what is over the limit, in words."""

    stage: str
    what: str


@dataclass(frozen=True)
class Plan:
    config: Config
    node: Node
    models: Mapping[str, PlannedModel]
    assumed: Assumptions
    amounts: Amounts
    total: int  # parameters of the student
    active: int
    per_rank: Mapping[str, list[StageParameters]]  # sft, distill: of a rank, by pipeline stage
    memory: Mapping[str, MemoryUse]
    work: Mapping[str, Work]
    syncs: Work  # the part of distill's that is weight syncs and the evaluations after them
    disk: Mapping[str, float]
    problems: list[Problem] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def tight(self) -> list[str]:
        """Trainings that fit, but barely. A server's memory is what mem_fraction says, and needs no
        such margin.
        """
        limit = self.node.gpu.memory
        return [
            stage for stage in self.trained if TIGHT * limit < self.memory[stage].gpu_total <= limit
        ]

    @property
    def trained(self) -> list[str]:
        """The trainings of this run: no sft where its student is given."""
        return [stage for stage in TRAINED if stage in self.memory]

    @property
    def teacher_total(self) -> int:
        """Parameters of the teacher."""
        return total_and_active(self.models["teacher"].arch)[0]

    def gpu_hours(self, stage: str) -> float:
        """The whole node is held while a stage runs, or as many nodes as a training has."""
        nodes = getattr(self.config, stage).parallel.nodes if stage in TRAINED else 1
        return float(self.work[stage].seconds * self.node.num_gpus * nodes / 3600)


def make_plan(
    config: Config,
    models: Mapping[str, PlannedModel],
    node: Node,
    assumed: Assumptions,
    *,
    build: bool = True,
    cohost: bool = False,
) -> Plan:
    """build: count parameters on the model as Megatron-Core makes it (seconds); without, by the
    formula that a test holds to it.

    cohost: as standard OPD has it, teacher and student are served live beside the trainer.
    ConfigError: a layout does not divide the student.
    """
    student = models["student"].arch
    for name in (stage for stage in TRAINED if stage not in given_stages(config)):
        for problem in layout_problems(
            student, getattr(config, name).parallel, where=f"{name}.parallel"
        ):
            raise problem
    if config.score.engine == "megatron" and "score" not in given_stages(config):
        for role in teacher_roles(models):
            for problem in scorer_problems(config.score, models[role].arch):
                raise problem
    per_rank, (total, active) = _count(config, models, build), total_and_active(student)
    amounts = Amounts.of(config, assumed)
    memory = _memory(config, models, per_rank, node, assumed, amounts, cohost=cohost)
    work = _work(config, models, node, assumed, amounts, total)
    syncs = _syncs(config, models, node, assumed, amounts, memory["distill"])
    work["distill"] += syncs
    disk = disk_bytes(config, total, amounts, assumed)
    problems = _problems(config, memory, disk, node)
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
        work,
        syncs,
        disk,
        problems,
    )


def given_stages(config: Config) -> set[str]:
    """What this run does not make, because the configuration names it (lopd.pipeline leaves out the
    same).
    """
    given = {"demonstrate"} if config.sft.demonstrations is not None else set()
    if config.sft.checkpoint is not None:
        given |= {"demonstrate", "sft"}
    return given | {"rollout", "score"} if config.distill.cache is not None else given


def _count(
    config: Config, models: Mapping[str, PlannedModel], build: bool
) -> dict[str, list[StageParameters]]:
    student = models["student"].arch
    # context ranks hold the same parameters, and build only where Transformer Engine is
    layouts = {
        name: getattr(config, name).parallel.model_copy(update={"context": 1})
        for name in TRAINED
        if name not in given_stages(config)
    }
    if not build:
        return {name: parameters_by_formula(student, layout) for name, layout in layouts.items()}
    counted = count_parameters([CountJob(student, layout) for layout in layouts.values()])
    for layout, found in zip(layouts.values(), counted, strict=True):
        assert found == parameters_by_formula(student, layout), (
            "the formula and Megatron-Core disagree about the parameters of a rank"
        )
    return dict(zip(layouts, counted, strict=True))


# ---- memory ---------------------------------------------------------------------------------------------------------------------------------------


def _memory(
    config: Config,
    models: Mapping[str, PlannedModel],
    per_rank: Mapping[str, list[StageParameters]],
    node: Node,
    assumed: Assumptions,
    amounts: Amounts,
    *,
    cohost: bool,
) -> dict[str, MemoryUse]:
    student = models["student"].arch

    def server(role: str, mean_len: float, scoring: bool = False) -> MemoryUse:
        return _server(config, models[role], node, assumed, amounts.prompt_len + mean_len, scoring)

    def trainer(name: str, responses: float, mean_len: float) -> MemoryUse:
        return trainer_memory(
            student,
            getattr(config, name),
            per_rank[name],
            assumed,
            data=Data(responses, amounts.prompt_len, mean_len),
        )

    def scorer(role: str) -> MemoryUse:
        if config.score.engine == "megatron":
            return forward_memory(models[role].arch, config.score.forward, assumed)
        return server(role, amounts.rollout_len, scoring=True)

    def fullest(uses: Iterable[MemoryUse]) -> MemoryUse:
        return max(
            uses, key=lambda use: (round(use.gpu_total / 2**20), use.gpu["weights"])
        )  # of servers that fill the same share, that of least KV cache

    teachers, made = (
        teacher_roles(models),
        {stage for stage in STAGES if stage not in given_stages(config)},
    )
    demonstrations, rollouts = (
        amounts.sft_prompts * config.demonstrate.samples_per_prompt,
        amounts.opd_prompts * config.rollout.samples_per_prompt,
    )
    ways: dict[str, Callable[[], MemoryUse]] = {
        "demonstrate": lambda: fullest(
            server(role, amounts.demonstration_len) for role in teachers
        ),  # one after the other
        "sft": lambda: trainer("sft", demonstrations, amounts.demonstration_len),
        "rollout": lambda: server("student", amounts.rollout_len),
        "score": lambda: fullest(scorer(role) for role in teachers),
        "distill": lambda: trainer("distill", rollouts, amounts.rollout_len),
        "evaluate": lambda: fullest(
            server(role, amounts.answer_len, scoring=role == "teacher")
            for role in ("teacher", "student")
        ),
    }
    uses = {stage: way() for stage, way in ways.items() if stage in made}
    refresh = config.distill.refresh
    live = ["student"] if config.distill.sync_every > 0 or refresh.is_on or cohost else []
    live += ["teacher"] if refresh.is_on or cohost else []
    served = {
        role: server(role, amounts.rollout_len)
        if role == "student"
        else fullest(server(one, amounts.rollout_len, True) for one in teachers)
        for role in live
    }
    if config.sync.colocate and live and not cohost:
        uses["distill"] = in_turns(
            uses["distill"], served, config.distill, config.sync.bucket_bytes, assumed
        )
        return uses
    for role, beside in served.items():
        uses["distill"] = _beside(uses["distill"], beside, role)
    return uses


def _server(
    config: Config,
    model: PlannedModel,
    node: Node,
    assumed: Assumptions,
    mean_len: float,
    scoring: bool = False,
) -> MemoryUse:
    return server_memory(
        model.arch,
        total_and_active(model.arch)[0],
        config.sglang,
        node,
        assumed,
        mean_len=mean_len,
        scoring=scoring,
    )


def _beside(trainer: MemoryUse, server: MemoryUse, role: str) -> MemoryUse:
    """A server on the trainer's GPUs."""
    gpu = {
        **trainer.gpu,
        **{f"{role}'s server: {term}": value for term, value in server.gpu.items()},
    }
    return MemoryUse(
        gpu,
        {**trainer.host, f"{role}'s server": server.host_total},
        {**trainer.figures, **server.figures},
    )


# ---- time -----------------------------------------------------------------------------------------------------------------------------------------


def _work(
    config: Config,
    models: Mapping[str, PlannedModel],
    node: Node,
    assumed: Assumptions,
    amounts: Amounts,
    total: int,
) -> dict[str, Work]:
    student, teachers = models["student"].arch, teacher_roles(models)
    sizes = {role: total_and_active(model.arch)[0] for role, model in models.items()}
    demonstrations = amounts.sft_prompts * config.demonstrate.samples_per_prompt
    rollouts = amounts.opd_prompts * config.rollout.samples_per_prompt
    answers = amounts.eval_prompts * config.evaluate.samples_per_prompt

    def sample(role: str, responses: float, mean_len: float) -> Work:
        server = _server(config, models[role], node, assumed, amounts.prompt_len + mean_len)
        return sampling_work(
            models[role].arch,
            sizes[role],
            config,
            server,
            node,
            assumed,
            responses=responses,
            mean_len=mean_len,
        )

    def train(settings: TrainSection, num_steps: float, response_len: float) -> Work:
        length = amounts.prompt_len + response_len
        return training_work(
            student,
            settings,
            node,
            assumed,
            num_steps=num_steps,
            sequence_len=length,
            parameters=total,
        )

    served_ranks = config.sglang.tensor * config.sglang.data * config.sglang.replicas

    def score(
        responses: float, mean_len: float, ranks: int = served_ranks, role: str = "teacher"
    ) -> Work:
        return scoring_work(
            models[role].arch, ranks, node, assumed, responses=responses, mean_len=mean_len
        )

    scoring_ranks = (
        config.score.forward.parallel.ranks if config.score.engine == "megatron" else served_ranks
    )
    none, share = (
        Work(0, 0, 0, 0),
        1 / len(teachers),
    )  # prompts files are not read: every teacher is taken to have as many
    work = {
        "demonstrate": sum(
            (sample(role, share * demonstrations, amounts.demonstration_len) for role in teachers),
            none,
        ),
        "sft": train(config.sft, config.sft.num_steps, amounts.demonstration_len),
        "rollout": sample("student", rollouts, amounts.rollout_len),
        "score": sum(
            (
                score(share * rollouts, amounts.rollout_len, scoring_ranks, role)
                for role in teachers
            ),
            none,
        ),
        "distill": train(config.distill, config.distill.num_steps, amounts.rollout_len),
        "evaluate": sample("teacher", answers, amounts.answer_len),
    }
    work |= dict.fromkeys(given_stages(config), none)
    served = (
        4 if config.evaluate.equal_compute_baseline else 3
    )  # base, SFT, distilled student, and the baseline
    for _ in range(served):
        work["evaluate"] += sample("student", answers, amounts.answer_len) + score(
            amounts.eval_prompts, amounts.answer_len
        )
    if config.evaluate.equal_compute_baseline:
        steps = baseline_steps(
            config, work["distill"].tokens, amounts.prompt_len + amounts.demonstration_len
        )
        work["evaluate"] += train(config.sft, steps, amounts.demonstration_len)
    return work


def _syncs(
    config: Config,
    models: Mapping[str, PlannedModel],
    node: Node,
    assumed: Assumptions,
    amounts: Amounts,
    distill: MemoryUse,
) -> Work:
    """Nothing where no server lives beside distill. distill: its memory, which has what leaves the
    GPUs while a server works.
    """
    if config.distill.sync_every == 0:
        return Work(0, 0, 0, 0)
    student = models["student"].arch
    size = total_and_active(student)[0]
    prompts = min(config.distill.sync_num_prompts, amounts.eval_prompts)
    server = _server(
        config, models["student"], node, assumed, amounts.prompt_len + amounts.answer_len
    )
    about: dict[str, Any] = {"responses": prompts, "mean_len": amounts.answer_len}
    sampled = sampling_work(student, size, config, server, node, assumed, **about)
    away = distill.host.get(AWAY, 0.0) / ranks_of_a_node(config.distill)
    return sync_work(config, size * SIZES[config.sglang.dtype], away, sampled, assumed)


# ---- verdict --------------------------------------------------------------------------------------------------------------------------------------


def _problems(
    config: Config, memory: Mapping[str, MemoryUse], disk: Mapping[str, float], node: Node
) -> list[Problem]:
    found = []
    for stage, use in memory.items():
        wanted = (
            ranks_of_a_node(getattr(config, stage)) if stage in TRAINED else use.figures["gpus"]
        )
        if wanted > node.num_gpus:
            found.append(Problem(stage, f"wants {wanted:.0f} GPUs, the node has {node.num_gpus}"))
        if use.gpu_total > node.gpu.memory:
            term, size = max(use.gpu.items(), key=lambda each: each[1])
            over = f"{use.gpu_total / 2**30:.1f} GiB of a GPU's {node.gpu.memory / 2**30:.1f}"
            found.append(Problem(stage, f"{over}; largest term: {term}, {size / 2**30:.1f} GiB"))
        needed = config.sglang.context_length
        if "kv_tokens" in use.figures and use.figures["kv_tokens"] < needed:
            found.append(
                Problem(
                    stage,
                    f"KV cache for {use.figures['kv_tokens']:,.0f} tokens, one sequence of sglang.context_length needs {needed:,}",
                )
            )
        if use.host_total > node.host_memory:
            term, size = max(use.host.items(), key=lambda each: each[1])
            over = (
                f"{use.host_total / 2**30:.0f} GiB of the machine's {node.host_memory / 2**30:.0f}"
            )
            found.append(Problem(stage, f"{over}; largest term: {term}, {size / 2**30:.0f} GiB"))
    if (needed_disk := sum(disk.values())) > node.disk:
        term, size = max(disk.items(), key=lambda each: each[1])
        found.append(
            Problem(
                "disk",
                f"{needed_disk / 2**40:.2f} TiB of {node.disk / 2**40:.2f}; largest term: {term}, {size / 2**40:.2f} TiB",
            )
        )
    return found


def ranks_of_a_node(settings: TrainSection) -> int:
    return settings.parallel.ranks // settings.parallel.nodes


def as_json(plan: Plan) -> dict[str, Any]:
    """For programs: parameters, fits, memory, gpu_hours, and what they rest on. Bytes, seconds,
    operations.
    """
    hours = {stage: plan.gpu_hours(stage) for stage in plan.work}
    return {
        "node": {"gpu": plan.node.gpu.name, "gpus": plan.node.num_gpus, "gpu_memory": plan.node.gpu.memory, "host_memory": plan.node.host_memory},
        "models": {role: {"name": model.name, "source": model.source} for role, model in plan.models.items()},
        "parameters": {
            "total": plan.total,
            "active": plan.active,
            "per_rank": {name: [stage.total for stage in stages] for name, stages in plan.per_rank.items()},
        },
        "fits": plan.fits,
        "tight": plan.tight,
        "problems": [{"stage": problem.stage, "what": problem.what} for problem in plan.problems],
        "memory": {
            stage: {
                "gpu": dict(use.gpu), "gpu_total": use.gpu_total, "gpu_limit": plan.node.gpu.memory, "fits": use.gpu_total <= plan.node.gpu.memory,
                "host": dict(use.host), "host_total": use.host_total, "turns": dict(use.turns), **use.figures,
            }
            for stage, use in plan.memory.items()
        },
        "disk": {**plan.disk, "total": sum(plan.disk.values())},
        "tokens": {stage: work.tokens for stage, work in plan.work.items()},
        "flops": {stage: work.flops for stage, work in plan.work.items()},
        "seconds": {stage: work.seconds for stage, work in plan.work.items()},
        "mfu": {stage: plan.work[stage].utilisation for stage in plan.trained},
        "sync_seconds": plan.syncs.seconds,
        "gpu_hours": {**hours, "total": sum(hours.values()), "lightning_opd": sum(hours[stage] for stage in LIGHTNING)},
        "assumptions": {name: getattr(plan.assumed, name) for name in plan.assumed.__slots__},
    }  # fmt: skip
