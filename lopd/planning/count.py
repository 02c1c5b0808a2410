"""Counts parameters by building the model through Megatron-Core on the meta device, with the very
layout: ``python -m lopd.planning.count < jobs.json``.

In a process of its own, because it changes what belongs to the whole process: process groups that
talk to nobody (torch's ``fake`` backend stands for all ranks of a node), and the device on which a
model is built. Nothing has storage, so a model of any size is built in a second or two.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

from lopd.config import ParallelSection
from lopd.megatron.weights.architecture import Architecture
from lopd.planning.parameters import CountJob, StageParameters

EXPERT = ".mlp.experts."


def count(arch: Architecture, parallel: ParallelSection) -> list[StageParameters]:
    """What a rank of each pipeline stage holds. ConfigError: the layout does not divide the model."""
    parallel = parallel.model_copy(
        update={"context": 1}
    )  # context ranks hold the same weights, and only Transformer Engine's layers can be built for several
    return [
        _count_stage(arch, parallel, stage * parallel.ranks // parallel.pipeline)
        for stage in range(parallel.pipeline)
    ]


def _count_stage(arch: Architecture, parallel: ParallelSection, rank: int) -> StageParameters:
    import torch

    from lopd.megatron.model.build import build_model
    from lopd.megatron.ranks import parallel as ranks

    _pretend(rank, parallel.ranks)
    ranks.initialize(parallel, seed=0, timeout_s=60)
    try:
        with torch.device("meta"):
            # Without initialisation Megatron-Core leaves out its marks of split parameters, which
            # only gradient norms need, and minutes of drawing numbers.
            unmarked = {"perform_initialization": False}
            model = build_model(
                arch,
                parallel=parallel,
                dtype="bfloat16",
                recompute="none",
                moe_aux_loss=0.0,
                overrides=unmarked,
            )
        assert all(parameter.is_meta for parameter in model.parameters())
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    finally:
        ranks.shutdown()
    experts = sum(size for name, size in sizes.items() if EXPERT in name)
    routers = sum(size for name, size in sizes.items() if name.endswith(".router.weight"))
    vocabulary = sum(
        size for name, size in sizes.items() if "word_embeddings" in name or "output_layer" in name
    )
    return StageParameters(
        dense=sum(sizes.values()) - experts, experts=experts, routers=routers, vocabulary=vocabulary
    )


def _pretend(rank: int, world_size: int) -> None:
    """This process as one of world_size ranks, of which no other exists: every collective returns
    at once.
    """
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from lopd.megatron.ranks import parallel as ranks

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    ranks.device = lambda: torch.device("meta")
    if not hasattr(dist.new_group, "pretended"):
        new_group = dist.new_group

        def fake_group(
            *arguments: Any, **named: Any
        ) -> Any:  # Megatron-Core also asks for gloo groups, which would look for the other ranks
            return new_group(*arguments, **{**named, "backend": "fake", "pg_options": None})

        fake_group.pretended = True  # type: ignore[attr-defined]
        dist.new_group = fake_group
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def main() -> None:
    import logging
    import warnings

    warnings.simplefilter("ignore")  # Megatron-Core tells at length of what is not installed
    logging.disable(logging.WARNING)
    jobs = [CountJob.from_json(raw) for raw in json.load(sys.stdin)]
    json.dump(
        [[asdict(stage) for stage in count(job.arch, job.parallel)] for job in jobs], sys.stdout
    )


if __name__ == "__main__":
    main()
