"""Two tools as environments: a calculator, and a sandbox for programs.

An environment gets the messages so far, the last of which the model has written. It returns the
next message, or None where the response is over. docs/multi_turn.md says more.
"""

from __future__ import annotations

import re
from typing import Any

from lopd.tasks import sandbox

# The last sum that the model has written: "87+02=".
_SUM = re.compile(r"(\d{1,9})([+-])(\d{1,9})=")
_PROGRAM = re.compile(r"```python\n(.*?)```", re.DOTALL)
_LIMITS = sandbox.Limits(cpu_s=2, wall_s=20)


def calculator(messages: list[dict[str, Any]]) -> dict[str, str] | None:
    """Work out the last sum of the model's first turn, and say nothing to its second."""
    answers = [one["content"] for one in messages if one["role"] == "assistant"]
    found = _SUM.findall(answers[-1])
    if not found or len(answers) > 1:
        return None
    left, sign, right = found[-1]
    # Two numbers and a sign: nothing of what the model wrote is run as a program.
    value = int(left) + int(right) if sign == "+" else int(left) - int(right)
    return {"role": "user", "content": f"{left}{sign}{right}={value}"}


def python(messages: list[dict[str, Any]]) -> dict[str, str] | None:
    """Run the program that the model has written, in the sandbox, and say what it prints."""
    programs = _PROGRAM.findall(messages[-1]["content"])
    if not programs:
        return None
    # The protections of this machine, or an error that says what it lacks.
    held = sandbox.require(allow_weak=False)
    outcome = sandbox.run(
        [sandbox.interpreter(held), "-I", "-S", "main.py"],
        files={"main.py": programs[-1]},
        limits=_LIMITS,
        protections_used=held,
    )
    printed = (outcome.stdout + outcome.stderr[-1000:]).decode("utf-8", "replace")
    note = "\nstopped at the time limit" if outcome.timed_out else ""
    return {"role": "user", "content": (printed[:4000] + note).strip() or "no output"}
