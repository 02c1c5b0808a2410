"""Messages of errors: a name in braces is filled in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path
    for package in ("lopd", "sglang_rollout", "megatron_patches")
    for path in (ROOT / package).rglob("*.py")
)
# Words that a user writes in braces.
WRITTEN = {"{question}", "{prompt}", "{answer}", "{hint}"}


def unfilled(tree: ast.AST) -> Iterator[str]:
    """Texts of errors that have a name in braces, but are no f-strings."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        name = call.func.id if isinstance(call.func, ast.Name) else name
        if not name.endswith(("Error", "Contradiction", "OtherWeights")):
            continue
        for value in [*call.args, *(keyword.value for keyword in call.keywords)]:
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found = set(re.findall(r"\{[a-z_.]+\}", value.value)) - WRITTEN
                yield from (f"line {value.lineno}: {word}" for word in sorted(found))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_braces_are_filled_in(path: Path) -> None:
    assert [*unfilled(ast.parse(path.read_text()))] == []


def test_one_that_is_not_is_noticed() -> None:
    text = 'raise ConfigError(f"{a} is bad", where="x", remedy="set {key} " "anew")'
    assert [*unfilled(ast.parse(text))] == ["line 1: {key}"]
    assert [*unfilled(ast.parse(text.replace('"set', 'f"set')))] == []
