"""Code: the last code block of a response passes the prompt's tests, each run in a sandbox (lopd.tasks.sandbox).

A program is judged from outside: it sees the inputs, never the expected outputs. docs/tasks.md has the forms of tests, and what the sandbox does not
protect from.
"""

from __future__ import annotations

import base64
import json
import pickletools
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any, ClassVar

from pydantic import Field

from lopd.errors import DataError
from lopd.records import Prompt
from lopd.tasks import sandbox
from lopd.tasks.answers import FileTask
from lopd.tasks.verdicts import Verdict

_LANGUAGES = ("", "python", "python3", "py")
_UNPACKED_MAX = 1 << 30  # bytes of a problem's packed tests
_PRELUDE = """\
import sys, os, re, math, cmath, random, string, heapq, bisect, itertools, functools, operator, collections, copy, json, time, datetime, statistics, fractions
from typing import *
from collections import *
from itertools import *
from functools import *
from heapq import *
from bisect import *
from math import *
from builtins import *
sys.setrecursionlimit(50000)
exit = quit = sys.exit
"""
_PROGRAM = """\
names = {"__name__": "__main__"}
exec(compile(open("prelude.py").read(), "prelude.py", "exec"), names)
exec(compile(open("program.py").read(), "program.py", "exec"), names)
"""
# of a called function the program's own prints go nowhere, its result to the descriptor kept aside
_CALLER = """\
import json, os, sys
job = json.loads(sys.stdin.read())
kept = os.dup(1)
os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
names = {"__name__": "program"}
exec(compile(open("prelude.py").read(), "prelude.py", "exec"), names)
exec(compile(open("program.py").read(), "program.py", "exec"), names)
if "check" in job:
    exec(compile(job["check"], "tests.py", "exec"), names)
    result = job["proof"]
else:
    holder = names["Solution"]() if "Solution" in names else None
    function = getattr(holder, job["function"]) if holder is not None else names[job["function"]]
    result = function(*job["arguments"])
os.write(kept, json.dumps(result, default=list).encode())
"""


@dataclass(frozen=True, slots=True)
class Test:
    """One test. stdin: the program reads it and must print ``expected``. call: JSON arguments and JSON result. check: statements that must not raise."""

    kind: str  # stdin, call, check
    given: Any
    expected: Any


class Code(FileTask):
    """The task ``code``: Python programs."""

    name: ClassVar[str] = "code"

    limit_s: float = Field(default=6.0, gt=0, le=600, strict=False, description="CPU seconds of one test; twice as many and 2 of the clock.")
    memory_mb: int = Field(default=2048, ge=64, description="Memory of a process of the program.")
    processes: int = Field(default=16, ge=1, description="Processes and threads of the program.")
    disk_mb: int = Field(default=64, ge=1, description="All that the program may write (per file where the sandbox has no disk of its own).")
    max_tests: int | None = Field(default=None, ge=1, description="Run only the first tests of a problem; absent: all.")
    packages: bool = Field(default=False, description="Programs may import what is installed in this environment (numpy).")
    allow_weak_sandbox: bool = Field(default=False, description="Run code also where it can reach the network or foreign files (docs/tasks.md).")

    def check_machine(self) -> str:
        """One line on the protections here. ConfigError: too few, and allow_weak_sandbox is not set."""
        return sandbox.require(self.allow_weak_sandbox).describe()

    def judge_answer(self, prompt: Prompt, gold: str, part: str) -> Verdict:
        """See FileTask. Tests run in order, up to the first that fails."""
        program = last_code_block(part)
        if program is None:
            return Verdict(False, "no code block")
        try:
            tests, function = read_tests(gold)
        except DataError:
            return Verdict(False, "the prompt's tests cannot be read")
        held = sandbox.require(self.allow_weak_sandbox)
        for number, test in enumerate(tests[: self.max_tests], start=1):
            reason = self._run(program, test, function, held)
            if reason:
                return Verdict(False, reason, f"test {number} of {len(tests)}")
        return Verdict(True, found=f"{len(tests[: self.max_tests])} tests")

    def _run(self, program: str, test: Test, function: str, held: sandbox.Protections) -> str:
        """Why the program fails this test, or nothing."""
        limits = sandbox.Limits(self.limit_s, 2 * self.limit_s + 2, self.memory_mb, self.processes, self.disk_mb, min(16, self.disk_mb))
        proof = secrets.token_hex(8)
        if test.kind == "stdin":
            main, stdin = _PROGRAM, str(test.given).encode()
        else:
            job = {"check": test.given, "proof": proof} if test.kind == "check" else {"function": function, "arguments": test.given}
            main, stdin = _CALLER, json.dumps(job).encode()
        files = {"main.py": main, "prelude.py": _PRELUDE, "program.py": program}
        python = [sandbox.interpreter(held, packages=self.packages), "-I", *([] if self.packages else ["-S"]), "main.py"]
        outcome = sandbox.run(python, files=files, stdin=stdin, limits=limits, packages=self.packages, protections_used=held)
        if outcome.timed_out:
            return "time limit"
        if outcome.code != 0:
            return "memory limit" if b"MemoryError" in outcome.stderr[-200:] else "error"
        printed = outcome.stdout.decode("utf-8", "replace")
        if test.kind == "stdin":
            return "" if same_output(printed, str(test.expected)) else "wrong answer"
        try:
            result = json.loads(printed)
        except ValueError:
            return "no result"
        return "" if result == (proof if test.kind == "check" else test.expected) else "wrong answer"


