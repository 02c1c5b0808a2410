"""Tests of code problems in the forms that data sets have, each with a right and a wrong program,
and the program in responses as models write them."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass
from typing import Any

import pytest

from lopd.errors import DataError
from lopd.records import Prompt
from lopd.tasks import get_task, sandbox
from lopd.tasks.answer_text import answer_line, last_box
from lopd.tasks.code_blocks import blocks_of, program_of
from lopd.tasks.code_tests import read_tests
from lopd.tasks.verdicts import Verdict, judge_all

RIGHT_ADD = "def add(a, b):\n    return a + b"
WRONG_ADD = "def add(a, b):\n    return a - b"
READ_ADD = "a, b = map(int, input().split())\nprint(a + b)"
READ_SUB = "a, b = map(int, input().split())\nprint(a - b)"
SUM_ALL = "print(*[sum(map(int, input().split())) for _ in range(int(input()))], sep='\\n')"
SUM_ONE = "print(*[min(map(int, input().split())) for _ in range(int(input()))], sep='\\n')"
CASE = {"input": "1 2\n", "output": "3\n", "testtype": "stdin_stdout"}
ERROR = "error"
WRONG = "wrong answer"


@dataclass(frozen=True)
class Case:
    gold: str
    program: str
    reason: str = ""

    @property
    def name(self) -> str:
        return ascii(f"{self.gold[:60]} <- {self.program[-30:]}: {self.reason}")


def both(gold: Any, right: str, wrong: str, reason: str = WRONG) -> list[Case]:
    """A right program and a wrong one. gold: text, or what is written as JSON."""
    text = gold if isinstance(gold, str) else json.dumps(gold)
    return [Case(text, right), Case(text, wrong, reason)]


def adds(gold: Any, reason: str = ERROR) -> list[Case]:
    return both(gold, RIGHT_ADD, WRONG_ADD, reason)


def dedent(text: str) -> str:
    return textwrap.dedent(text).strip("\n")


HUMAN_EVAL = "METADATA = {}\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n"
UNITTEST = dedent("""
    import unittest

    class TestAdd(unittest.TestCase):
        def setUp(self):
            self.one = 1

        def test_add(self):
            self.assertEqual(add(self.one, 2), 3)

    if __name__ == "__main__":
        unittest.main()
