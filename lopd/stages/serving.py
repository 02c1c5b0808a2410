"""One server that serves several models, one after the other."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.stages.overlap import architecture_of

if TYPE_CHECKING:
    from lopd.stages.context import StageContext
    from sglang_rollout.requests.client import SGLangEngine


class ModelServer:
    """A context manager. ``use(model)`` gives an engine for that model until the next ``use``."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        # A stack, because the server may be exchanged for another one in the middle.
        self._open = contextlib.ExitStack()
        self._engine: SGLangEngine | None = None
        self._architecture: Any = None

    def __enter__(self) -> ModelServer:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def use(self, model: Path, *, version: str) -> SGLangEngine:
        """Return an engine that answers with this model.

        Args:
            model: The Hugging Face folder.
            version: The weight version that responses carry if a running server takes these weights
                in place of its own.

        Raises:
            EngineError: The server does not start, or refuses the weights.
        """
        # The files of a trained model differ from its base in names and versions, not in what
        # SGLang builds from them.
        architecture = architecture_of(model)
        if self._engine is not None and architecture == self._architecture:
            from sglang_rollout.weight_sync import update_weights_from_disk

            # A start takes tens of seconds, an exchange of weights in a running server much less.
            update_weights_from_disk(self._engine, model, version=version)
            return self._engine
        # The old server goes first: two of them may not fit on the GPUs.
        self._open.close()
        self._engine = self._open.enter_context(self._context.serve("evaluated", model))
        self._architecture = architecture
        return self._engine
