"""Names that Megatron-Core imports; nothing here is in 8 bits."""

from __future__ import annotations

import contextlib

fp8_autocast = fp8_model_init = contextlib.nullcontext


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False
