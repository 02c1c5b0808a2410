"""Weight sync into the running SGLang server between training steps, and the evaluation that
follows it. Runs on the trainer's rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.batching import build_microbatch
from lopd.config import Config, SyncSection
from lopd.errors import EngineError
from lopd.megatron.ranks import parallel
from lopd.megatron.ranks.first_rank import by_first_rank
from lopd.stages.batches import MOST_SENDS
from lopd.stages.sampling import sampling_params
from lopd.tasks import get_task
from lopd.tasks.prompts import load_prompts
from lopd.tasks.tokenizer import decode, load_tokenizer
from lopd.tasks.verdicts import Judged, judge_all
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.sampling import SamplingRequest, request_seed
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


def push_weights(
    buckets: Iterable[list[tuple[str, Tensor]]],
    engine: SGLangEngine | None,
    *,
    folder: Path,
    template: Path,
    version: str,
    receiver: WeightReceiver | None = None,
    weights_file: Path | None = None,
) -> SyncReport | None:
    """Feeds the trainer's weights, bucket by bucket, to all servers of an engine; says what it
    cost, where one was given.

    Every rank must call this; the one with an engine is the one that sends. receiver: as
    build_receiver makes it, to be kept for all syncs; absent: by disk. weights_file: where the
    owner of the servers looks what a restarted one must serve, once a disk sync is done.
    EngineError: as of a receiver, once the buckets are gathered to their end: the other ranks,
    which learn nothing of it here, then stand where this one does.
    """
    if engine is None:
        for _ in buckets:  # collective: these ranks only take part in gathering
            pass
        return None
    if receiver is None:
        receiver = build_receiver(
            SyncSection(),
            engine.engines,
            folder=folder,
            template_dir=template,
            weights_file=weights_file,
        )
    try:
        receiver.begin(version)
        for bucket in buckets:
            receiver.receive(bucket)
        receiver.commit()
    except EngineError:
        receiver.abandon()
        for _ in buckets:
            pass
        raise
    except BaseException:
        receiver.abandon()
        raise
    return receiver.report


class StudentWeights:
    """Puts a trainer's weights into servers, as the section sync says. Every rank has one and calls
    it together; the one with an engine sends.
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
        weights_file: str | None,
        turns: SeparateMemory | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """folder: for versions by disk. template: a checkpoint of the served architecture.
        weights_file: of servers that lopd runs. turns: with them, where they share GPUs. say: a
        line on screen. ConfigError: settings.
        """
        if settings.verify is None:
            settings = settings.model_copy(
                update={"verify": "tensors" if weights_file is not None else "scores"}
            )
        self._trainer, self._samples, self._settings, self._engine = (
            trainer,
            samples,
            settings,
            engine,
        )
        self._folder, self._template, self._turns, self._say = (
            folder,
            template,
            turns or SeparateMemory(),
            say,
        )
        self._weights_file = Path(weights_file) if weights_file is not None else None
        self._receiver = None
        self._restarted: RestartedServers | None = None
        if engine is not None:
            file = self._weights_file
            remembers = (
                file if settings.transport == "disk" else None
            )  # with half an update a server need not end: all of it is sent again
            own = (
                settings.model_copy(update={"verify": "off"})
                if settings.verify == "scores"
                else settings
            )  # those are compared here, in _settle
            self._receiver = build_receiver(
                own, engine.engines, folder=folder, template_dir=template, weights_file=remembers
            )
            if file is not None and engine.settings.restarts > 0:
                self._restarted = RestartedServers(engine.engines, file, settings.timeout_s)

    def push(self, version: str) -> SyncReport | None:
        """Sends the weights as they are now and verifies them; on the rank with an engine what it
        cost.

        Where a server of lopd's was lost on the way (dead, silent, started again), all of it is
        sent again to all of them once it is back, MOST_SENDS times at most. EngineError: that
        often, or a server is not started again, or is not lopd's; or none was lost, and one refuses
        or has other values.
        """
        lost = ""
        for attempt in range(MOST_SENDS):
            by_first_rank(self._await_servers)
            if attempt > 0 and self._engine is not None:
                self._say(f"{lost}; the weights are sent again")
            probe = self._probe() if self._settings.verify == "scores" else None
            report, error = self._send(version)
            lost = by_first_rank(partial(self._settle, version, error, probe))
            if not lost:
                return report
        raise EngineError(
            f"{lost}, {MOST_SENDS} times",
            where=f"weight version {version}",
            remedy="read the servers' logs",
        )

    def _await_servers(self) -> None:
        """Those that are being started again."""
        if self._restarted is not None:
            self._restarted.await_all()
        elif self._engine is not None and self._engine.settings.restarts > 0:
            await_servers(self._engine.engines, self._settings.timeout_s)

    def _send(self, version: str) -> tuple[SyncReport | None, EngineError | None]:
        """The report, or what went wrong on the rank with an engine; every rank has gathered
        everything then.
        """
        try:
            with self._turns.to_server():
                buckets = self._trainer.export(bucket_bytes=self._settings.bucket_bytes)
                return push_weights(
                    buckets,
                    self._engine,
                    folder=self._folder,
                    template=self._template,
                    version=version,
                    receiver=self._receiver,
                ), None
        except EngineError as error:
            if self._turns.shares:  # in the middle of turns that the other ranks go on with
                raise
            return None, error.with_traceback(
                None
            )  # whose frames hold what the receiver has let go of

    def _settle(self, version: str, error: EngineError | None, probe: Probe | None) -> str:
        """After a sending, on the rank with an engine: "" where all have the weights; what was
        lost, where they must be sent again. EngineError: neither.
        """
        if self._engine is None:
            return ""
        if error is None and probe is not None:
            try:
                ScoreVerification(probe, self._settings.tolerance).check(self._engine.engines)
            except EngineError as found:
                error = found
        lost: list[int] = []
        if self._restarted is not None:
            lost = self._restarted.lost() if error is not None else self._restarted.restarted()
        if lost and self._restarted is not None:
            self._restarted.end(lost)
            reason = "it was started again meanwhile" if error is None else error.what
            return f"a sync of {version} has lost the server at {self._restarted.urls(lost)} ({reason})"
        if error is not None:
            raise error
        if self._weights_file is not None and self._settings.transport != "disk":
            remember_unsaved_weights(self._weights_file, version)
        return ""

    def _probe(self) -> Probe:
        """The trainer's own log-probabilities of the first samples. Collective."""
        samples = [
            self._samples[index]
            for index in range(min(self._settings.num_probes, len(self._samples)))
        ]
        logprobs = self._trainer.logprobs_of(
            [build_microbatch([sample], parallel.tensor_size()) for sample in samples]
        )
        requests = tuple(
            ScoreRequest(f"probe-{index}", 0, sample.token_ids[:1], sample.token_ids[1:])
            for index, sample in enumerate(samples)
        )
        values = (
            row[: len(sample) - 1].float().cpu().numpy()
            for row, sample in zip(logprobs, samples, strict=True)
        )
        return Probe(
            requests, {request.key: value for request, value in zip(requests, values, strict=True)}
        )


