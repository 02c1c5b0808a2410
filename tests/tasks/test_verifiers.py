"""Right, wrong, malformed and hostile answers of every verifier. A table; all of it is judged once,
in parallel, as an evaluation does.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lopd.errors import ConfigError
from lopd.processes import group_alive
from lopd.records import Prompt
from lopd.tasks import get_task, sandbox
from lopd.tasks.answer_text import answer_line, last_box
from lopd.tasks.code import same_output
from lopd.tasks.code_blocks import program_of
from lopd.tasks.code_tests import read_tests
from lopd.tasks.verdicts import Verdict, final_part, judge_all
from lopd.tasks.workers import WorkerPool, WorkerTimeoutError

LIMIT_S = 2.0  # of processor time; what is right takes a twentieth of it
TASKS = {
    "math": get_task("math", {"limit_s": LIMIT_S}),
    "plain": get_task("plain", {}),
    "plain_line": get_task(
        "plain", {"answer_in": "last_line", "ignore_case": True, "alternatives": True}
    ),
    "code": get_task("code", {"limit_s": LIMIT_S, "memory_mb": 512, "disk_mb": 8}),
    "code_numpy": get_task("code", {"limit_s": 5.0, "packages": True}),
}


@dataclass(frozen=True)
class Case:
    """reason: why it is wrong; "" where it is right."""

    task: str
    gold: str
    text: str
    reason: str = ""
    finish_reason: str = "stop"

    @property
    def name(self) -> str:
        return f"{self.task}: {self.gold[:16]} <- {self.text[-44:]}".replace("\n", " ")


def boxed(gold: str, answer: str, reason: str = "") -> Case:
    return Case(
        "math",
        gold,
        f"<think>\nhm\n</think>\n\nSo the answer is $\\boxed{{{answer}}}$.",
        reason,
    )


WRONG = "wrong answer"
MATH = [
    # right, in many forms
    boxed("204", "204"), boxed("204", "0204"), boxed("025", "25"), boxed("204", "204.0"),
    boxed("1000", "1,000"), boxed("1000", "1{,}000"),
    boxed("\\frac{1}{2}", "0.5"), boxed("\\frac12", "\\dfrac{1}{2}"), boxed("2", "\\frac{4}{2}"),
    boxed("2\\sqrt{3}", "\\sqrt{12}"), boxed("2", "x=2"),
    boxed("18", "\\$18"), boxed("50", "50\\%"), boxed("90", "90^\\circ"),
    boxed("10", "10\\text{ cm}"), boxed("x^2+1", "1+x^2"), boxed("17", "17."),
    boxed("1,2", "2,1"), boxed("(3,4)", "(3, 4)"), boxed("\\text{Evelyn}", "\\text{evelyn}"),
    boxed("21", "7\\cdot 3=21"), boxed("2", "\\boxed{2}"),
    boxed("\\frac{9\\sqrt{23}}{23}", "\\frac{9}{\\sqrt{23}}"), boxed("1+2i", "2i+1"),
    boxed("$5$", "5"), boxed("2^{99}", "2^{99}"),
    boxed("\\frac{-1+\\sqrt{17}}{2}, \\frac{-1-\\sqrt{17}}{2}", "\\frac{-1 \\pm \\sqrt{17}}{2}"),
    boxed("\\pm 5", "5, -5"), boxed("5", "\\pm 5", WRONG),
    boxed("2^{25} \\cdot 26!", "26! \\cdot 33554432"),
    boxed("1-\\frac{2}{\\pi}", "\\frac{\\pi-2}{\\pi}"),
    Case("math", "7", "first \\boxed{8}, no: \\boxed{7}"),  # the last box
    Case("math", "7", "no thinking at all \\boxed{7}"),
    # the template opened the thinking
    Case("math", "7", "thought before </think> \\boxed {7}"),
    Case("math", "34", "</think>We add.\n\n**Answer: 34**"),
    Case("math", "34", "</think>We add.\nAnswer: $34$\n"),
    # wrong
    boxed("204", "205", WRONG), boxed("2", "1,2,3", WRONG), boxed("2", "2 \\text{ or } 3", WRONG),
    boxed("5", "(4,6)", WRONG), boxed("-5", "5", WRONG),
    boxed("204", "205=204", WRONG), boxed("204", "204=205", WRONG),
    boxed("\\frac13", "0.333", WRONG), boxed("(3,4)", "(4,3)", WRONG), boxed("2", "2x", WRONG),
    boxed("3", "\\infty", WRONG), boxed("A", "B", WRONG), boxed("0", "\\text{None}", WRONG),
    boxed("7", "7^{2}", WRONG),
    Case("math", "7", "\\boxed{7} or rather \\boxed{8}", WRONG),
    Case("math", "7", "<think>\\boxed{7}</think>\\boxed{8}", WRONG),
    # malformed
    boxed("7", "", "no answer"),
    Case("math", "7", "the answer is 7", "no answer"),
    Case("math", "7", "\\boxed{7", "no answer"),
    # the last box is not closed
    Case("math", "7", "\\boxed{7} and \\boxed{8", "no answer"),
    Case("math", "7", "<think>\\boxed{7}</think> so it is", "no answer"),
    Case("math", "7", "<think>it is \\boxed{7}", "never ended its thinking"),
    Case("math", "7", "so \\boxed{7}", "cut off", finish_reason="length"),
    Case("math", "7", "", "no answer"),
    Case("math", "", "\\boxed{}", "no answer"),
    # hostile
    boxed("7", "9^{9^{9^{9}}}", "time limit"), boxed("7", "99999999!", "time limit"),
    boxed("7", "7" * 200_000, "answer too long"), boxed("7", "\\frac{" * 60_000, "no answer"),
    boxed("7", "__import__('os').system('touch proof')", WRONG),
    boxed("7", "\\text{" + "7, " * 400 + "}", WRONG),
    Case("math", "7", "\\boxed{" * 100_000, "no answer"),
    Case("math", "7", "\\boxed{8}" * 50_000 + "\\boxed{7}"),
    Case("math", "7", f"\\boxed{{7}}{'x' * 300_000}"),
    Case("math", "7", "\\boxed{\x00\ud800}", WRONG),
]  # fmt: skip

ADD = json.dumps(
    {"tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6\n", "output": "11\n"}]}
)
CALL = json.dumps(
    {"fn_name": "join", "inputs": ["[1, 2]\n3", [[], 7]], "outputs": ["[1, 2, 3]", [7]]}
)
CHECK = json.dumps({"assertions": "assert square(2) == 4\nassert square(3) == 9"})


def python(tests: str, program: str, reason: str = "") -> Case:
    return Case(
        "code",
        tests,
        (f"<think>\n```python\nprint('not this')\n```\n</think>\nHere:\n```python\n{program}\n```"),
        reason,
    )


NUMPY = "import numpy\nprint(numpy.sum(list(map(int, input().split()))))"
CODE = [
    # right
    python(ADD, "a, b = map(int, input().split())\nprint(a + b)"),
    python(ADD, "print(float(sum(map(int, input().split()))))"),
    python(
        ADD, "from __future__ import annotations\nprint(sum(map(int, input().split())))\nexit()"
    ),
    python(ADD, "import sys\nprint(sum(map(int, sys.stdin.read().split())), end='  \\n\\n\\n')"),
    python(
        CALL,
        (
            "class Solution:\n"
            "    def join(self, a: List[int], b: int) -> List[int]:\n"
            "        print('noise')\n"
            "        return tuple(a + [b])"
        ),
    ),
    python(CALL, "def join(a, b):\n    return [*a, b]"),
    python(CHECK, "def square(x):\n    return x * x"),
    python("assert square(2) == 4", "def square(x):\n    return x ** 2"),
    Case(
        "code",
        ADD,
        (
            "one\n"
            "```python\n"
            "print(1)\n"
            "```\n"
            "better\n"
            "```\n"
            "print(sum(map(int, input().split())))\n"
            "```\n"
            "```text\n"
            "3\n"
            "```"
        ),
    ),
    # wrong
    python(ADD, "print(3)", WRONG),
    python(ADD, "a, b = map(int, input().split())\nprint(a - b)", WRONG),
    python(ADD, "print(3, 11)", WRONG),
    python(CALL, "def join(a, b):\n    return [1, 2, 3]", WRONG),
    python(CHECK, "def square(x):\n    return 4", "error"),
    python(ADD, "pass", WRONG),
    python(ADD, NUMPY, "error"),
    Case("code_numpy", ADD, f"```python\n{NUMPY}\n```"),
    # malformed
    python(ADD, "print(", "error"),
    python(CALL, "def other(): pass", "error"),
    python(CALL, "def join(a, b): return object()", "error"),
    Case("code", ADD, "no code", "no code block"),
    Case("code", ADD, "```python\nprint(3)", "no code block"),
    Case("code", ADD, "```cpp\nint main() {}\n```", "no code block"),
    Case("code", "{}", "```python\nprint(3)\n```", "the prompt's tests cannot be read"),
    # hostile
    python(ADD, "while True: pass", "time limit"),
    python(ADD, "import time\ntime.sleep(60)", "time limit"),
    python(ADD, "x = bytearray(2 * 10**9)", "memory limit"),
    python(ADD, "print('3' * 10**9)", "memory limit"),
    python(ADD, "while True: print('3' * 10**6)", "error"),
    python(
        ADD,
        (
            "import os\n"
            "n = 0\n"
            "while True:\n"
            "    try:\n"
            "        os.fork()\n"
            "    except OSError:\n"
            "        break\n"
            "print(3)"
        ),
        WRONG,
    ),
    python(ADD, "import socket\nsocket.create_connection(('127.0.0.1', 22))", "error"),
    python(ADD, "open('/etc/passwd').read()", "error"),
    python(ADD, "import os\nos.kill(os.getppid(), 9)\nprint(3)", "error"),
    python(ADD, "open('/usr/lib/proof', 'w')", "error"),
    python(ADD, "for i in range(99999): open(str(i), 'w').write('x' * 10**5)", "error"),
    python(ADD, "import os\nos.abort()", "error"),
    python(CHECK, "import os\nos._exit(0)", "no result"),
    python(CHECK, "import sys\nsys.exit(0)", "no result"),
    python(ADD, "import ctypes\nctypes.string_at(0)", "error"),
]

PLAIN = [
    Case("plain", "Paris", "<think>France</think>\n  Paris\n"),
    Case("plain", "New York", "New   York"),
    Case("plain", "Paris", "paris", WRONG),
    Case("plain", "Paris", "It is Paris", WRONG),
    Case("plain", "Paris", "", "no answer"),
    Case("plain", "Paris", "x" * 200_000, WRONG),
    Case("plain_line", "Paris\nLutetia", "Long ago:\nlutetia\n"),
    Case("plain_line", "Paris", "Paris\nno, Rome", WRONG),
]
CASES = [*MATH, *PLAIN, *CODE]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Verdict]:
    """Of every case; workers and sandboxes run in an empty folder."""
    found: dict[Case, Verdict] = {}
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("verdicts"))
    try:
        for name, task in TASKS.items():
            cases = [
                case
                for case in CASES
                if case.task == name and ("code" not in name or sandbox.protections().sufficient)
            ]
            judged = judge_all(
                task,
                (
                    (
                        Prompt("p", ({"role": "user", "content": "q"},), name, case.gold),
                        case.text,
                        case.finish_reason,
                    )
                    for case in cases
                ),
            )
            found |= dict(zip(cases, judged, strict=True))
        assert list(Path.cwd().iterdir()) == [], "an answer has written a file"
    finally:
        os.chdir(before)
    return found


def test_the_table_is_large() -> None:
    assert len(CASES) >= 100
    assert len(set(CASES)) == len(CASES)


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: case.name.encode("ascii", "replace").decode()
)
def test_case(case: Case, verdicts: dict[Case, Verdict]) -> None:
    if case not in verdicts:
        pytest.skip(f"no sandbox here: {sandbox.protections().describe()}")
    verdict = verdicts[case]
    assert (verdict.right, verdict.reason) == (case.reason == "", case.reason), verdict


# ---- workers ----


def test_a_bomb_costs_the_limit_and_the_next_answer_is_judged() -> None:
    """Control: the same comparison with a harmless answer takes a small part of the limit."""
    pool = WorkerPool("lopd.tasks.math_worker", limit_s=2.0, memory_mb=1024, size=1)
    assert pool.ask({"gold": "1/2", "answer": "0.5"}) == {"right": True}
    start = time.process_time(), time.monotonic()
    with pytest.raises(WorkerTimeoutError):
        pool.ask({"gold": "7", "answer": "9^{9^{9^{9}}}"})
    assert time.process_time() - start[0] < 0.5, "what takes the time is another process"
    assert time.monotonic() - start[1] < 60, "it would take for ever"
    assert pool.ask({"gold": "1/2", "answer": "0.5"}) == {"right": True}
    pool.close()


def test_workers_end_with_their_parent() -> None:
    """kill -9 of the process that asked: an idle worker ends at the end of its input, one in a bomb
    at its limit.
    """
    script = """
