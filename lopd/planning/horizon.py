"""What rollouts that stop at a prefix would save, where the loss is on a prefix alone."""

from __future__ import annotations

from dataclasses import dataclass

from lopd.planning.plan import Plan, make_plan
from lopd.planning.stages import LIGHTNING, given_stages


@dataclass(frozen=True, slots=True)
class ShortHorizon:
    """The GPU hours of rollout, score and distill, with whole rollouts and with short ones.

    Attributes:
        tokens: Where the short rollouts stop.
        gpu_hours: With rollouts that stop there.
        instead_of: With the rollouts of the configuration.
    """

    tokens: int
    gpu_hours: float
    instead_of: float

    @property
    def line(self) -> str:
        return (
            f"the loss ends after {self.tokens:,} tokens; rollouts that stop there "
            f"(rollout.max_new_tokens = {self.tokens}) need {self.gpu_hours:,.1f} instead of "
            f"{self.instead_of:,.1f} GPU hours of rollout, score and distill"
        )


def short_horizon(plan: Plan) -> ShortHorizon | None:
    """Return what short rollouts would take, or None where nothing is cut from the loss.

    Args:
        plan: The plan, with the rollouts of the configuration.
    """
    config = plan.config
    tokens = config.distill.objective.prefix_tokens
    # A share of a response is no limit that a server could be given.
    if tokens is None or tokens >= config.rollout.max_new_tokens or not plan.has_gpus:
        return None
    # Given rollouts are not sampled, so a shorter limit would save nothing.
    if "rollout" in given_stages(config):
        return None
    rollout = config.rollout.model_copy(update={"max_new_tokens": tokens})
    shorter = make_plan(
        config.model_copy(update={"rollout": rollout}),
        plan.models,
        plan.node,
        plan.assumed,
        # The parameters are those of the plan, which has counted them.
        build=False,
    )
    hours, instead_of = (
        sum(one.gpu_hours(stage) for stage in LIGHTNING) for one in (shorter, plan)
    )
    return ShortHorizon(tokens, hours, instead_of)
