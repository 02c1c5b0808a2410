"""lopd: distil a large reasoning teacher into a mixture-of-experts student by Lightning OPD
(offline on-policy distillation).

``lopd.run``, ``lopd.load_config`` and ``lopd.Config`` are the entry for Python and notebooks. They
are imported when they are first used, because torch and pydantic take long to import and many
programs want ``lopd.__version__`` alone.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
# Where each name of the entry stands.
_ENTRY = {"Config": "lopd.config", "load_config": "lopd.config", "run": "lopd.entry"}


def __getattr__(name: str) -> Any:
    """Import a name of the entry at its first use."""
    # By its text and not by a statement: everything imports this package, so a statement here would
    # make a circle of all modules.
    if name not in _ENTRY:
        raise AttributeError(f"module 'lopd' has no attribute {name!r}")
    return getattr(import_module(_ENTRY[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_ENTRY]
