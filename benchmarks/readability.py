"""Measure how a code base reads: long lines, comments, values per assignment, function lengths.

    python -m benchmarks.readability                       # lopd, sglang_rollout, megatron_patches
    python -m benchmarks.readability NAME=FOLDER [...]     # beside other code bases

The table informs and judges nothing: no test depends on it. Folders named `tests` are left out, and
empty lines are not counted. docs/benchmarks.md has the figures.

- A line counts as docstring where it belongs to a string that stands alone as a statement.
- A line counts as comment where nothing but a comment stands on it. The comment block at the top of
  a file (a licence, a shebang) and marks for tools (`noqa`, `type:`, `fmt:`) are not counted.
- "several values" is the share of assignments such as `a, b = x, y`: a tuple on both sides. An
  unpacking of one value, `a, b = pair`, is not counted.
- A function is measured from `def` to its last line, first with and then without docstring and
  comments, and then in statements. Statements do not depend on where lines are broken.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

LIMIT = 100  # columns
OURS = ("lopd", "sglang_rollout", "megatron_patches")
_FOR_TOOLS = re.compile(r"#\s*(noqa|type:|fmt:|ruff:|mypy:|pragma)")


@dataclass
class Figures:
    """Counts over one code base. Lines are lines that are not empty."""

    lines: int = 0
    code: int = 0
    docstrings: int = 0
    comments: int = 0
    long_code: int = 0
    long_docstrings: int = 0
    assignments: int = 0
    several_values: int = 0
    functions: list[int] = field(default_factory=list)
    function_bodies: list[int] = field(default_factory=list)
    statements: list[int] = field(default_factory=list)

    def row(self, name: str) -> str:
        """Return a row of a Markdown table."""
        cells = (
            name,
            f"{self.lines:,}",
            _percent(self.long_code, self.code),
            _percent(self.long_docstrings, self.docstrings),
            _percent(self.comments, self.lines),
            _percent(self.several_values, self.assignments),
            _median_and_largest(self.functions),
            _median_and_largest(self.function_bodies),
            _median_and_largest(self.statements),
        )
        return f"| {' | '.join(cells)} |"


HEADER = """\
| | lines | code over 100 | docstrings over 100 | comments | several values | functions |\
 without docstrings | statements |
|---|---|---|---|---|---|---|---|---|"""


def measure(files: Iterable[Path]) -> Figures:
    """Count over all files."""
    figures = Figures()
    for path in files:
        _add(figures, path.read_text(encoding="utf-8"))
    return figures


def python_files(folders: Iterable[Path]) -> list[Path]:
    """Return the Python files below the folders, without tests."""
    return [
        path
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        if "tests" not in path.relative_to(folder).parts
    ]


def _add(figures: Figures, source: str) -> None:
    tree = ast.parse(source)
    lines = source.split("\n")
    filled = {number for number, line in enumerate(lines, 1) if line.strip()}
    docstrings = _docstring_lines(tree) & filled
    comments = _comment_lines(source)
    figures.lines += len(filled)
    figures.docstrings += len(docstrings)
    figures.code += len(filled - docstrings)
    figures.comments += len(comments)
    too_long = {number for number in filled if len(lines[number - 1]) > LIMIT}
    figures.long_docstrings += len(too_long & docstrings)
    figures.long_code += len(too_long - docstrings)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            figures.assignments += 1
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            figures.several_values += isinstance(node.targets[0], ast.Tuple)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            own = filled & set(range(node.lineno, node.end_lineno + 1))
            figures.functions.append(len(own))
            figures.function_bodies.append(len(own - docstrings - comments))
            figures.statements.append(_statements(node))


def _statements(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    inner = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.stmt) and not _is_lone_string(node)
    ]
    return len(inner) - 1  # ast.walk gives the function itself, too


def _is_lone_string(node: ast.stmt) -> bool:
    match node:
        case ast.Expr(value=ast.Constant(value=str())):
            return True
    return False


def _docstring_lines(tree: ast.AST) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str()), end_lineno=int() as end):
                found.update(range(node.lineno, end + 1))
    return found


def _comment_lines(source: str) -> set[int]:
    found: set[int] = set()
    at_top = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            if alone and not at_top and not _FOR_TOOLS.match(token.string):
                found.add(token.start[0])
        elif token.type not in (tokenize.NL, tokenize.ENCODING):
            at_top = False
    return found


def _median_and_largest(values: list[int]) -> str:
    return f"{statistics.median(values):g} / {max(values)}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f}%"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("others", nargs="*", metavar="NAME=FOLDER", help="code bases to set beside")
    root = Path(__file__).parent.parent
    print(HEADER)
    for other in parser.parse_args().others:
        name, _, folder = other.partition("=")
        print(measure(python_files([Path(folder)])).row(name))
    print(measure(python_files(root / package for package in OURS)).row("lopd"))


if __name__ == "__main__":
    main()
