"""The sums of one step over microbatches and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lopd.errors import TrainingError
from lopd.megatron.ranks import parallel


def require_equal_counts(count: int, *, step: int) -> None:
    """Refuse a step in which the data ranks have unequal numbers of microbatches. Collective.

    Args:
        count: The number of microbatches of this rank.
        step: The number of the step, from 1, for the message.

    Raises:
        TrainingError: The numbers differ, or they are 0.
    """
    # A pipeline, an expert's exchange or a gradient's sum that some ranks run once more than others
    # blocks until the timeout, and the error then says nothing about the cause.
    where = f"step {step}"
    if parallel.data_size() > 1:
        # One maximum gives both bounds: the maximum of -count is minus the least count.
        bounds = torch.tensor([count, -count], device=parallel.device())
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=parallel.data_group())
        most = int(bounds[0])
        least = -int(bounds[1])
        if most != least:
            raise TrainingError(
                f"data ranks have between {least} and {most} microbatches, and rank "
                f"{parallel.rank()} has {count}",
                where=where,
                limit="exactly the same number on every data rank",
                remedy="divide the step by lopd.batching.plan_step on every rank",
            )
    # After the comparison, so that all ranks raise the same error together.
    if count == 0:
        raise TrainingError(
            "there are no microbatches", where=where, remedy="give each step at least one"
        )


class StepSums:
    """Adds up what the objective reports, and the health vectors of all ranks."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def reduce(
        self, outputs: Sequence[Mapping[str, Tensor]], health: Tensor
    ) -> tuple[dict[str, float], list[float]]:
        """Return the sums over the whole step, on every rank. Collective.

        Args:
            outputs: The sums of each microbatch by name, float64 []. They are empty but on the last
                pipeline stage.
            health: This rank's health vector, float64 [N] (lopd.megatron.training.health).

        Returns:
            The sums by name over all microbatches and data ranks, and the sum of all ranks' health
            vectors [N].
        """
        self._learn_names(outputs)
        # float64, because the sums run over millions of tokens and are compared between layouts.
        num_metrics = len(self._names)
        # Both kinds of sums in one vector, so that a step has one all-reduce for its metrics. Each
        # all-reduce costs a synchronisation of all ranks.
        metrics = torch.zeros(num_metrics, dtype=torch.float64, device=parallel.device())
        # Ranks with the same data rank have the same microbatches. One of them contributes;
        # otherwise each token would count once per tensor and context rank.
        if parallel.reports_for_data_rank():
            for output in outputs:
                assert [*output] == self._names, (
                    "an objective reports the same metrics for every microbatch"
                )
                metrics += torch.stack([*output.values()])
        total = torch.cat([metrics, health])
        dist.all_reduce(total)
        summed = total.tolist()
        sums = dict(zip(self._names, summed[:num_metrics], strict=True))
        return sums, summed[num_metrics:]

    def _learn_names(self, outputs: Sequence[Mapping[str, Tensor]]) -> None:
        """Tell the earlier pipeline stages which sums there are, once per training.

        They have no objective's output, but their vector must have the same length.
        """
        if self._names:
            return
        # Only the last stage has outputs. Its names go to the others in a list that is overwritten.
        names = [[*outputs[0]] if outputs else None]
        if parallel.pipeline_size() > 1:
            dist.broadcast_object_list(
                names, src=parallel.last_stage_rank(), group=parallel.pipeline_group()
            )
        assert names[0] is not None
        self._names = names[0]
