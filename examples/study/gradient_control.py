"""The control of gradient_gap.py: what its gap is where frozen and fresh rollouts are the same.

    python -m examples.study.gradient_control SEED RUN SFT_MODEL STEP=MODEL [STEP=MODEL ...]

It takes the responses that gradient_gap.py has published in RUN, and the gradient of each of them
alone. Then it exchanges the frozen and the fresh response of prompts at random, which makes the
expectation of the gap's square 0, and leaves its noise. RUN/control.json gets, for each model, the
standard deviation of the square over such exchanges, and the share of exchanges that give a square
as far from 0 as the one that was measured.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from examples.study.claim_4 import CONTROL
from examples.study.gradient_gap import Gradients, job_with, read_order, samples_of
from examples.study.one_rank import only_rank
from lopd.artifacts import publish_json
from lopd.records import Sample

NUM_EXCHANGES = 4000


def differences_of(
    gradients: Gradients, frozen: list[Sample], fresh: list[Sample]
) -> NDArray[np.float32]:
    """Return frozen minus fresh of each prompt, [prompts, weights].

    The loss is a mean over responses, so the mean of these over a half of the prompts is the
    difference of that half's gradients.
    """
    rows = []
    for one, other in zip(frozen, fresh, strict=True):
        row = gradients.gradient([one])[0] - gradients.gradient([other])[0]
        rows.append(row.astype(np.float32))
    return np.stack(rows)


def exchanged(differences: NDArray[np.float32], seed: int) -> dict[str, float]:
    """Return the square of the gap, and what exchanges of frozen and fresh make of it.

    Args:
        differences: Frozen minus fresh of each prompt, [prompts, weights].
        seed: The seed of the exchanges.

    Returns:
        gap_squared: The product of the means of both halves, as in gap_of().
        deviation: The standard deviation of that product over exchanges.
        share_as_large: The share of exchanges whose product is as far from 0.
    """
    middle = len(differences) // 2
    first, second = differences[:middle], differences[middle : 2 * middle]
    products = (first @ second.T).astype(np.float64) / middle**2
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (NUM_EXCHANGES, 2 * middle))
    found = ((signs[:, :middle] @ products) * signs[:, middle:]).sum(1)
    measured = float(products.sum())
    return {
        "gap_squared": measured,
        "deviation": float(found.std()),
        "share_as_large": float((np.abs(found) >= abs(measured)).mean()),
    }


def main() -> None:
    order = read_order(__doc__)
    job = job_with(order.config, order.run, order.sft)
    frozen = samples_of(order.run / "sft" / "scores")
    found: dict[str, dict[str, float]] = {}
    with only_rank(job):
        for step, model in order.models.items():
            fresh = samples_of(order.run / f"step-{step}" / "scores")
            differences = differences_of(Gradients(job, model), frozen, fresh)
            found[str(step)] = exchanged(differences, order.config.run.seed)
    publish_json(order.run / CONTROL, found)


if __name__ == "__main__":
    main()
