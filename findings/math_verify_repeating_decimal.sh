#!/usr/bin/env bash
# math-verify reads a repeating decimal without its repeating part: 0.\overline{3} is 0 to it.
# A right answer of this kind is judged wrong, and an answer of 0 right. Size: 120 MB on disk.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq math-verify==0.9.0 latex2sympy2_extended==1.11.0 \
    antlr4-python3-runtime==4.13.2 sympy==1.14.0
cd "$folder"
"$folder/venv/bin/python" -I - <<'PYTHON'
import sys
from importlib.metadata import version

from math_verify import parse, verify


def right(gold, answer):
    return verify(parse(f"${gold}$"), parse(f"${answer}$"))


print("math-verify", version("math-verify"), "sympy", version("sympy"))
seen = {}
for gold, answer in (
    (r"\frac{1}{3}", r"0.\overline{3}"),
    (r"0.\overline{3}", "0"),
    (r"2.\overline{6}", r"\frac{8}{3}"),
    (r"2.\overline{6}", "2"),
    (r"\frac{1}{3}", r"\frac{2}{6}"),
):
    seen[gold, answer] = right(gold, answer)
    print(f"gold {gold}, answer {answer}: {'right' if seen[gold, answer] else 'wrong'}")
print("expected: right, wrong, right, wrong, right (or an expression that cannot be read)")
print(r"seen: wrong, right, wrong, right, right; 0.\overline{3} is", parse(r"$0.\overline{3}$")[0])
if list(seen.values()) != [False, True, False, True, True]:
    sys.exit("no longer so")
PYTHON
