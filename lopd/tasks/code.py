"""The task ``code``: the program of a response passes the prompt's tests.

Every test runs in a sandbox (lopd.tasks.sandbox). A program is judged from outside: it sees the
inputs, but never the expected outputs. docs/tasks.md describes the forms of tests, and what the
sandbox does not protect from.
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
from lopd.tasks.code_tests import Test, Tests, read_tests
from lopd.tasks.code_values import same_result
from lopd.tasks.sandbox_process import Outcome
from lopd.tasks.verdicts import Verdict

# The relative error that a printed decimal fraction may have.
_ROUNDING = Decimal("1e-9")
# A longer word is no number that a test prints; Decimal would spend much time on it.
_MAX_NUMBER_CHARS = 400
# Wall-clock seconds of a test beside its CPU seconds: a program may wait while others compute.
_WALL_FACTOR = 2
_WALL_EXTRA_S = 2
# The output is held in memory, and it counts as a file.
_MAX_FILE_MB = 16

# Programs in the sandbox: every program runs after the prelude, which imports what many solutions
# use without an import of their own.
_STARS = "".join(f"from {name} import *\n" for name in STARRED)
_PRELUDE = f"""\
import {MODULES}
{_STARS}sys.setrecursionlimit(50000)
exit = quit = sys.exit
"""
# Two files and no joined text: the line numbers in an error are those of the program itself.
_PROGRAM = """\
names = {"__name__": "__main__"}
exec(compile(open("prelude.py").read(), "prelude.py", "exec"), names)
exec(compile(open("program.py").read(), "program.py", "exec"), names)
"""
# Calls a function of the program. What the program prints goes to /dev/null. The result is written
# to the descriptor "kept", so that a print cannot be taken for it.
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
    """The task ``code``: programs in Python."""

    name: ClassVar[str] = "code"

    limit_s: float = Field(
        default=6.0,
        gt=0,
        le=600,
        strict=False,
        description=(
            "The CPU seconds of one test. It may take twice as many seconds of the clock, plus 2."
        ),
    )

    # The address space counts, which is more than what is used.
    memory_mb: int = Field(
        default=2048,
        ge=64,
        description="The memory of one process of the program, in MB.",
    )

    # Numpy and the interpreter itself start threads, which count too.
    processes: int = Field(
        default=16,
        ge=1,
        description="The most processes and threads that the program may have at once.",
    )

    disk_mb: int = Field(
        default=64,
        ge=1,
        description=(
            "The most MB that the program may write. If the sandbox cannot limit the sum, this is "
            "the limit of one file."
        ),
    )

    # For quick evaluations while a model trains: some problems have a hundred tests.
    max_tests: int | None = Field(
        default=None,
        ge=1,
        description="Run only this number of first tests of a problem. If absent, all tests run.",
    )

    packages: bool = Field(
        default=False,
        description="Programs may import the packages of this environment, for example numpy.",
    )

    # Off, because the programs come from a model: nobody has read them.
    allow_weak_sandbox: bool = Field(
        default=False,
        description=(
            "Also run programs on a machine that cannot keep them from the network or from files "
            "of others (docs/tasks.md)."
        ),
    )

    def check_machine(self) -> str:
        """Return one line about how this machine protects itself from code that a model wrote.

        Raises:
            ConfigError: The machine has too few protections, and ``allow_weak_sandbox`` is not set.
        """
        return sandbox.require(self.allow_weak_sandbox).describe()

    def judge_answer(self, prompt: Prompt, gold: str, part: str) -> Verdict:
        """See FileTask. The tests run in order, up to the first that fails."""
        try:
            # Cached, because many responses answer the same prompt.
            tests = read_tests(gold, self.packages)
        except DataError:
            return Verdict(False, "the prompt's tests cannot be read")
        # Tests with "candidate" name no function. Then it is the function that the question begins,
        # or else the last one of the program.
        asked = _asked_function(prompt) if tests.needs_candidate else ""
        program = program_of(part, tests.called | ({asked} if asked else set()))
        if program is None:
            return Verdict(False, "no code block")
        if tests.needs_candidate:
            candidate = asked if defines(program, asked) else last_function(program)
            tests = replace(tests, function=candidate)
        # Asked again here: a caller may judge without check_machine.
        held = sandbox.require(self.allow_weak_sandbox)
        chosen = tests.tests[: self.max_tests]
        # A program passes if one reading of the expected results holds for all tests. A test may
        # leave several readings, so the set becomes smaller from test to test.
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
        """Run one test.

        Returns:
            The reason why the program fails, or "". And the readings by which it passes.
        """
        # A check returns this value if all its statements held. A program that only ends the
        # process with code 0 does not return it.
        proof = secrets.token_hex(8)
        outcome = self._outcome(program, test, tests, proof, held)
        # A program that is stopped at a limit has no meaningful output.
        if outcome.timed_out:
            return "time limit", set()
        if outcome.code != 0:
            # Python ends with a MemoryError if RLIMIT_AS refuses memory.
            short = b"MemoryError" in outcome.stderr[-200:]
            return "memory limit" if short else "error", set()
        printed = outcome.stdout.decode("utf-8", "replace")
        every = set(range(tests.readings))
        if test.kind == "stdin":
            return "", every if same_output(printed, str(test.expected)) else set()
        try:
            result = json.loads(printed)
        except ValueError:
            # A function whose result is no JSON, or a program that has ended the process early.
            return "no result", set()
        if test.kind == "check":
            return "", every if result == proof else set()
        holding = (index for index in every if same_result(result, test.expected[index]))
        return "", set(holding)

    def _outcome(
        self, program: str, test: Test, tests: Tests, proof: str, held: sandbox.Protections
    ) -> Outcome:
        if test.kind == "stdin":
            # The program reads its input by itself. For the other two kinds the input is the job of
            # the caller.
            main = _PROGRAM
            stdin = str(test.given).encode()
        else:
            job: dict[str, Any] = {"function": tests.function, "arguments": test.given}
            if test.kind == "check":
                # Some data sets write their tests about a function `candidate`, whatever the
                # program calls it.
                candidate = tests.function if tests.needs_candidate else ""
                job = {"check": test.given, "proof": proof, "candidate": candidate}
            main = _CALLER
            stdin = json.dumps(job).encode()
        return sandbox.run(
            self._command(held),
            files={"main.py": main, "prelude.py": _PRELUDE, "program.py": program},
            stdin=stdin,
            limits=self._limits(),
            packages=self.packages,
            protections_used=held,
        )

    def _limits(self) -> sandbox.Limits:
        return sandbox.Limits(
            # Processor time is the limit that counts: on a busy machine a right program may wait
            # long.
            cpu_s=self.limit_s,
            wall_s=_WALL_FACTOR * self.limit_s + _WALL_EXTRA_S,
            memory_mb=self.memory_mb,
            processes=self.processes,
            disk_mb=self.disk_mb,
            file_mb=min(_MAX_FILE_MB, self.disk_mb),
        )

    def _command(self, held: sandbox.Protections) -> list[str]:
        # Its standard library is readable in the sandbox (readonly_folders).
        python = sandbox.interpreter(held, packages=self.packages)
        # -I: no folder and no variable of this user; -S: no site-packages.
        return [python, "-I", *([] if self.packages else ["-S"]), "main.py"]


def _asked_function(prompt: Prompt) -> str:
    """Return the last function that the question begins to write, or ""."""
    # Starter code in a question may define helpers first.
    found = re.findall(r"^\s*def\s+(\w+)\s*\(", prompt.messages[-1]["content"], re.MULTILINE)
    return found[-1] if found else ""


def same_output(printed: str, expected: str) -> bool:
    """Compare line by line.

    White space at the ends of lines does not count, nor do empty lines at the end. A number may be
    written differently (1.0 and 1). If a decimal fraction is expected, the number may be wrong by a
    billionth of it, which is what arithmetic in double precision leaves.
    """
    texts = (printed, expected)
    mine, theirs = ([line.split() for line in text.rstrip().splitlines()] for text in texts)
    if mine == theirs:
        return True
    # Pairs of words exist only if every line has the same number of words.
    if [len(line) for line in mine] != [len(line) for line in theirs]:
        return False
    pairs = zip(mine, theirs, strict=True)
    return all(all(map(_same_word, line, other)) for line, other in pairs)


def _same_word(one: str, expected: str) -> bool:
    if one == expected:
        return True
    try:
        if max(len(one), len(expected)) >= _MAX_NUMBER_CHARS:
            return False
        mine = Decimal(one)
        theirs = Decimal(expected)
        if mine == theirs:
            return True
        # Whole numbers must be equal. The point in the expected text says that it is a fraction.
        fraction = "." in expected and mine.is_finite() and theirs.is_finite()
        return fraction and abs(mine - theirs) <= _ROUNDING * abs(theirs)
    except InvalidOperation:
        # One of them is a word and no number.
        return False