""")
STATEMENTS = [
    *adds({"assertions": ["assert add(1,2)==3"]}), *adds({"assertions": "assert add(1,2)==3"}),
    *adds('["assert add(1,2)==3"]'), *adds("['assert add(1, 2) == 3', 'assert add(0, 1) == 1']"),
    *adds({"test_list": ["assert add(1, 2) == three"], "test_setup_code": "three = 3"}),
    *adds({"test_list": json.dumps(["assert add(1, 2) == 3"]), "test_imports": ["import math"]}),
    *adds({"test": HUMAN_EVAL, "entry_point": "add"}), *adds(HUMAN_EVAL),
    *adds(HUMAN_EVAL + "\ncheck(add)"), *adds("def test_add():\n    assert add(1, 2) == 3"),
    *adds("from solution import add\n\ndef test_add():\n    assert add(1, 2) == 3"),
    *adds("def helper(x):\n    assert x == 3\n\ndef test_add():\n    helper(add(1, 2))"),
    *adds("class TestAdd:\n    def test_add(self):\n        assert add(1, 2) == 3"),
    *adds("if __name__ == '__main__':\n    assert add(1, 2) == 3"), *adds(UNITTEST),
    *adds("for a, b, c in [(1, 2, 3)]:\n    assert add(a, b) == c"),
    *adds("import solution\nassert solution.add(1, 2) == 3"),
    *adds("def check():\n    assert add(1, 2) == 3"),
    *adds("try:\n    assert add(1, 2) == 3\nexcept AssertionError:\n    raise ValueError('no')"),
    *both("try:\n    half(0)\n    assert False\nexcept ZeroDivisionError:\n    pass",
          "def half(x): return 1 / x", "def half(x): return 1", ERROR),
    *adds({"tests": "assert add(1, 2) == 3"}), *adds({"test_cases": ["assert add(1, 2) == 3"]}),
    *adds({"test_code": "from solution import *\nassert add(1, 2) == 3"}),
    *adds("if add(1, 2) != 3:\n    raise AssertionError('no')"),
]  # fmt: skip
CALLS = [
    *adds({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]]}, WRONG),
    *adds({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}, WRONG),
    *adds({"fn_name": "add", "inputs": '[[1, 2]]', "outputs": '[[3]]'}, WRONG),
    *adds({"input_output": '{"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}'}, WRONG),
    *adds([{"type": "function_call", "fn_name": "add", "input": [1, 2], "output": 3}], WRONG),
    *adds({"tests": [{"input": "1\n2", "output": "3", "testtype": "functional"}],
           "func_name": "add"}, WRONG),
    *adds({"tests": [{"input": "1\n2", "output": "3", "testtype": "functional",
                      "metadata": {"func_name": "add"}}]}, WRONG),
    # a list of one is the result itself, or its wrapping, for all tests alike
    *both({"fn_name": "f", "inputs": [[3], [7]], "outputs": [[3], [7]]},
          "def f(x): return [x]", "def f(x): return [x] if x == 3 else x"),
    *both({"fn_name": "f", "inputs": [[3], [7]], "outputs": [[3], [7, 7]]},
          "def f(x): return [x] if x == 3 else [x, x]", "def f(x): return x"),
    # Python literals, text, fractions
    *both({"fn_name": "f", "inputs": ["1"], "outputs": ["True"]},
          "def f(x): return x == 1", "def f(x): return x != 1"),
    *both({"fn_name": "f", "inputs": ["'ab'"], "outputs": ["'ab'"]},
          "def f(x): return x", "def f(x): return repr(x)"),
    *both({"fn_name": "f", "inputs": ["(1, 2)\nNone"], "outputs": ["(1, None)"]},
          "def f(x, y): return x[0], y", "def f(x, y): return x"),
    *both({"fn_name": "f", "inputs": [["a"]], "outputs": ["ab"]},
          "def f(x): return x + 'b'", "def f(x): return x"),
    *both({"fn_name": "f", "inputs": [[3]], "outputs": ["3"]},
          "def f(x): return str(x)", "def f(x): return str(x + 1)"),
    *both({"fn_name": "add", "inputs": [[0.1, 0.2]], "outputs": [0.3]},
          RIGHT_ADD, "def add(a, b): return 0.3001"),
    *both({"fn_name": "f", "inputs": [[1]], "outputs": [{"a": [0.3, 1]}]},
          "def f(x): return {'a': [0.1 + 0.2, 1]}", "def f(x): return {'a': [0.1 + 0.2, 1.1]}"),
    *both({"fn_name": "f", "inputs": [[1]], "outputs": [10**18 + 1]},
          "def f(x): return 10**18 + x", "def f(x): return 1e18"),
    *both({"fn_name": "f", "inputs": [[1]], "outputs": ["{3, 1, 2}"]},
          "def f(x): return {2, 3, 1}", "def f(x): return {2, 3}"),
    # a class Solution that holds something else
    *both({"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]},
          f"class Solution:\n    pass\n\n{RIGHT_ADD}", f"class Solution:\n    pass\n\n{WRONG_ADD}"),
    *both({"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]},
          "class Solution:\n    def add(self, a, b):\n        return a + b",
          "def sub(a, b): pass", ERROR),
]  # fmt: skip


def reads(gold: Any) -> list[Case]:
    return both(gold, READ_ADD, READ_SUB)


PROGRAMS = [
    *both({"inputs": [["2", "1 2", "3 4"]], "outputs": [["3", "7"]]}, SUM_ALL, SUM_ONE),
    *both({"inputs": [[1, [1, 2]]], "outputs": [[3]]}, SUM_ALL, SUM_ONE),
    *reads([CASE]), *reads({"tests": [CASE]}), *reads({"test_cases": [CASE]}), *reads(repr([CASE])),
    *reads({"tests": json.dumps([CASE])}), *reads({"test_cases": [json.dumps(CASE)]}),
    *reads({"inputs": '["1 2"]', "outputs": '["3"]'}), *reads({"inputs": "['1 2']",
    "outputs": ["3"]}),
    *reads({"input_output": json.dumps({"inputs": ["1 2"], "outputs": ["3"]})}),
    *reads(json.dumps(json.dumps({"inputs": ["1 2"], "outputs": ["3"]}))),
    *reads({"language": "python", "test_cases": [{**CASE, "testtype": None, "type": "stdin"}]}),
    *reads({"public_tests": {"input": ["1 2"], "output": ["3"]}, "private_tests": {}}),
    *both({"inputs": ["0.1 0.2"], "outputs": ["0.3"]},
          "a, b = map(float, input().split())\nprint(a + b)", "print(0.3001)"),
]  # fmt: skip
CASES = [*STATEMENTS, *CALLS, *PROGRAMS]

NO_TEST = "there is no test|is not a test"
UNUSABLE = {
    "[]": NO_TEST, "null": NO_TEST, "": "runs no assertion", "  \n": "runs no assertion",
    "# only a comment": "runs no assertion", "word": "runs no assertion", "{}": NO_TEST,
    "None": NO_TEST, "NaN": NO_TEST,
    "def check(candidate):\n    pass": "runs no assertion", "print(add(1, 2))": "runs no assertion",
    "try:\n    assert add(1, 2) == 3\nexcept AssertionError:\n    pass": "runs no assertion",
    "try:\n    assert add(1, 2) == 3\nexcept:\n    print('no')": "runs no assertion",
    "assert False": "no program can pass",
    "assert add(1, 2) == 3\nassert False": "no program can pass",
    "assert True": "runs no assertion", "assert (add(1, 2) == 3, 'words')": "runs no assertion",
    "def helper():\n    assert add(1, 2) == 3": "runs no assertion", "assert add(": "not Python",
    "def test_add(tmp_path):\n    assert add(1, 2) == 3": "fixtures",
    "async def test_add():\n    assert add(1, 2) == 3": "asynchronous",
    "import pytest\ndef test_add():\n    assert add(1, 2) == 3": "import pytest",
    "from other import add\nassert add(1, 2) == 3": "import other",
    "class Tests:\n    def add(self):\n        assert add(1, 2) == 3": "begins with test",
    "assert add" + "()" * 20_000: "too many nested levels|not Python",
    '{"assertions": []}': NO_TEST, '{"assertions": ["x = 1"]}': "runs no assertion",
    '{"tests": [{"input": "1"}]}': "no input or no output", "3": "runs no assertion",
    '{"inputs": ["1"], "outputs": []}': "1 inputs and 0 outputs", '{"tests": []}': NO_TEST,
    '{"language": "cpp", "tests": [{"input": "1", "output": "2"}]}': "programs in cpp",
    '{"tests": [{"input": "1", "output": "2", "testtype": "interactive"}]}': "the unknown type",
    '{"tests": [{"input": "1", "output": null}]}': "no expected output",
    '{"fn_name": "f", "inputs": ["a b"], "outputs": ["2"]}': "neither JSON nor Python",
    '{"tests": [{"input": "1", "output": "2", "testtype": "functional"}]}': "nothing names it",
    '{"inputs": {"a": 1}, "outputs": [1]}': "not a list",
}  # fmt: skip


@pytest.fixture(scope="module")
def verdicts() -> dict[Case, Verdict]:
    if not sandbox.protections().sufficient:
        pytest.skip(f"no sandbox here: {sandbox.protections().describe()}")
    question = ({"role": "user", "content": "q"},)
    texts = [(case.gold, f"```python\n{case.program}\n```") for case in CASES]
    responses = ((Prompt("p", question, "code", gold), text, "stop") for gold, text in texts)
    judged = judge_all(get_task("code", {"limit_s": 5.0, "memory_mb": 512}), responses)
    return dict(zip(CASES, judged, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_form(case: Case, verdicts: dict[Case, Verdict]) -> None:
    verdict = verdicts[case]
    assert (verdict.right, verdict.reason) == (case.reason == "", case.reason), verdict


@pytest.mark.parametrize("gold", UNUSABLE, ids=lambda gold: ascii(gold[:60]))
def test_what_checks_nothing_is_unreadable(gold: str) -> None:
    """Every program, right or wrong, is then judged alike, and the checks before a run say so."""
    with pytest.raises(DataError, match=UNUSABLE[gold]):
        read_tests(gold)
    task: Any = get_task("code", {})
    prompt = Prompt("p", ({"role": "user", "content": "q"},), "code", gold)
    assert re.search(UNUSABLE[gold], task.answer_fault(prompt))
    verdict = task.judge(prompt, f"```python\n{RIGHT_ADD}\n```", "stop")
    assert verdict.reason == "the prompt's tests cannot be read"


# ---- the program in a response ----

ENDINGS = [
    "```python\nprint(add(1, 2))\n```", "```\nprint(add(1, 2))\n```", "```\n>>> add(1, 2)\n3\n```",
    "```python\n>>> add(1, 2)\n3\n```", "```\n3\n```", "```\n3 7\n```", "```\npython main.py\n```",
    "```\n$ python main.py\n```", "```\nO(n)\n```", "```\nO(n log n)\n```", "```text\n3\n```",
    "```\nls\n```", "```\nx = 3\n```", "```bash\npython main.py\n```", "```\n[1, 2]\n```",
    "```\nInput: 1 2\nOutput: 3\n```", "```python\nresult = add(1, 2)\nassert result == 3\n```",
    "```python\nIn [1]: add(1, 2)\n```", "~~~\n3\n~~~",
    "```python\nfrom solution import add\nprint(add(1, 2))\n```", "```json\n{}\n```",
]  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_follows_a_program_is_not_judged(ending: str) -> None:
    """Control: a second program in the same place is."""
    for program, names in ((RIGHT_ADD, ["add"]), (READ_ADD, [])):
        text = f"So:\n```python\n{program}\n```\nFor example:\n\n{ending}\n"
        assert program_of(text, names) == f"{program}\n"
        other = program.replace("+", "-")
        for fence in ("```python", "```"):
            assert program_of(f"{text}\nNo:\n{fence}\n{other}\n```", names) == f"{other}\n"


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("~~~python", "~~~"), ("````python", "````"), ('```python title="a.py"', "```"),
        ("```{python}", "```"), ("```{.python .numberLines}", "```"), ("```py", "```"),
        ("```Python3", "`````"), ("```python:a.py", "```"), ("```python3.11", "```"), ("```",
        "```"),
        ("~~~~", "~~~~"), ("``` python", "```  "), ("```ipython", "```"), ("```python,linenos",
        "```"),
    ],
)  # fmt: skip
def test_fences(opening: str, closing: str) -> None:
    assert program_of(f"So\n{opening}\n{RIGHT_ADD}\n{closing}\nDone") == f"{RIGHT_ADD}\n"


@pytest.mark.parametrize(
    "text",
    [
        f"```cpp\n{RIGHT_ADD}\n```", f"```python\n{RIGHT_ADD}", f"````python\n{RIGHT_ADD}\n```",
        f"~~~python\n{RIGHT_ADD}\n```", f"``python\n{RIGHT_ADD}\n``", "```python\n```", "no code",
        f"```python2.7.1\n{RIGHT_ADD}\n```", "```\n3\n```", f"```python\n    {READ_ADD}",
        f"````markdown\n```python\n{RIGHT_ADD}\n```\n````", "So:\n    print(1)",
    ],
)  # fmt: skip
def test_no_program(text: str) -> None:
    assert program_of(text, ["add"]) is None


@pytest.mark.parametrize("indent", ["   ", "    ", "\t", "> ", "   > ", "     "])
def test_blocks_under_list_items_and_quotations(indent: str) -> None:
    lines = f"```python\n{RIGHT_ADD}\n```"
    inner = textwrap.indent(lines, indent)
    assert program_of(f"1. First:\n\n{inner}\n\n2. Then.", ["add"]) == f"{RIGHT_ADD}\n"
    assert program_of(f"- {lines.replace(chr(10), chr(10) + '  ')}", ["add"]) == f"{RIGHT_ADD}\n"


def test_code_that_is_only_indented() -> None:
    """Where no fence is: four columns after an empty line, as Markdown has it."""
    inner = textwrap.indent(RIGHT_ADD, " " * 7)
    assert program_of(f"1. So:\n\n{inner}\n\nDone.", ["add"]) == f"{RIGHT_ADD}\n"
    assert program_of("1. So:\n\n       prose that goes on\n") is None


def test_programs_within_programs() -> None:
    quoted = '    """\n    ```\n    add(1, 2)\n    ```\n    """'
    docstring = f"def add(a, b):\n{quoted}\n    return a + b"
    assert program_of(f"````python\n{docstring}\n````", ["add"]) == f"{docstring}\n"
    assert [block.language for block in blocks_of("```\n~~~\n```\n~~~sh\n```\n~~~")] == ["", "sh"]


def test_the_block_that_defines_what_is_called() -> None:
    """A helper alone is no answer where another block defines the function too."""
    text = f"```python\n{RIGHT_ADD}\n```\nand\n```python\ndef sub(a, b):\n    return a - b\n```"
    assert program_of(text, ["add"]) == f"{RIGHT_ADD}\n"
    assert program_of(text, ["sub"]) == "def sub(a, b):\n    return a - b\n"
    broken = f"```python\n{RIGHT_ADD}\n```\n```python\ndef add(a, b\n```"
    assert program_of(broken, ["add"]) == "def add(a, b\n"
    broken = f"```python\n{READ_ADD}\n```\n```python\nprint(input()\n```"
    assert program_of(broken) == "print(input()\n"


def test_check_is_given_the_function_that_the_question_begins() -> None:
    """Control: without it the last function of the program is taken, here the helper."""
    if not sandbox.protections().sufficient:
        pytest.skip(f"no sandbox here: {sandbox.protections().describe()}")
    code: Any = get_task("code", {})
    text = f"```python\n{RIGHT_ADD}\n\ndef helper(a, b):\n    return 0\n```"
    for question, right in (('def add(a, b):\n    "Adds."\n', True), ("Add.", False)):
        prompt = Prompt("p", ({"role": "user", "content": question},), "code", HUMAN_EVAL)
        assert code.judge(prompt, text, "stop").right is right


def test_a_megabyte_is_read_in_linear_time() -> None:
    """A pattern that goes back over what it has read would take hours for each of these."""
    assert program_of("```\n" * 250_000) is None
    assert program_of("> " * 400_000 + "```python\nprint(1)\n```") is None
    assert program_of("- " * 400_000) is None
    assert program_of(" " * 1_000_000 + "x") is None
    assert program_of(" \t" * 400_000 + "```python x`") is None
    assert program_of("```python\n" + "(" * 900_000 + "\n```") is not None, "a broken program"
    assert last_box("\\boxed\\x{" * 100_000) is None
    assert last_box("\\boxed " * 100_000) is None
    assert answer_line("*" * 1_000_000) is None
    assert answer_line("answer " * 100_000) is None
