"""Code: the program of a response passes the prompt's tests, each run in a sandbox
(lopd.tasks.sandbox).

A program is judged from outside: it sees the inputs, never the expected outputs. docs/tasks.md has
the forms of tests, and what the sandbox does not protect from.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar

from pydantic import Field

from lopd.errors import DataError
from lopd.records import Prompt
from lopd.tasks import sandbox
from lopd.tasks.answers import FileTask
from lopd.tasks.code_blocks import MODULES, STARRED, defines, last_function, program_of
from lopd.tasks.code_tests import Test, Tests, read_tests, same_result
from lopd.tasks.verdicts import Verdict

_ROUNDING = Decimal("1e-9")  # relative
_STARS = "".join(f"from {name} import *\n" for name in STARRED)
_PRELUDE = f"""\
import {MODULES}
{_STARS}sys.setrecursionlimit(50000)
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

def listed(value):
    try:
        return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    except TypeError:
        return list(value)

def run_unittest(case):
    import unittest
    found = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(found)
    problems = [*found.failures, *found.errors, *found.unexpectedSuccesses, *found.skipped]
    if problems or not found.testsRun:
        raise AssertionError(str(problems)[:1000])

if "check" in job:
    solution = type(sys)("solution")
    solution.__dict__.update(names)
    sys.modules["solution"] = solution
    names["_run_unittest"] = run_unittest
    if job["candidate"]:
        names["candidate"] = names[job["candidate"]]
    exec(compile(job["check"], "tests.py", "exec"), names)
    result = job["proof"]
else:
    holder = names["Solution"]() if "Solution" in names else None
    if hasattr(holder, job["function"]):
        function = getattr(holder, job["function"])
    else:
        function = names[job["function"]]
    result = function(*job["arguments"])
os.write(kept, json.dumps(result, default=listed).encode())
"""


class Code(FileTask):
    """The task ``code``: Python programs."""

    name: ClassVar[str] = "code"

    limit_s: float = Field(
        default=6.0,
        gt=0,
        le=600,
        strict=False,
        description="CPU seconds of one test; twice as many and 2 of the clock.",
    )
    memory_mb: int = Field(default=2048, ge=64, description="Memory of a process of the program.")
    processes: int = Field(default=16, ge=1, description="Processes and threads of the program.")
    disk_mb: int = Field(
        default=64,
        ge=1,
        description="All that the program may write (per file where the sandbox has no disk of its own).",
    )
    max_tests: int | None = Field(
        default=None, ge=1, description="Run only the first tests of a problem; absent: all."
    )
    packages: bool = Field(
        default=False,
        description="Programs may import what is installed in this environment (numpy).",
    )
    allow_weak_sandbox: bool = Field(
        default=False,
        description="Run code also where it can reach the network or foreign files (docs/tasks.md).",
    )

    def check_machine(self) -> str:
        """One line on the protections here. ConfigError: too few, and allow_weak_sandbox is not
        set.
        """
        return sandbox.require(self.allow_weak_sandbox).describe()

    def judge_answer(self, prompt: Prompt, gold: str, part: str) -> Verdict:
        """See FileTask. Tests run in order, up to the first that fails."""
        try:
            tests = read_tests(gold, self.packages)
        except DataError:
            return Verdict(False, "the prompt's tests cannot be read")
        asked = _asked_function(prompt) if tests.needs_candidate else ""
        program = program_of(part, tests.called | ({asked} if asked else set()))
        if program is None:
            return Verdict(False, "no code block")
        if tests.needs_candidate:
            candidate = asked if defines(program, asked) else last_function(program)
            tests = replace(tests, function=candidate)
        held = sandbox.require(self.allow_weak_sandbox)
        chosen = tests.tests[: self.max_tests]
        readings = set(range(tests.readings))
        for number, test in enumerate(chosen, start=1):
            reason, holding = self._run(program, test, tests, held)
            readings &= holding
            if reason or not readings:
                found = f"test {number} of {len(tests.tests)}"
                return Verdict(False, reason or "wrong answer", found)
        return Verdict(True, found=f"{len(chosen)} tests")

    def answer_fault(self, prompt: Prompt) -> str:
        """See FileTask."""
        try:
            read_tests(prompt.answer or "", self.packages)
        except DataError as error:
            return error.what
        return ""

    def _run(
        self,
        program: str,
        test: Test,
        tests: Tests,
        held: sandbox.Protections,
    ) -> tuple[str, set[int]]:
        """Why the program fails this test, or nothing, and the readings by which it passes."""
        disk = min(16, self.disk_mb)
        bounds = (self.limit_s, 2 * self.limit_s + 2, self.memory_mb, self.processes, self.disk_mb)
        limits = sandbox.Limits(*bounds, disk)
        proof = secrets.token_hex(8)
        every = set(range(tests.readings))
        if test.kind == "stdin":
            main, stdin = _PROGRAM, str(test.given).encode()
        else:
            job: dict[str, Any] = {"function": tests.function, "arguments": test.given}
            if test.kind == "check":
                candidate = tests.function if tests.needs_candidate else ""
                job = {"check": test.given, "proof": proof, "candidate": candidate}
            main, stdin = _CALLER, json.dumps(job).encode()
        files = {"main.py": main, "prelude.py": _PRELUDE, "program.py": program}
        outcome = sandbox.run(
            self._command(held),
            files=files,
            stdin=stdin,
            limits=limits,
            packages=self.packages,
            protections_used=held,
        )
        if outcome.timed_out:
            return "time limit", set()
        if outcome.code != 0:
            short = b"MemoryError" in outcome.stderr[-200:]
            return "memory limit" if short else "error", set()
        printed = outcome.stdout.decode("utf-8", "replace")
        if test.kind == "stdin":
            return "", every if same_output(printed, str(test.expected)) else set()
        try:
            result = json.loads(printed)
        except ValueError:
            return "no result", set()
        if test.kind == "check":
            return "", every if result == proof else set()
        holding = (index for index in every if same_result(result, test.expected[index]))
        return "", set(holding)

    def _command(self, held: sandbox.Protections) -> list[str]:
        python = sandbox.interpreter(held, packages=self.packages)
        return [python, "-I", *([] if self.packages else ["-S"]), "main.py"]


def _asked_function(prompt: Prompt) -> str:
    """The last function that the question begins to write; "" where it writes none."""
    found = re.findall(r"^\s*def\s+(\w+)\s*\(", prompt.messages[-1]["content"], re.MULTILINE)
    return found[-1] if found else ""


def same_output(printed: str, expected: str) -> bool:
    """Line by line, white space at the ends of lines and empty lines at the end aside.

    Numbers may be written differently (1.0 and 1). Where a decimal fraction is expected, the
    number may be off by a billionth of it, which is what arithmetic in double precision leaves.
    """
    texts = (printed, expected)
    mine, theirs = ([line.split() for line in text.rstrip().splitlines()] for text in texts)
    if mine == theirs:
        return True
    if [len(line) for line in mine] != [len(line) for line in theirs]:
        return False
    pairs = zip(mine, theirs, strict=True)
    return all(all(map(_same_word, line, other)) for line, other in pairs)


def _same_word(one: str, expected: str) -> bool:
    if one == expected:
        return True
    try:
        if len(one) >= 400 or len(expected) >= 400:
            return False
        mine, theirs = Decimal(one), Decimal(expected)
        if mine == theirs:
            return True
        fraction = "." in expected and mine.is_finite() and theirs.is_finite()
        return fraction and abs(mine - theirs) <= _ROUNDING * abs(theirs)
    except InvalidOperation:
        return False