def last_code_block(text: str) -> str | None:
    """The last fenced block of Python (or of no named language) that is closed; None where there is none."""
    found: str | None = None
    begun: list[str] | None = None
    language = ""
    for line in text.splitlines():
        bare = line.strip()
        if not bare.startswith("```"):
            if begun is not None:
                begun.append(line)
        elif begun is None:
            begun, language = [], bare[3:].strip().lower()
        else:
            if language in _LANGUAGES and begun:
                found = "\n".join(begun) + "\n"
            begun = None
    return found


def same_output(printed: str, expected: str) -> bool:
    """Line by line, white space at the ends of lines and empty lines at the end aside; numbers may be written differently (1.0 and 1), never rounded."""
    mine, theirs = ([line.split() for line in text.rstrip().splitlines()] for text in (printed, expected))
    if mine == theirs:
        return True
    if [len(line) for line in mine] != [len(line) for line in theirs]:
        return False
    return all(_same_word(a, b) for line, other in zip(mine, theirs, strict=True) for a, b in zip(line, other, strict=True))


def _same_word(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return len(one) < 400 and len(other) < 400 and Decimal(one) == Decimal(other)
    except InvalidOperation:
        return False


# ---- the forms of tests ---------------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def read_tests(gold: str) -> tuple[Sequence[Test], str]:
    """The tests of a prompt's answer, and the name of the function they call ("" for programs).

    Forms: LiveCodeBench's three columns as JSON; {"tests": [{"input", "output", "testtype"}], "func_name"}; {"inputs", "outputs", "fn_name"};
    {"assertions": "..."} or plain statements. DataError: none of these, or no test at all.
    """
    try:
        about = json.loads(gold)
    except ValueError:
        about = {"assertions": gold}
    if not isinstance(about, dict):
        raise _unreadable("not a JSON object")
    if "assertions" in about:
        return (Test("check", str(about["assertions"]), None),), ""
    metadata = _unpack(about.get("metadata") or {})
    function = str(about.get("func_name") or about.get("fn_name") or (metadata.get("func_name") if isinstance(metadata, dict) else "") or "")
    if "inputs" in about:
        inputs, outputs = about["inputs"], about.get("outputs") or []
        if len(inputs) != len(outputs):
            raise _unreadable(f"{len(inputs)} inputs and {len(outputs)} outputs")
        kind = "functional" if function else "stdin"
        cases = [{"input": given, "output": expected, "testtype": kind} for given, expected in zip(inputs, outputs, strict=True)]
    else:
        cases = [*_unpack(about.get("tests") or []), *_unpack(about.get("public_test_cases") or []), *_unpack(about.get("private_test_cases") or [])]
    if not cases:
        raise _unreadable("no test")
    return tuple(_case(case, function) for case in cases), function


def _case(case: Any, function: str) -> Test:
    if not isinstance(case, dict) or "input" not in case or "output" not in case:
        raise _unreadable("a test without input or output")
    if case.get("testtype", "functional" if function else "stdin") == "stdin":
        return Test("stdin", case["input"], case["output"])
    try:
        given = [json.loads(line) for line in case["input"].splitlines() if line.strip()] if isinstance(case["input"], str) else case["input"]
        expected = json.loads(case["output"]) if isinstance(case["output"], str) else case["output"]
    except ValueError as error:
        raise _unreadable(f"a test that is not JSON ({error})") from None
    if not function or not isinstance(given, list):
        raise _unreadable("a call without a function's name or arguments")
    return Test("call", given, expected)


def _unpack(value: Any) -> Any:
    """A column as a list or object: JSON text, or JSON text in a pickled string, compressed, in base64 (how LiveCodeBench packs its hidden tests)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(value, validate=True), _UNPACKED_MAX)
        if unpacker.unconsumed_tail:
            raise _unreadable(f"packed tests of more than {_UNPACKED_MAX >> 20} MiB")
        return json.loads(_only_string(content))
    except (ValueError, zlib.error) as error:
        raise _unreadable(f"tests that cannot be unpacked ({error})") from None


def _only_string(content: bytes) -> str:
    """The text in a pickle that holds one string and nothing else. Its operations are listed, not carried out: no pickle is ever loaded."""
    found: list[str] = []
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"):
            found.append(str(argument))
        elif operation.name not in ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"):
            raise ValueError(f"a pickle that does more than hold a string ({operation.name})")
    if len(found) != 1:
        raise ValueError(f"a pickle of {len(found)} strings")
    return found[0]


def _unreadable(what: str) -> DataError:
    return DataError(f"tests of a problem: {what}", where="the prompt's answer", remedy="see docs/tasks.md for the forms of tests")
