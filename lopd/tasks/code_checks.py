"""Tests of a code problem that are Python statements: do they check anything, and how are they run?

Known shapes: plain ``assert`` statements, functions ``test_...``, classes of ``unittest``, and a
function ``check(candidate)`` to which the program's function is given.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_ASSERTS = re.compile(r"assert|fail\Z")
_TEST_NAME = re.compile(r"test")
_SOLUTION_MODULE = "solution"  # the name under which some data sets' tests import the program
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_UNUSED = "the tests' text runs no assertion"


class UnusableTextError(ValueError):
    """Why a text of tests cannot tell a right program from a wrong one."""


@dataclass(frozen=True, slots=True)
class Check:
    """Statements to run after the program. called: functions that a program must define.

    needs_candidate: ``candidate`` is to be the program's own last function, for want of a name.
    """

    code: str
    called: frozenset[str]
    needs_candidate: bool = False


def read_check(text: str, entry_point: str = "", *, packages: bool = False) -> Check:
    """The statements of a test, with calls of what the text defines and nobody calls.

    entry_point: the function that ``check(candidate)`` is given. UnusableTextError: see there.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnusableTextError(f"the tests' text is no Python ({error})") from None
    try:
        return _check(tree, entry_point, packages)
    except RecursionError:
        raise UnusableTextError("the tests' text is nested too deeply") from None


def _check(tree: ast.Module, entry_point: str, packages: bool) -> Check:
    _importable(tree, packages)
    body = list(_statements(tree.body))
    if any(isinstance(one, ast.Assert) and ast.unparse(one.test) == "False" for one in body):
        raise UnusableTextError("the tests' text asserts False, which no program meets")
    calls, needs_candidate = _calls(body, entry_point)
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    if not calls and not _asserts(body, functions):
        raise UnusableTextError(_UNUSED)
    code = ast.unparse(ast.Module([*body, *ast.parse("\n".join(calls)).body], []))
    called = frozenset([entry_point]) if entry_point else _foreign_calls(ast.parse(code))
    return Check(code, called, needs_candidate)


def _calls(body: Sequence[ast.stmt], entry_point: str) -> tuple[list[str], bool]:
    """Calls of functions and classes of tests that nothing in the text calls itself."""
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    called = _called_names(node for node in body if not isinstance(node, ast.FunctionDef))
    calls: list[str] = []
    needs_candidate = False
    for node in body:
        name = getattr(node, "name", "")
        if name in called:
            continue
        if isinstance(node, ast.AsyncFunctionDef) and _TEST_NAME.match(name):
            raise UnusableTextError(f"{name} is asynchronous, and nothing here would run it")
        if isinstance(node, ast.ClassDef) and _asserts(ast.walk(node), functions):
            calls.append(_call_of_class(node))
        elif isinstance(node, ast.FunctionDef) and _asserts(node.body, functions):
            needed = len(node.args.posonlyargs + node.args.args) - len(node.args.defaults)
            if name == "check" and needed == 0:
                calls.append("check()")
            elif name == "check" and needed == 1:
                needs_candidate = not entry_point
                calls.append(f"check({entry_point or 'candidate'})")
            elif _TEST_NAME.match(name) and needed == 0 and not node.decorator_list:
                calls.append(f"{name}()")
            elif _TEST_NAME.match(name):
                raise UnusableTextError(f"{name} needs arguments or fixtures that nobody gives")
    return calls, needs_candidate


def _call_of_class(node: ast.ClassDef) -> str:
    """Runs the tests of a class, those of unittest by their own runner."""
    bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    if "IsolatedAsyncioTestCase" in bases:
        raise UnusableTextError(f"{node.name} needs sockets, which programs do not have")
    methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
    names = [one.name for one in methods if _TEST_NAME.match(one.name)]
    if not names:
        raise UnusableTextError(f"the class {node.name} has no method that begins with test")
    if "TestCase" in bases:
        return f"_run_unittest({node.name})"
    prepared = any(re.match("setup|teardown", one.name) for one in methods)
    if prepared or any(len(one.args.args) != 1 for one in methods if one.name in names):
        raise UnusableTextError(f"{node.name} needs arguments or fixtures that nobody gives")
    return "\n".join(f"{node.name}().{name}()" for name in names)


def _asserts(nodes: Iterable[ast.AST], functions: dict[str, ast.FunctionDef]) -> bool:
    """Whether running these statements checks something, functions that they call included."""
    waiting = list(nodes)
    seen: set[str] = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Assert) and _depends(node.test):
            return True
        if isinstance(node, ast.Raise) and _is_failure(node):
            return True
        if isinstance(node, ast.Call):
            name = _name_of(node.func)
            if _ASSERTS.match(name) and name not in functions:
                return True
            if name in functions and name not in seen:
                seen.add(name)
                waiting.extend(functions[name].body)
        if isinstance(node, ast.Try) and any(map(_swallows, node.handlers)):
            waiting += [*node.handlers, *node.orelse, *node.finalbody]
        elif not isinstance(node, _DEFINITIONS):
            waiting.extend(ast.iter_child_nodes(node))
    return False


def _swallows(handler: ast.ExceptHandler) -> bool:
    """Whether a failed assertion ends here, and the tests go on as if it had held."""
    caught = "BaseException" if handler.type is None else ast.unparse(handler.type)
    if not re.search(r"\b(AssertionError|Exception|BaseException)\b", caught):
        return False
    ends = (ast.Raise, ast.Assert)
    inside = [node for one in handler.body for node in ast.walk(one)]
    fails = {"fail", "exit", "_exit"} & _called_names(inside)
    return not fails and not any(isinstance(node, ends) for node in inside)


def _depends(test: ast.expr) -> bool:
    """False of ``assert True``, and of ``assert (f(1) == 2, "words")``, which is always true.

    ``assert False`` does: it stands where a right program does not come.
    """
    if isinstance(test, ast.Constant):
        return not test.value
    if isinstance(test, ast.Tuple):
        return False
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    return bool(names - set(dir(builtins)))


def _is_failure(node: ast.Raise) -> bool:
    return node.exc is not None and "Assert" in ast.unparse(node.exc)


def _name_of(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _called_names(nodes: Iterable[ast.AST]) -> set[str]:
    found = (one for node in nodes for one in ast.walk(node))
    return {_name_of(one.func) for one in found if isinstance(one, ast.Call)}


def _foreign_calls(tree: ast.Module) -> frozenset[str]:
    """What the statements call by a bare name that neither they nor Python define."""
    own = {"candidate", "_run_unittest", *dir(builtins)}
    called = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                own.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                own.add(name)
            case ast.ImportFrom(module=module, names=aliases) if module != _SOLUTION_MODULE:
                own.update(alias.asname or alias.name for alias in aliases)
            case ast.Call(func=ast.Name(id=name)):
                called.add(name)
    return frozenset(called - own)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Also those meant for a script; without ``unittest.main()`` and ``pytest.main()``."""
    for node in body:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            yield from _statements(node.body)
            continue
        value = node.value if isinstance(node, ast.Expr) else None
        runner = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
        if runner not in ("unittest.main", "pytest.main", "sys.exit"):
            yield node


def _importable(tree: ast.Module, packages: bool) -> None:
    """UnusableTextError: the tests import what programs do not have."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        else:
            continue
        for module in (name.split(".")[0] for name in modules):
            known = module in sys.stdlib_module_names or module == _SOLUTION_MODULE
            if not known and not (packages and importlib.util.find_spec(module) is not None):
                more = "" if packages else " without task.options.packages"
                raise UnusableTextError(f"the tests import {module}, which is not there{more}")
