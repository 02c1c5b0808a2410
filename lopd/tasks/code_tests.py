"""Reads the tests of a code problem, in the forms in which data sets have them (docs/tasks.md)."""

from __future__ import annotations

import ast
import base64
import json
import math
import pickletools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from lopd.errors import DataError
from lopd.tasks.code_checks import UnusableTextError, read_check

# The most bytes of a problem's packed tests: a small packed text may unpack to any size.
_UNPACKED_MAX = 1 << 30

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


# Operations of a pickle that make no object. Any other one could call a function.
_HARMLESS = ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP")


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
    about = _opened(_opened(gold))
    # Bare text is statements.
    if isinstance(about, str):
        return _statements({"assertions": about}, packages)
    if isinstance(about, list) and about and all(isinstance(one, str) for one in about):
        return _statements({"assertions": about}, packages)
    if isinstance(about, list):
        # A list of objects is the cases alone.
        about = {"tests": about}
    if not isinstance(about, dict) or not about:
        raise _unreadable(f"{gold[:60]!r} is not a test")
    # APPS has all of it as text in one column, sometimes once more inside that.
    while "input_output" in about:
        inner = _opened(about.pop("input_output"))
        about = {**about, **(inner if isinstance(inner, dict) else {"tests": inner})}
    # Some data sets hold problems in several languages.
    language = str(about.get("language") or "python").lower()
    if not language.startswith("py"):
        raise _unreadable(f"they are for programs in {language}, and only Python is run")
    # These columns hold cases in most data sets, and statements in some.
    for name in ("tests", "test_cases"):
        if _is_text(_opened(about.get(name))):
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
        raise _unreadable(str(error)) from None
    test = Test("check", check.code, None)
    return Tests((test,), called=check.called, needs_candidate=check.needs_candidate)


def _is_text(value: Any) -> bool:
    """Return whether a value is statements, or a list of them, and not cases in JSON text."""
    texts = value if isinstance(value, list) else [value]
    opened = [_opened(one) if isinstance(one, str) and one.strip() else None for one in texts]
    # What opens to a list or an object is a case.
    return bool(texts) and all(isinstance(one, str) for one in opened)


def _joined(value: Any, end: str) -> str:
    """Return one text from a text, a list of lines, or JSON of one of them."""
    if value is None:
        return ""
    opened = _opened(value)
    if isinstance(opened, list):
        return end.join(_joined(one, " ") for one in opened)
    return value if isinstance(value, str) else str(value)


def _cases(about: Mapping[str, Any]) -> Tests:
    opened = _case_rows(about)
    # The function's name stands in the whole problem's metadata, or in that of its cases.
    function = _function_of(about)
    for case in opened:
        function = function or _function_of(case)
    # One problem has one kind: the program is either run as a whole or called.
    kinds = [_kind(case, function) for case in opened]
    # Text for a program's input keeps its form, so there is only one reading.
    if "call" not in kinds:
        return Tests(tuple(_stdin(case) for case in opened))
    if "stdin" in kinds:
        # The two kinds would need two programs.
        raise _unreadable("some tests read input, and some call a function")
    if not function:
        raise _unreadable("they call a function, and nothing names it")
    arguments = [_arguments(case["input"]) for case in opened]
    readings = _readings([case["output"] for case in opened], [case["input"] for case in opened])
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
        found = _unpacked(about.get(name))
        # A table with the columns input and output, instead of rows.
        if isinstance(found, dict) and found:
            found = _paired(found.get("input"), found.get("output"))
        cases += found if isinstance(found, list) else []
    if not cases:
        raise _unreadable("there is no test")
    opened = [_opened(case) for case in cases]
    for case in opened:
        if not isinstance(case, dict) or "input" not in case or "output" not in case:
            raise _unreadable("a test has no input or no output")
    return opened


def _function_of(about: Mapping[str, Any]) -> str:
    """Return the function that a problem or a case names, or "". Its own key stands above."""
    metadata = _opened(about.get("metadata") or {})
    named = {**(metadata if isinstance(metadata, dict) else {}), **about}
    return next((str(named[name]) for name in _FUNCTION if named.get(name)), "")


def _paired(inputs: Any, outputs: Any) -> list[dict[str, Any]]:
    inputs = _opened(inputs)
    outputs = _opened(outputs)
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise _unreadable("the inputs or the outputs are not a list")
    if len(inputs) != len(outputs):
        raise _unreadable(f"{len(inputs)} inputs and {len(outputs)} outputs")
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
    raise _unreadable(f"a test has the unknown type {told!r:.40}")


def _stdin(case: Mapping[str, Any]) -> Test:
    # Without an expected output any program would pass.
    if case["output"] is None:
        raise _unreadable("a test has no expected output")
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
        given = [_value(line, strict=True) for line in lines]
    if not isinstance(given, list):
        raise _unreadable("a call has no list of arguments")
    return [_plain(one) for one in given]


