"""From responses to what a rank learns from, with numpy alone.

The parts are a resumable order, a balanced plan of each step, and packed microbatches:

    order = ResponseOrder(num_responses=len(samples), batch_size=256, seed=17)
    chosen = [samples[index] for index in order.batch_indices(step)]
    # Every rank computes the same plan, and takes its own part of it.
    plan = plan_step([len(sample) for sample in chosen], num_ranks=data_parallel_size,
                     max_tokens=16384, pad_multiple=tensor_parallel_size)
    for members in plan[data_parallel_rank]:
        microbatch = build_microbatch([chosen[member] for member in members],
                                      pad_multiple=tensor_parallel_size)
"""

from lopd.batching.microbatch import build_microbatch, make_sample
from lopd.batching.order import ResponseOrder
from lopd.batching.packing import (
    StepPlan,
    microbatch_capacity,
    plan_step,
    refuse_too_long,
    sample_costs,
)

__all__ = [
    "ResponseOrder",
    "StepPlan",
    "build_microbatch",
    "make_sample",
    "microbatch_capacity",
    "plan_step",
    "refuse_too_long",
    "sample_costs",
]
