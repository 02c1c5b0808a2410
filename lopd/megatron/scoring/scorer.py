"""A second scorer: log-probabilities of given responses by a model in Megatron-Core.

It runs forward passes alone. On request it gives the entropy at every token too.

    with MegatronScorer(folder_of_model, settings, folder=work) as engine:
        # As SGLangEngine.score: each request once, in any order.
        for score in engine.score(requests):
            ...

It is for users who want teacher and student from one engine, with the same kernels, layout rules
and dtype as the trainer. lopd.megatron.ranks.launch starts the ranks, which run
lopd.megatron.scoring.scorer_worker. Requests and answers cross as files
(lopd.megatron.scoring.exchange), a few chunks ahead. So the memory of this process does not grow
with the number of responses, and ranks that wait for a chunk wait in no collective.
"""

from __future__ import annotations

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

from lopd.artifacts import remove_folder
from lopd.batching import refuse_too_long
from lopd.config import ForwardSection
from lopd.errors import ConfigError, DataError, EngineError, LopdError
from lopd.megatron.ranks.launch import run_ranks, threads_of
from lopd.megatron.scoring.exchange import (
    END,
    POLL_S,
    answers_path,
    read_numbers,
    requests_path,
    write_job,
    write_numbers,
)
from lopd.megatron.weights.architecture import read_architecture, validate_layout
from lopd.records import Ints, TeacherScores, token_hash

# Chunks that are written while another is scored. They keep the ranks busy.
AHEAD = 2
# Microbatches of each data rank in a chunk: enough to balance their lengths, and few enough that
# the first answers come soon.
CHUNK_MICROBATCHES = 8
# Nats. Rounding can bring the log-probability of a certain token a little above 0.
MAX_LOGPROB = 1e-4


