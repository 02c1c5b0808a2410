"""The tests of a code problem, from the forms in which data sets have them (docs/tasks.md)."""

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

_UNPACKED_MAX = 1 << 30  # bytes of a problem's packed tests
_STDIN = ("stdin", "stdin_stdout", "stdio", "standard_input", "stdin/stdout", "io")
_CALL = ("functional", "function", "function_call", "call", "call_based", "fn")
_CASES = (
    "tests",
    "test_cases",
    "public_test_cases",
    "private_test_cases",
    "public_tests",
    "private_tests",
    "generated_tests",
)
_TEXTS = ("assertions", "test_list", "test", "test_code", "unit_tests", "challenge_test_list")
_SETUP = ("test_imports", "test_setup_code")
_FUNCTION = ("func_name", "fn_name", "entry_point")
_NOTHING: tuple[Any, ...] = (None, "", [], {})


@dataclass(frozen=True, slots=True)
class Test:
    """One test.

    stdin: the program reads ``given`` and must print ``expected``. call: arguments, and the result
    by each reading (see ``Tests.readings``). check: statements that must not raise.
    """

    kind: Literal["stdin", "call", "check"]
    given: Any
    expected: Any


@dataclass(frozen=True, slots=True)
class Tests:
    """All tests of a problem. function: the one that calls name.

    readings: how many meanings the expected results have where the form leaves it open: ``[3]`` is
    a list, or APPS's wrapping of 3. A program is right where one reading holds for every test.
    called: functions that a program must define.
    """

    tests: Sequence[Test]
    function: str = ""
    readings: int = 1
    called: frozenset[str] = frozenset()
    needs_candidate: bool = False


@lru_cache(maxsize=16)
def read_tests(gold: str, packages: bool = False) -> Tests:
    """The tests of a prompt's answer. DataError: none of the known forms, or nothing is tested.

    packages: programs may import what is installed here, and so may tests.
    """
    about = _opened(_opened(gold))
    if isinstance(about, str):
        return _statements({"assertions": about}, packages)
    if isinstance(about, list) and about and all(isinstance(one, str) for one in about):
        return _statements({"assertions": about}, packages)
    if isinstance(about, list):
        about = {"tests": about}
    if not isinstance(about, dict) or not about:
        raise _unreadable(f"{gold[:60]!r} is no test")
    while set(about) & {"input_output"}:  # APPS: all of it as text in one column
        inner = _opened(about.pop("input_output"))
        about = {**about, **(inner if isinstance(inner, dict) else {"tests": inner})}
    language = str(about.get("language") or "python").lower()
    if not language.startswith("py"):
        raise _unreadable(f"programs in {language}, and only Python is run")
    for name in ("tests", "test_cases"):  # where some data sets keep statements
        if _is_text(_opened(about.get(name))):
            about = {**about, "assertions": about.pop(name)}
    if any(about.get(name) not in _NOTHING for name in _TEXTS):
        return _statements(about, packages)
    return _cases(about)


# ---- statements ----------------------------------------------------------------------


def _statements(about: Mapping[str, Any], packages: bool) -> Tests:
    parts = [_joined(about.get(name), "\n") for name in (*_SETUP, *_TEXTS)]
    entry_point = next((str(about[name]) for name in _FUNCTION if about.get(name)), "")
    try:
        check = read_check("\n".join(parts), entry_point, packages=packages)
    except UnusableTextError as error:
        raise _unreadable(str(error)) from None
    test = Test("check", check.code, None)
    return Tests((test,), called=check.called, needs_candidate=check.needs_candidate)


def _is_text(value: Any) -> bool:
    """Statements, or a list of them; not cases that are JSON text each."""
    texts = value if isinstance(value, list) else [value]
    opened = [_opened(one) if isinstance(one, str) and one.strip() else None for one in texts]
    return bool(texts) and all(isinstance(one, str) for one in opened)


