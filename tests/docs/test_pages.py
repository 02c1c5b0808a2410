"""The Markdown files of the repository: their width, and the files and tests that they name."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
]
# A file of the repository that a page names, and possibly a test inside of it.
PATH = re.compile(
    r"(?<![\w/.~-])(?P<file>(?:lopd|sglang_rollout|megatron_patches|tests|benchmarks|examples"
    r"|docker|docs|requirements|findings)/[\w./-]+\.(?:py|sh|toml|md|lock|env|in|txt|json|svg))"
    r"(?:::(?P<test>\w+))?"
)


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of the lines that are neither code, table, picture nor comment."""
    inside_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            inside_code = not inside_code
        elif not inside_code and not line.lstrip().startswith(("|", "![", "<!--")):
            yield number, line


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_prose_fits_into_100_columns(file: Path) -> None:
    long = [(number, line) for number, line in prose(file.read_text()) if len(line) > 100]
    assert not long


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_tests_that_a_page_names_exist(file: Path) -> None:
    for match in PATH.finditer(file.read_text()):
        named = ROOT / match["file"]
        assert named.exists(), match[0]
        if match["test"]:
            assert match["test"] in functions(named), match[0]


def functions(file: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


def test_a_name_that_is_gone_would_be_noticed() -> None:
    found = PATH.search("see `tests/docs/test_pages.py::test_gone` for it")
    assert found is not None
    assert found["test"] not in functions(ROOT / found["file"])
    assert not (ROOT / "lopd/megatron/optimizer.py").exists(), "PATH finds such a name as missing"
    assert PATH.search("in lopd/megatron/optimizer.py: learning_rate") is not None
