"""What a step learns from, on a trainer's rank: responses frozen once and for all, or refreshed;
and the wait for a refresh.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lopd.batching import ResponseOrder, build_microbatch, plan_step
from lopd.batching.order import epoch_permutation
from lopd.errors import EngineError
from lopd.megatron.ranks import parallel
from lopd.objective.drift import RefreshRule
from lopd.records import Microbatch, Sample
from lopd.stages.refreshed import LOST, ROLLOUTS, SCORES, Refresh, finished
from lopd.stages.training import TrainingJob
from lopd.stages.training_data import load_samples

POLL_S = 0.1
MOST_SENDS = 5  # of the same weights, to a server that loses them


class Batches:
    """The microbatches of this data rank at any step; nothing to remember between steps but where
    the present responses begin.

    The first responses come in ResponseOrder. Refreshed ones were sampled in the order in which
    they are learnt from; if they last for more steps than they were made for, they are gone through
    again, in another order.
    """

    def __init__(self, samples: Sequence[Sample], job: TrainingJob) -> None:
        self._samples, self._settings, self._seed = samples, job.settings, job.order_seed
        self._order = ResponseOrder(len(samples), job.settings.batch_size, seed=job.order_seed)
        self._refreshed_at: int | None = None

    def learn_from(self, samples: Sequence[Sample], start: int) -> None:
        """From step ``start`` on, these responses."""
        self._samples, self._refreshed_at = samples, start

    def __call__(self, step: int) -> tuple[list[Microbatch], int]:
        """This rank's microbatches of a step, and the number of tokens of the whole step over all
        ranks.
        """
        chosen = [
            self._samples[index] for index in self.indices(step)
        ]  # once: they may lie on disk
        lengths = [len(sample) for sample in chosen]
        multiple, context = self._settings.parallel.tensor, self._settings.parallel.context
        plan = plan_step(
            lengths,
            parallel.data_size(),
            self._settings.max_tokens_per_microbatch,
            multiple,
            context=context,
        )
        mine = plan[parallel.data_rank()]
        return [build_microbatch([chosen[i] for i in indices], multiple) for indices in mine], sum(
            lengths
        )

    def indices(self, step: int) -> list[int]:
        """Of the present responses, [batch_size]."""
        if self._refreshed_at is None:
            return [int(index) for index in self._order.batch_indices(step)]
        first, count = (step - self._refreshed_at) * self._settings.batch_size, len(self._samples)
        rounds = [divmod(place, count) for place in range(first, first + self._settings.batch_size)]
        return [
            index if epoch == 0 else int(epoch_permutation(count, self._seed, epoch)[index])
            for epoch, index in rounds
        ]


class Server(Protocol):
    """The student's, and whose turn it is where it shares the trainer's GPUs; every rank calls
    these together.
    """

    shares: bool  # GPUs with the trainer

    def push(self, step: int, *, again: bool = False) -> None:
        """Puts the weights after so many steps into it, as version ``step-N``; again: even if it
        has had them. It then answers.
        """

    def leave(self) -> None:
        """For the teacher, or whoever else needs the GPUs."""

    def train(self) -> None:
        """For the next step."""


class Refreshes:
    """When a refresh is due, and how one comes about; the same on every rank. state: goes into
    checkpoints with the training.
    """

    def __init__(self, job: TrainingJob, state: dict[str, Any], server: Server) -> None:
        self._job, self._server = job, server
        self._rule = RefreshRule.from_config(job.config.distill)
        self._state = state
        state.setdefault("refreshes", [])
        state.setdefault("refresh_due", None)

    @property
    def made(self) -> list[Refresh]:
        return [Refresh(**fields) for fields in self._state["refreshes"]]

    @property
    def due(self) -> bool:
        """Before the next step."""
        return self._state["refresh_due"] is not None

    def observe(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        """After so many steps of the training, the last with these figures."""
        since = self.made[-1].step if self.made else 0
        self._state["refresh_due"] = self._rule.reason(num_steps - since, metrics)

    def __call__(self, step: int, say: Callable[[str], None]) -> Sequence[Sample]:
        """Fresh responses of the present weights, for step ``step`` (from 0) on. say: a line that
        the process with the servers hears.
        """
        refresh = Refresh(
            len(self.made) + 1, step, self._state["refresh_due"], version=f"step-{step}"
        )
        if (
            finished(refresh, self._job.folder) is None
        ):  # else made by a command that was killed after it
            if parallel.rank() == 0:
                say(
                    f"step {step}/{self._job.num_steps}: refresh {refresh.number} ({refresh.reason})"
                )
            if self._server.shares:  # the teacher comes when the student's server has left
                self._make(refresh, ROLLOUTS, say)
                self._server.leave()
                self._ask(refresh, SCORES, say)
            else:
                self._make(refresh, SCORES, say)
        self._state["refreshes"].append(dataclasses.asdict(refresh))
        self._state["refresh_due"] = None
        return self._learn(refresh)

    def resume(self, say: Callable[[str], None]) -> tuple[Sequence[Sample], int] | None:
        """The refreshed responses that a resumed training was learning from, and the step they
        begin at; None: it has come to no refresh yet.
        """
        if not self.made:
            return None
        refresh = self.made[-1]
        if (
            finished(refresh, self._job.folder) is None
        ):  # somebody has removed scores; the rollouts may still be there
            self._server.leave()
            self._ask(refresh, SCORES, say)
        return self._learn(refresh), refresh.step

    def _make(self, refresh: Refresh, until: str, say: Callable[[str], None]) -> None:
        """Has it made by the present weights, which are sent again where a server has lost them.
        EngineError: that happens again and again.
        """
        for attempt in range(MOST_SENDS):
            self._server.push(refresh.step, again=attempt > 0)
            if parallel.rank() == 0:
                (self._job.folder / LOST).unlink(missing_ok=True)
            # nobody takes the former loss for one of the weights that were just sent
            parallel.barrier()
            self._ask(refresh, until, say, can_send=True)
            if self._wait_for(refresh, until):
                return
        raise EngineError(
            f"the student's server lost its weights {MOST_SENDS} times in refresh {refresh.number}",
            remedy="read its log",
        )

    def _ask(
        self, refresh: Refresh, until: str, say: Callable[[str], None], *, can_send: bool = False
    ) -> None:
        if parallel.rank() == 0:
            refresh.ask(self._job.folder, until=until, can_send=can_send)
            say(
                f"step {refresh.step}/{self._job.num_steps}: refresh {refresh.number}: waiting for {until}"
            )  # the process with the servers hears it

    def _wait_for(self, refresh: Refresh, part: str = SCORES) -> bool:
        """Waits until it is published, in no collective, which would time out: sampling and scoring
        may take hours. Meanwhile the heartbeat goes on, and if it cannot be made, the process that
        makes it ends this one. False: the server has lost the weights.
        """
        while finished(refresh, self._job.folder, part) is None:
            if (self._job.folder / LOST).exists():
                return False
            time.sleep(POLL_S)
        return True

    def _learn(self, refresh: Refresh) -> Sequence[Sample]:
        self._wait_for(refresh)
        self._server.train()
        return load_samples(
            dataclasses.replace(self._job, data=refresh.folder(self._job.folder) / SCORES)
        )