def _joined(value: Any, end: str) -> str:
    """A text, or a list of lines, or JSON of one of them."""
    if value is None:
        return ""
    opened = _opened(value)
    if isinstance(opened, list):
        return end.join(_joined(one, " ") for one in opened)
    return value if isinstance(value, str) else str(value)


# ---- cases ---------------------------------------------------------------------------


def _cases(about: Mapping[str, Any]) -> Tests:
    metadata = _opened(about.get("metadata") or {})
    named = {**(metadata if isinstance(metadata, dict) else {}), **about}
    function = next((str(named[name]) for name in _FUNCTION if named.get(name)), "")
    cases: list[Any] = []
    if "inputs" in about:
        cases += _paired(about["inputs"], about.get("outputs"))
    for name in _CASES:
        found = _unpacked(about.get(name))
        if isinstance(found, dict) and found:  # columns instead of rows
            found = _paired(found.get("input"), found.get("output"))
        cases += found if isinstance(found, list) else []
    if not cases:
        raise _unreadable("no test")
    opened = [_opened(case) for case in cases]
    for case in opened:
        if not isinstance(case, dict) or "input" not in case or "output" not in case:
            raise _unreadable("a test without input or output")
    for case in opened if not function else ():
        inner = _opened(case.get("metadata") or {})
        named = {**(inner if isinstance(inner, dict) else {}), **case}
        function = function or next((str(named[one]) for one in _FUNCTION if named.get(one)), "")
    kinds = [_kind(case, function) for case in opened]
    if "call" not in kinds:
        return Tests(tuple(_stdin(case) for case in opened))
    if "stdin" in kinds:
        raise _unreadable("some tests read input, and some call a function")
    if not function:
        raise _unreadable("calls without a function's name")
    arguments = [_arguments(case["input"]) for case in opened]
    readings = _readings([case["output"] for case in opened], [case["input"] for case in opened])
    expected = zip(*readings, strict=True)
    tests = [Test("call", *both) for both in zip(arguments, expected, strict=True)]
    return Tests(tuple(tests), function, len(readings), frozenset([function]))


def _paired(inputs: Any, outputs: Any) -> list[dict[str, Any]]:
    inputs, outputs = _opened(inputs), _opened(outputs)
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise _unreadable("inputs or outputs that are no list")
    if len(inputs) != len(outputs):
        raise _unreadable(f"{len(inputs)} inputs and {len(outputs)} outputs")
    pairs = zip(inputs, outputs, strict=True)
    return [{"input": given, "output": expected} for given, expected in pairs]


def _kind(case: Mapping[str, Any], function: str) -> str:
    told = case.get("testtype") or case.get("type")
    if told is None:
        return "call" if function else "stdin"
    if str(told).lower() in _STDIN:
        return "stdin"
    if str(told).lower() in _CALL:
        return "call"
    raise _unreadable(f"a test of the type {told!r:.40}")


def _stdin(case: Mapping[str, Any]) -> Test:
    if case["output"] is None:
        raise _unreadable("a test without an expected output")
    return Test("stdin", _lines(case["input"]), _lines(case["output"]))


def _lines(value: Any) -> str:
    """Text, or a list of lines, each of them text, a number or a list of words."""
    if isinstance(value, list):
        lines = [line if isinstance(line, list) else [line] for line in value]
        return "\n".join(" ".join(map(str, line)) for line in lines)
    return "" if value is None else str(value)


def _arguments(given: Any) -> list[Any]:
    """A list of them, or text with one a line."""
    if isinstance(given, str):
        lines = [line for line in given.splitlines() if line.strip()]
        given = [_value(line, strict=True) for line in lines]
    if not isinstance(given, list):
        raise _unreadable("a call without a list of arguments")
    return [_plain(one) for one in given]


