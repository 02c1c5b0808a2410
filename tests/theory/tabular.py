"""A language of three tokens small enough to write down every response: expectations are sums, so
that the theory's statements can be tested exactly.

Token 0 ends a response; one of three tokens without it is cut off. A policy has a row of logits for
every prefix: 7 states, 15 responses, 21 parameters. The update of a response is what lopd's own
objective gives for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lopd.objective import Distillation, Lightning, TokenBatch
from lopd.objective.aggregation import expand_to_tokens as spread
from lopd.objective.weighting import Weighting

VOCAB_SIZE = 3
MAX_LEN = 3
END = 0
STATES: list[tuple[int, ...]] = [
    prefix
    for length in range(MAX_LEN)
    for prefix in itertools.product(range(1, VOCAB_SIZE), repeat=length)
]
# Every response that ends, and every one that is cut off.
RESPONSES: list[tuple[int, ...]] = [
    (*prefix, token)
    for prefix in STATES
    for token in range(VOCAB_SIZE)
    if token == END or len(prefix) == MAX_LEN - 1
]
_STATE_OF = torch.tensor(
    [STATES.index(response[:t]) for response in RESPONSES for t in range(len(response))]
)
_TOKENS = torch.tensor([token for response in RESPONSES for token in response])
_LENGTHS = [len(response) for response in RESPONSES]
METHOD = Lightning(advantage_clip=10.0, aggregation="token_sum")  # the paper's sum over tokens


def random_logits(seed: int, scale: float = 1.0) -> Tensor:
    """float64 [states, V]."""
    return scale * torch.randn(
        len(STATES), VOCAB_SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def log_policy(logits: Tensor) -> Tensor:
    """log pi(token | state), [states, V]."""
    return torch.log_softmax(logits, -1)


def on_tokens(log_probs: Tensor) -> Tensor:
    """Of every token of every response, [all tokens], from [states, V]."""
    return log_probs[_STATE_OF, _TOKENS]


def per_response(values: Tensor) -> Tensor:
    """Sums over each response's tokens, [responses] from [all tokens]."""
    return torch.stack([part.sum() for part in values.split(_LENGTHS)])


def response_probabilities(log_probs: Tensor) -> Tensor:
    """[responses]; they add up to 1."""
    return per_response(on_tokens(log_probs)).exp()


@dataclass(frozen=True)
class ByProbability:
    """A weighting that turns the sum over all responses into an expectation over them."""

    probabilities: Tensor  # [responses]

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        return spread(self.probabilities, batch)

    def metric_sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        return {}


def expected_update(
    probabilities: Tensor,
    logits: Tensor,
    teacher: Tensor,
    sampling: Tensor,
    weightings: tuple[Weighting, ...] = (),
    policy: Callable[[Tensor], Tensor] = log_policy,
) -> Tensor:
    """E[f(x)]: the direction in which the objective moves the parameters when response x comes with
    probabilities[x]; [parameters of logits].

    Minus the gradient of the sum over all responses of p(x) * loss. teacher, sampling: log pi
    [states, V]. policy: logits to the student's log-probabilities.
    """
    logits = logits.detach().requires_grad_()
    bounds = torch.tensor([0, *itertools.accumulate(_LENGTHS)], dtype=torch.int32)
    batch = TokenBatch(
        torch.ones(len(_TOKENS), dtype=torch.bool),
        bounds,
        len(RESPONSES),
        on_tokens(teacher),
        on_tokens(sampling),
    )
    objective = Distillation(
        METHOD, weightings=(ByProbability(probabilities.detach()), *weightings)
    )
    output = objective(on_tokens(policy(logits)), batch)
    return -torch.autograd.grad(output.loss_sum, logits)[0].flatten()


def updates(logits: Tensor, teacher: Tensor, sampling: Tensor) -> Tensor:
    """f(x) of every response, [responses, parameters]."""
    return torch.stack(
        [
            expected_update(one, logits, teacher, sampling)
            for one in torch.eye(len(RESPONSES), dtype=torch.float64)
        ]
    )


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL between next-token distributions in each state, [states] of log pi [states, V]."""
    return (first.exp() * (first - second)).sum(-1)


def visits(log_probs: Tensor) -> Tensor:
    """How often a response comes through each state, [states]."""
    probabilities = response_probabilities(log_probs)
    through = [
        [len(response) > len(state) and response[: len(state)] == state for response in RESPONSES]
        for state in STATES
    ]
    return torch.tensor(through).double() @ probabilities
