"""Weight sync: the trainer's weights go into the running SGLang servers of the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lopd.batching import build_microbatch
from lopd.config import SyncSection
from lopd.errors import EngineError
from lopd.megatron.ranks import parallel
from lopd.megatron.ranks.first_rank import run_on_first_rank
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.scoring import ScoreRequest
from sglang_rollout.servers.weights_file import remember_unsaved_weights
from sglang_rollout.weight_sync import (
    Probe,
    ScoreVerification,
    SeparateMemory,
    SyncReport,
    WeightReceiver,
    build_receiver,
)
from sglang_rollout.weight_sync.interface import await_servers
from sglang_rollout.weight_sync.recovery import RestartedServers

if TYPE_CHECKING:
    from torch import Tensor

    from lopd.megatron.training.trainer import Trainer
    from lopd.records import Sample

# How often the same weights are sent to a server that loses them, before it counts as an error.
MAX_SENDS = 5


class StudentWeights:
    """A sender of the trainer's weights to servers. The section ``sync`` has its settings.

    Every rank has one and calls it together with the other ranks. The rank with an engine sends;
    the others only take part in gathering the weights.
    """

    def __init__(
        self,
        trainer: Trainer,
        samples: Sequence[Sample],
        settings: SyncSection,
        engine: SGLangEngine | None,
        *,
        folder: Path,
        template: Path,
        weights_file: Path | None,
        colocation: SeparateMemory | None = None,
        print_line: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Prepare a receiver on the rank that has an engine.

        Args:
            trainer: Whose weights are sent.
            samples: Responses that are scored where syncs are verified by scores.
            settings: The section ``sync``.
            engine: The servers, on one rank; None on the others.
            folder: Where the transport "disk" puts the weights.
            template: A checkpoint of the architecture that the servers serve.
            weights_file: Where the servers' owner reads what a restarted server must serve. None
                where lopd does not run the servers.
            colocation: Who holds the GPUs, where the servers share them with the trainer.
            print_line: Shows a line on the screen.

        Raises:
            ConfigError: The settings cannot be used with these servers.
        """
        if settings.verify is None:
            # Comparing tensors needs code of ours in the server, which only lopd's servers have.
            verify = "tensors" if weights_file is not None else "scores"
            settings = settings.model_copy(update={"verify": verify})
        self._trainer = trainer
        self._samples = samples
        self._settings = settings
        self._engine = engine
        self._weights_file = weights_file
        self._colocation = colocation or SeparateMemory()
        self._print_line = print_line
        self._receiver: WeightReceiver | None = None
        self._restarted: RestartedServers | None = None
        if engine is not None:
            self._receiver = self._build_receiver(engine, folder, template)
            if weights_file is not None and engine.settings.restarts > 0:
                timeout_s = settings.timeout_s
                self._restarted = RestartedServers(engine.engines, weights_file, timeout_s)

    def _build_receiver(self, engine: SGLangEngine, folder: Path, template: Path) -> WeightReceiver:
        settings = self._settings
        if settings.verify == "scores":
            # A receiver sees tensors only. The scores are compared in _settle.
            settings = settings.model_copy(update={"verify": "off"})
        # By disk the receiver writes into this file which folder a restarted server must load. In
        # place it would have a server restarted that a failed update has left with half of the
        # weights. That is not needed here, because all of them are sent again.
        weights_file = self._weights_file if settings.transport == "disk" else None
        return build_receiver(
            settings,
            engine.engines,
            folder=folder,
            template_dir=template,
            weights_file=weights_file,
        )

    def push(self, version: str) -> SyncReport | None:
        """Send the present weights to all servers and verify them.

        Where a server that lopd runs is lost on the way (it is dead, silent or was started again),
        the weights are sent again to all servers once it is back, at most MAX_SENDS times.

        Returns:
            What the sync cost, on the rank with an engine; None on the other ranks.

        Raises:
            EngineError: A server was lost MAX_SENDS times, is not started again, or is not lopd's;
                or no server was lost, and one refuses the weights or has other values. Every rank
                raises it.
        """
        # All ranks go through this loop together. What only the rank with an engine can know, it
        # tells the others by run_on_first_rank, so that all of them repeat or end.
        lost = ""
        for attempt in range(MAX_SENDS):
            run_on_first_rank(self._await_servers)
            if attempt > 0 and self._engine is not None:
                self._print_line(f"{lost}; the weights are sent again")
            # The trainer's forward pass comes before the servers get the GPUs.
            probe = self._probe() if self._settings.verify == "scores" else None
            report, error = self._send(version)
            lost = run_on_first_rank(partial(self._settle, version, error, probe))
            if not lost:
                return report
        raise EngineError(
            f"{lost}, {MAX_SENDS} times",
            where=f"weight version {version}",
            remedy="read the logs of the servers",
        )

    def _await_servers(self) -> None:
        """Wait for servers that are being started again."""
        if self._restarted is not None:
            self._restarted.await_all()
        elif self._engine is not None and self._engine.settings.restarts > 0:
            # Nothing is known of the restarts of the user's servers, so they must only answer.
            await_servers(self._engine.engines, self._settings.timeout_s)

    def _send(self, version: str) -> tuple[SyncReport | None, EngineError | None]:
        """Return the report, or what went wrong on the rank with an engine."""
        try:
            with self._colocation.to_server():
                buckets = self._trainer.export(bucket_bytes=self._settings.bucket_bytes)
                return _send_buckets(buckets, self._receiver, version), None
        except EngineError as error:
            if self._colocation.shares:
                # The other ranks continue inside to_server(), which waits for this one. Nothing can
                # be sent again from here, so the error ends the training.
                raise
            # The traceback's frames would keep alive the memory that the receiver has released.
            return None, error.with_traceback(None)

    def _settle(self, version: str, error: EngineError | None, probe: Probe | None) -> str:
        """Find out how a sending ended. Only the rank with an engine has something to do.

        Returns:
            "" where all servers have the weights; else what was lost, and the weights must be sent
            again.

        Raises:
            EngineError: The weights were refused or are wrong, and no server was lost.
        """
        if self._engine is None:
            return ""
        # Scores are compared after the sync, because servers answer no request during it.
        if error is None and probe is not None:
            try:
                ScoreVerification(probe, self._settings.tolerance).check(self._engine.engines)
            except EngineError as found:
                error = found
        lost: list[int] = []
        if self._restarted is not None:
            # After an error every server is asked, because the one that complains need not be the
            # one that was lost. Without an error only a restart can have lost the weights.
            lost = self._restarted.lost() if error is not None else self._restarted.restarted()
        if lost and self._restarted is not None:
            # A server that is silent may still run. It is ended, so that it can be started again.
            self._restarted.end(lost)
            urls = self._restarted.urls(lost)
            reason = "it was started again meanwhile" if error is None else error.what
            return f"a sync of {version} has lost the server at {urls} ({reason})"
        if error is not None:
            raise error
        if self._weights_file is not None and self._settings.transport != "disk":
            # These weights are in no folder, so a server that is restarted later cannot load them.
            remember_unsaved_weights(self._weights_file, version)
        return ""

    def _probe(self) -> Probe:
        """Return the trainer's own log-probabilities of the first samples. Collective."""
        # A response each, so that what is compared does not depend on packing.
        num_probes = min(self._settings.num_probes, len(self._samples))
        samples = [self._samples[index] for index in range(num_probes)]
        microbatches = [build_microbatch([sample], parallel.tensor_size()) for sample in samples]
        requests: list[ScoreRequest] = []
        expected = {}
        logprobs = self._trainer.logprobs_of(microbatches)
        for index, (sample, row) in enumerate(zip(samples, logprobs, strict=True)):
            # Everything but the first token is scored as a response to the first token.
            request = ScoreRequest(f"probe-{index}", 0, sample.token_ids[:1], sample.token_ids[1:])
            requests.append(request)
            # The last position predicts nothing, and padding may follow it.
            expected[request.key] = row[: len(sample) - 1].float().cpu().numpy()
        return Probe(tuple(requests), expected)


def _send_buckets(
    buckets: Iterable[list[tuple[str, Tensor]]], receiver: WeightReceiver | None, version: str
) -> SyncReport | None:
    """Give the trainer's weights, bucket by bucket, to the receiver of the rank that has one.

    Gathering a bucket is a collective, so every rank goes through all buckets, whatever happens.
    """
    if receiver is None:
        for _ in buckets:
            pass
        return None
    try:
        receiver.begin(version)
        for bucket in buckets:
            receiver.receive(bucket)
        receiver.commit()
    except EngineError:
        receiver.abandon()
        # The other ranks learn nothing of the error here. They still gather, so this rank does too.
        for _ in buckets:
            pass
        raise
    except BaseException:
        # This rank ends now, and ends the others. There is nobody left to gather with.
        receiver.abandon()
        raise
    return receiver.report