# A protocol, because the Megatron side of lopd imports nothing of the SGLang side.
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
    """Ranks with a model, for as long as the ``with`` block lasts.

    The ranks end with this process, however it ends.
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
        """Check the model and the layout. Nothing starts yet.

        Args:
            model: The Hugging Face folder of the model.
            settings: The [score.forward] section.
            folder: The folder of the ranks' log, megatron-NAME.log. No other scorer may write to
                the same log.
            name: The name of the model, for the log and for messages.
            entropy: Whether the scores have the entropy at every token.

        Raises:
            LopdError: The model cannot be read, or the layout does not divide it.
        """
        self._model = model
        self._settings = settings
        self._entropy = entropy
        # Here, before the ranks start: a layout that does not fit is then an error in a second, and
        # not after the model was read.
        architecture = read_architecture(model)
        validate_layout(architecture, settings.parallel, where=f"parallel of the {name}")
        self._num_rows = architecture.vocab_size
        self._log = folder / f"megatron-{name}.log"
        # The name is unique: a process may have several scorers, and a machine several users.
        self._spool = Path(
            tempfile.gettempdir(), f"lopd-megatron-{name}-{os.getpid()}-{secrets.token_hex(4)}"
        )
        # The number of the newest chunk, from 1.
        self._number = 0
        self._stop = threading.Event()
        self._error: LopdError | None = None
        self._thread = threading.Thread(target=self._run, name=f"megatron-{name}", daemon=True)

    def __enter__(self) -> Self:
        # For its owner alone: other users of the machine must not read prompts and responses.
        self._spool.mkdir(mode=0o700)
        write_job(self._spool, self._model, self._settings, entropy=self._entropy)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            # The ranks finish by themselves, and close their process groups in order.
            (self._spool / END).touch()
        else:
            # Nobody wants the rest of the answers.
            self._stop.set()
        # The ranks read and write in the spool. It goes when they have ended.
        self._thread.join()
        remove_folder(self._spool)

    def score(self, requests: Iterable[Scorable], *, top_k: int = 0) -> Iterator[TeacherScores]:
        """Score every response. Scores come in chunks, as soon as a chunk is done.

        Args:
            requests: The responses. They are read as they are needed.
            top_k: Must be 0. This scorer gives no top-K.

        Yields:
            Natural logarithms at temperature 1.

        Raises:
            ConfigError: top_k is not 0.
            DataError: A response is empty, or longer than a microbatch.
            EngineError: A value is no log-probability.
            LopdError: The error that ended the ranks.
        """
        if top_k:
            raise ConfigError(
                f"top_k = {top_k} is set, but this scorer returns no top-K scores",
                where="score.engine = 'megatron'",
                remedy="set score.engine = 'sglang'",
            )
        # The bound on chunks ahead is also the bound on memory: requests are kept until their
        # answers come, and are read only when a chunk is to be filled.
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
        # In tokens. A chunk closes before the request that would exceed the budget, so no request
        # is divided.
        budget = CHUNK_MICROBATCHES * settings.parallel.data * settings.max_tokens_per_microbatch
        pending: list[Scorable] = []
        num_tokens = 0
        for request in requests:
            length = self._length(request)
            if pending and num_tokens + length > budget:
                yield self._numbered(pending)
                pending = []
                num_tokens = 0
            pending.append(request)
            num_tokens += length
        if pending:
            yield self._numbered(pending)

    def _numbered(self, requests: list[Scorable]) -> _Chunk:
        # One count for all calls of score: the ranks take chunks in the order of their numbers.
        self._number += 1
        return _Chunk(self._number, requests)

    def _length(self, request: Scorable) -> int:
        """Return the number of tokens of a request that can be scored.

        Raises:
            DataError: The sequence is empty, or longer than a microbatch, or has an unknown token.
        """
        name = f"response {request.prompt_id}/{request.sample_index}"
        # Checked when the request comes: an error among the ranks could not name the response.
        prompt_len = len(request.prompt_ids)
        response_len = len(request.token_ids)
        if prompt_len == 0 or response_len == 0:
            raise DataError(
                f"the sequence has {prompt_len} prompt tokens and {response_len} response tokens",
                where=name,
                limit="at least one of each, because the first token of a sequence has no "
                "log-probability",
                remedy="remove this response",
            )
        # The rows past the vocabulary are padding: their ids would get a value that means nothing.
        largest = max(int(request.prompt_ids.max()), int(request.token_ids.max()))
        if largest >= self._num_rows:
            raise DataError(
                f"the sequence has a token {largest} past the rows of the model",
                where=name,
                limit=f"at most {self._num_rows - 1}: {self._model} has {self._num_rows} rows",
                remedy="remove this response: the model that sampled it has more rows",
            )
        length = prompt_len + response_len
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
        # All sequences end to end, each prompt followed by its response.
        parts: list[Ints] = []
        for request in chunk.requests:
            parts += [request.prompt_ids, request.token_ids]
        write_numbers(
            requests_path(self._spool, chunk.number),
            tokens=np.concatenate(parts),
            prompt_lens=[len(request.prompt_ids) for request in chunk.requests],
            response_lens=[len(request.token_ids) for request in chunk.requests],
        )

    def _receive(self, chunk: _Chunk) -> Iterator[TeacherScores]:
        num_answered = 0
        for data_rank in range(self._settings.parallel.data):
            path = answers_path(self._spool, chunk.number, data_rank)
            self._wait_for(path)
            answer = read_numbers(path)
            bounds = np.cumsum([0, *answer["lengths"]])
            for place, index in enumerate(answer["index"].tolist()):
                rows = slice(bounds[place], bounds[place + 1])
                entropy = answer["entropy"][rows] if self._entropy else None
                yield self._scores(chunk.requests[index], answer["logprobs"][rows], entropy)
                num_answered += 1
            # The spool holds only chunks that are under way, so it does not grow with the data.
            path.unlink()
        assert num_answered == len(chunk.requests), (
            f"{num_answered} answers to {len(chunk.requests)} requests"
        )
        # Not before the last answer: a data rank that is behind still has to read the requests.
        requests_path(self._spool, chunk.number).unlink()

    def _wait_for(self, path: Path) -> None:
        # No limit of time here: run_ranks ends ranks that hang, and then the thread ends.
        while not path.exists():
            if not self._thread.is_alive():
                raise self._error or EngineError(
                    "the ranks ended before they had answered",
                    where=str(self._log),
                    remedy="read the log",
                )
            time.sleep(POLL_S)

    def _scores(self, request: Scorable, logprobs: Any, entropy: Any) -> TeacherScores:
        assert len(logprobs) == len(request.token_ids)
        # A broken model gives nan or values above 0. In a cache they would end a training much
        # later, far from their cause.
        bad = np.flatnonzero(~np.isfinite(logprobs) | (logprobs > MAX_LOGPROB))
        if len(bad):
            first = int(bad[0])
            raise EngineError(
                f"the model gives the log-probability {logprobs[first]}, which no token can have",
                where=f"response {request.prompt_id}/{request.sample_index}, token {first}",
                limit="a finite number that is at most 0",
                remedy=f"check the weights of {self._model}",
            )
        return TeacherScores(
            request.prompt_id,
            request.sample_index,
            token_hash(request.prompt_ids, request.token_ids),
            # What is above 0 by rounding is the log-probability of a certain token.
            np.minimum(logprobs, 0),
            entropy=entropy,
        )

    def _run(self) -> None:
        settings = self._settings
        try:
            # In a thread of its own: this call ends only when all ranks have ended.
            run_ranks(
                "lopd.megatron.scoring.scorer_worker",
                [str(self._spool)],
                ranks=settings.parallel.ranks,
                threads_per_rank=threads_of(settings),
                log=self._log,
                timeout_s=settings.timeout_s,
                stop=self._stop,
            )
        # An exception would end this thread unseen. It is raised where an answer is waited for.
        except LopdError as error:
            self._error = error