def _readings(outputs: Sequence[Any], inputs: Sequence[Any]) -> list[list[Any]]:
    """Return the expected results by each meaning that all of them can have.

    Args:
        outputs: The expected result of each test, as the data set has it.
        inputs: The arguments of each test. They show whether values are written as text.

    Returns:
        One list of results for each meaning.
    """
    as_text = all(isinstance(given, str) for given in inputs)
    ways: list[Callable[[Any], Any]] = [_value, _inner]
    if not as_text:
        # If the arguments are values and not text, then "3" may be the text "3".
        ways.append(lambda output: output)
    found: list[list[Any]] = []
    for way in ways:
        try:
            reading = [_plain(way(output)) for output in outputs]
        except _OtherFormError:
            continue
        # Two meanings are often the same, and a second run of the comparison would tell nothing.
        if reading not in found:
            found.append(reading)
    return found


class _OtherFormError(Exception):
    """A value cannot be read in this way."""


def _inner(output: Any) -> Any:
    """Return the only element of a list. APPS and TACO put each result into a list of its own."""
    output = _value(output)
    if not isinstance(output, list) or len(output) != 1:
        raise _OtherFormError
    return output[0]


def _value(text: Any, *, strict: bool = False) -> Any:
    """Return what JSON or a Python literal means. Other text stays as it is.

    Args:
        text: A text, or any other value, which is returned.
        strict: Whether other text is refused.

    Raises:
        DataError: ``strict`` is set, and the text is neither JSON nor Python.
    """
    if not isinstance(text, str):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    # An argument that nobody can read would be passed as text, and a right program would fail.
    if strict:
        raise _unreadable(f"an argument is neither JSON nor Python ({text[:40]!r})")
    return text


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, so that tuples and sets are lists."""
    try:
        # The same way that results take in the sandbox, so both sides change alike.
        return json.loads(json.dumps(value, default=listed))
    except (TypeError, ValueError):
        raise _unreadable(
            f"a value has the type {type(value).__name__}, which JSON does not have"
        ) from None


def listed(value: Any) -> list[Any]:
    """Return a set or another iterable as a list, in an order that does not depend on chance."""
    try:
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    except TypeError:
        return list(value)


def same_result(result: Any, expected: Any) -> bool:
    """Return whether a result is right.

    A decimal fraction may be wrong by rounding in double precision.
    """
    # Only where a fraction is expected: a count must be exact.
    if isinstance(expected, float) and isinstance(result, int | float):
        # The absolute tolerance is for results that should be 0.
        close = math.isclose(result, expected, rel_tol=1e-9, abs_tol=1e-12)
        return close or (math.isnan(result) and math.isnan(expected))
    if isinstance(expected, list) and isinstance(result, list):
        return len(result) == len(expected) and all(map(same_result, result, expected))
    if isinstance(expected, dict) and isinstance(result, dict):
        if result.keys() != expected.keys():
            return False
        return all(same_result(result[key], expected[key]) for key in expected)
    return bool(result == expected)


def _opened(value: Any) -> Any:
    """Return what JSON text, or the text of a Python list or dict, holds.

    Other values are returned as they are.
    """
    if not isinstance(value, str):
        return value
    stripped = value.strip()
    # A data frame writes a missing value so.
    if stripped in ("null", "None", "nan", "NaN"):
        return []
    # A number stays text: input is text, and "007" is not 7.
    if stripped[:1] not in ("{", "[", '"'):
        return value
    # JSON first: in both languages most texts mean the same, but true and null are only JSON.
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(stripped)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return value


def _unpacked(value: Any) -> Any:
    """Return a column as a list or object.

    It is JSON text, or JSON text in a pickled string that is compressed and in base64.
    LiveCodeBench packs its hidden tests like that.
    """
    opened = _opened(value)
    if not isinstance(opened, str) or not opened.strip():
        return opened
    try:
        # Unpacked in one call with a limit, so that a small text cannot fill the memory.
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(opened, validate=True), _UNPACKED_MAX)
        # The limit was reached and something is left: no data set has tests of this size.
        if unpacker.unconsumed_tail:
            raise _unreadable(
                f"they have more than {_UNPACKED_MAX >> 20} MiB when they are unpacked"
            )
        return json.loads(_only_string(content))
    except (ValueError, zlib.error) as error:
        raise _unreadable(f"they cannot be unpacked ({error})") from None


def _only_string(content: bytes) -> str:
    """Return the text in a pickle that holds one string and nothing else.

    The operations of the pickle are listed and not executed. No pickle is ever loaded, because that
    would run any code.
    """
    found: list[str] = []
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"):
            found.append(str(argument))
        elif operation.name not in _HARMLESS:
            # For example GLOBAL or REDUCE, which name and call a function.
            raise ValueError(f"the pickle does more than hold a string ({operation.name})")
    if len(found) != 1:
        raise ValueError(f"the pickle holds {len(found)} strings")
    return found[0]


def _unreadable(what: str) -> DataError:
    remedy = "write the tests in one of the forms of docs/tasks.md"
    return DataError(
        f"the tests of a problem cannot be used: {what}", where="the prompt's answer", remedy=remedy
    )
