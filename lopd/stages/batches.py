"""Which responses a step learns from, and the microbatches that a data rank makes of them.

The next step's responses are read and packed by a thread while the present step computes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lopd.batching import ResponseOrder, build_microbatch, plan_step
from lopd.batching.order import epoch_permutation
from lopd.megatron.ranks import parallel
from lopd.records import Microbatch, Sample
from lopd.stages.training import TrainingJob
from lopd.stages.training_data import CachedSamples


@dataclass(frozen=True, slots=True)
class Batch:
    """What one rank learns from in one step."""

    # Those of this data rank. Every data rank has the same number of them.
    microbatches: list[Microbatch]
    # Prompt and response tokens of the whole step, over all ranks.
    num_tokens: int
    # How long this rank waited for the batch, in seconds.
    waited_s: float = 0.0


class Batches:
    """The batch of any step.

    The first responses come in the order of ResponseOrder. Refreshed responses come in the order in
    which they were sampled. Where they last for more steps than they were made for, they are used
    again in another order.
    """

    def __init__(self, samples: Sequence[Sample], job: TrainingJob) -> None:
        self._samples = samples
        self._lengths = _lengths_of(samples)
        self._settings = job.settings
        self._seed = job.order_seed
        self._order = ResponseOrder(len(samples), job.settings.batch_size, seed=job.order_seed)
        # The step at which the present responses begin; None: no refresh yet. This is all the state
        # there is. The order is a function of seed and step, so a resumed training needs no cursor.
        self._refreshed_at: int | None = None
        # The batch that is being read for a later step, and that step.
        self._ahead: tuple[int, _Reading] | None = None

    def use_refreshed(self, samples: Sequence[Sample], start: int) -> None:
        """Use these responses from step ``start`` on."""
        # What has been read ahead is of the former responses. Its error, if it has one, belongs to
        # a step that will not be made with them.
        self._drop_ahead()
        self._samples = samples
        self._lengths = _lengths_of(samples)
        self._refreshed_at = start

    def of_step(self, step: int) -> Batch:
        """Return this rank's batch of step ``step``, counted from 0, and begin to read the next.

        Raises:
            LopdError: A response of this step cannot be read or packed. An error of the next step
                is raised when that step is asked for.
        """
        began = time.perf_counter()
        if self._ahead is None or self._ahead[0] != step:
            self.read_ahead(step)
        assert self._ahead is not None
        _, reading = self._ahead
        self._ahead = None
        batch = reading.result()
        waited_s = time.perf_counter() - began
        # Nothing is read after the last step, so the thread ends with the training.
        if step + 1 < self._settings.num_steps:
            self.read_ahead(step + 1)
        return Batch(batch.microbatches, batch.num_tokens, waited_s)

    def read_ahead(self, step: int) -> None:
        """Begin to read the batch of a step in a thread."""
        # One thread at a time: two would hold a third batch in memory.
        self._drop_ahead()
        self._ahead = (step, _Reading(lambda: self._read(step)))

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead[1].wait()
            self._ahead = None

    def _read(self, step: int) -> Batch:
        places = self.indices(step)
        # The lengths are known without reading: a rank decodes its own responses alone.
        lengths = self._lengths[places].astype(np.int64)
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
        own = plan[parallel.data_rank()]
        chosen = _fetch(self._samples, [places[index] for part in own for index in part])
        microbatches: list[Microbatch] = []
        for part in own:
            members = chosen[: len(part)]
            chosen = chosen[len(part) :]
            microbatches.append(build_microbatch(members, multiple))
        return Batch(microbatches, int(lengths.sum()))

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


class _Reading:
    """A batch that a thread reads."""

    def __init__(self, read: Callable[[], Batch]) -> None:
        self._read = read
        self._batch: Batch | None = None
        self._error: BaseException | None = None
        # A daemon: a rank that ends with an error does not wait for what it no longer needs.
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def result(self) -> Batch:
        """Return the batch, or raise the error of the reading."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._batch is not None
        return self._batch

    def _run(self) -> None:
        try:
            self._batch = self._read()
        except BaseException as error:
            # Whatever it is, it belongs to the loop, at the step of this batch. In the thread it
            # would only be printed, and the loop would wait for a batch that never comes.
            self._error = error


def _lengths_of(samples: Sequence[Sample]) -> NDArray[np.int32]:
    """Return the tokens of each sample, prompt and response, [N]."""
    if isinstance(samples, CachedSamples):
        return samples.lengths
    return np.fromiter(map(len, samples), np.int32, len(samples))


def _fetch(samples: Sequence[Sample], places: Sequence[int]) -> list[Sample]:
    # Together: neighbours in the cache are decoded once.
    if isinstance(samples, CachedSamples):
        return samples.fetch(places)
    return [samples[place] for place in places]
