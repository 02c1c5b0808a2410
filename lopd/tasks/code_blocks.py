"""Finds the program of a response: the fenced block that is judged.

Blocks are found by CommonMark's rules for fences. The last block that is a program by its syntax
tree is taken. A program defines what the tests call; if the tests run a whole program, it works
without another block. A demonstration, an interactive session, an output or a shell line is not a
program. Tests are never run to choose a block.

There is no Markdown parser here: one pass in linear time must go over a megabyte that a model
wrote, and fences may have any indentation.
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

# The modules that every program finds imported, as in LiveCodeBench, and those of which it finds
# every name. Many solutions in the wild rely on them.
MODULES = """
sys, os, re, math, cmath, random, string, heapq, bisect, itertools, functools, operator,
collections, copy, json, time, datetime, statistics, fractions
""".replace("\n", " ").strip()
STARRED = ("typing", "collections", "itertools", "functools", "heapq", "bisect", "math", "builtins")

# List items and quotations around a fence. The quantifiers are possessive (++), because a line of
# many markers would otherwise be tried in very many ways.
_CONTAINER = r"[ \t]*+(?:>[ \t]*+|(?:[-*+]|[0-9]{1,9}[.)])[ \t]++){0,16}"
_OPENING = re.compile(rf"({_CONTAINER})(`{{3,}}|~{{3,}})[ \t]*(.*)")
_QUOTES = re.compile(r"(?:[ \t]*>[ \t]?)*")
# The names of the language that models write behind a fence.
_PYTHON = re.compile(r"(?:ipython|python|py)(?:[23](?:\.[0-9]+)?)?", re.IGNORECASE)
# A program that reads its input, as tests of whole programs need.
_READS = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0\b|\bfileinput\b|\bos\.read\b")
# Words that prose and output rarely have: a block with them was meant as a program.
_SPEAKS = re.compile(r"\b(?:print|input|def|class|import|write)\b")
# The prompts of an interactive session of Python or IPython.
_SESSION = re.compile(r"^\s*(?:>>>|In \[[0-9]+\]:)", re.MULTILINE)
# A longer block is not parsed. No model writes such a program, and the parser would need long.
_MAX_CHARS = 200_000


@dataclass(frozen=True)
class Block:
    """A closed fenced block.

    Attributes:
        language: The first word behind the fence, in small letters. "" if there is none.
        content: The lines between the fences.
    """

    language: str
    content: str

    @property
    def is_python(self) -> bool:
        return _PYTHON.fullmatch(self.language) is not None

    @cached_property
    def tree(self) -> ast.Module | None:
        """Return the syntax tree, or None if the content is not Python."""
        if len(self.content) > _MAX_CHARS or "\0" in self.content:
            return None
        try:
            with warnings.catch_warnings():
                # An invalid escape in a string gives a warning, which is of no interest here.
                warnings.simplefilter("ignore")
                return ast.parse(self.content)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None

    def defines(self, name: str) -> bool:
        """Return whether the block makes a function or class of this name.

        An import of it does not count.
        """
        if name not in self.content:
            # Most blocks are answered here, and need not be parsed.
            return False
        if self.tree is None:
            # A block with a syntax error still says what it wanted to define. It is then chosen,
            # and fails its tests.
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
                # "solve = Solution().solve" makes a function too.
                found.update(one.id for one in node.targets if isinstance(one, ast.Name))
        return found

    @cached_property
    def stands_alone(self) -> bool:
        """Return whether the block does something with names that it defines itself.

        ``O(n)`` and ``print(add(1, 2))`` call what another block has defined. ``3`` calls nothing.
        """
        if self.tree is None:
            return False
        # Scopes are ignored: a name that is bound anywhere counts as defined. A stricter rule would
        # reject programs that work.
        nodes = list(ast.walk(self.tree))
        bound = set().union(*(_bound(node) for node in nodes)) | _known_names()
        # After "from x import *" any name may be defined.
        if "*" not in bound:
            used = {node.id for node in nodes if isinstance(node, ast.Name)}
            if not used <= bound:
                return False
        kinds = ast.Call | ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom
        return any(isinstance(node, kinds) for node in nodes)

    @property
    def is_broken(self) -> bool:
        """Return whether the block was meant as a program and cannot be parsed."""
        return self.tree is None and _SPEAKS.search(self.content) is not None

    @property
    def may_be_program(self) -> bool:
        """Return whether the block is marked as Python, or has no mark and reads like Python."""
        if _SESSION.search(self.content):
            return False
        return self.is_python or (self.language == "" and _SPEAKS.search(self.content) is not None)


def program_of(text: str, names: Collection[str] = ()) -> str | None:
    """Return the program in a response, or None if no closed block can be one.

    Args:
        text: The final part of the response.
        names: The functions that the tests call. The program then defines every one of them that
            any block defines.
    """
    found, closed = _fenced(text)
    blocks = [one for one in found if one.may_be_program and one.content.strip()]
    # Without any fence, code may be set off by its indentation. An open fence means that the
    # response broke off inside its program.
    if not blocks and closed:
        blocks = [one for one in _indented(text) if one.stands_alone]
    # Names that no block defines are the tests' own business, for example helpers of theirs.
    wanted = {name for name in names if any(block.defines(name) for block in blocks)}
    defining = [block for block in blocks if all(block.defines(name) for name in wanted)]
    # The last one, because models first sketch and then correct.
    if wanted and defining:
        return defining[-1].content
    # A block that cannot be parsed counts here: if the last program has a syntax error, the
    # response is wrong. Without names the tests run a whole program, so one that reads input is
    # preferred: the last block is often only an example of its use.
    last_first = blocks[::-1]
    reading = [block for block in last_first if not names and _READS.search(block.content)]
    for block in (*reading, *last_first):
        if block.stands_alone or block.is_broken:
            return block.content
    return next((block.content for block in last_first if block.is_python), None)


def defines(program: str, name: str) -> bool:
    """Return whether a program makes a function of this name."""
    return bool(name) and Block("python", program).defines(name)


def last_function(program: str) -> str:
    """Return the name of the last function on the top level, or "" if there is none."""
    tree = Block("python", program).tree
    body = [] if tree is None else tree.body
    functions = [one for one in body if isinstance(one, ast.FunctionDef)]
    return functions[-1].name if functions else ""


def blocks_of(text: str) -> list[Block]:
    """Return every closed fenced block, in order, without its indentation and quotation marks."""
    return _fenced(text)[0]


def _fenced(text: str) -> tuple[list[Block], bool]:
    """Return the closed blocks, and whether no block is left open."""
    found: list[Block] = []
    lines: list[str] = []
    fence = ""
    indent = 0
    language = ""
    for line in text.splitlines():
        if not fence:
            opening = _OPENING.fullmatch(line)
            # CommonMark: a line with backticks behind the fence is inline code, not a fence.
            if opening is None or (opening[2][0] == "`" and "`" in opening[3]):
                continue
            fence = opening[2]
            language = _language(opening[3])
            lines = []
            # The content loses as many columns and quotation marks as stand before the fence.
            indent = len(_QUOTES.sub("", opening[1], count=1).expandtabs(4))
            quotes = opening[1].count(">")
            continue
        # A fence inside a quotation has the quotation's marks before each line.
        for _ in range(quotes):
            line = re.sub(r"^[ \t]*>[ \t]?", "", line)
        # A fence is closed by at least as many of the same characters.
        bare = line.strip()
        if len(bare) >= len(fence) and bare == fence[0] * len(bare):
            found.append(Block(language, "\n".join(lines) + "\n"))
            fence = ""
        else:
            lines.append(_outdented(line, indent))
    return found, not fence


def _indented(text: str) -> list[Block]:
    """Return code that only an empty line and four columns set off, also under a list item."""
    found: list[Block] = []
    lines: list[str] = []
    # A line of prose must not stand directly before it, as CommonMark demands.
    after_empty = True
    # The additional last line ends a block that goes to the end of the text.
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
    """Return the language behind a fence, in small letters.

    Examples are ``python title="a.py"``, ``{python}``, ``{.python .numberLines}`` and
    ``python:a.py``.
    """
    words = re.split(r"[\s,:;{}=]+", info.strip().strip("{}").strip())
    return words[0].lstrip(".").lower()


def _outdented(line: str, indent: int) -> str:
    """Remove as many columns of white space as stood before the fence, if there are so many."""
    expanded = line[: len(line) - len(line.lstrip(" \t"))].expandtabs(4) if indent else ""
    return expanded[indent:] + line.lstrip(" \t") if indent else line


def _bound(node: ast.AST) -> set[str]:
    """Return the names that this node defines. "*" stands for all names of a module."""
    # Every statement that gives a name a value: definitions, imports, assignments, arguments,
    # handlers and patterns.
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        # `import a.b` binds the name a.
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
    """Return the names that a program finds without defining them."""
    known = {*MODULES.split(", "), "__name__", "__file__", "exit", "quit", *dir(builtins)}
    # Asked of the modules themselves, because their names differ from one Python to the next.
    for name in STARRED:
        module = importlib.import_module(name)
        known.update(getattr(module, "__all__", dir(module)))
    return frozenset(known)
