"""The engine that scores: an SGLang server, or ranks of Megatron-Core, as score.engine says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lopd.megatron.scoring.scorer import MegatronScorer
from lopd.stages.context import StageContext


@contextlib.contextmanager
def serve_teacher(context: StageContext) -> Iterator[Any]:
    """Something with SGLangEngine's ``score``, as long as the block lasts. LopdError: it does not
    start.
    """
    config = context.config
    if config.score.engine == "sglang":
        with context.serve("teacher", config.models.teacher) as server:
            yield server
        return
    parallel = config.score.forward.parallel
    context.log(f"starting {parallel.ranks} ranks of Megatron-Core with {config.models.teacher}")
    name = (
        "teacher" if context.share is None else f"teacher-{context.share.index}"
    )  # of several workers each has a log of its own
    with MegatronScorer(
        config.models.teacher,
        config.score.forward,
        folder=context.folder,
        name=name,
        entropy=config.score.entropy,
    ) as ranks:
        yield ranks
