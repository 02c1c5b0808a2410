"""The stages of a plan, and which of them a run makes itself."""

from __future__ import annotations

from lopd.config import Config, TrainSection

# All stages that need a GPU. export copies files, so a plan does not have it.
STAGES = ("demonstrate", "sft", "rollout", "score", "distill", "evaluate")
# The stages whose GPU hours the paper publishes (arXiv 2604.13010).
LIGHTNING = ("rollout", "score", "distill")
# The stages that start ranks of Megatron-Core.
TRAINED = ("sft", "distill")


def given_stages(config: Config) -> set[str]:
    """Return the stages that this run does not make.

    Their result is given, or evaluation is switched off. lopd.pipeline leaves out the same stages.
    """
    given: set[str] = set() if config.evaluate.enabled else {"evaluate"}
    if config.sft.demonstrations is not None:
        given |= {"demonstrate"}
    # A given SFT student needs no demonstrations either.
    if config.sft.checkpoint is not None:
        given |= {"demonstrate", "sft"}
    if config.distill.cache is not None:
        given |= {"rollout", "score"}
    return given


def planned_stages(config: Config) -> list[str]:
    """Return the stages that this run makes, in their order."""
    given = given_stages(config)
    return [stage for stage in STAGES if stage not in given]


def ranks_of_a_node(settings: TrainSection) -> int:
    """Return the number of ranks that one machine runs, one on each GPU."""
    # Unequal parts are refused elsewhere, so this division has no rest.
    return settings.parallel.ranks // settings.parallel.nodes