class SyncEvaluation:
    """Answers to the same held-out prompts, with the same seeds, after every sync."""

    def __init__(self, config: Config, model: Path, engine: SGLangEngine) -> None:
        """model: a folder with the tokenizer."""
        self._config, self._engine = config, engine
        self._task = get_task(config.task.name, config.task.options)
        self._tokenizer = load_tokenizer(model)
        length = config.sglang.context_length
        prompts, ids = load_prompts(
            config.prompts.eval,
            self._task,
            self._tokenizer,
            context_length=length,
            need_answers=True,
        )
        self._prompts, self._ids = (
            prompts[: config.distill.sync_num_prompts],
            ids[: config.distill.sync_num_prompts],
        )
        self._params = sampling_params(
            config.evaluate, (config.models.teacher, config.models.student)
        )

    def run(self, version: str) -> dict[str, Any]:
        """accuracy, mean response length in tokens, share of truncated responses. OtherWeights: a
        response is not of this version.
        """
        by_id = {prompt.prompt_id: prompt for prompt in self._prompts}
        requests = (
            SamplingRequest(
                prompt.prompt_id,
                0,
                ids,
                request_seed(self._config.run.seed, prompt.prompt_id, 0, "sync"),
            )
            for prompt, ids in zip(self._prompts, self._ids, strict=True)
        )
        lengths, truncated = [], []

        def responses() -> Iterator[Judged]:
            for response in self._engine.generate(requests, self._params, version=version):
                lengths.append(len(response.token_ids))
                truncated.append(response.finish_reason == "length")
                yield (
                    by_id[response.prompt_id],
                    decode(self._tokenizer, response.token_ids),
                    response.finish_reason,
                )

        correct, count = (
            sum(verdict.right for verdict in judge_all(self._task, responses())),
            len(self._prompts),
        )
        return {
            "accuracy": correct / count,
            "num_prompts": count,
            "response_len": sum(lengths) / count,
            "truncated_share": sum(truncated) / count,
        }
