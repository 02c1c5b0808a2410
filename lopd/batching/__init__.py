"""From responses to what a rank learns from: a resumable order, a balanced plan of each step,
packed microbatches. numpy only.

order = ResponseOrder(num_responses=len(samples), batch_size=256, seed=17)
chosen = order.batch_indices(step)
plan = plan_step([len(samples[i]) for i in chosen], num_ranks=data_parallel_size, max_tokens=16384,
pad_multiple=tensor_parallel_size)
for members in plan[data_parallel_rank]:
    microbatch = build_microbatch([samples[chosen[m]] for m in members],
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
