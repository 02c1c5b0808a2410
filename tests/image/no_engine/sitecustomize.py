"""Hides Transformer Engine from a process, as if it were not installed."""

from __future__ import annotations

import sys

HIDDEN = ("transformer_engine", "transformer_engine_torch")
for name in HIDDEN:
    sys.modules[name] = None  # type: ignore[assignment]  # an import of it then is an ImportError
