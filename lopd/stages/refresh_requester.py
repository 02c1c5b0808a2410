"""A rank's side of a refresh: decide when, ask the parent process, and wait for the scores."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lopd.errors import EngineError
from lopd.megatron.ranks import parallel
from lopd.objective.drift import RefreshRule
from lopd.records import Sample
from lopd.stages.between_steps import StepHook
from lopd.stages.refresh_record import LOST, ROLLOUTS, SCORES, RefreshRecord, completed
from lopd.stages.sync import MAX_SENDS
from lopd.stages.training import TrainingJob
from lopd.stages.training_data import load_samples

if TYPE_CHECKING:
    from lopd.megatron.training.step_metrics import StepMetrics
    from lopd.stages.training_rank import Training

# How often a waiting rank looks for the published scores, in seconds.
POLL_S = 0.1
# Keys of the training's state, which its checkpoints hold. The second one is the reason for a
# refresh before the next step, or null.
_MADE = "refreshes"
_REASON = "refresh_due"


class Server(Protocol):
    """What a refresh needs of lopd.stages.student.StudentServer."""

    shares_gpus: bool

    def push(self, step: int, *, again: bool = False) -> None: ...

    def free_gpus(self) -> None: ...

    def gpus_to_trainer(self) -> None: ...


class RefreshRequester(StepHook):
    """Replaces the responses by fresh ones of the present weights when the rule says so.

    Every rank has one and decides alike, because the metrics of a step are the same on all ranks.
    """

    def __init__(self, job: TrainingJob, server: Server) -> None:
        self._job = job
        self._server = server
        self._rule = RefreshRule.from_config(job.config.distill)

    def begin(self, training: Training) -> None:
        """Go on with the responses that a resumed training was learning from."""
        self._batches = training.batches
        self._state: dict[str, Any] = training.state
        self._state.setdefault(_MADE, [])
        self._state.setdefault(_REASON, None)
        if not self.made:
            return
        newest = self.made[-1]
        if completed(newest, self._job.folder) is None:
            # Somebody has removed the scores. Where the rollouts are still there they are scored
            # again; the weights that could sample them again are gone.
            self._server.free_gpus()
            self._request(newest, SCORES)
        self._batches.use_refreshed(self._load(newest), newest.step)

    @property
    def made(self) -> list[RefreshRecord]:
        """The refreshes that this training has made, the newest last."""
        # The state holds plain JSON, because a checkpoint does.
        return [RefreshRecord(**fields) for fields in self._state[_MADE]]

    def before_step(self, step: int) -> None:
        if self._state[_REASON] is not None:
            self._batches.use_refreshed(self._refresh(step), step)

    def after_step(self, result: StepMetrics) -> dict[str, int]:
        """Record why the next step needs fresh responses, if it does."""
        # Steps are counted from the newest refresh: so many have learnt from its responses.
        made = self.made
        since = made[-1].step if made else 0
        self._state[_REASON] = self._rule.reason(result.step - since, result.metrics)
        return {"refreshes": len(made)}

    def _refresh(self, step: int) -> Sequence[Sample]:
        """Return fresh responses of the present weights for the steps from ``step`` on."""
        reason = self._state[_REASON]
        refresh = RefreshRecord(len(self.made) + 1, step, reason, version=f"step-{step}")
        # A command that was killed after the refresh and before the next checkpoint has made it.
        if completed(refresh, self._job.folder) is None:
            if parallel.rank() == 0:
                self._print_line(refresh, f"refresh {refresh.number} ({reason})")
            if self._server.shares_gpus:
                # The teacher needs the GPUs, so the student's servers give them back in between.
                self._sample(refresh, ROLLOUTS)
                self._server.free_gpus()
                self._request(refresh, SCORES)
            else:
                self._sample(refresh, SCORES)
        # The next checkpoint has this. A training that was killed before it comes here again.
        self._state[_MADE].append(dataclasses.asdict(refresh))
        self._state[_REASON] = None
        return self._load(refresh)

    def _sample(self, refresh: RefreshRecord, until: str) -> None:
        """Have the present weights sample, and send them again where a server has lost them.

        Raises:
            EngineError: A server has lost them MAX_SENDS times.
        """
        for attempt in range(MAX_SENDS):
            # The weights first: the responses must come from the student as it is at this step.
            self._server.push(refresh.step, again=attempt > 0)
            if parallel.rank() == 0:
                (self._job.folder / LOST).unlink(missing_ok=True)
            # No rank may take the previous loss for one of the weights that were just sent.
            parallel.barrier()
            self._request(refresh, until, can_send=True)
            if self._wait_for(refresh, until):
                return
        # A server that loses its weights again and again has a cause that no repetition mends.
        raise EngineError(
            f"the student's server lost its weights {MAX_SENDS} times in refresh {refresh.number}",
            remedy="read the log of the server",
        )

    def _request(self, refresh: RefreshRecord, until: str, *, can_send: bool = False) -> None:
        if parallel.rank() == 0:
            refresh.request(self._job.folder, until=until, can_send=can_send)
            # The parent looks for a request whenever a rank prints a line.
            self._print_line(refresh, f"refresh {refresh.number}: waiting for {until}")

    def _print_line(self, refresh: RefreshRecord, text: str) -> None:
        self._job.print_line(f"step {refresh.step}/{self._job.num_steps}: {text}")

    def _wait_for(self, refresh: RefreshRecord, part: str = SCORES) -> bool:
        """Wait until a part of the refresh is published. False: a server has lost the weights."""
        # Sampling and scoring may take hours. A collective would time out, so every rank looks at
        # the files by itself. Its heartbeat continues; if the refresh fails, the parent ends it.
        while completed(refresh, self._job.folder, part) is None:
            if (self._job.folder / LOST).exists():
                return False
            time.sleep(POLL_S)
        return True

    def _load(self, refresh: RefreshRecord) -> Sequence[Sample]:
        self._wait_for(refresh)
        # Nobody samples or scores now, so shared GPUs go back to the trainer.
        self._server.gpus_to_trainer()
        scores = refresh.folder(self._job.folder) / SCORES
        return load_samples(dataclasses.replace(self._job, data=scores))
