"""Memory of every stage of a run. All sizes are bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lopd.config import Config
from lopd.planning.assumptions import Assumptions
from lopd.planning.hardware import Node
from lopd.planning.hours import Amounts
from lopd.planning.memory import Data, MemoryUse, forward_memory, trainer_memory
from lopd.planning.models import PlannedModel, teacher_roles
from lopd.planning.parameters import StageParameters, total_and_active
from lopd.planning.servers import colocated_memory, memory_beside, server_memory
from lopd.planning.stages import planned_stages


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Computes the memory of each stage.

    Attributes:
        config: The configuration.
        models: The models by role.
        node: The machine.
        assumed: Sizes that cannot be known.
        amounts: Numbers of prompts and lengths of responses.
        per_rank: For each training the parameters of a rank, by pipeline stage.
    """

    config: Config
    models: Mapping[str, PlannedModel]
    node: Node
    assumed: Assumptions
    amounts: Amounts
    per_rank: Mapping[str, list[StageParameters]]

    def all_stages(self, *, cohost: bool) -> dict[str, MemoryUse]:
        """Return the memory of every stage that the run makes.

        Args:
            cohost: Whether servers of both models run beside the trainer, as standard OPD needs.
        """
        # First each stage by itself. Only distill may have servers beside it.
        uses = {stage: self._stage_alone(stage) for stage in planned_stages(self.config)}
        # Weight syncs and refreshes need the student's server while training runs.
        servers = self._live_servers(cohost=cohost)
        if not servers:
            return uses
        # Standard OPD asks both models in every step, so they cannot take turns.
        if self.config.sync.colocate and not cohost:
            uses["distill"] = colocated_memory(
                uses["distill"],
                servers,
                self.config.distill,
                self.config.sync.bucket_bytes,
                self.assumed,
            )
            return uses
        # Without turns everything is on the GPUs at once, so the terms add up.
        for role, server in servers.items():
            uses["distill"] = memory_beside(uses["distill"], server, role)
        return uses

    def server(self, role: str, response_len: float, *, scoring: bool = False) -> MemoryUse:
        """Return the memory of a server.

        Args:
            role: The role of the model that is served.
            response_len: Mean tokens of a response.
            scoring: Whether log-probabilities of prompts are asked for.
        """
        arch = self.models[role].arch
        return server_memory(
            arch,
            # All parameters are in memory, also those of experts that a token does not meet.
            total_and_active(arch)[0],
            self.config.sglang,
            self.node,
            self.assumed,
            mean_len=self.amounts.prompt_len + response_len,
            scoring=scoring,
        )

    def _stage_alone(self, stage: str) -> MemoryUse:
        """Return the memory of a stage without servers beside its trainer."""
        config = self.config
        amounts = self.amounts
        if stage == "sft":
            # What a training reads decides its host memory, not its GPU memory.
            responses = amounts.sft_prompts * config.demonstrate.samples_per_prompt
            return self._trainer("sft", responses, amounts.demonstration_len)
        if stage == "distill":
            responses = amounts.opd_prompts * config.rollout.samples_per_prompt
            return self._trainer("distill", responses, amounts.rollout_len)
        # The SFT student has the shape of the base student.
        if stage == "rollout":
            return self.server("student", amounts.rollout_len)
        # Teachers of several domains are served one after the other.
        teachers = teacher_roles(self.models)
        if stage == "demonstrate":
            return _fullest(self.server(role, amounts.demonstration_len) for role in teachers)
        if stage == "score":
            return _fullest(self._scorer(role) for role in teachers)
        # Every stage of STAGES has a branch. A new one must not be taken for evaluate.
        assert stage == "evaluate"
        # The teacher also scores the students' answers, for the reverse KL.
        return _fullest(
            self.server(role, amounts.answer_len, scoring=role == "teacher")
            for role in ("teacher", "student")
        )

    def _trainer(self, name: str, responses: float, response_len: float) -> MemoryUse:
        return trainer_memory(
            self.models["student"].arch,
            getattr(self.config, name),
            self.per_rank[name],
            self.assumed,
            # On a GPU the layers are Transformer Engine's, which is the default of trainer_memory.
            data=Data(responses, self.amounts.prompt_len, response_len),
        )

    def _scorer(self, role: str) -> MemoryUse:
        # Then the teacher is scored by ranks of Megatron-Core, and not by a server.
        if self.config.score.engine == "megatron":
            arch = self.models[role].arch
            return forward_memory(arch, self.config.score.forward, self.assumed)
        return self.server(role, self.amounts.rollout_len, scoring=True)

    def _live_servers(self, *, cohost: bool) -> dict[str, MemoryUse]:
        """Return the memory of the servers that live while distill trains, by role."""
        distill = self.config.distill
        length = self.amounts.rollout_len
        servers = {}
        if self.config.evaluates_at_syncs or distill.refresh.is_on or cohost:
            servers["student"] = self.server("student", length)
        # A refresh scores the fresh rollouts, so it needs the teacher too.
        if distill.refresh.is_on or cohost:
            servers["teacher"] = _fullest(
                self.server(role, length, scoring=True) for role in teacher_roles(self.models)
            )
        return servers


def _fullest(uses: Iterable[MemoryUse]) -> MemoryUse:
    """Return the largest memory use.

    Servers fill the same share of a GPU whatever they serve. Of those that differ by less than a
    MiB, the one with the most weights, and so the least KV cache, is returned.
    """
    return max(uses, key=lambda use: (round(use.gpu_total / 2**20), use.gpu["weights"]))
