"""Are the weights that the servers use those that were sent? By fingerprints of every tensor, or by
the scores of a few responses.
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

_NAMED = 5  # tensors in the message


class TensorVerification:
    """Every tensor by its fingerprint, computed by the server from the parameters that it uses; for
    servers that lopd started.

    Tensors are compared as they are after rounding to the dtype in which the server keeps them.
    """

    def __init__(self, *, timeout_s: float = 300.0) -> None:
        self._timeout_s = timeout_s
        self._template_dir = Path()
        self._dtypes: dict[str, torch.dtype] = {}  # in which the servers keep a tensor
        self._expected: dict[str, int] = {}

    def begin(self, engines: Sequence[SGLangEngine], template_dir: Path) -> None:
        """EngineError: the servers cannot tell fingerprints, or have parameters that no tensor of
        the checkpoint goes into.
        """
        self._template_dir, self._expected = template_dir, {}
        if not self._dtypes:
            ranks = self._ask(engines[:1], DTYPES)[0]
            for name in sorted(
                set.intersection(*(set(rank.pop(NOT_FED)) for rank in ranks))
            ):  # one rank's share may be padding alone
                raise EngineError(
                    f"parameter {name} of the served model gets no tensor of the checkpoint",
                    where=engines[0].url,
                    remedy="this SGLang cannot serve such a checkpoint (tied embeddings of a mixture of experts, say): store the tensor under its own name",
                )
            self._dtypes = {
                name: getattr(torch, held["dtype"]) for rank in ranks for name, held in rank.items()
            }

    def expect(self, name: str, tensor: Tensor) -> int | None:
        """The tensor's own fingerprint, where it had to be computed."""
        dtype = self._dtypes.get(name)
        if (
            dtype is None
        ):  # no rank holds it: the output layer of a model that shares its input embedding
            return None
        self._expected[name] = fingerprint(tensor.detach().to(dtype))
        return self._expected[name] if dtype == tensor.dtype else None

    def check(self, engines: Sequence[SGLangEngine]) -> int:
        """The number of tensors compared on every server. EngineError: names the tensors that
        differ.
        """
        for engine, ranks in zip(engines, self._ask(engines, FINGERPRINTS), strict=True):
            wrong = []
            for name, expected in self._expected.items():
                said = _difference(expected, [rank[name] for rank in ranks if name in rank])
                if said:
                    wrong.append((name, said))
            if wrong:
                more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
                raise EngineError(
                    f"{len(wrong)} of {len(self._expected)} tensors differ from what was sent: "
                    + ", ".join(f"{name} ({said})" for name, said in wrong[:_NAMED])
                    + more,
                    where=engine.url,
                    remedy="the server's weights are not to be used: sync again, or restart it",
                )
        return len(self._expected)

    def _ask(self, engines: Sequence[SGLangEngine], action: str) -> list[list[dict[str, Any]]]:
        """For each server, for each of its ranks: tensor -> dtype and parts."""

        def ask(engine: SGLangEngine) -> list[dict[str, Any]]:
            try:
                answer = engine.call(
                    "POST",
                    "/weights_checker",
                    {"action": f"{action}{self._template_dir.resolve()}"},
                    timeout_s=self._timeout_s,
                )
            except EngineError as error:
                raise EngineError(
                    f"the server cannot tell fingerprints of its weights ({error.what})",
                    where=engine.url,
                    remedy='for a server that lopd did not start, set sync.verify = "scores" or "off"',
                ) from None
            return [
                {name: json.loads(held) for name, held in rank["checksums"].items()}
                for rank in answer["ranks"]
            ]

        return on_all(engines, ask, self._timeout_s + 10)


def _difference(expected: int, ranks: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with one tensor, "" where nothing is. ranks: those that hold a part of it; a
    part that several hold counts once.
    """
    parts: dict[str, int] = {}
    for rank in ranks:
        for offset, shape, strides, total in rank["parts"]:
            where = json.dumps([offset, shape, strides])
            if parts.setdefault(where, total) != total:
                return "its ranks hold different values"
    if not parts:
        return "no rank holds it"
    return "" if sum(parts.values()) % 2**64 == expected else "other values"


@dataclass(frozen=True)
class Probe:
    """Responses and the trainer's own log-probabilities of their tokens, float32 [R] each."""

    requests: tuple[ScoreRequest, ...]
    expected: Mapping[Key, Floats]


class ScoreVerification:
    """A few responses scored by every server as by the trainer; names no tensor, but needs nothing
    of ours in the server.

    To be checked once requests are let go again.
    """

    def __init__(self, probe: Probe, tolerance: float) -> None:
        self._probe, self._tolerance = probe, tolerance

    def check(self, engines: Sequence[SGLangEngine]) -> int:
        """The number of responses compared. EngineError: the log-probabilities of one differ by
        more than the tolerance, in the mean over its tokens.
        """
        for engine in engines:
            worst, key = 0.0, ("", 0)
            for scores in engine.score(self._probe.requests):
                differences = np.abs(scores.teacher_logprobs - self._probe.expected[scores.key])
                difference = float(np.nan_to_num(differences, nan=np.inf).mean())
                if difference > worst:
                    worst, key = difference, scores.key
            if worst > self._tolerance:
                raise EngineError(
                    f"the log-probabilities of response {key[0]}#{key[1]} are {worst:.2g} nats a token from the trainer's",
                    where=engine.url,
                    limit=f"sync.tolerance = {self._tolerance:g}",
                    remedy="the server's weights are not the trainer's, or its number format is coarser: raise sync.tolerance only if lopd parity says so",
                )
        return len(self._probe.requests)
