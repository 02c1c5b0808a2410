"""Describes the columns of public data sets, in one table (docs/tasks.md).

A field map in the configuration (prompts.*.fields) replaces columns of this table.

The facts come from the data sets' cards and from public code that loads them, on the hub's pages
named in ``source``. Of these sets only GSM8K was at hand when this was written. If a set has
changed since, ``prompts.*.fields`` names the new columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from lopd.tasks.answer_text import last_box
from lopd.tasks.values import is_no_answer

# The question alone.
PLAIN = "{question}"
# The sentence that the model cards of Qwen3 recommend.
BOXED = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
# The names that prompts.*.instruction knows.
INSTRUCTIONS = {"plain": PLAIN, "boxed": BOXED}
FIELDS = ("question", "messages", "answer", "prompt_id", "domain", "hint")
# Our own form: prompt_id, messages or question, answer.
OWN = "lopd"

Compute: TypeAlias = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How the rows of one data set become prompts.

    Attributes:
        title: The data set's name.
        source: Where it is published.
        columns: For each field the dotted paths of its columns. The first one that a row has is
            used.
        domain: The domain of the prompts, if a row names none.
        instruction: The text around the question.
        duplicates: What happens to a question that an earlier row already has.
        computed: Fields that no path gives. A function computes each of them from the row.
        needed: The columns that ``computed`` reads.
        note: A sentence for the user about the columns. Messages show it.
    """

    title: str
    source: str
    columns: Mapping[str, tuple[str, ...]]
    domain: str
    instruction: str = PLAIN
    duplicates: Literal["keep", "drop"] = "drop"
    computed: Mapping[str, Compute] = field(default_factory=dict)
    needed: tuple[str, ...] = ()
    note: str = ""


def _after_hashes(row: Mapping[str, Any]) -> str | None:
    """Return GSM8K's answer: the number after ``####``, without commas between thousands."""
    # The answer column holds the solution, and the number behind it.
    text = str(row.get("answer") or "")
    found = re.search(r"####\s*(\S.*?)\s*$", text)
    # Without the mark the whole text is the answer, as in some copies of the set.
    return found[1].replace(",", "") if found else text or None


def _competition_answer(row: Mapping[str, Any]) -> Any:
    """Return the answer of AIME and HMMT.

    It is the answer column, or else the last box of the solution.
    """
    # An empty column counts as none.
    for name in ("answer", "Answer"):
        if not is_no_answer(row.get(name)):
            return row[name]
    return last_box(str(row.get("solution") or row.get("Solution") or ""))


# LiveCodeBench publishes no prompts, only problems. This frame is ours, not the benchmark's own
# wording.
_STDIN = (
    "Write a Python 3 program that solves the following problem. It reads its input from "
    "standard input and writes its answer to standard output.\n\n"
    "{content}\n\nPut the whole program into one ```python code block at the end of your response."
)
_FUNCTIONAL = (
    "Write Python 3 code that solves the following problem. Keep the names and arguments of the "
    "starter code.\n\n"
    "{content}\n\nStarter code:\n```python\n{starter}\n```\n\n"
    "Put the whole code into one ```python code block at the end of your response."
)


def _livecodebench_question(row: Mapping[str, Any]) -> str | None:
    content = row.get("question_content")
    starter = row.get("starter_code")
    if not isinstance(content, str):
        return None
    # Starter code names the function that the tests call. Without it the program reads its input.
    if starter:
        return _FUNCTIONAL.format(content=content, starter=starter.rstrip())
    return _STDIN.format(content=content)


def _livecodebench_tests(row: Mapping[str, Any]) -> str | None:
    """Return the tests as they are published.

    Packed tests stay packed, because the hidden tests of one problem may have many MB.
    """
    # The names of LiveCodeBench's columns, which lopd.tasks.code_tests knows.
    names = ("public_test_cases", "private_test_cases", "metadata")
    found = {name: row[name] for name in names if row.get(name)}
    # Metadata alone holds no test.
    if len(found) > 1 or "public_test_cases" in found:
        return json.dumps(found, ensure_ascii=False)
    return None


# The years and publishers of AIME and HMMT write the same columns in different ways.
_COMPETITION = {
    "question": ("problem", "Problem", "question"),
    "prompt_id": ("id", "ID", "problem_idx"),
}
_COMPETITION_NEEDED = ("answer", "Answer", "solution", "Solution")

