"""The example's small architecture, written once per test session."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_models"


def load_example(name: str) -> ModuleType:
    """A script of examples/tiny_models as a module; examples are no package."""
    spec = importlib.util.spec_from_file_location(f"tiny_models_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with config.json, generation_config.json and tokenizer of the small Qwen3-MoE."""
    folder: Path = load_example("make_architecture").write_architecture(
        tmp_path_factory.mktemp("tiny") / "architecture"
    )
    return folder


@pytest.fixture(scope="session")
def tokenizer(architecture: Path) -> Any:
    from lopd.tasks.tokenizer import load_tokenizer

    return load_tokenizer(architecture)
