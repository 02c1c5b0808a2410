r"""Answers as people write them: where they stand, and what they equal. Both sides of each line."""

from __future__ import annotations

import pytest

from lopd.records import Prompt
from lopd.tasks import get_task
from lopd.tasks.answer_text import answer_line, last_box
from lopd.tasks.math_text import readable
from lopd.tasks.verdicts import Verdict, judge_all

WRONG = "wrong answer"
UNPARSED = "answer cannot be parsed"
NO = "no answer"


def boxed(gold: str, answer: str, reason: str = "") -> tuple[str, str, str]:
    return gold, f"So it is $\\boxed{{{answer}}}$.", reason


THOUSANDS = [
    *(boxed("10000", f"10{gap}000") for gap in ("\\,", "\\;", "\\ ", "~", " ", "\u2009", "\u202f")),
    *(boxed("0", f"10{gap}000", WRONG) for gap in ("\\,", "\\;", "\\ ", "~", " ", "\u00a0")),
    *(boxed("1234", f"1{gap}234") for gap in ("\\,", "\\;", "\\:", "\\ ", "~", " ", " \\, ")),
    *(boxed("235", f"1{gap}234", WRONG) for gap in ("\\,", "\\;", "\\ ", "~", " ")),
    *(boxed(f"1{gap}234", "1234") for gap in ("\\,", "\\;", "\\ ", "~", " ", "{\\,}")),
    *(boxed(f"1{gap}234", "235", WRONG) for gap in ("\\,", "\\;", "\\ ", "~", " ")),
    boxed("10000", "10,000"), boxed("10000", "10{,}000"), boxed("10000", "10\\!000"),
    boxed("1234567", "1\\,234\\,567"), boxed("1234567", "\\$1 234 567"),
    boxed("10000", "10\\,000.0"),
    boxed("x^2+10000", "x^2+10\\,000"), boxed("3.141592", "3.141\\,592"),
    boxed("1234.5", "1 234.5"),
    boxed("(1000,2000)", "(1\\,000, 2\\,000)"), boxed("10^{10000}", "10^{10\\,000}"),
    boxed("10000", "10\\_000"), boxed("10000", "10_000"), boxed("10000", "10\\mathpunct{,}000"),
    boxed("1234", "1{\\ }234"), boxed("10000", "10\\thinspace 000"), boxed("-10000", "−10\\,000"),
    boxed("10000", "１００００"), boxed("10000", "10’000"), boxed("10000", "10\\,000~\\mathrm{km}"),
    boxed("0", "10\\quad 000", UNPARSED), boxed("10000", "10\\quad 000", UNPARSED),
    boxed("101_2", "101_2"), boxed("1012", "101_2", WRONG), boxed("a_{1}", "a_1"),
    # no groups of three: a list, a pair, or nothing that has one reading
    boxed("1,234", "1, 234", WRONG), boxed("1234", "1, 234", WRONG),
    boxed("1234", "(1, 234)", WRONG),
    boxed("(1,234)", "(1, 234)"), boxed("1234", "(1,234)", WRONG), boxed("36", "12\\,3", UNPARSED),
    boxed("15", "12\\,3", UNPARSED), boxed("123", "12 3", UNPARSED), boxed("6", "2 3", UNPARSED),
    boxed("123456", "1\\,234\\,56", UNPARSED), boxed("12345678", "1\\,2345 678", UNPARSED),
    boxed("123", "0\\,123", UNPARSED), boxed("1234567", "1\\,234 567", UNPARSED),
    boxed("2 3", "5", "the prompt's answer cannot be parsed"),
    boxed("\\begin{pmatrix}1 & 234 \\\\ 567 & 8\\end{pmatrix}",
          "\\begin{pmatrix} 1 & 234 \\\\ 567 & 8 \\end{pmatrix}"),
    # a mixed number
    boxed("5/2", "2 1/2"), boxed("5/2", "2\\ 1/2"), boxed("3/2", "2 1/2", WRONG),
    boxed("5/2", "2\\frac12"), boxed("-5/2", "-2 1/2"),
]  # fmt: skip