FORMATS: dict[str, PromptFormat] = {
    OWN: PromptFormat(
        "our own form",
        "docs/tasks.md",
        {name: (name,) for name in FIELDS},
        domain="",
        # The user has chosen these prompts and their ids, repeated ones included.
        duplicates="keep",
        note="prompt_id, messages or question, answer, domain, hint",
    ),
    # Nothing is known of this one: the user's field map says everything.
    "fields": PromptFormat(
        "any JSONL or Parquet",
        "prompts.*.fields says which columns",
        {},
        domain="",
    ),
    # The largest set of the paper: SFT prompts of mathematics, code and science.
    "openthoughts3": PromptFormat(
        "OpenThoughts3-1.2M",
        "open-thoughts/OpenThoughts3-1.2M, data/train-*.parquet",
        {"messages": ("conversations",), "domain": ("domain",)},
        domain="reasoning",
        note=(
            "difficulty, source, domain, conversations (from, value); the messages before the "
            "first answer are the prompt; it has each question several times"
        ),
    ),
    # The paper's OPD prompts of mathematics.
    "dapo_math_17k": PromptFormat(
        "DAPO-Math-17k",
        "BytedTsinghua-SIA/DAPO-Math-17k, data/dapo-math-17k.parquet",
        {
            "messages": ("source_prompt", "prompt"),
            "answer": ("reward_model.ground_truth", "label", "solution"),
            "prompt_id": ("extra_info.index",),
        },
        domain="math",
        note=(
            "1,791,700 rows, each 100 times: 17,398 different questions; its own text asks for a "
            "last line Answer: ..."
        ),
    ),
    # The paper's OPD prompts of code.
    "epicoder": PromptFormat(
        "EpiCoder-func-380k",
        "microsoft/EpiCoder-func-380k",
        {"question": ("instruction",)},
        domain="code",
        note="instruction and output; no tests, so its responses cannot be verified",
    ),
    # From here on: sets for evaluations. GSM8K also has training rows.
    "gsm8k": PromptFormat(
        "GSM8K",
        "openai/gsm8k, main; openai/grade-school-math",
        {"question": ("question",)},
        domain="math",
        instruction=BOXED,
        computed={"answer": _after_hashes},
        needed=("answer",),
        note="the answer is what follows ####",
    ),
    # The answer column is LaTeX without a box.
    "math_500": PromptFormat(
        "MATH-500",
        "HuggingFaceH4/MATH-500, test.jsonl",
        {"question": ("problem",), "answer": ("answer",), "prompt_id": ("unique_id",)},
        domain="math",
        instruction=BOXED,
        note="problem, solution, answer, subject, level, unique_id; 500 rows",
    ),
    # Some publishers write the answer only inside the solution, so a function finds it.
    "aime_2024": PromptFormat(
        "AIME 2024",
        "HuggingFaceH4/aime_2024 (also Maxwell-Jia/AIME_2024, math-ai/aime24)",
        _COMPETITION,
        domain="math",
        instruction=BOXED,
        computed={"answer": _competition_answer},
        needed=_COMPETITION_NEEDED,
        note="30 rows; answers 0 to 999",
    ),
    "aime_2025": PromptFormat(
        "AIME 2025",
        "math-ai/aime25 (also MathArena/aime_2025, opencompass/AIME2025)",
        _COMPETITION,
        domain="math",
        instruction=BOXED,
        computed={"answer": _competition_answer},
        needed=_COMPETITION_NEEDED,
        note="30 rows; answers 0 to 999",
    ),
    # Its own column of ids is only a number, which becomes hmmt_2025-1 and so on.
    "hmmt_2025": PromptFormat(
        "HMMT February 2025",
        "MathArena/hmmt_feb_2025, data/train-*.parquet",
        _COMPETITION,
        domain="math",
        instruction=BOXED,
        computed={"answer": _competition_answer},
        needed=_COMPETITION_NEEDED,
        note="problem_idx, problem, answer (LaTeX), problem_type; 30 rows",
    ),
    # The question and the tests are made of several columns.
    "livecodebench": PromptFormat(
        "LiveCodeBench",
        "livecodebench/code_generation_lite, test*.jsonl",
        {"prompt_id": ("question_id",)},
        domain="code",
        computed={"question": _livecodebench_question, "answer": _livecodebench_tests},
        needed=(
            "question_content",
            "starter_code",
            "public_test_cases",
            "private_test_cases",
            "metadata",
        ),
        note=(
            "test5.jsonl is what release v5 added, test6.jsonl v6; the frame around the problem is "
            "ours, not the benchmark's own wording"
        ),
    ),
}
