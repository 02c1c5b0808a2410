"""Requests without end to a real server, so that some are under way whenever its weights change,
however fast or slow the machine is.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd.records import Floats, Response
from sglang_rollout.requests import client
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest
from tests.sglang.conftest import sampling_requests
from tests.sglang.test_parity import MAX_DIFFERENCE, HuggingFace

PATIENCE_S = 120.0  # for what takes a second or two: only a hang takes as long


def number_of(item: SamplingRequest | Response) -> int:
    """Requests are numbered in the order in which they are begun."""
    return int(item.prompt_id.removeprefix("p"))


class Traffic:
    """A thread that takes the responses of an engine.generate() whose input goes on until end().
    Attributes are the thread's: read copies (seen()).
    """

    def __init__(
        self, engine: SGLangEngine, params: SamplingParams, attempts: Counter[int]
    ) -> None:
        """attempts: how often each request was sent; somebody else counts."""
        self._engine = engine
        self._params = params
        self.attempts = attempts
        self._changed = threading.Condition()
        self._num_begun = 0
        self._last = -1
        self._responses: list[Response] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)
        self._thread.start()

    def seen(self) -> tuple[int, list[Response]]:
        """How many requests have been begun, and the responses in the order in which they came."""
        with self._changed:
            return self._num_begun, list(self._responses)

    def until_answered(self, first: int) -> list[Response]:
        """Waits until so many of the requests begun first are answered; those responses."""

        def found() -> list[Response]:
            return [response for response in self._responses if number_of(response) < first]

        self._until(lambda: len(found()) >= first)
        with self._changed:
            return found()

    def end(self, more: int) -> list[Response]:
        """So many requests more, then none; all responses."""
        with self._changed:
            self._last = self._num_begun + more
        self._until(lambda: not self._thread.is_alive() or len(self._responses) >= self._last)
        self._thread.join(PATIENCE_S)
        return self.seen()[1]

    def _until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            came = self._changed.wait_for(
                lambda: condition() or self._failure is not None, PATIENCE_S
            )
        if self._failure is not None:
            raise self._failure
        assert came, f"{len(self._responses)} of {self._num_begun} requests are answered"

    def _requests(self) -> Iterator[SamplingRequest]:
        for number, prompt in enumerate(itertools.cycle(sampling_requests(16))):
            with self._changed:
                if number == self._last:
                    return
                self._num_begun = number + 1
            yield replace(prompt, prompt_id=f"p{number}", seed=1000 + number)

    def _run(self) -> None:
        try:
            for response in self._engine.generate(self._requests(), self._params):
                with self._changed:
                    self._responses.append(response)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()


@contextmanager
def traffic(
    engine: SGLangEngine, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Traffic]:
    """Traffic as long as the block lasts."""
    attempts = Counter[int]()
    payload = client.generate_payload

    def counted(request: SamplingRequest, *rest: Any) -> dict[str, Any]:
        attempts[number_of(request)] += 1
        return payload(request, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(client, "generate_payload", counted)
        requests = Traffic(engine, params, attempts)
        try:
            yield requests
        finally:
            requests.end(0)


class Turns:
    """Two checkpoints that are served in turns: version v3 has the weights of number 3 modulo 2,
    "default" those of number 0.
    """

    def __init__(self, *folders: Path) -> None:
        self._folders = folders
        self._references = [HuggingFace(folder) for folder in folders]
        self._known: dict[tuple[bytes, bytes, int], np.ndarray[Any, np.dtype[np.bool_]]] = {}

    def folder(self, version: int) -> Path:
        return self._folders[version % 2]

    @staticmethod
    def version(response: Response) -> int:
        """ValueError for a version that nobody has committed, such as one called incomplete."""
        return (
            0
            if response.weight_version == "default"
            else int(response.weight_version.removeprefix("v"))
        )

    def _agrees(self, response: Response, version: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether each token's log-probability is that of these weights, [R]."""
        known = (response.token_ids.tobytes(), response.sampling_logprobs.tobytes(), version % 2)
        if known not in self._known:
            expected: Floats = self._references[version % 2].logprobs(
                response.prompt_ids, response.token_ids
            )
            self._known[known] = np.abs(response.sampling_logprobs - expected) <= MAX_DIFFERENCE
        return self._known[known]

    def pure(self, response: Response) -> bool:
        """Every token is of the weights that the response claims."""
        return bool(self._agrees(response, self.version(response)).all())

    def num_before(self, response: Response) -> int:
        """How many of its first tokens are of the weights before those that it claims."""
        return int(
            np.logical_and.accumulate(self._agrees(response, self.version(response) - 1)).sum()
        )

    def pure_from(self, response: Response, place: int) -> bool:
        """Every token from this place on is of the weights that the response claims, which have
        read all before it.
        """
        return bool(self._agrees(response, self.version(response))[place:].all())
