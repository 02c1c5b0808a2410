"""Reads the tests of a code problem, in the forms in which data sets have them (docs/tasks.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from lopd.tasks.code_checks import UnusableTextError, read_check
from lopd.tasks.code_values import (
    OtherFormError,
    only_element,
    opened,
    plain,
    unpacked,
    unreadable,
    value_of,
)

# The names that data sets use: for the two kinds of tests, ...
_STDIN = ("stdin", "stdin_stdout", "stdio", "standard_input", "stdin/stdout", "io")
_CALL = ("functional", "function", "function_call", "call", "call_based", "fn")
# ... for columns with pairs of input and output, ...
_CASES = (
    "tests",
    "test_cases",
    "public_test_cases",
    "private_test_cases",
    "public_tests",
    "private_tests",
    "generated_tests",
)
# ... for columns with statements, and for what stands before them, ...
_TEXTS = ("assertions", "test_list", "test", "test_code", "unit_tests", "challenge_test_list")
_SETUP = ("test_imports", "test_setup_code")
# ... and for the function that is called.
_FUNCTION = ("func_name", "fn_name", "entry_point")
# What an empty column holds.
_NOTHING: tuple[Any, ...] = (None, "", [], {})


@dataclass(frozen=True, slots=True)
class Test:
    """One test.

    Attributes:
        kind: stdin: the program reads ``given`` and must print ``expected``. call: the function
            gets the arguments ``given``. check: the statements ``given`` must not raise.
        given: The input of the test. kind explains it.
        expected: For stdin the output. For call one result for each reading (see Tests.readings).
            For check None.
    """

    kind: Literal["stdin", "call", "check"]
    given: Any
    expected: Any


@dataclass(frozen=True, slots=True)
class Tests:
    """All tests of a problem.

    A program is right if one reading of the expected results holds for every test.

    Attributes:
        tests: The tests, in order.
        function: The function that the tests of the kind call use.
        readings: The number of meanings that the expected results have. Some forms leave it open:
            ``[3]`` is a list, or it is 3 as APPS wraps it.
        called: The functions that a program must define.
        needs_candidate: As in Check.
    """

    tests: Sequence[Test]
    function: str = ""
    readings: int = 1
    called: frozenset[str] = frozenset()
    needs_candidate: bool = False


@lru_cache(maxsize=16)
def read_tests(gold: str, packages: bool = False) -> Tests:
    """Read the tests of a prompt's answer.

    Args:
        gold: The prompt's answer.
        packages: Whether programs, and so their tests, may import packages of this environment.

    Raises:
        DataError: The answer has none of the known forms, or it tests nothing.
    """
    # Twice: some columns hold JSON text inside a JSON string.
    about = opened(opened(gold))
    # Bare text is statements.
    if isinstance(about, str):
        return _statements({"assertions": about}, packages)
    if isinstance(about, list) and about and all(isinstance(one, str) for one in about):
        return _statements({"assertions": about}, packages)
    if isinstance(about, list):
        # A list of objects is the cases alone.
        about = {"tests": about}
    if not isinstance(about, dict) or not about:
        raise unreadable(f"{gold[:60]!r} is not a test")
    # APPS has all of it as text in one column, sometimes once more inside that.
    while "input_output" in about:
        inner = opened(about.pop("input_output"))
        about = {**about, **(inner if isinstance(inner, dict) else {"tests": inner})}
    # Some data sets hold problems in several languages.
    language = str(about.get("language") or "python").lower()
    if not language.startswith("py"):
        raise unreadable(f"they are for programs in {language}, and only Python is run")
    # These columns hold cases in most data sets, and statements in some.
    for name in ("tests", "test_cases"):
        if _is_text(opened(about.get(name))):
            about = {**about, "assertions": about.pop(name)}
    if any(about.get(name) not in _NOTHING for name in _TEXTS):
        return _statements(about, packages)
    return _cases(about)


def _statements(about: Mapping[str, Any], packages: bool) -> Tests:
    # Imports and preparation come first, then every column with statements.
    parts = [_joined(about.get(name), "\n") for name in (*_SETUP, *_TEXTS)]
    entry_point = next((str(about[name]) for name in _FUNCTION if about.get(name)), "")
    try:
        # One test of all statements: their functions and imports depend on each other.
        check = read_check("\n".join(parts), entry_point, packages=packages)
    except UnusableTextError as error:
        raise unreadable(str(error)) from None
    test = Test("check", check.code, None)
    return Tests((test,), called=check.called, needs_candidate=check.needs_candidate)


def _is_text(value: Any) -> bool:
    """Return whether a value is statements, or a list of them, and not cases in JSON text."""
    texts = value if isinstance(value, list) else [value]
    read = [opened(one) if isinstance(one, str) and one.strip() else None for one in texts]
    # What opens to a list or an object is a case.
    return bool(texts) and all(isinstance(one, str) for one in read)


def _joined(value: Any, end: str) -> str:
    """Return one text from a text, a list of lines, or JSON of one of them."""
    if value is None:
        return ""
    inner = opened(value)
    if isinstance(inner, list):
        return end.join(_joined(one, " ") for one in inner)
    return value if isinstance(value, str) else str(value)


def _cases(about: Mapping[str, Any]) -> Tests:
    rows = _case_rows(about)
    # The function's name stands in the whole problem's metadata, or in that of its cases.
    function = _function_of(about)
    for case in rows:
        function = function or _function_of(case)
    # One problem has one kind: the program is either run as a whole or called.
    kinds = [_kind(case, function) for case in rows]
    # Text for a program's input keeps its form, so there is only one reading.
    if "call" not in kinds:
        return Tests(tuple(_stdin(case) for case in rows))
    if "stdin" in kinds:
        # The two kinds would need two programs.
        raise unreadable("some tests read input, and some call a function")
    if not function:
        raise unreadable("they call a function, and nothing names it")
    arguments = [_arguments(case["input"]) for case in rows]
    readings = _readings([case["output"] for case in rows], [case["input"] for case in rows])
    # From one list per reading to one tuple of readings per test.
    expected = zip(*readings, strict=True)
    tests = [Test("call", *both) for both in zip(arguments, expected, strict=True)]
    return Tests(tuple(tests), function, len(readings), frozenset([function]))


def _case_rows(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the cases of all columns, each with the keys input and output."""
    cases: list[Any] = []
    if "inputs" in about:
        # APPS and TACO: two columns of equal length.
        cases += _paired(about["inputs"], about.get("outputs"))
    for name in _CASES:
        found = unpacked(about.get(name))
        # A table with the columns input and output, instead of rows.
        if isinstance(found, dict) and found:
            found = _paired(found.get("input"), found.get("output"))
        cases += found if isinstance(found, list) else []
    if not cases:
        raise unreadable("there is no test")
    rows = [opened(case) for case in cases]
    for case in rows:
        if not isinstance(case, dict) or "input" not in case or "output" not in case:
            raise unreadable("a test has no input or no output")
    return rows


