"""A stand-in for Transformer Engine in plain torch: the modules that Megatron-Core's layer spec is
made of, with the names and shapes of their parameters.

It is not Transformer Engine: no kernel of it runs, and nothing of its speed or precision shows.
What it shows is that Megatron-Core's own wrappers (megatron/core/extensions/transformer_engine.py),
our layer spec, the table of weights and the trainer fit together under those names. Of version 1.12
because Megatron-Core asks the least of it; names and shapes are those of 2.x too.
"""

from __future__ import annotations

from types import SimpleNamespace

from transformer_engine import pytorch

__version__ = "1.12.0"
__all__ = ["common", "pytorch"]


class _DelayedScaling:
    """A base class that Megatron-Core asks for when it is imported."""


common = SimpleNamespace(recipe=SimpleNamespace(DelayedScaling=_DelayedScaling))
