"""Register arithmetic: problems, their separation into sets, the verifier, and the written
responses.
"""

from __future__ import annotations

import operator
import re

import numpy as np
import pytest

from lopd.errors import ConfigError
from lopd.tasks import Task, get_task
from lopd.tasks.register_arithmetic import NUM_PARTITIONS, Problem, RegisterArithmetic
from lopd.tasks.register_responses import Corruption, write_corrupted, write_response

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
PROBLEM = Problem(81, (("+", 6), ("+", 2), ("+", 7), ("+", 3), ("-", 10)))
CAREFUL = "<think>\n81+06=87\n87+02=89\n89+07=96\n96+03=99\n99-10=89\n</think>\n89"
FIRST_OF_SEED_2 = ["19+36+41-20-59+25", "84+15-57-36-06+97"]


def register_values(text: str) -> list[int]:
    """The register after each operation, by Python's own arithmetic on the text of a problem."""
    first, *steps = re.findall(r"[0-9]{2}|[-+*][0-9]{2}", text)
    values = [int(first)]
    for step in steps:
        values.append(OPERATORS[step[0]](values[-1], int(step[1:])))
    return values


def test_prompt_of_the_documented_problem() -> None:
    prompt = RegisterArithmetic().to_prompt(PROBLEM)
    assert prompt.messages == ({"role": "user", "content": "81+06+02+07+03-10=?"},)
    assert (prompt.prompt_id, prompt.answer, prompt.domain) == (
        "reg-81+06+02+07+03-10",
        "89",
        "register_arithmetic",
    )


@pytest.mark.parametrize("multiplication", [False, True])
def test_register_never_leaves_its_range_and_the_answer_is_right(multiplication: bool) -> None:
    for problem in RegisterArithmetic(multiplication=multiplication).generate_problems(300, seed=5):
        values = register_values(problem.text)
        assert len(values) == 6
        assert all(0 <= value <= 99 for value in values)
        assert f"{values[-1]:02d}" == problem.answer
        assert all(operand >= 1 for _, operand in problem.steps)


def test_multiplication_occurs_only_when_asked_for() -> None:
    def operators(task: RegisterArithmetic) -> set[str]:
        return {
            sign for problem in task.generate_problems(200, seed=5) for sign, _ in problem.steps
        }

    assert operators(RegisterArithmetic()) == {"+", "-"}
    assert operators(RegisterArithmetic(multiplication=True)) == {"+", "-", "*"}


def test_sets_with_different_seeds_share_no_prompt_even_where_the_task_is_small() -> None:
    """With two operations there are about a million problems: sets of 1,500 from independent random
    draws would overlap (the control shows it).
    """
    task = RegisterArithmetic(num_operations=2)
    sets = [
        {prompt.prompt_id for prompt in task.generate_prompts(1_500, seed)} for seed in range(4)
    ]
    assert [len(ids) for ids in sets] == [1_500] * 4
    assert len(set().union(*sets)) == 4 * 1_500

    rng = np.random.default_rng(0)
    independent = [set(rng.choice(100 * 99**2, 1_500, replace=False).tolist()) for _ in range(4)]
    assert len(set().union(*independent)) < 4 * 1_500


def test_prompts_are_reproducible_and_a_longer_set_begins_with_the_shorter_one() -> None:
    task = RegisterArithmetic()
    assert task.generate_prompts(700, seed=3)[:50] == task.generate_prompts(50, seed=3)


def test_a_sets_first_prompts_stay_what_they_were() -> None:
    """The shipped models and the published figures rest on these very problems: a change of the
    generator must not go unnoticed.
    """
    assert [
        problem.text for problem in RegisterArithmetic().generate_problems(2, seed=2)
    ] == FIRST_OF_SEED_2


def test_seed_beyond_the_partitions_and_exhausted_partition_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=rf"seed {NUM_PARTITIONS}.*limit: at least 0 and at most "
        rf"{NUM_PARTITIONS - 1}.*another seed",
    ):
        RegisterArithmetic().generate_prompts(1, seed=NUM_PARTITIONS)
    with pytest.raises(
        ConfigError,
        match=r"num_prompts = 100 is too large: seed 0 has only [1-9][0-9]? prompts;.*num_op",
    ):
        RegisterArithmetic(num_operations=1).generate_prompts(100, seed=0)


