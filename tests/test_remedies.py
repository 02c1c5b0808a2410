"""Every error that a user can meet says what to do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from lopd import errors

ROOT = Path(__file__).parent.parent
CLASSES = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.LopdError)
}


def without_remedy(source: str) -> Iterator[int]:
    """Yield the line of each error that is made without a remedy."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            # `**parts` has no name here. Such a call hands on the parts of another error.
            named = {keyword.arg for keyword in node.keywords}
            if node.func.id in CLASSES and not named & {"remedy", None}:
                yield node.lineno


def test_every_error_has_a_remedy() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for package in ("lopd", "sglang_rollout", "megatron_patches")
        for path in sorted((ROOT / package).rglob("*.py"))
        for line in without_remedy(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_an_error_without_a_remedy_would_be_found() -> None:
    source = 'raise DataError("a", where="b")\nraise DataError("a", remedy="c")\n'
    assert [*without_remedy(source)] == [1]
    assert len(CLASSES) > 5
