"""Every name that we import or call of megatron-core and SGLang exists in the versions we support,
and takes our arguments.

The signatures are data (signatures.json), so the versions need not be installed. What is installed
is held against the data.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from typing import Any

import pytest

from tests.docker.test_image import VERSIONS
from tests.image.signatures import (
    DATA,
    ROOT,
    Call,
    calls,
    imported,
    installed,
    names,
    package_of,
    problem,
)

RECORDED: dict[str, dict[str, Any]] = json.loads(DATA.read_text(encoding="utf-8"))


def test_both_ends_of_the_supported_range_are_recorded() -> None:
    cpu = dict(
        re.findall(r"^([a-z-]+)==(\S+)", (ROOT / "requirements/cpu.lock").read_text(), re.MULTILINE)
    )
    expected = {
        f"megatron-core {cpu['megatron-core']}",
        f"megatron-core {VERSIONS['MEGATRON_CORE_VERSION']}",
        f"sglang {VERSIONS['SGLANG_VERSION']}",
    }
    assert RECORDED.keys() == expected
    assert cpu["sglang"] == VERSIONS["SGLANG_VERSION"]


@pytest.mark.parametrize("package", RECORDED)
def test_every_name_is_recorded_and_there(package: str) -> None:
    """A name that is new in our sources is recorded by: python -m tests.image.signatures --record,
    in both environments.
    """
    distribution = package.partition(" ")[0]
    wanted = {name for name in names() if package_of(name) == distribution}
    assert wanted <= RECORDED[package].keys()
    assert [name for name in sorted(wanted) if RECORDED[package][name] == "absent"] == []


@pytest.mark.parametrize("package", RECORDED)
def test_every_call_is_taken(package: str) -> None:
    distribution = package.partition(" ")[0]
    mine = [call for call in calls() if package_of(call.name) == distribution]
    assert len(mine) > 5
    found = [problem(call, RECORDED[package].get(call.name, "absent")) for call in mine]
    assert [line for line in found if line] == []


def test_what_is_installed_is_what_is_recorded() -> None:
    found = installed("megatron-core")
    for package, entries in found.items():
        assert entries == {name: RECORDED[package][name] for name in entries}
    assert found.keys() == {
        f"megatron-core {importlib.metadata.version('megatron-core').partition('+')[0]}"
    }


def test_a_call_that_is_refused_is_noticed() -> None:
    """The controls: a keyword that is not there, too many arguments, one that is missing, a name
    that is gone.
    """
    signature = [["folder", "POSITIONAL_OR_KEYWORD", False], ["strict", "KEYWORD_ONLY", True]]
    right = Call("megatron.core.f", "x.py:1", 1, ("strict",), False)
    assert problem(right, signature) is None
    wrong = {
        "unexpected keyword": Call("megatron.core.f", "x.py:1", 1, ("loose",), False),
        "too many": Call("megatron.core.f", "x.py:1", 2, (), False),
        "missing": Call("megatron.core.f", "x.py:1", 0, ("strict",), False),
    }
    for word, call in wrong.items():
        assert word in (problem(call, signature) or "")
    assert problem(Call("megatron.core.f", "x.py:1", 0, ("strict",), True), signature) is None
    assert "does not exist" in (problem(right, "absent") or "")


def test_imports_in_functions_and_under_other_names_are_found() -> None:
    import ast

    text = (
        "def f():\n"
        "    import megatron.core.tensor_parallel.random as r\n"
        "    from megatron.core import dist_checkpointing as d\n"
        "    import json as j\n"
    )
    assert imported(ast.parse(text)) == {
        "r": "megatron.core.tensor_parallel.random",
        "d": "megatron.core.dist_checkpointing",
    }