BOXES = [
    ("5", "so \\fbox{5}", ""), ("5", "so $\\boxed 5$.", ""), ("5", "so $\\boxed5$", ""),
    ("5", "so \\boxed\n{5}", ""), ("5", "so \\boxed\n\n  {5}.", ""),
    ("5", "\\boxed{4} and then \\fbox{5}", ""), ("4", "\\boxed{4} and then \\fbox{5}", WRONG),
    ("12", "so \\boxed 12.", ""), ("1", "so \\boxed 12", WRONG), ("1/2", "\\boxed 1/2", ""),
    ("1", "\\boxed 1/2", WRONG), ("1/2", "$\\boxed\\frac12$", ""), ("-5", "\\boxed -5", ""),
    ("1/2", "\\(\\boxed\\frac{1}{2}\\)", ""), ("A", "so \\boxed A.", ""), ("5", "\\fbox{$5$}", ""),
    ("\\sqrt{2}", "so $\\boxed\\sqrt{2}$ is it", ""), ("5", "\\boxed{x = \\fbox{5}}", ""),
    # a sentence that mentions a box is none; a box that is never closed is no answer
    ("5", "I write \\boxed around it: \\boxed{5}, as \\boxed asks.", ""),
    ("a", "I use \\boxed a lot", NO), ("5", "the \\boxed command", NO), ("5", "\\boxed{5", NO),
    ("5", "\\boxed{5} and \\fbox{6", NO), ("5", "\\boxedx 5", NO),
    ("5", "I use \\boxed.\nAnswer: 5", ""),
    ("5", "\\boxed{6\nAnswer: 5", NO),
]  # fmt: skip

LINES = [
    *(("13", f"We add.\n{line}", "") for line in (
        "**Answer**: 13", "Final Answer: 13", "Answer : 13", "Answer:\n13", "Answer:\n\n$13$",
        "**Answer:** 13", "### Answer: 13", "**Final Answer:**\n\n\\[\n13\n\\]", "ANSWER: **13**",
        "Answer:\n$$\n13\n$$", "__Answer__: 13", "*Final answer*: $13$.", "Answer：13",
        "> Answer: 13",
        "**Final Answer**\n13", "## Answer\n\n13", "`Answer: 13`", "- **Answer**: \\(13\\)",
        "answer:13",
    )),
    ("13", "Final Answer: The final answer is $13$. I hope it is correct.", ""),
    ("13", "Final Answer: The final answer is $14$. I hope it is correct.", WRONG),
    *(("13", f"We add.\n{line}", WRONG) for line in (
        "**Answer**: 14", "Answer: 13\nFinal Answer: 14", "Answer:\n14\n13", "Answer: -13",
    )),
    *(("13", f"We add.\n{line}", NO) for line in (
        "the answer is 13", "Answers differ: 13", "Answering: 13", "Answer the question: 13",
        "Answer: 13\nAnswer:", "Answer", "the answer: 13",
    )),
]  # fmt: skip

