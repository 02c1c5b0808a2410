"""Which responses a step learns from, and the microbatches that a data rank makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lopd.batching import ResponseOrder, build_microbatch, plan_step
from lopd.batching.order import epoch_permutation
from lopd.megatron.ranks import parallel
from lopd.records import Microbatch, Sample
from lopd.stages.training import TrainingJob


@dataclass(frozen=True, slots=True)
class Batch:
    """What one rank learns from in one step."""

    # Those of this data rank. Every data rank has the same number of them.
    microbatches: list[Microbatch]
    # Prompt and response tokens of the whole step, over all ranks.
    num_tokens: int


class Batches:
    """The batch of any step.

    The first responses come in the order of ResponseOrder. Refreshed responses come in the order in
    which they were sampled. Where they last for more steps than they were made for, they are used
    again in another order.
    """

    def __init__(self, samples: Sequence[Sample], job: TrainingJob) -> None:
        self._samples = samples
        self._settings = job.settings
        self._seed = job.order_seed
        self._order = ResponseOrder(len(samples), job.settings.batch_size, seed=job.order_seed)
        # The step at which the present responses begin; None: no refresh yet. This is all the state
        # there is. The order is a function of seed and step, so a resumed training needs no cursor.
        self._refreshed_at: int | None = None

    def use_refreshed(self, samples: Sequence[Sample], start: int) -> None:
        """Use these responses from step ``start`` on."""
        self._samples = samples
        self._refreshed_at = start

    def of_step(self, step: int) -> Batch:
        """Return this rank's batch of step ``step``, counted from 0."""
        # Each response is read once: a large cache stays on the disk.
        chosen = [self._samples[index] for index in self.indices(step)]
        lengths = [len(sample) for sample in chosen]
        # Tensor ranks share a microbatch in equal parts: its length is a multiple of their number.
        multiple = self._settings.parallel.tensor
        # Every rank computes the same plan and takes its own part, so no rank has to tell another.
        plan = plan_step(
            lengths,
            parallel.data_size(),
            self._settings.max_tokens_per_microbatch,
            multiple,
            context=self._settings.parallel.context,
        )
        microbatches = [
            build_microbatch([chosen[index] for index in indices], multiple)
            for indices in plan[parallel.data_rank()]
        ]
        return Batch(microbatches, sum(lengths))

    def indices(self, step: int) -> list[int]:
        """Return the places of a step's responses among the present ones, [batch_size]."""
        if self._refreshed_at is None:
            return [int(index) for index in self._order.batch_indices(step)]
        # Places are counted through all passes over the responses. The first pass keeps the order
        # in which they were sampled; each later pass has a permutation of its own.
        batch_size = self._settings.batch_size
        count = len(self._samples)
        first = (step - self._refreshed_at) * batch_size
        indices: list[int] = []
        for place in range(first, first + batch_size):
            epoch, index = divmod(place, count)
            if epoch > 0:
                # Another order in each pass, so that no batch comes a second time.
                index = int(epoch_permutation(count, self._seed, epoch)[index])
            indices.append(index)
        return indices
