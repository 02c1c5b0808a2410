#!/usr/bin/env bash
# Whether math-verify takes (a, b) for a point or an interval depends on which number is larger,
# and with it whether the set {a, b} is a right answer: for the point (1,2) it is, for (2,1) not.
# Size: 120 MB on disk.
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

print("math-verify", version("math-verify"), "sympy", version("sympy"))
answer = r"\{1,2\}"
kinds = {}
verdicts = {}
for gold in ("(1,2)", "(2,1)"):
    parsed = parse(f"${gold}$")
    kinds[gold] = type(parsed[0]).__name__
    verdicts[gold] = verify(parsed, parse(f"${answer}$"))
    verdict = "right" if verdicts[gold] else "wrong"
    print(f"gold {gold} is read as {kinds[gold]}; the answer {answer} is {verdict}")
print("expected: both are read as the same kind of thing, and a set is an answer to neither")
print("seen: the order of the numbers decides the kind and the verdict")
if kinds["(1,2)"] == kinds["(2,1)"]:
    sys.exit("no longer so: both are of one kind")
if verdicts != {"(1,2)": True, "(2,1)": False}:
    sys.exit("no longer so: the verdicts are others")
PYTHON
