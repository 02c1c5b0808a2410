"""Reads tests of a code problem that are Python statements.

It finds out whether they check anything, and how they must be called. The known forms are plain
``assert`` statements, functions ``test_...``, classes of ``unittest``, and a function
``check(candidate)`` that gets the program's function.

All decisions are made from the syntax tree. The tests do not run here, because they came from the
internet like the programs.
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

# Names of functions and methods that check something: assertEqual, assert_allclose, fail.
_ASSERTS = re.compile(r"assert|fail\Z")
_TEST_NAME = re.compile(r"test")
# The name by which the tests of some data sets import the program.
_SOLUTION_MODULE = "solution"
# Statements whose body does not run where they stand.
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_UNUSED = "the code of the tests runs no assertion"


class UnusableTextError(ValueError):
    """The text of the tests cannot tell a right program from a wrong one."""


@dataclass(frozen=True, slots=True)
class Check:
    """Statements that run after the program.

    Attributes:
        code: The statements.
        called: The functions that a program must define.
        needs_candidate: ``candidate`` must be the program's last function, because the problem
            names none.
    """

    code: str
    called: frozenset[str]
    needs_candidate: bool = False


def read_check(text: str, entry_point: str = "", *, packages: bool = False) -> Check:
    """Return the statements of a test, with the calls that the text itself lacks.

    Args:
        text: Python source.
        entry_point: The name of the function that ``check(candidate)`` gets, or "".
        packages: Whether the tests may import packages of this environment.

    Raises:
        UnusableTextError: The text is not Python, checks nothing, or needs what programs do not
            have.
    """
    try:
        with warnings.catch_warnings():
            # An invalid escape in a string gives a warning, which is of no interest here.
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        # The last two come from text that is nested too deeply for the parser.
        raise UnusableTextError(f"the code of the tests is not Python ({error})") from None
    try:
        return _check(tree, entry_point, packages)
    except RecursionError:
        raise UnusableTextError("the code of the tests has too many nested levels") from None


def _check(tree: ast.Module, entry_point: str, packages: bool) -> Check:
    _importable(tree, packages)
    # From here on only the statements that run.
    body = list(_statements(tree.body))
    # Some data sets hide a test that they have lost behind this statement.
    if any(isinstance(one, ast.Assert) and ast.unparse(one.test) == "False" for one in body):
        raise UnusableTextError("the code of the tests asserts False, so no program can pass")
    calls, needs_candidate = _calls(body, entry_point)
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    # Without calls the assertions must stand on the top level, or in functions that run from there.
    if not calls and not _asserts(body, functions):
        raise UnusableTextError(_UNUSED)
    # As text again, because the sandbox compiles it in another process.
    code = ast.unparse(ast.Module([*body, *ast.parse("\n".join(calls)).body], []))
    # With an entry point the program must have it. Otherwise what the tests call by a bare name
    # must come from the program.
    called = frozenset([entry_point]) if entry_point else _foreign_calls(ast.parse(code))
    return Check(code, called, needs_candidate)


def _calls(body: Sequence[ast.stmt], entry_point: str) -> tuple[list[str], bool]:
    """Return calls of the test functions and test classes that the text itself does not call.

    Returns:
        The calls, and whether one of them needs the name ``candidate``.
    """
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    called = _called_names(node for node in body if not isinstance(node, ast.FunctionDef))
    calls: list[str] = []
    needs_candidate = False
    for node in body:
        # Only definitions have a name. The others run where they stand.
        name = getattr(node, "name", "")
        # The text runs this function itself, perhaps with arguments.
        if name in called:
            continue
        # What nobody can call must be refused by name: to leave it out would make a test that
        # passes every program.
        if isinstance(node, ast.AsyncFunctionDef) and _TEST_NAME.match(name):
            raise UnusableTextError(f"{name} is asynchronous, and lopd runs no asynchronous tests")
        if isinstance(node, ast.ClassDef) and _asserts(ast.walk(node), functions):
            calls.append(_call_of_class(node))
        elif isinstance(node, ast.FunctionDef) and _asserts(node.body, functions):
            # The number of arguments without a default.
            needed = len(node.args.posonlyargs + node.args.args) - len(node.args.defaults)
            if name == "check" and needed == 0:
                calls.append("check()")
            elif name == "check" and needed == 1:
                needs_candidate = not entry_point
                calls.append(f"check({entry_point or 'candidate'})")
            elif _TEST_NAME.match(name) and needed == 0 and not node.decorator_list:
                calls.append(f"{name}()")
            elif _TEST_NAME.match(name):
                raise UnusableTextError(f"{name} needs arguments or fixtures that are not defined")
    return calls, needs_candidate


def _call_of_class(node: ast.ClassDef) -> str:
    """Return the statements that run the tests of a class.

    Classes of unittest have their own runner.
    """
    # "unittest.TestCase" and "TestCase" are the same base.
    bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    # Its event loop makes a pair of sockets, which the sandbox refuses.
    if "IsolatedAsyncioTestCase" in bases:
        raise UnusableTextError(f"{node.name} needs sockets, which programs do not have")
    methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
    names = [one.name for one in methods if _TEST_NAME.match(one.name)]
    if not names:
        raise UnusableTextError(f"the class {node.name} has no method that begins with test")
    if "TestCase" in bases:
        return f"_run_unittest({node.name})"
    # A class without unittest is pytest's: each test has a new object and the argument self.
    # Methods that prepare something, and further arguments, would need pytest itself.
    prepared = any(re.match("setup|teardown", one.name) for one in methods)
    if prepared or any(len(one.args.args) != 1 for one in methods if one.name in names):
        raise UnusableTextError(f"{node.name} needs arguments or fixtures that are not defined")
    return "\n".join(f"{node.name}().{name}()" for name in names)


def _asserts(nodes: Iterable[ast.AST], functions: dict[str, ast.FunctionDef]) -> bool:
    """Return whether running these statements checks something, called functions included.

    Args:
        nodes: The statements.
        functions: The text's own functions, by name.
    """
    # A stack instead of a recursion: functions may call each other in a circle.
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
            # An own function may be named assert_equal and check nothing: its body decides.
            if _ASSERTS.match(name) and name not in functions:
                return True
            if name in functions and name not in seen:
                seen.add(name)
                waiting.extend(functions[name].body)
        # The assertions of a "try" count only if its handlers let a failure through.
        if isinstance(node, ast.Try) and any(map(_swallows, node.handlers)):
            waiting += [*node.handlers, *node.orelse, *node.finalbody]
        elif not isinstance(node, _DEFINITIONS):
            waiting.extend(ast.iter_child_nodes(node))
    return False


def _swallows(handler: ast.ExceptHandler) -> bool:
    """Return whether a failed assertion ends here, and the tests continue as if it had held."""
    # A bare except catches everything.
    caught = "BaseException" if handler.type is None else ast.unparse(handler.type)
    if not re.search(r"\b(AssertionError|Exception|BaseException)\b", caught):
        return False
    # A handler that raises, asserts or ends the process passes the failure on.
    ends = (ast.Raise, ast.Assert)
    inside = [node for one in handler.body for node in ast.walk(one)]
    fails = {"fail", "exit", "_exit"} & _called_names(inside)
    return not fails and not any(isinstance(node, ends) for node in inside)


def _depends(test: ast.expr) -> bool:
    """Return whether the outcome of an assertion depends on the program.

    ``assert True`` does not, nor does ``assert (f(1) == 2, "words")``, which is always true.
    ``assert False`` does: it stands where a right program does not come.
    """
    if isinstance(test, ast.Constant):
        return not test.value
    if isinstance(test, ast.Tuple):
        return False
    # An expression of constants and built-in functions alone has always the same value.
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    return bool(names - set(dir(builtins)))


def _is_failure(node: ast.Raise) -> bool:
    """Return whether a statement raises an AssertionError or something like it."""
    return node.exc is not None and "Assert" in ast.unparse(node.exc)


def _name_of(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _called_names(nodes: Iterable[ast.AST]) -> set[str]:
    found = (one for node in nodes for one in ast.walk(node))
    return {_name_of(one.func) for one in found if isinstance(one, ast.Call)}


def _foreign_calls(tree: ast.Module) -> frozenset[str]:
    """Return the bare names that the statements call, and that neither they nor Python define."""
    # The first two are defined by the script that runs the tests (lopd.tasks.code).
    own = {"candidate", "_run_unittest", *dir(builtins)}
    called = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                own.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                own.add(name)
            # What comes from the program's own module is the program's to define.
            case ast.ImportFrom(module=module, names=aliases) if module != _SOLUTION_MODULE:
                own.update(alias.asname or alias.name for alias in aliases)
            case ast.Call(func=ast.Name(id=name)):
                called.add(name)
    return frozenset(called - own)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Return the statements, without ``unittest.main()`` and ``pytest.main()``.

    Statements under ``if __name__ == "__main__"`` are part of them.
    """
    for node in body:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            yield from _statements(node.body)
            continue
        value = node.value if isinstance(node, ast.Expr) else None
        runner = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
        # These runners would look for tests in a file that does not exist, and then end the
        # process.
        if runner not in ("unittest.main", "pytest.main", "sys.exit"):
            yield node


def _importable(tree: ast.Module, packages: bool) -> None:
    """Check the imports of the tests.

    Raises:
        UnusableTextError: The tests import what programs do not have.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        else:
            continue
        # Of a.b.c only the package a can be missing as a whole.
        for module in (name.split(".")[0] for name in modules):
            # A test that cannot be imported would count every program as wrong.
            known = module in sys.stdlib_module_names or module == _SOLUTION_MODULE
            if not known and not (packages and importlib.util.find_spec(module) is not None):
                more = "" if packages else " without task.options.packages"
                raise UnusableTextError(
                    f"the tests import {module}, which the sandbox does not have{more}"
                )
