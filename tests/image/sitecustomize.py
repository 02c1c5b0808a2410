"""What a process of the image's checks sees of Transformer Engine. run.sh puts this on its path.

Its compiled part, transformer_engine_torch, exists as source only and needs nvcc, and its kernels
need a GPU. LOPD_ENGINE says what stands in its place:

    hidden   Transformer Engine is not found, as if it were not installed (the default). A stand-in
             that is first on the path is found.
    stub     Transformer Engine's own Python is found. The compiled part is
             tests/image/extension.py.
    real     Nothing is changed: the compiled part is installed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

IMAGE = os.environ.get("LOPD_IMAGE_PACKAGES", "")  # the image's site-packages
EXTENSION = Path(os.environ.get("LOPD_ENGINE_EXTENSION", ""))


class _Hidden(importlib.machinery.PathFinder):
    """Finds everything as before, but transformer_engine not among the image's packages."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in ("transformer_engine", "transformer_engine_torch"):
            path = [entry for entry in sys.path if entry != IMAGE]
        return super().find_spec(name, path, target)


class _Stub:
    """Lets transformer_engine.common load, and replaces its loading of the compiled part."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name != "transformer_engine.common":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            vars(module)["load_framework_extension"] = _load_stub

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _load_stub(framework: str) -> None:
    assert framework == "torch", framework
    name = "transformer_engine_torch"
    spec = importlib.util.spec_from_file_location(name, EXTENSION)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_mode = os.environ.get("LOPD_ENGINE", "hidden")
if _mode == "hidden":
    finders = sys.meta_path
    finders[:] = [_Hidden if each is importlib.machinery.PathFinder else each for each in finders]
elif _mode == "stub":
    sys.meta_path.insert(0, _Stub())  # type: ignore[arg-type]
elif _mode != "real":
    raise SystemExit(f"LOPD_ENGINE = {_mode!r}: hidden, stub or real")
