"""The program of a response: which of its fenced blocks is judged.

Blocks are found by CommonMark's rules for fences. Of the blocks the last is taken that is a
program by its syntax tree: that defines what the tests call, or, where they run a whole program,
stands by itself. A demonstration, a session, an output or a shell line is none. Tests are never
run to choose. Own code in place of a Markdown parser: one pass in linear time over a megabyte
that a model wrote, and fences with any indentation.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import textwrap
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, cached_property

# modules that each program finds imported, as LiveCodeBench has it, and those of which it finds
# every name
MODULES = """
sys, os, re, math, cmath, random, string, heapq, bisect, itertools, functools, operator,
collections, copy, json, time, datetime, statistics, fractions
""".replace("\n", " ").strip()
STARRED = ("typing", "collections", "itertools", "functools", "heapq", "bisect", "math", "builtins")

# list items and quotations that a fence may stand in
_CONTAINER = r"[ \t]*+(?:>[ \t]*+|(?:[-*+]|[0-9]{1,9}[.)])[ \t]++){0,16}"
_OPENING = re.compile(rf"({_CONTAINER})(`{{3,}}|~{{3,}})[ \t]*(.*)")
_QUOTES = re.compile(r"(?:[ \t]*>[ \t]?)*")
_PYTHON = re.compile(r"(?:ipython|python|py)(?:[23](?:\.[0-9]+)?)?", re.IGNORECASE)
_READS = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0\b|\bfileinput\b|\bos\.read\b")
_SPEAKS = re.compile(r"\b(?:print|input|def|class|import|write)\b")
_SESSION = re.compile(r"^\s*(?:>>>|In \[[0-9]+\]:)", re.MULTILINE)
_MAX_CHARS = 200_000  # of a block that is parsed; a longer one is no program that a model wrote


@dataclass(frozen=True)
class Block:
    """A closed fenced block. language: "" where none is named."""

    language: str
    content: str

    @property
    def is_python(self) -> bool:
        return _PYTHON.fullmatch(self.language) is not None

    @cached_property
    def tree(self) -> ast.Module | None:
        """None where it is not Python."""
        if len(self.content) > _MAX_CHARS or "\0" in self.content:
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an invalid escape in a string is no matter
                return ast.parse(self.content)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None

    def defines(self, name: str) -> bool:
        """Whether it makes a function or class of this name; an import of one does not count."""
        if name not in self.content:
            return False  # most blocks need not be parsed
        if self.tree is None:
            start = rf"^\s*(?:def|class)\s+{re.escape(name)}\b"
            return re.search(start, self.content, re.MULTILINE) is not None
        return name in self._made

    @cached_property
    def _made(self) -> set[str]:
        assert self.tree is not None
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Assign):
                found.update(one.id for one in node.targets if isinstance(one, ast.Name))
        return found

    @cached_property
    def stands_alone(self) -> bool:
        """Whether it does something, with names that it defines itself.

        ``O(n)`` and ``print(add(1, 2))`` call what another block has defined; ``3`` calls nothing.
        """
        if self.tree is None:
            return False
        nodes = list(ast.walk(self.tree))
        bound = set().union(*(_bound(node) for node in nodes)) | _known_names()
        if "*" not in bound:
            used = {node.id for node in nodes if isinstance(node, ast.Name)}
            if not used <= bound:
                return False
        kinds = ast.Call | ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom
        return any(isinstance(node, kinds) for node in nodes)

    @property
    def is_broken(self) -> bool:
        """Whether it was meant as a program and cannot be parsed."""
        return self.tree is None and _SPEAKS.search(self.content) is not None

    @property
    def may_be_program(self) -> bool:
        """A block in Python, or, where no language is named, one that reads like it."""
        if _SESSION.search(self.content):
            return False
        return self.is_python or (self.language == "" and _SPEAKS.search(self.content) is not None)


def program_of(text: str, names: Collection[str] = ()) -> str | None:
    """The program in a response; None where no closed block can be one.

    names: functions that the tests call, of which the program defines all that any block defines.
    """
    found, closed = _fenced(text)
    blocks = [one for one in found if one.may_be_program and one.content.strip()]
    if not blocks and closed:
        blocks = [one for one in _indented(text) if one.stands_alone]
    wanted = {name for name in names if any(block.defines(name) for block in blocks)}
    defining = [block for block in blocks if all(block.defines(name) for name in wanted)]
    if wanted and defining:
        return defining[-1].content
    # a block that cannot be parsed counts: a last program with a syntax error is a wrong one
    last_first = blocks[::-1]
    reading = [block for block in last_first if not names and _READS.search(block.content)]
    for block in (*reading, *last_first):
        if block.stands_alone or block.is_broken:
            return block.content
    return next((block.content for block in last_first if block.is_python), None)


def defines(program: str, name: str) -> bool:
    """Whether a program makes a function of this name."""
    return bool(name) and Block("python", program).defines(name)


def last_function(program: str) -> str:
    """The name of the last function on the top level; "" where there is none."""
    tree = Block("python", program).tree
    body = [] if tree is None else tree.body
    functions = [one for one in body if isinstance(one, ast.FunctionDef)]
    return functions[-1].name if functions else ""


def blocks_of(text: str) -> list[Block]:
    """Every fenced block that is closed, in order; its indentation and quotation marks removed."""
    return _fenced(text)[0]


def _fenced(text: str) -> tuple[list[Block], bool]:
    """The closed blocks, and whether none is left open."""
    found: list[Block] = []
    lines: list[str] = []
    fence = ""
    indent = 0
    language = ""
    for line in text.splitlines():
        if not fence:
            opening = _OPENING.fullmatch(line)
            if opening is None or (opening[2][0] == "`" and "`" in opening[3]):
                continue
            fence, language, lines = opening[2], _language(opening[3]), []
            indent = len(_QUOTES.sub("", opening[1], count=1).expandtabs(4))
            quotes = opening[1].count(">")
            continue
        for _ in range(quotes):
            line = re.sub(r"^[ \t]*>[ \t]?", "", line)
        bare = line.strip()
        if len(bare) >= len(fence) and bare == fence[0] * len(bare):
            found.append(Block(language, "\n".join(lines) + "\n"))
            fence = ""
        else:
            lines.append(_outdented(line, indent))
    return found, not fence


def _indented(text: str) -> list[Block]:
    """Code that is set off by an empty line and four columns alone, also under a list item."""
    found: list[Block] = []
    lines: list[str] = []
    after_empty = True
    for line in [*text.expandtabs(4).splitlines(), "end"]:
        if line.startswith("    ") and (lines or after_empty):
            lines.append(line)
        elif lines and not line.strip():
            lines.append("")
        elif lines:
            found.append(Block("", textwrap.dedent("\n".join(lines)).strip("\n") + "\n"))
            lines = []
        after_empty = not line.strip()
    return found


def _language(info: str) -> str:
    r"""Of ``python title="a.py"``, ``{python}``, ``{.python .numberLines}``, ``python:a.py``."""
    words = re.split(r"[\s,:;{}=]+", info.strip().strip("{}").strip())
    return words[0].lstrip(".").lower()


def _outdented(line: str, indent: int) -> str:
    """Without as much white space as stood before the fence, as far as there is any."""
    expanded = line[: len(line) - len(line.lstrip(" \t"))].expandtabs(4) if indent else ""
    return expanded[indent:] + line.lstrip(" \t") if indent else line


def _bound(node: ast.AST) -> set[str]:
    """The names that this node gives a meaning; "*" for all of a module's."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Import(names=aliases):
            return {alias.asname or alias.name.split(".")[0] for alias in aliases}
        case ast.ImportFrom(names=aliases):
            return {alias.asname or alias.name for alias in aliases}
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
            return {name}
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
            return {name}
        case ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
            return {name}
        case ast.Global(names=names) | ast.Nonlocal(names=names):
            return set(names)
    return set()


@cache
def _known_names() -> frozenset[str]:
    """The names that a program finds without defining them."""
    known = {*MODULES.split(", "), "__name__", "__file__", "exit", "quit", *dir(builtins)}
    for name in STARRED:
        module = importlib.import_module(name)
        known.update(getattr(module, "__all__", dir(module)))
    return frozenset(known)
