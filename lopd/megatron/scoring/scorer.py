"""A second scorer: the log-probability, and where asked for the entropy, of given responses by a
model that runs in Megatron-Core, forward only.

    with MegatronScorer(folder_of_model, settings, folder=work) as engine:
        for score in engine.score(requests):            # as SGLangEngine.score: in any order, each request once
            ...

For users who want teacher and student from one engine: the same kernels, layout rules and dtype as
the trainer. The ranks are started by lopd.megatron.ranks.launch and run
lopd.megatron.scoring.scorer_worker. Requests and answers cross as files of plain numbers (.npz) in
a folder: a few chunks ahead, so the memory of this process does not grow with the number of
responses, and ranks that wait for a chunk wait in no collective.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from lopd.artifacts import publish_json, remove_folder
from lopd.batching import refuse_too_long
from lopd.config import ForwardSection
from lopd.errors import ConfigError, DataError, EngineError, LopdError
from lopd.megatron.ranks.launch import run_ranks, threads_of
from lopd.megatron.weights.architecture import read_architecture, validate_layout
from lopd.records import Ints, TeacherScores, token_hash

AHEAD = 2  # chunks that are written while another is scored
CHUNK_MICROBATCHES = (
    8  # of each data rank: enough to balance them, few enough that the first answers come soon
)
POLL_S = 0.02
MAX_LOGPROB = 1e-4  # a probability of 1 may come out as a hair more
END = "end"


class Scorable(Protocol):
    """A response to score: sglang_rollout.requests.scoring.ScoreRequest, or anything like it."""

    @property
    def prompt_id(self) -> str: ...
    @property
    def sample_index(self) -> int: ...
    @property
    def prompt_ids(self) -> Ints: ...
    @property
    def token_ids(self) -> Ints: ...


@dataclass(frozen=True, slots=True)
class _Chunk:
    number: int
    requests: Sequence[Scorable]


class MegatronScorer:
    """Ranks with a model, as long as the ``with`` block lasts; they end with this process, whatever
    ends it.
    """

    def __init__(
        self,
        model: Path,
        settings: ForwardSection,
        *,
        folder: Path,
        name: str = "teacher",
        entropy: bool = False,
    ) -> None:
        """folder: for the ranks' log, megatron-NAME.log, of which no other scorer may write.
        LopdError: the model, or the layout does not divide it.
        """
        self._model, self._settings, self._entropy = model, settings, entropy
        validate_layout(
            read_architecture(model), settings.parallel, where=f"parallel of the {name}"
        )
        self._log = folder / f"megatron-{name}.log"
        self._spool = Path(
            tempfile.gettempdir(), f"lopd-megatron-{name}-{os.getpid()}-{secrets.token_hex(4)}"
        )
        self._number = 0
        self._stop = threading.Event()
        self._error: LopdError | None = None
        self._thread = threading.Thread(target=self._run, name=f"megatron-{name}", daemon=True)

    def __enter__(self) -> Self:
        self._spool.mkdir(mode=0o700)
        settings = self._settings.model_dump(mode="json")
        publish_json(
            self._spool / "job.json",
            {"model": str(self._model), "settings": settings, "entropy": self._entropy},
        )
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            (self._spool / END).touch()
        else:
            self._stop.set()
        self._thread.join()
        remove_folder(self._spool)

    def score(self, requests: Iterable[Scorable], *, top_k: int = 0) -> Iterator[TeacherScores]:
        """Score every response; scores come in chunks as these are done. Natural log, temperature
        1.

        ConfigError: top_k, which this engine cannot give. DataError: empty, or longer than a
        microbatch. LopdError: what stopped the ranks. EngineError: a value that no model gives.
        """
        if top_k:
            raise ConfigError(
                f"top_k = {top_k}, and this scorer gives none",
                where="score.engine = 'megatron'",
                remedy="set score.engine = 'sglang'",
            )
        waiting: deque[_Chunk] = deque()
        for chunk in self._chunks(requests):
            self._send(chunk)
            waiting.append(chunk)
            if len(waiting) > AHEAD:
                yield from self._receive(waiting.popleft())
        while waiting:
            yield from self._receive(waiting.popleft())

    def _chunks(self, requests: Iterable[Scorable]) -> Iterator[_Chunk]:
        settings = self._settings
        budget = CHUNK_MICROBATCHES * settings.parallel.data * settings.max_tokens_per_microbatch
        pending: list[Scorable] = []
        num_tokens = 0
        for request in requests:
            length = self._length(request)
            if pending and num_tokens + length > budget:
                yield self._numbered(pending)
                pending, num_tokens = [], 0
            pending.append(request)
            num_tokens += length
        if pending:
            yield self._numbered(pending)

    def _numbered(self, requests: list[Scorable]) -> _Chunk:
        self._number += 1
        return _Chunk(self._number, requests)

    def _length(self, request: Scorable) -> int:
        name = f"response {request.prompt_id}/{request.sample_index}"
        if len(request.prompt_ids) == 0 or len(request.token_ids) == 0:
            what = f"{len(request.prompt_ids)} prompt tokens and {len(request.token_ids)} response tokens"
            raise DataError(
                what,
                where=name,
                limit="at least one of each: the first token of a sequence has no log-probability",
            )
        length = len(request.prompt_ids) + len(request.token_ids)
        parallel = self._settings.parallel
        refuse_too_long(
            [length],
            self._settings.max_tokens_per_microbatch,
            parallel.tensor,
            [name],
            context=parallel.context,
        )
        return length

    def _send(self, chunk: _Chunk) -> None:
        prompts, responses = (
            [request.prompt_ids for request in chunk.requests],
            [request.token_ids for request in chunk.requests],
        )
        tokens = np.concatenate(
            [part for pair in zip(prompts, responses, strict=True) for part in pair]
        )
        write_numbers(
            self._spool / f"in-{chunk.number:06d}.npz",
            tokens=tokens,
            prompt_lens=[*map(len, prompts)],
            response_lens=[*map(len, responses)],
        )

    def _receive(self, chunk: _Chunk) -> Iterator[TeacherScores]:
        answered = 0
        for data_rank in range(self._settings.parallel.data):
            path = self._spool / f"out-{chunk.number:06d}-{data_rank:04d}.npz"
            while not path.exists():
                if not self._thread.is_alive():
                    raise self._error or EngineError(
                        "the ranks ended before they had answered", where=str(self._log)
                    )
                time.sleep(POLL_S)
            answer = read_numbers(path)
            bounds = np.cumsum([0, *answer["lengths"]])
            for place, index in enumerate(answer["index"].tolist()):
                rows = slice(bounds[place], bounds[place + 1])
                yield self._scores(
                    chunk.requests[index],
                    answer["logprobs"][rows],
                    answer["entropy"][rows] if self._entropy else None,
                )
                answered += 1
            path.unlink()
        assert answered == len(chunk.requests), (
            f"{answered} answers to {len(chunk.requests)} requests"
        )
        (self._spool / f"in-{chunk.number:06d}.npz").unlink()

    def _scores(self, request: Scorable, logprobs: Any, entropy: Any) -> TeacherScores:
        assert len(logprobs) == len(request.token_ids)
        if not np.isfinite(logprobs).all() or logprobs.max() > MAX_LOGPROB:
            bad = int(np.flatnonzero(~np.isfinite(logprobs) | (logprobs > MAX_LOGPROB))[0])
            where = f"response {request.prompt_id}/{request.sample_index}, token {bad}"
            raise EngineError(
                f"log-probability {logprobs[bad]}",
                where=where,
                limit="finite and at most 0",
                remedy=f"look at the weights of {self._model}",
            )
        hashed = token_hash(request.prompt_ids, request.token_ids)
        return TeacherScores(
            request.prompt_id,
            request.sample_index,
            hashed,
            np.minimum(logprobs, 0),
            entropy=entropy,
        )

    def _run(self) -> None:
        settings = self._settings
        try:
            run_ranks(
                "lopd.megatron.scoring.scorer_worker",
                [str(self._spool)],
                ranks=settings.parallel.ranks,
                threads_per_rank=threads_of(settings),
                log=self._log,
                timeout_s=settings.timeout_s,
                stop=self._stop,
            )
        except LopdError as error:  # raised where somebody waits for an answer
            self._error = error


def write_numbers(path: Path, **arrays: Any) -> None:
    """Arrays of numbers by name, as a file that appears at once and complete."""
    buffer = io.BytesIO()
    columns: dict[str, Any] = {name: np.asarray(values) for name, values in arrays.items()}
    np.savez(buffer, **columns)
    partial = path.with_suffix(".partial")
    partial.write_bytes(buffer.getvalue())
    partial.rename(path)


def read_numbers(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def read_job(spool: Path) -> tuple[Path, ForwardSection, bool]:
    """What a rank is told: model, settings, whether entropy is asked for."""
    job = json.loads((spool / "job.json").read_text(encoding="utf-8"))
    return Path(job["model"]), ForwardSection.model_validate(job["settings"]), bool(job["entropy"])
