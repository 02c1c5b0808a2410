"""Time of every stage of a run, in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from lopd.config import Config, ParallelSection, TrainSection
from lopd.planning.hours import (
    NO_TIME,
    StageTime,
    baseline_steps,
    sampling_time,
    scoring_time,
    sync_time,
    training_time,
)
from lopd.planning.memory import SIZES, MemoryUse
from lopd.planning.models import teacher_roles
from lopd.planning.parameters import adapter_parameters, total_and_active
from lopd.planning.servers import PAUSED_TRAINER
from lopd.planning.stage_memory import StageMemory
from lopd.planning.stages import given_stages, ranks_of_a_node


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Computes the time of each stage.

    Attributes:
        memory: Computes the memory of servers, which limits how many requests they serve. It also
            has the configuration, the models and the assumptions.
    """

    memory: StageMemory

    @property
    def config(self) -> Config:
        return self.memory.config

    def all_stages(self) -> dict[str, StageTime]:
        """Return the time of every stage. A stage that this run does not make takes none."""
        config = self.config
        amounts = self.memory.amounts
        times = {
            "demonstrate": self._demonstrate(),
            # Steps times the batch decide, not the number of demonstrations: epochs repeat them.
            "sft": self._train(config.sft, config.sft.num_steps, amounts.demonstration_len),
            # The student samples once per OPD prompt. This is what is done in every step of
            # standard OPD.
            "rollout": self._sample(
                "student",
                amounts.opd_prompts * config.rollout.samples_per_prompt,
                amounts.rollout_len,
            ),
            # Each teacher's responses are read once, forward only.
            "score": self._score(),
            "distill": self._train(config.distill, config.distill.num_steps, amounts.rollout_len),
        }
        # evaluate comes after distill: its baseline trains on as many tokens.
        times["evaluate"] = self._evaluate(times["distill"])
        return times | dict.fromkeys(given_stages(config), NO_TIME)

    def syncs(self, distill: MemoryUse) -> StageTime:
        """Return the time of distill's weight syncs and of the evaluations after them.

        Args:
            distill: The memory use of distill. It says how many bytes the trainer moves off the
                GPUs while a server uses them.
        """
        config = self.config
        amounts = self.memory.amounts
        # Without syncs no server runs beside the trainer, and there is no curve.
        if not config.evaluates_at_syncs:
            return NO_TIME
        # A set with fewer prompts than the knob gives all of them.
        prompts = min(config.distill.sync_num_prompts, amounts.eval_prompts)
        # After a sync the student answers each of a few held-out prompts once.
        evaluation = self._sample("student", prompts, amounts.answer_len)
        weights = self._parameters("student") * SIZES[config.sglang.dtype]
        # The host's term is of all ranks of a machine. Each moves its own part on its own link.
        away = distill.host.get(PAUSED_TRAINER, 0.0) / ranks_of_a_node(config.distill)
        return sync_time(config, weights, away, evaluation, self.memory.assumed)

    def _demonstrate(self) -> StageTime:
        """Return the time of demonstrate: the teachers are served one after the other."""
        teachers = teacher_roles(self.memory.models)
        amounts = self.memory.amounts
        responses = amounts.sft_prompts * self.config.demonstrate.samples_per_prompt
        # Prompt files are not read. Every teacher is taken to have the same number of prompts.
        share = responses / len(teachers)
        parts = [self._sample(role, share, amounts.demonstration_len) for role in teachers]
        return sum(parts, NO_TIME)

    def _score(self) -> StageTime:
        """Return the time of score, likewise."""
        teachers = teacher_roles(self.memory.models)
        amounts = self.memory.amounts
        responses = amounts.opd_prompts * self.config.rollout.samples_per_prompt
        share = responses / len(teachers)
        # All servers of the model score together.
        gpus = self._served_gpus()
        if self.config.score.engine == "megatron":
            # Megatron-Core scores on ranks of its own, without servers.
            gpus = self.config.score.forward.parallel.ranks
        # The teacher's base has the teacher's shape, and scores the same responses.
        if self.config.models.teacher_base is not None:
            teachers = [*teachers, "teacher"]
        parts = [self._forward(role, share, amounts.rollout_len, gpus) for role in teachers]
        return sum(parts, NO_TIME)

    def _evaluate(self, distill: StageTime) -> StageTime:
        """Return the time of evaluate.

        Args:
            distill: The time of distill, whose tokens the baseline of equal compute is given.
        """
        config = self.config
        amounts = self.memory.amounts
        answers = amounts.eval_prompts * config.evaluate.samples_per_prompt
        # The teacher answers too: its accuracy is the line that students are compared with.
        total = self._sample("teacher", answers, amounts.answer_len)
        # Base, SFT and distilled student, and the baseline. The teacher scores one answer of each
        # to each prompt, for the reverse KL.
        students = 4 if config.evaluate.equal_compute_baseline else 3
        for _ in range(students):
            total += self._sample("student", answers, amounts.answer_len)
            total += self._forward(
                "teacher", amounts.eval_prompts, amounts.answer_len, self._served_gpus()
            )
        if config.evaluate.equal_compute_baseline:
            length = amounts.prompt_len + amounts.demonstration_len
            # Equal tokens, not equal steps: demonstrations are longer than rollouts.
            steps = baseline_steps(config, distill.tokens, length)
            total += self._train(config.sft, steps, amounts.demonstration_len)
        return total

    def _sample(self, role: str, responses: float, response_len: float) -> StageTime:
        return sampling_time(
            self.memory.models[role].arch,
            self._parameters(role),
            self.config,
            # The memory of the server decides how many requests run at once.
            self.memory.server(role, response_len),
            self.memory.node,
            self.memory.assumed,
            responses=responses,
            mean_len=response_len,
        )

    def _forward(self, role: str, responses: float, response_len: float, gpus: int) -> StageTime:
        return scoring_time(
            self.memory.models[role].arch,
            gpus,
            self.memory.node,
            self.memory.assumed,
            responses=responses,
            mean_len=response_len,
        )

    def _train(self, settings: TrainSection, num_steps: float, response_len: float) -> StageTime:
        return training_time(
            self.memory.models["student"].arch,
            settings,
            self.memory.node,
            self.memory.assumed,
            num_steps=num_steps,
            # The prompt is computed too, although it carries no loss.
            sequence_len=self.memory.amounts.prompt_len + response_len,
            parameters=self._num_trained(settings),
        )

    def _num_trained(self, settings: TrainSection) -> int:
        if settings.lora.is_on:
            arch = self.memory.models["student"].arch
            return adapter_parameters(arch, ParallelSection(), settings.lora).total
        return self._parameters("student")

    def _parameters(self, role: str) -> int:
        return total_and_active(self.memory.models[role].arch)[0]

    def _served_gpus(self) -> int:
        """Return the number of GPUs of all servers of one model."""
        settings = self.config.sglang
        return settings.tensor * settings.data * settings.replicas
