"""Can these responses have come from this teacher, at this temperature and top-p?

The test needs only scores and entropies. For a token sampled from the teacher's distribution p at
its position, the drift

    x = log p(token) + H(p)

has mean zero whatever came before, because E[log p] = -H. Over responses that the teacher sampled,
the x are therefore martingale differences. Their sum has mean zero, its variance is the sum of
Var_p[log p], and

    z = sum x / sqrt(sum Var_p[log p])

is normal for many tokens.

Text of another model or temperature drifts. The drift is above zero if the text is likelier than
the teacher's own, as at a lower temperature, and below zero if it is less likely. The statistic
cannot see a model whose mean surprise happens to agree.

The curves by position, by entropy and by kind of token show where a drift comes from. The verdict
uses the sum alone, so that its error rate is the stated one. A group of a curve with few uncertain
tokens is not normal: one rare token can move it by many standard errors. Groups depend only on what
is known before the token is drawn: its position from the start, the entropy, the token before it.
Groups by the token itself, or by the share of the response, would not have mean zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
# There are three verdicts and not two: too few tokens must not look like a proof of consistency.
Verdict = Literal["consistent", "inconsistent", "cannot tell"]
# The first position of each group, in tokens from the start of the response.
POSITIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
# In nats.
ENTROPY_EDGES = (0.001, 0.01, 0.1, 0.5, 1.0, 2.0)
# A larger share of tokens outside the nucleus shows that the teacher did not sample them. A smaller
# one may be rounding at the edge of the nucleus.
_IMPOSSIBLE_SHARE = 1e-3


@dataclass(frozen=True, slots=True)
class Scores:
    """The teacher's scores of the tokens of some responses, response after response.

    All are at the temperature and top-p that are asked about. N is the number of tokens.

    Attributes:
        logprobs: The log-probabilities of the tokens, in nats. -inf means outside the nucleus.
        entropy: The entropy of the teacher's distribution at each token, in nats.
        lengths: The number of tokens of each response.
        variance: The variance of log p under p. It is estimated if it is not known (see spread()).
        token_kinds: The kind of the token before each token, for the curves.
    """

    logprobs: F64  # [N]
    entropy: F64  # [N]
    lengths: NDArray[np.int64]  # [responses]
    variance: F64 | None = None  # [N]
    token_kinds: Sequence[str] | None = None  # [N]

    def __post_init__(self) -> None:
        # A column of another length would be joined to the wrong tokens, and the test would still
        # give a verdict.
        for name in ("entropy", "variance", "token_kinds"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.logprobs):
                raise ValueError(
                    f"audit: {name} has {len(column)} values for {len(self.logprobs)} tokens"
                )
        # The curves by position need to know where each response begins.
        total = int(self.lengths.sum())
        if total != len(self.logprobs):
            raise ValueError(
                f"the lengths of the responses sum to {total}, but there are "
                f"{len(self.logprobs)} log-probabilities"
            )


@dataclass(frozen=True, slots=True)
class Point:
    """A group of tokens on a curve.

    Attributes:
        mean: The mean drift, in nats.
        standard_error: The standard error of the mean, if the tokens come from the teacher.
    """

    name: str
    tokens: int
    mean: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of an audit.

    Attributes:
        mean: The mean drift log p + H per token, in nats.
        impossible: How many tokens are outside the nucleus.
        detectable: The mean drift that so many tokens show with a probability of ``power``.
        tokens_needed: How many tokens show a mean drift of ``tolerance`` with that probability.
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
    """Test whether the teacher can have sampled the responses.

    The verdict is

    - "inconsistent" if the drift differs from 0 at level ``alpha``, or too many tokens are
      impossible,
    - "consistent" if it does not, and a drift of ``tolerance`` would have been seen,
    - "cannot tell" otherwise. ``tokens_needed`` then says how many tokens would be enough.

    Args:
        tolerance: A mean drift in nats per token.
        alpha: The probability that a true teacher is called inconsistent.
        power: The probability with which a drift of ``tolerance`` is seen.
    """
    # One impossible token has log p = -inf. It is counted, and must not make the sum useless.
    possible = np.isfinite(scores.logprobs)
    impossible = int((~possible).sum())
    drift = np.where(possible, scores.logprobs + scores.entropy, 0.0)
    # Impossible tokens count with a drift of 0.
    number = len(drift)
    assert number > 0, "no tokens"
    variance = spread(drift, scores)
    # Of the sum. The floor keeps a text without any uncertain token from a division by zero.
    deviation = math.sqrt(max(float(variance.sum()), 1e-300))
    total = float(drift.sum())
    z = total / deviation if variance.sum() > 0 else 0.0
    # Two-sided: a drift to either side is a drift.
    p_value = math.erfc(abs(z) / math.sqrt(2))
    normal = NormalDist()
    # In standard errors: how far the true mean must be from 0, so that the estimate, which varies
    # around it, is beyond the threshold with the stated power.
    reach = normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)
    detectable = reach * deviation / number
    # The detectable drift falls with the square root of the number of tokens.
    needed = math.ceil(reach**2 * float(variance.mean()) / tolerance**2)
    # Impossible tokens decide by themselves: no drift is needed if a token had the probability 0.
    is_refuted = p_value < alpha or impossible > _IMPOSSIBLE_SHARE * number
    return Audit(
        verdict=_verdict(is_refuted=is_refuted, is_sharp=detectable <= tolerance),
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
        by_kind=_by_kind(drift, variance, scores.token_kinds),
    )


def _verdict(*, is_refuted: bool, is_sharp: bool) -> Verdict:
    """Return the verdict.

    Args:
        is_refuted: Whether there is enough evidence against the teacher.
        is_sharp: Whether there are enough tokens to see a drift of the tolerated size.
    """
    # Checked first: with enough evidence against the teacher, the number of tokens does not matter.
    if is_refuted:
        return "inconsistent"
    # Without a drift, only an audit that would have seen one says anything.
    return "consistent" if is_sharp else "cannot tell"


def spread(drift: F64, scores: Scores) -> F64:
    """Return the variance of each drift [N] if the token comes from the teacher.

    A variance that is not given is estimated by the square of the drift.
    """
    if scores.variance is not None:
        return scores.variance
    # Among few tokens none of the teacher's rare choices may have occurred. The squares are then
    # too small, and a true teacher would be accused. So their sum must reach a bound: the variance
    # of log p of two outcomes with the same entropy, tabulated over the chance of the rarer one.
    chance = np.geomspace(1e-12, 0.5, 4096)
    entropy = -(chance * np.log(chance) + (1 - chance) * np.log1p(-chance))
    variance = chance * (1 - chance) * np.log((1 - chance) / chance) ** 2
    least = np.interp(scores.entropy, entropy, variance)
    # A larger entropy needs more than two outcomes, for which there is no such bound.
    least[scores.entropy > math.log(2)] = 0.0
    # The larger of the two is the more careful one. It makes z smaller.
    measured = drift**2
    return measured if measured.sum() >= least.sum() else least


def _by_position(drift: F64, variance: F64, lengths: NDArray[np.int64]) -> tuple[Point, ...]:
    # From the start of the response and not as a share of it: the length is not known before the
    # last token is drawn.
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
    group = np.searchsorted(np.array(POSITIONS), position, side="right") - 1
    return _points(drift, variance, group, [str(start) for start in POSITIONS])


def _by_entropy(drift: F64, variance: F64, entropy: F64) -> tuple[Point, ...]:
    group = np.searchsorted(np.array(ENTROPY_EDGES), entropy, side="right")
    return _points(drift, variance, group, ["0", *(f"{edge:g}" for edge in ENTROPY_EDGES)])


def _by_kind(drift: F64, variance: F64, kinds: Sequence[str] | None) -> tuple[Point, ...]:
    if kinds is None:
        return ()
    # In alphabetical order, with the number of its name for each token.
    names, group = np.unique(np.asarray(kinds), return_inverse=True)
    return _points(drift, variance, group, names.tolist())


def _points(
    drift: F64, variance: F64, group: NDArray[np.int64], names: Sequence[str]
) -> tuple[Point, ...]:
    """Return one point for each group [N] that has tokens, in the order of the names."""
    points = []
    for index, name in enumerate(names):
        chosen = group == index
        number = int(chosen.sum())
        # The mean of no tokens does not exist.
        if number:
            error = math.sqrt(float(variance[chosen].sum())) / number
            points.append(Point(name, number, float(drift[chosen].mean()), error))
    return tuple(points)


def distribution_scores(
    logits: Any, chosen: Any, *, temperature: float, top_p: float
) -> tuple[Any, Any, Any]:
    """Score the chosen tokens under the distribution that is sampled from.

    It is softmax(logits / temperature), cut to its likeliest tokens up to a mass of top_p, and
    renormalised. The token that crosses top_p is included.

    Args:
        logits: torch tensor [.., vocabulary].
        chosen: Token ids [..].

    Returns:
        The log-probability of the chosen tokens, the entropy, and the variance of log p, each as
        float64 [..], in nats.
    """
    import torch

    # In float64: the test adds up millions of drifts, and a rounding error with a preferred sign
    # would look like a drift.
    logprobs = torch.log_softmax(logits.double() / temperature, dim=-1)
    # With top_p = 1 the sort over the vocabulary would change nothing.
    if top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True)
        # The mass of all likelier tokens. A token is cut if they reach top_p without it.
        before = ordered.exp().cumsum(-1) - ordered.exp()
        # log 0 is -inf, and the second log_softmax distributes the mass that was cut.
        ordered = ordered.masked_fill(before >= top_p, -math.inf)
        logprobs = torch.empty_like(logprobs).scatter_(-1, order, ordered).log_softmax(-1)
    probability = logprobs.exp()
    # 0 * log 0 counts as 0, but is NaN in floating point.
    finite = logprobs.masked_fill(probability == 0, 0.0)
    entropy = -(probability * finite).sum(-1)
    variance = (probability * (finite + entropy[..., None]) ** 2).sum(-1)
    return logprobs.gather(-1, chosen[..., None]).squeeze(-1), entropy, variance


def token_kind(text: str) -> str:
    """Return what a token is, by its text.

    Returns:
        One of special, newline, space, digits, word, word start and signs.
    """
    # Special tokens look like <|im_end|> or <s>.
    if len(text) > 2 and text.startswith("<") and text.endswith(">"):
        return "special"
    if not text.strip():
        return "newline" if "\n" in text else "space"
    # Most tokenizers put the space before a word into its first token.
    bare = text.strip()
    if bare.isdigit():
        return "digits"
    if bare.isalpha():
        return "word start" if text[0] == " " else "word"
    return "signs"


def as_json(result: Audit) -> dict[str, Any]:
    """Return the result as JSON. The curves are lists of points."""
    return asdict(result)
