"""Can these responses have come from this teacher, at this temperature and top-p? From scores and
entropies alone.

For a token sampled from the teacher's distribution p at its position, x = log p(token) + H(p) has
mean zero whatever came before: E[log p] = -H. So over responses that the teacher sampled the x are
martingale differences, their sum has mean zero and the variance sum of Var_p[log p], and

    z = sum x / sqrt(sum Var_p[log p])

is normal for many tokens. Text of another model, or of another temperature, drifts: above zero if
it is likelier than the teacher's own (a lower temperature, a more careful model), below if it is
less likely. What the statistic cannot see: a model whose mean surprise happens to agree. The curves
by position, by entropy and by kind of token show where a drift comes from; the verdict is of the
sum alone, so that its error rate is the stated one. A group of a curve that holds few uncertain
tokens is not normal: one rare token can put it many errors off. Groups are of what is known before
the token is drawn (its position from the start, the entropy, the token before it): by the token
itself, or by the share of the response, they would not have mean zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Verdict = Literal["consistent", "inconsistent", "cannot tell"]
POSITIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
ENTROPY_EDGES = (0.001, 0.01, 0.1, 0.5, 1.0, 2.0)  # nats
# of tokens that the teacher cannot have sampled at this top-p: more than rounding at the edge of
# the nucleus explains
_IMPOSSIBLE_SHARE = 1e-3


@dataclass(frozen=True, slots=True)
class Scores:
    """What a teacher says of the tokens of some responses, response after response, at the
    temperature and top-p that are asked about.

    variance: of log p under p; where unknown it is estimated, see spread. token_kinds: of the token
    before each, for the curves.
    """

    logprobs: F64  # [N], of the tokens; -inf: outside the nucleus
    entropy: F64  # [N], nats
    lengths: NDArray[np.int64]  # [responses]
    variance: F64 | None = None  # [N]
    token_kinds: Sequence[str] | None = None  # [N]

    def __post_init__(self) -> None:
        for name in ("entropy", "variance", "token_kinds"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.logprobs):
                raise ValueError(f"audit: {len(column)} of {name} for {len(self.logprobs)} tokens")
        if int(self.lengths.sum()) != len(self.logprobs):
            raise ValueError(
                f"audit: lengths sum to {int(self.lengths.sum())}, for {len(self.logprobs)} tokens"
            )


@dataclass(frozen=True, slots=True)
class Point:
    """A group of tokens on a curve. standard_error: of the mean, if they come from the teacher."""

    name: str
    tokens: int
    mean: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class Audit:
    """mean: of log p + H per token, nats. detectable: the mean drift that so many tokens show with
    the stated power. tokens_needed: for the tolerance.
    """

    verdict: Verdict
    z: float
    p_value: float
    mean: float
    standard_error: float
    tokens: int
    responses: int
    impossible: int
    tolerance: float
    alpha: float
    power: float
    detectable: float
    tokens_needed: int
    by_position: tuple[Point, ...]
    by_entropy: tuple[Point, ...]
    by_kind: tuple[Point, ...]


def audit(
    scores: Scores, *, tolerance: float = 0.005, alpha: float = 0.01, power: float = 0.95
) -> Audit:
    """Inconsistent: the drift differs from 0 at level alpha (a true teacher is called so with that
    probability), or tokens are impossible. Consistent: it does not, and a drift of ``tolerance``
    nats per token would have shown with the stated power. Else: cannot tell; tokens_needed says how
    many would do.
    """
    possible = np.isfinite(scores.logprobs)
    impossible = int((~possible).sum())
    drift = np.where(possible, scores.logprobs + scores.entropy, 0.0)
    number = len(drift)
    assert number > 0, "no tokens"
    variance = spread(drift, scores)
    deviation = math.sqrt(max(float(variance.sum()), 1e-300))
    total = float(drift.sum())
    z = total / deviation if variance.sum() > 0 else 0.0
    p_value = math.erfc(abs(z) / math.sqrt(2))
    normal = NormalDist()
    reach = normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)
    detectable = reach * deviation / number
    needed = math.ceil(reach**2 * float(variance.mean()) / tolerance**2)
    verdict: Verdict = "cannot tell"
    if p_value < alpha or impossible > _IMPOSSIBLE_SHARE * number:
        verdict = "inconsistent"
    elif detectable <= tolerance:
        verdict = "consistent"
    return Audit(
        verdict=verdict,
        z=z,
        p_value=p_value,
        mean=total / number,
        standard_error=deviation / number,
        tokens=number,
        responses=len(scores.lengths),
        impossible=impossible,
        tolerance=tolerance,
        alpha=alpha,
        power=power,
        detectable=detectable,
        tokens_needed=needed,
        by_position=_by_position(drift, variance, scores.lengths),
        by_entropy=_by_entropy(drift, variance, scores.entropy),
        by_kind=()
        if scores.token_kinds is None
        else _grouped(drift, variance, np.asarray(scores.token_kinds)),
    )


def spread(drift: F64, scores: Scores) -> F64:
    """Variance of each drift if it comes from the teacher [N]: as given; else drift squared, but in
    sum at least what two outcomes of that entropy have.

    The bound is what keeps a true teacher from being accused when, among few tokens, none of its
    rare choices occurred.
    """
    if scores.variance is not None:
        return scores.variance
    chance = np.geomspace(1e-12, 0.5, 4096)
    entropy = -(chance * np.log(chance) + (1 - chance) * np.log1p(-chance))
    least = np.interp(
        scores.entropy, entropy, chance * (1 - chance) * np.log((1 - chance) / chance) ** 2
    )
    least[scores.entropy > math.log(2)] = 0.0  # more than two outcomes: no such bound
    measured = drift**2
    return measured if measured.sum() >= least.sum() else least


def _by_position(drift: F64, variance: F64, lengths: NDArray[np.int64]) -> tuple[Point, ...]:
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
    chosen = np.searchsorted(np.array(POSITIONS), position, side="right") - 1
    return _ordered(drift, variance, chosen, np.array([str(start) for start in POSITIONS]))


def _by_entropy(drift: F64, variance: F64, entropy: F64) -> tuple[Point, ...]:
    chosen = np.searchsorted(np.array(ENTROPY_EDGES), entropy, side="right")
    return _ordered(
        drift, variance, chosen, np.array(["0", *(f"{edge:g}" for edge in ENTROPY_EDGES)])
    )


def _ordered(
    drift: F64, variance: F64, chosen: NDArray[np.int64], names: NDArray[np.str_]
) -> tuple[Point, ...]:
    return tuple(
        _point(str(names[index]), drift, variance, chosen == index)
        for index in range(len(names))
        if (chosen == index).any()
    )


def _grouped(drift: F64, variance: F64, kinds: NDArray[np.str_]) -> tuple[Point, ...]:
    return tuple(_point(str(kind), drift, variance, kinds == kind) for kind in np.unique(kinds))


def _point(name: str, drift: F64, variance: F64, chosen: NDArray[np.bool_]) -> Point:
    number = int(chosen.sum())
    return Point(
        name, number, float(drift[chosen].mean()), math.sqrt(float(variance[chosen].sum())) / number
    )


def distribution_scores(
    logits: Any, chosen: Any, *, temperature: float, top_p: float
) -> tuple[Any, Any, Any]:
    """log p of the chosen tokens, entropy, variance of log p, each [..] float64, of the
    distribution that is sampled from: softmax(logits / temperature), cut to its likeliest tokens up
    to a mass of top_p (the one that crosses it included), renormalised. logits: torch [..,
    vocabulary]; chosen: ids [..].
    """
    import torch

    logprobs = torch.log_softmax(logits.double() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        ordered = ordered.masked_fill(before >= top_p, -math.inf)
        logprobs = torch.empty_like(logprobs).scatter_(-1, order, ordered).log_softmax(-1)
    probability = logprobs.exp()
    finite = logprobs.masked_fill(probability == 0, 0.0)
    entropy = -(probability * finite).sum(-1)
    variance = (probability * (finite + entropy[..., None]) ** 2).sum(-1)
    return logprobs.gather(-1, chosen[..., None]).squeeze(-1), entropy, variance


def token_kind(text: str) -> str:
    """A coarse name for what a token is, from its text: special, newline, space, digits, word, word
    start, or signs.
    """
    if len(text) > 2 and text.startswith("<") and text.endswith(">"):
        return "special"
    if not text.strip():
        return "newline" if "\n" in text else "space"
    bare = text.strip()
    if bare.isdigit():
        return "digits"
    if bare.isalpha():
        return "word start" if text[0] == " " else "word"
    return "signs"


def as_json(result: Audit) -> dict[str, Any]:
    """For --json: plain numbers, curves as lists of {name, tokens, mean, standard_error}."""
    import dataclasses

    return dataclasses.asdict(result)
