"""GSM8K and the Qwen3 tokenizer, where they are at hand: LOPD_TEST_DATA names a folder with
gsm8k/train.jsonl and qwen3_tokenizer/.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd.config import PromptSet
from lopd.records import Prompt
from lopd.tasks import get_task
from lopd.tasks.prompts import load_prompts, read_prompts
from lopd.tasks.rendering import render
from lopd.tasks.tokenizer import decode, load_tokenizer, stop_token_ids
from lopd.tasks.verdicts import judge_all

DATA = Path(os.environ.get("LOPD_TEST_DATA", "absent"))
GSM8K = DATA / "gsm8k" / "train.jsonl"
TOKENIZER = DATA / "qwen3_tokenizer"
needs_gsm8k = pytest.mark.skipif(
    not GSM8K.is_file(), reason="LOPD_TEST_DATA names no folder with gsm8k/train.jsonl"
)
needs_tokenizer = pytest.mark.skipif(
    not TOKENIZER.is_dir(), reason="LOPD_TEST_DATA names no folder with qwen3_tokenizer"
)
MATH = get_task("math", {})


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return read_prompts(PromptSet(file=GSM8K, format="gsm8k"), "math", need_answers=True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TOKENIZER)


def respond(answer: str) -> str:
    return (
        "<think>\n"
        "Let me see: 3, 4, \\boxed{0}?\n"
        "</think>\n\n"
        f"The answer is $\\boxed{{{answer}}}$."
    )


@needs_gsm8k
def test_every_gold_answer_is_right_and_shuffled_ones_are_not(prompts: list[Prompt]) -> None:
    """7,473 questions; a shuffled answer is right only where it happens to be the same number."""
    gold = [str(prompt.answer) for prompt in prompts]
    assert len(prompts) == 7473
    assert all(
        verdict.right
        for verdict in judge_all(
            MATH,
            (
                (prompt, respond(answer), "stop")
                for prompt, answer in zip(prompts, gold, strict=True)
            ),
        )
    )
    shuffled = [gold[position] for position in np.random.default_rng(0).permutation(len(gold))]
    verdicts = judge_all(
        MATH,
        (
            (prompt, respond(answer), "stop")
            for prompt, answer in zip(prompts, shuffled, strict=True)
        ),
    )
    right = [verdict.right for verdict in verdicts]
    assert right == [int(one) == int(other) for one, other in zip(gold, shuffled, strict=True)]
    assert sum(right) < 0.03 * len(prompts)


@needs_gsm8k
@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("\\${}", True),
        ("{}.00", True),
        ("x = {}", True),
        ("\\frac{{3 \\cdot {}}}{{3}}", True),
        ("{} + 1", False),
    ],
)
def test_gold_answers_in_other_forms_go_through_the_workers(
    prompts: list[Prompt], form: str, expected: bool
) -> None:
    chosen = prompts[::150]
    verdicts = judge_all(
        MATH, ((prompt, respond(form.format(prompt.answer)), "stop") for prompt in chosen)
    )
    assert [verdict.right for verdict in verdicts] == [expected] * len(chosen)


@needs_gsm8k
def test_the_calculations_in_its_solutions_are_right_and_with_one_more_they_are_not() -> None:
    """GSM8K writes each step as <<48/2=24>>: 27 thousand expressions with their values, every 60th
    of them.
    """
    steps = [
        step
        for line in GSM8K.read_text().splitlines()
        for step in re.findall(r"<<([^<>=]+)=([0-9.]+)>>", json.loads(line)["answer"])
    ][::60]
    assert len(steps) > 300
    for more in (0, 1):
        prompts = [
            Prompt("p", ({"role": "user", "content": "q"},), "math", value) for _, value in steps
        ]
        texts = [respond(expression if not more else f"{expression}+1") for expression, _ in steps]
        right = [
            verdict.right
            for verdict in judge_all(
                MATH, ((prompt, text, "stop") for prompt, text in zip(prompts, texts, strict=True))
            )
        ]
        assert right == [not more] * len(steps)


@needs_tokenizer
def test_the_qwen3_template_leaves_thinking_on(tokenizer: Any) -> None:
    """Control: with thinking off the template closes an empty thinking itself."""
    prompt = Prompt("p", ({"role": "user", "content": "1+1?"},), "math")
    (ids,) = render([prompt], tokenizer, context_length=100)
    assert decode(tokenizer, ids) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    (closed,) = render([prompt], tokenizer, context_length=100, thinking=False)
    assert decode(tokenizer, closed) == decode(tokenizer, ids) + "<think>\n\n</think>\n\n"
    assert 151645 in stop_token_ids(TOKENIZER, tokenizer)


@needs_gsm8k
@needs_tokenizer
def test_lengths_of_gsm8k_in_qwen3_tokens(tokenizer: Any) -> None:
    chosen = PromptSet(file=GSM8K, format="gsm8k", num_prompts=1000, max_prompt_tokens=128)
    prompts, ids = load_prompts(chosen, MATH, tokenizer, context_length=4096, need_answers=True)
    assert len(prompts) == len(ids) == 1000
    assert max(len(one) for one in ids) <= 128
    unlimited, all_ids = load_prompts(
        chosen.model_copy(update={"max_prompt_tokens": None}), MATH, tokenizer, context_length=4096
    )
    assert [prompt.prompt_id for prompt in unlimited] != [prompt.prompt_id for prompt in prompts], (
        "the first 1000 have longer ones"
    )
    assert max(len(one) for one in all_ids) > 128
    text = decode(tokenizer, ids[0])
    assert text.endswith("within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n")
