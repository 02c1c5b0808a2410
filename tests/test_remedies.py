"""Every error that a user can meet says what to do, with the values and not with their names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from lopd import errors

ROOT = Path(__file__).parent.parent
CLASSES = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.LopdError)
}


# A name in braces, such as {key} or {seconds:g}.
NAMED = re.compile(r"\{([a-z_]+)[a-z_.]*(?::[^}]*)?\}")


def library_sources() -> Iterator[tuple[Path, str]]:
    for package in ("lopd", "sglang_rollout", "megatron_patches"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


def without_remedy(source: str) -> Iterator[int]:
    """Yield the line of each error that is made without a remedy."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            # `**parts` has no name here. Such a call hands on the parts of another error.
            named = {keyword.arg for keyword in node.keywords}
            if node.func.id in CLASSES and not named & {"remedy", None}:
                yield node.lineno


def not_filled_in(source: str) -> Iterator[int]:
    """Yield the line of each text that has a variable of its function in braces, as text."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        inner = [*ast.walk(function)]
        names = {node.arg for node in inner if isinstance(node, ast.arg)}
        names |= {node.id for node in inner if isinstance(node, ast.Name)}
        docstring = ast.get_docstring(function, clean=False)
        for node in inner:
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and node.value != docstring:
                found = {match[1] for match in NAMED.finditer(node.value)}
                if found & names:
                    yield node.lineno


def test_every_error_has_a_remedy() -> None:
    assert not [
        f"{path}:{line}" for path, source in library_sources() for line in without_remedy(source)
    ]


def test_no_message_has_a_name_in_place_of_its_value() -> None:
    assert not [
        f"{path}:{line}" for path, source in library_sources() for line in not_filled_in(source)
    ]


def test_a_name_in_place_of_its_value_would_be_found() -> None:
    wrong = 'def f(key):\n    return "set {key}"\n'
    right = 'def f(key):\n    "Return {key}."\n    return f"set {key} to {{question}}"\n'
    assert [*not_filled_in(wrong)] == [2]
    assert not [*not_filled_in(right)]


def test_an_error_without_a_remedy_would_be_found() -> None:
    source = 'raise DataError("a", where="b")\nraise DataError("a", remedy="c")\n'
    assert [*without_remedy(source)] == [1]
    assert len(CLASSES) > 5
