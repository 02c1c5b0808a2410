"""What tests of lopd check share."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

from lopd import checks
from lopd.config import load_config
from lopd.errors import LopdError
from tests.stand_ins import StandIns


def forbid_processes(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """Any child process is an error; a stage that came so far would be seen in the stand-ins."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    return StandIns().install(monkeypatch)


def wrong(config: Path, *overrides: str) -> list[str]:
    """Every finding of lopd check that is wrong, with the name of its check."""
    return [
        f"{name} | {finding}"
        for name, finding in checks.check(load_config(config, overrides))
        if isinstance(finding, LopdError)
    ]
