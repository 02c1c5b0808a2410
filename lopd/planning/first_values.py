"""Values for a first configuration, by the size of the student and the number of prompts.

They are where a run can begin, not where it is best. Only ``lopd init`` writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lopd.errors import LopdError
from lopd.megatron.weights.architecture import Architecture
from lopd.planning.models import planned_model

# The defaults of the batch size and of the steps, which a smaller file of prompts lowers.
BATCH = 256
STEPS = 150
# Adam moves a weight by about lr a step. With fewer steps than this, a careful lr changes nothing.
_LEAST_STEPS = 32
_PASSES = 3
# The most tokens of a prompt and its response, where the models have positions for them.
CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class LearningRates:
    """Where the learning rates of a student may begin.

    Attributes:
        sft: That of SFT, as it stands in a TOML file.
        distill: That of distillation.
        schedule: Its schedule in both stages.
    """

    sft: str
    distill: str
    schedule: str = "constant"


# A rule of thumb: the number of parameters from which on a line holds, the largest first. The first
# line is the paper's. No line was searched for, and a model's own best value may be several times
# larger or smaller. A large rate must decay, or the last steps undo what the others reached.
_BY_SIZE = (
    (1_000_000_000, LearningRates("1e-5", "2e-6")),
    (100_000_000, LearningRates("2e-5", "1e-5")),
    (10_000_000, LearningRates("1e-4", "3e-5")),
    (1_000_000, LearningRates("1e-4", "1e-4")),
    (0, LearningRates("1e-3", "1e-3", "cosine")),
)


def learning_rates(num_parameters: int | None) -> LearningRates:
    """Return the learning rates for a student of this size; the paper's where it is not known."""
    if num_parameters is None:
        return _BY_SIZE[0][1]
    return next(rates for least, rates in _BY_SIZE if num_parameters >= least)


def batch_and_steps(num_prompts: int | None) -> tuple[int, int]:
    """Return a batch size, in responses, and the number of steps of a training.

    It goes about three times through the prompts, in at least 32 steps where there are 11 prompts
    or more, and in no more steps than the paper's.
    """
    if num_prompts is None:
        return BATCH, STEPS
    # Few prompts make small batches, and not few steps.
    batch = max(1, min(BATCH, _PASSES * num_prompts // _LEAST_STEPS))
    steps = -(-_PASSES * num_prompts // batch)
    return batch, max(1, min(STEPS, steps))


def shape_of(folder: Path) -> Architecture | None:
    """Return the shape of a model; None where it is not known yet, or not supported."""
    # lopd check says what is wrong with a model. A configuration can be written without it.
    try:
        return planned_model("student", folder, None).arch
    except LopdError:
        return None