VALUES = [
    # units, and words that are none
    boxed("18", "18 dollars"), boxed("18 dollars", "18"), boxed("18", "\\$18 dollars"),
    boxed("18", "18 cm"),
    boxed("18", "18 square feet"), boxed("19", "18 dollars", WRONG),
    boxed("18", "18 million", WRONG),
    boxed("18000000", "18 million"), boxed("18", "18\\text{ million}", WRONG),
    boxed("36", "3 dozen"),
    boxed("18000000", "18\\text{ million dollars}"), boxed("18", "18 dollars and 50 cents", WRONG),
    boxed("3", "3 squared", WRONG), boxed("5", "5 factorial", WRONG), boxed("2", "2 ab", WRONG),
    boxed("50\\%", "50 percent"), boxed("2", "2 pi", WRONG), boxed("2ab", "2 ab"),
    boxed("3", "3 halves", WRONG),
    boxed("18", "18 not 19", WRONG),
    # a single letter is a variable, not hours or metres
    boxed("2h", "2", WRONG), boxed("2", "5m", WRONG), boxed("5", "5m", WRONG),
    boxed("2ab", "2", WRONG), boxed("5", "5\\text{ m}"),
    boxed("\\pi r^2 h", "\\pi r^2", WRONG), boxed("\\pi r^2 h", "\\pi h r^2"), boxed("5", "5cm"),
    boxed("3t", "3t"), boxed("x", "x"),
    # arguments without braces
    boxed("1-\\frac{2}{\\pi}", "1-\\frac2\\pi"), boxed("1-\\frac2\\pi", "1-\\frac{2}{\\pi}"),
    boxed("\\frac{\\pi}{2}", "\\frac\\pi2"), boxed("1-\\frac{2}{\\pi}", "1-\\frac\\pi2", WRONG),
    boxed("\\frac{\\sqrt{2}}{3}", "\\frac\\sqrt{2}3"), boxed("10", "\\binom52"),
    boxed("\\frac12", "\\frac 1 2"),
    boxed("\\frac{\\frac{2}{\\pi}}{3}", "\\dfrac{\\frac2\\pi}3"), boxed("11", "\\binom52", WRONG),
    # exact numbers are compared exactly
    boxed("1/2^{98}", "1/2^{98}"), boxed("1/2^{98}", "1/2^{99}", WRONG),
    boxed("\\frac{1}{2^{98}}", "2^{-98}"),
    boxed("1/2006!", "1/2004!", WRONG), boxed("1/2006!", "\\frac{1}{2006!}"),
    boxed("0", "1/2^{99}", WRONG),
    boxed("x/2^{98}", "x/2^{99}", WRONG), boxed("x/2^{98}", "2^{-98}x"),
    boxed("e^{-50}", "e^{-51}", WRONG),
    boxed("(1,1/2^{98})", "(1,1/2^{99})", WRONG), boxed("1,1/2^{98}", "1/2^{98},1"),
    boxed("x=1/2^{98}", "2^{-98}"),
    boxed("\\frac{\\pi}{10^{9}}", "\\frac{\\pi}{10^{8}}", WRONG),
    boxed("\\sqrt{2}+\\sqrt{3}", "\\sqrt{5+2\\sqrt{6}}"),
    boxed("0", "\\sqrt{2}\\sqrt{3}-\\sqrt{6}"), boxed("1,1/2^{98}", "1/2^{99},1", WRONG),
    # a decimal fraction may differ by a millionth of the larger
    boxed("0.0000001", "0.0000002", WRONG), boxed("0", "0.00000001", WRONG),
    boxed("\\frac13", "0.3333333"),
    boxed("\\frac13", "0.333", WRONG), boxed("0.5", "0.50"), boxed("1/2^{98}", "0.0", WRONG),
    # what repeats, which math-verify drops
    boxed("\\frac13", "0.\\overline{3}"), boxed("0.\\overline{3}", "\\frac{1}{3}"),
    boxed("\\frac13", "0.\\bar3"),
    boxed("0.\\overline{3}", "0", WRONG), boxed("0.\\bar{3}", "0", WRONG),
    boxed("\\frac16", "0.1\\overline{6}"),
    boxed("\\frac{1}{10}", "0.1\\overline{6}", WRONG),
    boxed("-\\frac{137}{111}", "-1.\\overline{234}"),
    boxed("\\overline{AB}", "\\overline{AB}"),
    # sets, tuples, intervals
    boxed("\\{3,4\\}", "(3,4)", WRONG), boxed("(3,4)", "\\{3,4\\}", WRONG),
    boxed("\\{3,4\\}", "\\{4,3\\}"),
    boxed("[3,4]", "(3,4)", WRONG), boxed("[3,4]", "\\{3,4\\}", WRONG),
    boxed("(1,2,3)", "\\{1,2,3\\}", WRONG),
    boxed("\\{(1,2),(3,4)\\}", "((1,2),(3,4))", WRONG),
    boxed("\\{(1,2),(3,4)\\}", "\\{(3,4),(1,2)\\}"),
    boxed("\\{(1,2),(3,4)\\}", "\\{\\{1,2\\},\\{3,4\\}\\}", WRONG),
    boxed("\\left\\{3,4\\right\\}", "(3,4)", WRONG),
    boxed("3,4", "\\{3,4\\}"), boxed("(3,4)", "3,4"),  # docs/tasks.md: a bare list is either
    # case of single letters
    boxed("a", "A", WRONG), boxed("A", "a", WRONG), boxed("A", "(A)"), boxed("A", "\\text{A}"),
    boxed("A", "\\text{a}", WRONG),
    boxed("2A+1", "2a+1", WRONG), boxed("\\text{Yes}", "\\text{yes}"), boxed("10\\text{ cm}",
    "10\\text{ CM}"),
    boxed("x+y", "y+x"),
    boxed("$A$", "$A$"),
    # percent: docs/tasks.md
    boxed("0.5", "50\\%"), boxed("50", "50\\%"), boxed("50\\%", "\\frac12"),
    boxed("50", "0.5", WRONG), boxed("5", "50\\%", WRONG),
    # boxes and brackets around the prompt's answer
    boxed("\\boxed{5}", "5"), boxed("The answer is \\boxed{5}.", "5"),
    boxed("\\boxed{5}", "6", WRONG), boxed("\\(5\\)", "5"),
]  # fmt: skip
CASES = [*THOUSANDS, *BOXES, *LINES, *VALUES]


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[str, str, str], Verdict]:
    question = ({"role": "user", "content": "q"},)
    responses = ((Prompt("p", question, "math", gold), text, "stop") for gold, text, _ in CASES)
    judged = judge_all(get_task("math", {"limit_s": 10.0}), responses)
    return dict(zip(CASES, judged, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(" <- ".join(case)))
def test_answer(case: tuple[str, str, str], verdicts: dict[tuple[str, str, str], Verdict]) -> None:
    verdict = verdicts[case]
    assert (verdict.right, verdict.reason) == (case[2] == "", case[2]), verdict


def test_pieces() -> None:
    assert last_box("\\boxed{\\{1\\}}") == "\\{1\\}"
    assert last_box("no box") is None
    assert answer_line("Answer: x_1*") == "x_1"
    assert readable("10\\,000") == "10000"
    assert readable("10^3 456") is None
    assert readable("0.125 0.25") is None
