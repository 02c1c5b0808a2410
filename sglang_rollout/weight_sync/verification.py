"""Do the servers use the weights that were sent?

There are two answers: by the fingerprints of every tensor, or by the scores of a few responses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lopd.errors import EngineError
from lopd.records import Floats, Key
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.scoring import ScoreRequest
from sglang_rollout.server_side.checkpoint import tensor_shapes
from sglang_rollout.server_side.fingerprints import Method, fingerprints
from sglang_rollout.server_side.parts import Part, cover
from sglang_rollout.server_side.served_weights import FINGERPRINTS, LAYOUT, RANK
from sglang_rollout.weight_sync.interface import Bucket, on_all

# How many tensors a message names.
_MAX_NAMED = 5
# Each call to a server has its own timeout. The wait for all of them lasts this much longer.
_ANSWER_MARGIN_S = 10


class _Served(NamedTuple):
    """How the servers hold a tensor: in which type and in which parts."""

    dtype: torch.dtype
    parts: tuple[Part, ...]


class TensorVerification:
    """Compares the fingerprints of every tensor with those that the server computes.

    The server computes them from the parameters that it really uses, one for each part of a tensor
    that a rank holds. Only servers that lopd started can do that.
    """

    def __init__(self, *, timeout_s: float = 300.0) -> None:
        self._timeout_s = timeout_s
        self._template_dir = Path()
        # How the servers hold each tensor. It does not change while they run.
        self._served: dict[str, _Served] = {}
        # Replaced by the servers' own method in begin(). Fingerprints by two methods are never
        # equal.
        self._method: Method = "xxh3"
        self._expected: dict[str, dict[Part, int]] = {}

    def begin(self, engines: Sequence[SGLangEngine], template_dir: Path) -> None:
        """Start a version.

        Args:
            engines: One engine for each server.
            template_dir: A checkpoint with the names and shapes of the tensors.

        Raises:
            EngineError: The servers cannot report fingerprints, a parameter of the served model
                gets no tensor of the checkpoint, or a part of a tensor goes into no parameter.
        """
        self._template_dir = template_dir
        # Those of the former version must not be compared with the new weights.
        self._expected = {}
        # The layout is asked for once. Later versions have the same tensors in the same parts.
        if self._served:
            return
        # All servers have the same settings, so the first one answers for all of them. No
        # fingerprint is computed for this answer.
        ranks = self._ask(engines[:1], LAYOUT)[0]
        # A parameter that no rank fills is an error. One rank alone may have nothing to fill: its
        # share of the vocabulary can be padding.
        about = [rank.pop(RANK) for rank in ranks]
        for name in sorted(set.intersection(*(set(one["not_fed"]) for one in about))):
            raise EngineError(
                f"no tensor of the checkpoint is loaded into parameter {name} of the served model",
                where=engines[0].url,
                remedy="store this tensor in the checkpoint under its own name: this SGLang "
                "cannot serve, for example, tied embeddings of a mixture of experts",
            )
        served = _merged(ranks)
        shapes = tensor_shapes(template_dir)
        for name, held in served.items():
            # Only parts are compared, so an element that is in none of them would never be.
            if not cover(held.parts, torch.Size(shapes[name]).numel()):
                raise EngineError(
                    f"a part of tensor {name} is loaded into no parameter of the served model",
                    where=engines[0].url,
                    remedy='set sync.verify to "scores": this architecture cannot be verified '
                    "tensor by tensor",
                )
        self._method = about[0]["method"]
        self._served = served

    def expect(self, bucket: Bucket) -> dict[str, tuple[int, ...]]:
        """Compute the fingerprints that the servers must have for the tensors of a bucket.

        Args:
            bucket: Full tensors by their Hugging Face names, as they are sent.

        Returns:
            The fingerprints of the tensors themselves, where those were computed.
        """
        # No rank holds the output layer of a model that shares its input embedding.
        held = [(name, tensor.detach()) for name, tensor in bucket if name in self._served]
        places = [(name, part) for name, _ in held for part in self._served[name].parts]
        # The server rounds what it gets to the dtype of its parameter. Only the rounded bits can be
        # equal. All parts at once: on a GPU tensors of one shape are then one operation.
        numbers = fingerprints(
            [part.of(tensor) for name, tensor in held for part in self._served[name].parts],
            [self._served[name].dtype for name, _ in places],
            self._method,
        )
        for (name, part), number in zip(places, numbers, strict=True):
            self._expected.setdefault(name, {})[part] = number
        # Where the server rounds, the numbers are not those of the tensor that is sent, so they are
        # of no use to a caller that compares tensors (delta.py).
        return {
            name: tuple(self._expected[name].values())
            for name, tensor in held
            if self._served[name].dtype == tensor.dtype
        }

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
            # All differing tensors are collected first: which ones they are shows what went wrong
            # in the sync.
            wrong = []
            for name, expected in self._expected.items():
                difference = _difference(expected, [rank[name] for rank in ranks if name in rank])
                if difference:
                    wrong.append(f"{name} ({difference})")
            if wrong:
                # A few names show the kind of fault. All of them could be thousands.
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
        """Return, for each server and each of its ranks, what it says of each tensor."""
        # The folder travels inside the name of the action, because SGLang's call has no other field
        # for it.
        body = {"action": f"{action}{self._template_dir.resolve()}"}

        def ask(engine: SGLangEngine) -> list[dict[str, Any]]:
            try:
                answer = engine.call("POST", "/weights_checker", body, timeout_s=self._timeout_s)
            # A server without our plugin refuses the action, which is the usual reason.
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


def _merged(ranks: Sequence[Mapping[str, Any]]) -> dict[str, _Served]:
    """Return how all ranks of a server together hold each tensor."""
    parts: dict[str, dict[Part, None]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for rank in ranks:
        for name, held in rank.items():
            dtypes[name] = getattr(torch, held["dtype"])
            # Norms and small heads are held by every rank. Such a part counts once.
            parts.setdefault(name, {}).update(
                dict.fromkeys(Part.from_json(part) for part in held["parts"])
            )
    return {name: _Served(dtypes[name], tuple(found)) for name, found in parts.items()}


def _difference(expected: Mapping[Part, int], ranks: Sequence[Mapping[str, Any]]) -> str:
    """Return what is wrong with one tensor, or "" where nothing is.

    Args:
        expected: The fingerprint of each part of the tensor.
        ranks: The answers of the ranks that hold a part of it.
    """
    found: dict[Part, int] = {}
    for rank in ranks:
        for value, number in zip(rank["parts"], rank["numbers"], strict=True):
            # All holders of a part must agree.
            if found.setdefault(Part.from_json(value), number) != number:
                return "its ranks hold different values"
    if not found:
        return "no rank holds it"
    if found.keys() != expected.keys():
        return "its ranks hold other parts than before"
    return "" if found == expected else "other values"


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
                # The worst response of a server is named, and not the first bad one.
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
