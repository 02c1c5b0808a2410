"""Weight sync into the running SGLang server between training steps, and the evaluation that follows it. Runs on the trainer's rank 0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.batching import build_microbatch
from lopd.config import Config, SyncSection
from lopd.megatron import parallel
from lopd.stages.sampling import sampling_params
from lopd.tasks import get_task
from lopd.tasks.prompts import load_prompts
from lopd.tasks.tokenizer import decode, load_tokenizer
from lopd.tasks.verdicts import Judged, judge_all
from sglang_rollout.client import SGLangEngine
from sglang_rollout.sampling import SamplingRequest, request_seed
from sglang_rollout.scoring import ScoreRequest
from sglang_rollout.supervision import remember_unsaved_weights
from sglang_rollout.weight_sync import Apart, Probe, ScoreVerification, SyncReport, WeightReceiver, build_receiver
from sglang_rollout.weight_sync.interface import await_servers

if TYPE_CHECKING:
    from torch import Tensor

    from lopd.megatron.trainer import Trainer
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
    """Feeds the trainer's weights, bucket by bucket, to all servers of an engine; says what it cost, where one was given.

    Every rank must call this; the one with an engine is the one that sends. receiver: as build_receiver makes it, to be kept for all syncs; absent: by disk.
    weights_file: where the owner of the servers looks what a restarted one must serve, once a disk sync is done. EngineError: as of a receiver; the buckets
    are then not iterated to their end, so the other ranks end by the collective's timeout or with the first.
    """
    if engine is None:
        for _ in buckets:  # collective: these ranks only take part in gathering
            pass
        return None
    if receiver is None:
        receiver = build_receiver(SyncSection(), engine.engines, folder=folder, template_dir=template, weights_file=weights_file)
    try:
        receiver.begin(version)
        for bucket in buckets:
            receiver.receive(bucket)
        receiver.commit()
    except BaseException:
        receiver.abandon()
        raise
    return receiver.report


class StudentWeights:
    """Puts a trainer's weights into servers, as the section sync says. Every rank has one and calls it together; the one with an engine sends."""

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
        turns: Apart | None = None,
    ) -> None:
        """folder: for versions by disk. template: a checkpoint of the served architecture. weights_file: of servers that lopd runs. turns: with them, where
        they share GPUs. ConfigError: settings."""
        if settings.verify is None:
            settings = settings.model_copy(update={"verify": "tensors" if weights_file is not None else "scores"})
        self._trainer, self._samples, self._settings, self._engine = trainer, samples, settings, engine
        self._folder, self._template, self._turns = folder, template, turns or Apart()
        self._weights_file = Path(weights_file) if weights_file is not None else None
        self._receiver = None
        if engine is not None:
            self._receiver = build_receiver(settings, engine.engines, folder=folder, template_dir=template, weights_file=self._weights_file)

    def push(self, version: str) -> SyncReport | None:
        """Sends the weights as they are now and verifies them; on the rank with an engine what it cost. Servers that are being started again are waited for
        up to sync.timeout_s. EngineError."""
        if self._engine is not None and self._engine.settings.restarts > 0:
            await_servers(self._engine.engines, self._settings.timeout_s)
        probe = self._probe() if self._settings.verify == "scores" else None
        with self._turns.to_server():
            buckets = self._trainer.export(bucket_bytes=self._settings.bucket_bytes)
            report = push_weights(buckets, self._engine, folder=self._folder, template=self._template, version=version, receiver=self._receiver)
        if self._engine is not None and self._weights_file is not None and self._settings.transport != "disk":
            remember_unsaved_weights(self._weights_file, version)
        if self._engine is not None and probe is not None:
            ScoreVerification(probe, self._settings.tolerance).check(self._engine.engines)
        return report

    def _probe(self) -> Probe:
        """The trainer's own log-probabilities of the first samples. Collective."""
        samples = [self._samples[index] for index in range(min(self._settings.num_probes, len(self._samples)))]
        logprobs = self._trainer.logprobs_of([build_microbatch([sample], parallel.tensor_size()) for sample in samples])
        requests = tuple(ScoreRequest(f"probe-{index}", 0, sample.token_ids[:1], sample.token_ids[1:]) for index, sample in enumerate(samples))
        values = (row[: len(sample) - 1].float().cpu().numpy() for row, sample in zip(logprobs, samples, strict=True))
        return Probe(requests, {request.key: value for request, value in zip(requests, values, strict=True)})


class SyncEvaluation:
    """Answers to the same held-out prompts, with the same seeds, after every sync."""

    def __init__(self, config: Config, model: Path, engine: SGLangEngine) -> None:
        """model: a folder with the tokenizer."""
        self._config, self._engine = config, engine
        self._task = get_task(config.task.name, config.task.options)
        self._tokenizer = load_tokenizer(model)
        length = config.sglang.context_length
        prompts, ids = load_prompts(config.prompts.eval, self._task, self._tokenizer, context_length=length, need_answers=True)
        self._prompts, self._ids = prompts[: config.distill.sync_num_prompts], ids[: config.distill.sync_num_prompts]
        self._params = sampling_params(config.evaluate, (config.models.teacher, config.models.student))

    def run(self, version: str) -> dict[str, Any]:
        """accuracy, mean response length in tokens, share of truncated responses. OtherWeights: a response is not of this version."""
        by_id = {prompt.prompt_id: prompt for prompt in self._prompts}
        requests = (
            SamplingRequest(prompt.prompt_id, 0, ids, request_seed(self._config.run.seed, prompt.prompt_id, 0, "sync"))
            for prompt, ids in zip(self._prompts, self._ids, strict=True)
        )
        lengths, truncated = [], []

        def responses() -> Iterator[Judged]:
            for response in self._engine.generate(requests, self._params, version=version):
                lengths.append(len(response.token_ids))
                truncated.append(response.finish_reason == "length")
                yield by_id[response.prompt_id], decode(self._tokenizer, response.token_ids), response.finish_reason

        correct, count = sum(verdict.right for verdict in judge_all(self._task, responses())), len(self._prompts)
        return {"accuracy": correct / count, "num_prompts": count, "response_len": sum(lengths) / count, "truncated_share": sum(truncated) / count}
