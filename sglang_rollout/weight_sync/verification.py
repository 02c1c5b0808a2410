"""Do the servers use the weights that were sent?

There are two answers: by the fingerprints of every tensor, or by the scores of a few responses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopd.errors import EngineError
from lopd.records import Floats, Key
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.scoring import ScoreRequest
from sglang_rollout.server_side.fingerprints import fingerprint
from sglang_rollout.server_side.served_weights import DTYPES, FINGERPRINTS, NOT_FED
from sglang_rollout.weight_sync.interface import on_all

# How many tensors a message names.
_MAX_NAMED = 5
# Each call to a server has its own timeout. The wait for all of them lasts this much longer.
_ANSWER_MARGIN_S = 10
_MODULUS = 2**64


class TensorVerification:
    """Compares the fingerprint of every tensor with the one that the server computes.

    The server computes it from the parameters that it really uses. Only servers that lopd started
    can do that.
    """

    def __init__(self, *, timeout_s: float = 300.0) -> None:
        self._timeout_s = timeout_s
        self._template_dir = Path()
        # Tensor -> the dtype in which the servers keep it. It does not change while they run.
        self._dtypes: dict[str, torch.dtype] = {}
        self._expected: dict[str, int] = {}

    def begin(self, engines: Sequence[SGLangEngine], template_dir: Path) -> None:
        """Start a version.

        Args:
            engines: One engine for each server.
            template_dir: A checkpoint with the names and shapes of the tensors.

        Raises:
            EngineError: The servers cannot report fingerprints, or a parameter of the served model
                gets no tensor of the checkpoint.
        """
        self._template_dir = template_dir
        self._expected = {}
        if self._dtypes:
            return
        # All servers have the same settings, so the first one answers for all of them. It tells
        # dtypes only: no fingerprint is computed for this answer.
        ranks = self._ask(engines[:1], DTYPES)[0]
        # A parameter that no rank fills is an error. One rank alone may have nothing to fill: its
        # share of the vocabulary can be padding.
        not_fed = set.intersection(*(set(rank.pop(NOT_FED)) for rank in ranks))
        for name in sorted(not_fed):
            raise EngineError(
                f"no tensor of the checkpoint is loaded into parameter {name} of the served model",
                where=engines[0].url,
                remedy="store this tensor in the checkpoint under its own name: this SGLang "
                "cannot serve, for example, tied embeddings of a mixture of experts",
            )
        self._dtypes = {
            name: getattr(torch, held["dtype"]) for rank in ranks for name, held in rank.items()
        }

    def expect(self, name: str, tensor: Tensor) -> int | None:
        """Compute the fingerprint that the servers must have for a tensor.

        Args:
            name: The Hugging Face name.
            tensor: The full tensor that is sent.

        Returns:
            The fingerprint of the tensor itself, or None where it was not computed.
        """
        dtype = self._dtypes.get(name)
        # No rank holds the output layer of a model that shares its input embedding.
        if dtype is None:
            return None
        # The server rounds what it gets to the dtype of its parameter. Only the rounded bits can be
        # equal.
        self._expected[name] = fingerprint(tensor.detach().to(dtype))
        # Where the server rounds, the number is not that of the tensor that is sent, so it is of no
        # use to a caller that compares tensors (delta.py).
        return self._expected[name] if dtype == tensor.dtype else None

    def check(self, engines: Sequence[SGLangEngine]) -> int:
        """Compare all tensors of the version on every server.

        Returns:
            The number of tensors compared.

        Raises:
            EngineError: Tensors differ. The message names them.
        """
        # All tensors of the version are compared, also those that a delta did not send.
        answers = self._ask(engines, FINGERPRINTS)
        for engine, ranks in zip(engines, answers, strict=True):
            wrong = []
            for name, expected in self._expected.items():
                difference = _difference(expected, [rank[name] for rank in ranks if name in rank])
                if difference:
                    wrong.append(f"{name} ({difference})")
            if wrong:
                named = ", ".join(wrong[:_MAX_NAMED])
                more = f" and {len(wrong) - _MAX_NAMED} more" if len(wrong) > _MAX_NAMED else ""
                raise EngineError(
                    f"{len(wrong)} of {len(self._expected)} tensors differ from what was sent: "
                    f"{named}{more}",
                    where=engine.url,
                    remedy="do not use the served weights: sync again, or restart the server",
                )
        return len(self._expected)

    def _ask(self, engines: Sequence[SGLangEngine], action: str) -> list[list[dict[str, Any]]]:
        """Return, for each server and each of its ranks, tensor -> dtype and parts."""
        body = {"action": f"{action}{self._template_dir.resolve()}"}

        def ask(engine: SGLangEngine) -> list[dict[str, Any]]:
            try:
                answer = engine.call("POST", "/weights_checker", body, timeout_s=self._timeout_s)
            except EngineError as error:
                raise EngineError(
                    f"the server cannot report fingerprints of its weights ({error.what})",
                    where=engine.url,
                    remedy="for a server that lopd did not start, set sync.verify to "
                    '"scores" or "off"',
                ) from None
            # SGLang's answer has room for a text for each tensor, so the values come as JSON.
            return [
                {name: json.loads(held) for name, held in rank["checksums"].items()}
                for rank in answer["ranks"]
            ]

        return on_all(engines, ask, self._timeout_s + _ANSWER_MARGIN_S)


def _difference(expected: int, ranks: Sequence[Mapping[str, Any]]) -> str:
    """Return what is wrong with one tensor, or "" where nothing is.

    Args:
        expected: The fingerprint of the full tensor.
        ranks: The answers of the ranks that hold a part of it.
    """
    parts: dict[str, int] = {}
    for rank in ranks:
        for offset, shape, strides, total in rank["parts"]:
            # Norms and small heads are held by every rank. Such a part counts once, and all its
            # holders must agree.
            place = json.dumps([offset, shape, strides])
            if parts.setdefault(place, total) != total:
                return "its ranks hold different values"
    if not parts:
        return "no rank holds it"
    # The fingerprints of the parts of a tensor add up to that of the tensor.
    return "" if sum(parts.values()) % _MODULUS == expected else "other values"


@dataclass(frozen=True)
class Probe:
    """Responses and the trainer's own scores of them.

    Attributes:
        requests: The responses.
        expected: For each response the log-probabilities of its tokens, float32 of shape [R].
    """

    requests: tuple[ScoreRequest, ...]
    expected: Mapping[Key, Floats]


class ScoreVerification:
    """Compares the scores that every server gives to a few responses with the trainer's.

    It names no tensor, but it needs nothing of ours in the server. The requests must be let go
    again before the check.
    """

    def __init__(self, probe: Probe, tolerance: float) -> None:
        """
        Args:
            probe: The responses and the trainer's scores.
            tolerance: The largest difference in nats per token, in the mean over a response.
        """
        self._probe = probe
        self._tolerance = tolerance

    def check(self, engines: Sequence[SGLangEngine]) -> int:
        """Compare all responses on every server.

        Returns:
            The number of responses compared.

        Raises:
            EngineError: The log-probabilities of a response differ by more than the tolerance.
        """
        for engine in engines:
            worst = 0.0
            key = ("", 0)
            for scores in engine.score(self._probe.requests):
                differences = np.abs(scores.teacher_logprobs - self._probe.expected[scores.key])
                # The mean over the tokens: one unlikely token may differ much by rounding alone.
                # NaN counts as infinite, because it compares as false with everything and would
                # pass as the best value.
                difference = float(np.nan_to_num(differences, nan=np.inf).mean())
                if difference > worst:
                    worst = difference
                    key = scores.key
            if worst > self._tolerance:
                raise EngineError(
                    f"the log-probabilities of response {key[0]}#{key[1]} differ by "
                    f"{worst:.2g} nats per token from those of the trainer",
                    where=engine.url,
                    limit=f"at most sync.tolerance = {self._tolerance:g}",
                    remedy="run lopd parity: if it shows that the server only rounds more "
                    "coarsely, raise sync.tolerance; otherwise the server does not have "
                    "the weights of the trainer",
                )
        return len(self._probe.requests)
