"""Hides Transformer Engine from a dry run: once it is found, Megatron-Core asks for a driver."""

from __future__ import annotations

import sys

sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # an import fails