def _readings(outputs: Sequence[Any], inputs: Sequence[Any]) -> list[list[Any]]:
    """The results that are expected, by each meaning that all of them can have."""
    as_text = all(isinstance(given, str) for given in inputs)
    ways: list[Callable[[Any], Any]] = [_value, _inner]
    if not as_text:
        ways.append(lambda output: output)  # beside arguments that are values, "3" may be text
    found: list[list[Any]] = []
    for way in ways:
        try:
            reading = [_plain(way(output)) for output in outputs]
        except _OtherFormError:
            continue
        if reading not in found:
            found.append(reading)
    return found


class _OtherFormError(Exception):
    """A value cannot be read in this way."""


def _inner(output: Any) -> Any:
    """APPS and TACO put each result into a list of its own."""
    output = _value(output)
    if not isinstance(output, list) or len(output) != 1:
        raise _OtherFormError
    return output[0]


def _value(text: Any, *, strict: bool = False) -> Any:
    """JSON or a Python literal; other text is itself. strict: other text is unreadable."""
    if not isinstance(text, str):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    if strict:
        raise _unreadable(f"an argument that is neither JSON nor Python ({text[:40]!r})")
    return text


def _plain(value: Any) -> Any:
    """As JSON has it, which is how results come back: tuples and sets are lists."""
    try:
        return json.loads(json.dumps(value, default=listed))
    except (TypeError, ValueError):
        raise _unreadable(f"a value of the type {type(value).__name__}") from None


def listed(value: Any) -> list[Any]:
    """A set or another iterable as a list, in an order that does not depend on chance."""
    try:
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    except TypeError:
        return list(value)


def same_result(result: Any, expected: Any) -> bool:
    """Equal, where a fraction may be off by what rounding in double precision leaves."""
    if isinstance(expected, float) and isinstance(result, int | float):
        close = math.isclose(result, expected, rel_tol=1e-9, abs_tol=1e-12)
        return close or (math.isnan(result) and math.isnan(expected))
    if isinstance(expected, list) and isinstance(result, list):
        return len(result) == len(expected) and all(map(same_result, result, expected))
    if isinstance(expected, dict) and isinstance(result, dict):
        if result.keys() != expected.keys():
            return False
        return all(same_result(result[key], expected[key]) for key in expected)
    return bool(result == expected)


# ---- columns that hold text ----------------------------------------------------------


def _opened(value: Any) -> Any:
    """What JSON text, or the literal of a Python list or dict, holds; other values as they are."""
    if not isinstance(value, str):
        return value
    stripped = value.strip()
    if stripped in ("null", "None", "nan", "NaN"):
        return []
    if stripped[:1] not in ("{", "[", '"'):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(stripped)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return value


def _unpacked(value: Any) -> Any:
    """A column as a list or object: JSON text, or JSON text in a pickled string, compressed, in
    base64 (how LiveCodeBench packs its hidden tests)."""
    opened = _opened(value)
    if not isinstance(opened, str) or not opened.strip():
        return opened
    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(opened, validate=True), _UNPACKED_MAX)
        if unpacker.unconsumed_tail:
            raise _unreadable(f"packed tests of more than {_UNPACKED_MAX >> 20} MiB")
        return json.loads(_only_string(content))
    except (ValueError, zlib.error) as error:
        raise _unreadable(f"tests that cannot be unpacked ({error})") from None


def _only_string(content: bytes) -> str:
    """The text in a pickle that holds one string and nothing else. Its operations are listed, not
    carried out: no pickle is ever loaded."""
    found: list[str] = []
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"):
            found.append(str(argument))
        elif operation.name not in _HARMLESS:
            raise ValueError(f"a pickle that does more than hold a string ({operation.name})")
    if len(found) != 1:
        raise ValueError(f"a pickle of {len(found)} strings")
    return found[0]


_HARMLESS = ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP")


def _unreadable(what: str) -> DataError:
    remedy = "see docs/tasks.md for the forms of tests"
    return DataError(f"tests of a problem: {what}", where="the prompt's answer", remedy=remedy)
