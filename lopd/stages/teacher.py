"""The teacher as an engine that scores: an SGLang server, or ranks of Megatron-Core."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lopd.megatron.scoring.scorer import MegatronScorer
from lopd.stages.context import StageContext


@contextlib.contextmanager
def serve_teacher(context: StageContext) -> Iterator[Any]:
    """Serve the teacher as long as the block lasts, in the way that ``score.engine`` names.

    Yields:
        An object with the method ``score`` of SGLangEngine.

    Raises:
        LopdError: The teacher does not start.
    """
    config = context.config
    if config.score.engine == "sglang":
        with context.serve("teacher", config.models.teacher) as server:
            yield server
        return
    # The same forward pass as the trainer's, for a model that SGLang cannot serve, or for scores
    # without the difference between the two engines.
    num_ranks = config.score.forward.parallel.ranks
    context.log(f"starting {num_ranks} ranks of Megatron-Core with {config.models.teacher}")
    # Several workers share a folder, so each has a log of its own.
    name = "teacher" if context.share is None else f"teacher-{context.share.index}"
    with MegatronScorer(
        config.models.teacher,
        config.score.forward,
        folder=context.folder,
        name=name,
        entropy=config.score.entropy,
    ) as ranks:
        yield ranks