@pytest.mark.parametrize(
    ("text", "finish_reason", "right"),
    [
        (CAREFUL, "stop", True),
        ("<think>\n</think>\n89", "stop", True),  # the answer counts, not the way to it
        (CAREFUL.removesuffix("89") + "88", "stop", False),
        (CAREFUL, "length", False),
        (CAREFUL, "abort", False),
        (CAREFUL.replace("</think>\n89", "</think>89"), "stop", False),
        (CAREFUL.replace("</think>\n89", "</think>\n889"), "stop", False),
        (CAREFUL.replace("</think>\n89", "</think>\n8"), "stop", False),
        (CAREFUL.replace("</think>\n89", "</think>\n89\n"), "stop", False),
        (CAREFUL.replace("</think>\n89", "</think>\n٨٩"), "stop", False),  # digits, but not ours
        (CAREFUL.replace("</think>\n", ""), "stop", False),
        ("</think>\n89" + CAREFUL, "stop", False),
        (CAREFUL + CAREFUL, "stop", False),
        (CAREFUL + "<|im_end|>", "stop", False),
        (CAREFUL + "\n", "stop", False),
        ("89", "stop", False),
        ("", "stop", False),
    ],
)
def test_verifier(text: str, finish_reason: str, right: bool) -> None:
    task = RegisterArithmetic()
    assert task.verify(task.to_prompt(PROBLEM), text, finish_reason) is right


def test_written_responses() -> None:
    assert write_response(PROBLEM, "careful") == f"{CAREFUL}<|im_end|>"
    assert write_response(PROBLEM, "skip") == "<think>\n</think>\n89<|im_end|>"


def test_corrupted_response_masks_exactly_what_is_wrong_where_it_stands() -> None:
    """Every learnt character follows from what is written before it: recomputed here by reading the
    text step by step.
    """
    rng = np.random.default_rng(1)
    masked = 0
    for problem in RegisterArithmetic().generate_problems(400, seed=7):
        text, mask = write_corrupted(problem, rng)
        assert len(mask) == len(text)
        register = problem.start
        for index, (sign, operand) in enumerate(problem.steps):
            start = len("<think>\n") + 9 * index
            line = text[start : start + 9]
            assert re.fullmatch(r"[0-9]{2}[-+][0-9]{2}=[0-9]{2}\n", line)
            exact = OPERATORS[line[2]](int(line[:2]), int(line[3:5]))
            # There is no right text for a result outside of 0 to 99.
            value = f"{exact:02d}" if 0 <= exact <= 99 else "??"
            expected = f"{register:02d}{sign}{operand:02d}={value}\n"
            assert mask[start : start + 9].tolist() == [
                found == right for found, right in zip(line, expected, strict=True)
            ]
            register = int(line[6:8])
        assert text[start + 9 :] == f"</think>\n{register:02d}<|im_end|>"
        assert mask[: len("<think>\n")].all()
        assert mask[start + 9 :].all()
        masked += int((~mask).sum())
    assert masked > 0


def test_corruption_rates_of_zero_give_the_careful_response() -> None:
    text, mask = write_corrupted(
        PROBLEM, np.random.default_rng(0), Corruption(operator=0, operand=0, value=0)
    )
    assert text == f"{CAREFUL}<|im_end|>"
    assert mask.all()


def test_registry_gives_the_task_with_its_options() -> None:
    task = get_task("register_arithmetic", {"num_operations": 7})
    assert isinstance(task, Task)
    (prompt,) = task.generate_prompts(1, seed=0)
    assert len(prompt.messages[0]["content"]) == 2 + 7 * 3 + 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "register_aritmetic",
            {},
            (
                "task.name: unknown task 'register_aritmetic'.*"
                "nearest known one is register_arithmetic"
            ),
        ),
        (
            "register_arithmetic",
            {"num_operation": 5},
            (
                "task.options.num_operation: .*has no option num_operation.*"
                "nearest known one is num_operations"
            ),
        ),
        (
            "register_arithmetic",
            {"num_operations": "5"},
            r"task.options.num_operations: '5': .*integer",
        ),
        (
            "register_arithmetic",
            {"num_operations": 0},
            r"task.options.num_operations: 0: .*greater than or equal to 1",
        ),
        (
            "register_arithmetic",
            {"multiplication": 1},
            r"task.options.multiplication: 1: .*boolean",
        ),
    ],
)
def test_wrong_task_or_option_is_explained(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        get_task(name, options)
