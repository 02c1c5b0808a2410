"""The entry for Python: light to import, and one call is a whole run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lopd
from lopd.errors import ConfigError, LopdError
from tests.stand_ins import StandIns, write_project

LIBRARY = Path(__file__).resolve().parents[1] / "docs/library.md"
HEAVY = {"torch", "numpy", "pydantic", "transformers", "sglang", "typer", "rich", "pyarrow"}


def modules_after(code: str) -> set[str]:
    """Return the top-level modules that a new interpreter has imported after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_version_alone_imports_nothing_heavy() -> None:
    assert not modules_after("import lopd; assert lopd.__version__") & HEAVY
    # The control: a name of the entry brings what it needs, and a configuration needs no torch.
    loaded = modules_after("from lopd import load_config, Config")
    assert "pydantic" in loaded
    assert not loaded & {"torch", "transformers", "sglang"}


def test_the_names_of_the_entry() -> None:
    assert {"run", "Config", "load_config", "__version__"} <= set(dir(lopd))
    from lopd.config import Config

    assert lopd.Config is Config
    with pytest.raises(AttributeError, match="no attribute 'runs'"):
        _ = lopd.runs


def example() -> str:
    """Return the Python of docs/library.md that a reader pastes into a notebook."""
    section = LIBRARY.read_text().partition("## A run from Python")[2].partition("\n## ")[0]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_ins = StandIns().install(monkeypatch)
    (tmp_path / "mine").mkdir()
    write_project(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    exec(compile(example(), str(LIBRARY), "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("distilled ") for line in printed)
    # 24 rollouts, each with the advantage of the stand-ins: -0.4 - -0.5.
    rows = [line for line in printed if re.fullmatch(r"\S+ 13 0\.09999\S*|\S+ 13 0\.1\S*", line)]
    assert len(rows) == 24
    # A second call reuses everything, and returns what is in the file.
    stand_ins.trained.clear()
    summary = lopd.run("mine/config.toml", ["distill.num_steps=2"])
    assert {stage["status"] for stage in summary["stages"]} == {"reused"}
    assert summary == json.loads((tmp_path / "mine/run/summary.json").read_text())
    assert not stand_ins.trained
    with pytest.raises(ConfigError, match="no stage 'distil'"):
        lopd.run("mine/config.toml", stage="distil")
    with pytest.raises(ConfigError, match="read already"):
        lopd.run(lopd.load_config("mine/config.toml"), ["run.seed=1"])
    # The checks come first, as at the command line.
    with pytest.raises(LopdError, match="teacher"):
        lopd.run("mine/config.toml", ["models.teacher=absent"])