def _function_of(about: Mapping[str, Any]) -> str:
    """Return the function that a problem or a case names, or "". Its own key stands above."""
    metadata = opened(about.get("metadata") or {})
    named = {**(metadata if isinstance(metadata, dict) else {}), **about}
    return next((str(named[name]) for name in _FUNCTION if named.get(name)), "")


def _paired(inputs: Any, outputs: Any) -> list[dict[str, Any]]:
    inputs = opened(inputs)
    outputs = opened(outputs)
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise unreadable("the inputs or the outputs are not a list")
    if len(inputs) != len(outputs):
        raise unreadable(f"{len(inputs)} inputs and {len(outputs)} outputs")
    pairs = zip(inputs, outputs, strict=True)
    return [{"input": given, "output": expected} for given, expected in pairs]


def _kind(case: Mapping[str, Any], function: str) -> str:
    told = case.get("testtype") or case.get("type")
    # Without a type, a named function tells that the tests call it.
    if told is None:
        return "call" if function else "stdin"
    if str(told).lower() in _STDIN:
        return "stdin"
    if str(told).lower() in _CALL:
        return "call"
    raise unreadable(f"a test has the unknown type {told!r:.40}")


def _stdin(case: Mapping[str, Any]) -> Test:
    # Without an expected output any program would pass.
    if case["output"] is None:
        raise unreadable("a test has no expected output")
    return Test("stdin", _lines(case["input"]), _lines(case["output"]))


def _lines(value: Any) -> str:
    """Return the text of a list of lines. A line is text, a number or a list of words."""
    if isinstance(value, list):
        # A line of words is written with one space between them, as programs read it.
        lines = [line if isinstance(line, list) else [line] for line in value]
        return "\n".join(" ".join(map(str, line)) for line in lines)
    return "" if value is None else str(value)


def _arguments(given: Any) -> list[Any]:
    """Return the arguments from a list of them, or from text with one per line."""
    if isinstance(given, str):
        lines = [line for line in given.splitlines() if line.strip()]
        # LeetCode's form: one argument per line, in JSON.
        given = [value_of(line, strict=True) for line in lines]
    if not isinstance(given, list):
        raise unreadable("a call has no list of arguments")
    return [plain(one) for one in given]


def _readings(outputs: Sequence[Any], inputs: Sequence[Any]) -> list[list[Any]]:
    """Return the expected results by each meaning that all of them can have.

    Args:
        outputs: The expected result of each test, as the data set has it.
        inputs: The arguments of each test. They show whether values are written as text.

    Returns:
        One list of results for each meaning.
    """
    as_text = all(isinstance(given, str) for given in inputs)
    ways: list[Callable[[Any], Any]] = [value_of, only_element]
    if not as_text:
        # If the arguments are values and not text, then "3" may be the text "3".
        ways.append(lambda output: output)
    found: list[list[Any]] = []
    for way in ways:
        try:
            reading = [plain(way(output)) for output in outputs]
        except OtherFormError:
            continue
        # Two meanings are often the same, and a second run of the comparison would tell nothing.
        if reading not in found:
            found.append(reading)
    return found
