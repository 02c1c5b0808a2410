"""What the ranks of a training do between two steps: the hooks of a training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lopd.megatron.training.step_metrics import StepMetrics
    from lopd.stages.training_rank import Training


class StepHook:
    """One thing that happens between steps. A subclass overrides the moments at which it acts.

    Steps are counted from 0.
    """

    # Every rank has a hook of the same kind and calls its methods together with the other ranks,
    # because a hook may gather weights or wait for rank 0. So a hook never decides by what only one
    # rank knows.

    def begin(self, training: Training) -> None:
        """Prepare. The trainer exists by now and has resumed its newest checkpoint."""

    def before_step(self, step: int) -> None:
        """Act before step ``step``. The weights are those after ``step`` updates."""

    def after_step(self, result: StepMetrics) -> dict[str, int]:
        """Look at the result of a step, and return metrics for its line of the metrics."""
        return {}

    def end(self) -> None:
        """Act after the last step."""


class StepHooks(StepHook):
    """Several hooks that act one after the other. Without any, nothing happens between steps."""

    def __init__(self, *hooks: StepHook) -> None:
        # The order matters: a hook may use what the one before it has done.
        self._hooks = hooks

    def begin(self, training: Training) -> None:
        for hook in self._hooks:
            hook.begin(training)

    def before_step(self, step: int) -> None:
        for hook in self._hooks:
            hook.before_step(step)

    def after_step(self, result: StepMetrics) -> dict[str, int]:
        # Each hook names its own metrics, so none replaces those of another.
        figures: dict[str, int] = {}
        for hook in self._hooks:
            figures |= hook.after_step(result)
        return figures

    def end(self) -> None:
        for hook in self._hooks:
            hook.end()