import os, threading
from lopd.tasks.workers import WorkerPool
pool = WorkerPool("lopd.tasks.math_worker", limit_s=1.0, memory_mb=1024, size=2)
pids = []
for answer in ("0.5", "9^{9^{9^{9}}}"):
    question = {"gold": "1/2", "answer": answer}
    threading.Thread(target=pool.ask, args=(question,), daemon=True).start()
while len(pids) < 2:
    pids = [
        pid
        for task in os.listdir("/proc/self/task")
        for pid in open(f"/proc/self/task/{task}/children").read().split()
    ]
print(*pids, flush=True)
threading.Event().wait()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        workers = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(group_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(group_alive(pid) for pid in workers)


def test_integers_need_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lopd.tasks.math.pool", lambda *_: pytest.fail("a worker was asked"))
    math: Any = get_task("math", {})
    assert math.compare("204", "+0204").right
    assert not math.compare("204", "-204").right
    with pytest.raises(pytest.fail.Exception):
        math.compare("204", "203+1")


# ---- pieces ----


def test_boxes_and_lines() -> None:
    assert last_box("\\boxed{\\frac{1}{2}} x") == "\\frac{1}{2}"
    assert last_box("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}"
    assert last_box("\\boxed7") == "7"
    assert answer_line("ANSWER: 5\nmore") == "5"
    assert answer_line("the answer: 5") is None
    assert final_part("a</think>b</think>c") == "c"
    assert final_part("<|im_end|> ends a message") == "<|im_end|> ends a message"


def test_output_is_compared_up_to_rounding_in_double_precision() -> None:
    assert same_output("1.0 2\n\n", "1 2")
    assert same_output("0.30000000000000004", "0.3")
    assert not same_output("0.3000001", "0.3")
    assert not same_output("1e18", "1000000000000000001"), "a whole number is exact"
    assert not same_output("2.9999999999999996", "3"), "so is it where a fraction is printed"
    assert not same_output("1\n2", "1 2")
    assert not same_output("nan", "NaN x")
    assert not same_output("nan", "0.5")


def test_packed_tests_are_unpacked_and_no_pickle_is_loaded(tmp_path: Path) -> None:
    """Control: a pickle that would run a command when loaded is refused, and the command does not
    run; loading it here does.
    """
    case = [{"input": "1", "output": "2", "testtype": "stdin"}]

    def packed(value: object) -> str:
        content = base64.b64encode(zlib.compress(pickle.dumps(value))).decode()
        return json.dumps(
            {"public_test_cases": json.dumps(case), "private_test_cases": content, "metadata": "{}"}
        )

    read = read_tests(packed(json.dumps([*case, *case])))
    assert (len(read.tests), read.function, read.tests[2].expected) == (3, "", "2")

    class Command:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "proof",)

    code: Any = TASKS["code"]
    verdict = code.judge_answer(
        Prompt("p", ({"role": "user", "content": "q"},), "code"),
        packed(Command()),
        "```python\nprint(2)\n```",
    )
    assert verdict.reason == "the prompt's tests cannot be read"
    assert not (tmp_path / "proof").exists()
    pickle.loads(pickle.dumps(Command()))  # noqa: S301 (the control)
    assert (tmp_path / "proof").exists()


def test_the_last_closed_block_of_python_counts() -> None:
    assert program_of("```py\na\n```\n```python\nb\n") == "a\n"
    assert program_of("``` python\na\n  b\n```\n") == "a\n  b\n"
    assert program_of("```python\n```") is None


def test_file_tasks_make_no_prompts() -> None:
    for task in TASKS.values():
        with pytest.raises(ConfigError, match=r"makes no prompts.*prompts\.\*\.file"):
            task.generate_prompts(1, 0)
