"""Environments as functions: how they are named, what they may return, and the example's tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lopd.errors import DataError
from lopd.tasks.environments import ask, environment_identity, load_environment
from lopd.tasks.sandbox import protections
from tests.stand_ins import ROOT

TOOLS = ROOT / "examples" / "calculator" / "tools.py"


def fails(_: Any) -> None:
    raise ValueError("no tool here")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (fails, "the environment failed (ValueError: no tool here)"),
        (lambda messages: "87", "the environment returned '87', which is no message"),
        (lambda messages: {"role": "assistant", "content": "87"}, "which is no message"),
        (lambda messages: {"role": "user", "content": 87}, "which is no message"),
        (lambda messages: __import__("time").sleep(60), "did not reply within 0.2 s"),
    ],
)
def test_an_environment_that_fails_is_one_line(environment: Any, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        ask(environment, [{"role": "user", "content": "1"}], limit_s=0.2, where="response p/0")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("response p/0: ")


def test_an_environment_cannot_change_the_conversation() -> None:
    messages = [{"role": "assistant", "content": "1"}]

    def changes(own: list[dict[str, Any]]) -> None:
        own[0]["content"] = "2"
        own.clear()

    assert ask(changes, messages, limit_s=5, where="") is None
    assert messages == [{"role": "assistant", "content": "1"}]


def test_a_module_is_named_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS.parent))
    # The configuration makes a path of it.
    name = Path("/somewhere/tools:calculator")
    tool = load_environment(name)
    assert tool([{"role": "assistant", "content": "1+2="}]) == {"role": "user", "content": "1+2=3"}
    by_file = environment_identity(Path(f"{TOOLS}:calculator"))
    assert environment_identity(name)[1] == by_file[1]


@pytest.mark.skipif(not protections().sufficient, reason="no sandbox on this machine")
def test_code_of_the_model_runs_in_the_sandbox() -> None:
    tool = load_environment(Path(f"{TOOLS}:python"))

    def run(program: str) -> str:
        reply = tool([{"role": "assistant", "content": f"```python\n{program}\n```"}])
        assert reply is not None
        return str(reply["content"])

    assert run("print(6 * 7)") == "42"
    escaping = f"import os\nprint(os.path.exists({str(ROOT)!r}))"
    assert run(escaping) == "False"
    # The control: outside of the sandbox the folder is there.
    assert ROOT.exists()
    assert tool([{"role": "assistant", "content": "42"}]) is None
