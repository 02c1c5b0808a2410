"""The example of the small student: its table from made-up figures, what its commands repeat, and
the shipped model.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lopd.artifacts import identify_model
from lopd.config import load_config
from lopd.megatron.weights.headers import read_header

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "small_student"
# The scripts import each other by these names.
SCRIPTS = ("arms", "commands", "measure", "table", "picture", "seeds")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules, under their own names, as long as the tests of this file run."""
    loaded: dict[str, ModuleType] = {}
    for name in SCRIPTS:
        spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        loaded[name] = importlib.util.module_from_spec(spec)
        sys.modules[name] = loaded[name]
        spec.loader.exec_module(loaded[name])
    yield loaded
    for name in SCRIPTS:
        del sys.modules[name]


def of_seeds(*pairs: tuple[float, float]) -> dict[str, dict[str, float]]:
    return {
        str(seed): {"greedy": greedy, "sampled": sampled}
        for seed, (greedy, sampled) in enumerate(pairs, start=1)
    }


FIGURES: dict[str, Any] = {
    "fixed": {"base": {"greedy": 0.904, "sampled": 0.621}, "teacher": None},
    "models": {
        "sft": of_seeds((0.88, 0.66), (0.90, 0.64)),
        "distilled": of_seeds((0.97, 0.85), (0.97, 0.85)),
        "sft_longer": of_seeds((0.87, 0.75), (0.91, 0.73)),
    },
    "costs": {
        "sft": {"1": {"decoded": 26000, "scored": 0, "processor_seconds": 40.0}},
        "distilled": {"1": {"decoded": 26000, "scored": 106000, "processor_seconds": 140.0}},
        "sft_longer": {},
    },
    "advantages": {},
}


def test_a_row_has_means_errors_and_differences_paired_by_seed(
    scripts: dict[str, ModuleType],
) -> None:
    lines = scripts["table"].markdown(FIGURES).splitlines()
    assert lines[2] == "| base student |  | 90.4 | 62.1 |  |  |  |  |  |"
    assert lines[3] == (
        "| SFT student (96 steps) | 2 | 89.0 (1.0) | 65.0 (1.0) | +8.0 (1.0) | +20.0 (1.0) "
        "| 26,000 | 0 | 40 |"
    )
    assert lines[-1].startswith("| **distilled: top-8 reverse KL on frozen rollouts** | 2 | 97.0")
    assert len({line.count("|") for line in lines}) == 1, "as many cells as titles"


def test_the_best_sft_model_is_chosen_for_each_seed_and_column_by_itself(
    scripts: dict[str, ModuleType],
) -> None:
    (best,) = [
        line for line in scripts["table"].markdown(FIGURES).splitlines() if "best of" in line
    ]
    # Greedy: .88 of SFT in seed 1, .91 of longer SFT in seed 2. T=1: longer SFT in both.
    assert "| 89.5 (1.5) | 74.0 (1.0) |" in best
    alone = {**FIGURES, "models": {"sft": FIGURES["models"]["sft"]}}
    assert "best of" not in scripts["table"].markdown(alone)


def test_a_finished_command_is_not_repeated_and_a_changed_one_is(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = scripts["seeds"]
    commands: list[list[str]] = []

    def run(command: list[Any], log: Path) -> float:
        commands.append([*map(str, command)])
        return 1.5

    monkeypatch.setattr(seeds, "run_measured", run)
    arm = scripts["arms"].arm_named("sft")
    seeds.make(arm, 2, tmp_path)
    assert [command[1] for command in commands] == ["demonstrate", "sft"]
    assert f"run.dir={tmp_path / 'main'}" in commands[0]
    assert "prompts.sft.seed=22" in commands[0]
    seeds.make(arm, 2, tmp_path)
    assert len(commands) == 2, "finished commands are not repeated"
    # A mark of another command, as after a change of the configuration.
    mark = tmp_path / "done" / "sft-1-sft.json"
    mark.write_text(json.dumps({"command": "another", "processor_seconds": 1.0}))
    seeds.make(arm, 2, tmp_path)
    assert [command[1] for command in commands[2:]] == ["sft"]


def test_figures_of_another_model_of_the_same_name_do_not_count(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    is_measured = scripts["measure"].is_measured
    models = scripts["arms"].MODELS
    result = tmp_path / "base.json"
    assert not is_measured(result, models / "small_student")
    result.write_text(json.dumps({"model": identify_model(models / "small_student").weights}))
    assert is_measured(result, models / "small_student")
    assert not is_measured(result, models / "teacher")


def test_an_arm_begins_with_a_copy_of_the_stages_that_it_shares(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = scripts["seeds"]
    monkeypatch.setattr(seeds, "run_measured", lambda command, log: 0.0)
    for stage in ("demonstrate", "sft", "rollout", "score", "distill"):
        (tmp_path / "main" / stage).mkdir(parents=True)
    (tmp_path / "main" / "config.json").write_text("{}")
    # What a kill in the middle of copying leaves.
    (tmp_path / "lightning.partial" / "half").mkdir(parents=True)
    seeds.make(scripts["arms"].arm_named("lightning"), 1, tmp_path)
    found = sorted(path.name for path in (tmp_path / "lightning").iterdir())
    assert found == ["config.json", "demonstrate", "rollout", "score", "sft"]
    assert not (tmp_path / "lightning.partial").exists()
    # After a kill it goes on with its own run. After a change it begins with the stages of now.
    (tmp_path / "lightning" / "distill").mkdir()
    mark = tmp_path / "done" / "lightning-0-distill.json"
    mark.unlink()
    seeds.make(scripts["arms"].arm_named("lightning"), 1, tmp_path)
    assert (tmp_path / "lightning" / "distill").exists()
    mark.write_text(json.dumps({"command": "another", "processor_seconds": 1.0}))
    seeds.make(scripts["arms"].arm_named("lightning"), 1, tmp_path)
    assert not (tmp_path / "lightning" / "distill").exists()


def test_processor_time_of_processes_that_nobody_waited_for_is_counted(tmp_path: Path) -> None:
    """A child ends without waiting for its own child, as a server does with its workers."""
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {burn!r}])"
    script = (
        "import ctypes, seeds, sys; from pathlib import Path\n"
        "ctypes.CDLL(None).prctl({option}, 1, 0, 0, 0)\n"
        f"print(seeds.run_measured([sys.executable, '-c', {child!r}], Path(sys.argv[1])))"
    )

    def seconds(option: int) -> float:
        done = subprocess.run(
            [sys.executable, "-c", script.format(option=option), str(tmp_path / "log")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLE), str(ROOT)])},
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout)

    assert seconds(36) >= 0.4
    # Option 4 (dumpable) adopts nobody: the grandchild's time is lost.
    assert seconds(4) < 0.4


def test_every_arm_has_overrides_that_the_configuration_accepts(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    for arm in scripts["arms"].ARMS:
        for command in arm.commands(tmp_path / "main", 3):
            overrides = scripts["seeds"]._command(command, tmp_path / arm.run, 3)[3:]
            config = load_config(scripts["arms"].CONFIG, [*map(str, overrides)])
            assert config.run.seed in (3, 103)
            assert not config.evaluate.enabled


def test_the_shipped_student_is_a_sixth_of_the_teacher(scripts: dict[str, ModuleType]) -> None:
    def num_parameters(name: str) -> int:
        header = read_header(scripts["arms"].MODELS / name / "model.safetensors")
        return sum(math.prod(tensor.shape) for tensor in header.values())

    assert num_parameters("small_student") == 127_872
    assert 5.5 < num_parameters("teacher") / num_parameters("small_student") < 6.5


def test_the_pages_have_the_tables_of_the_published_figures(
    scripts: dict[str, ModuleType],
) -> None:
    table = scripts["table"]
    figures = json.loads((ROOT / "docs" / "small_student.json").read_text(encoding="utf-8"))
    assert table.markdown(figures) in (ROOT / "docs" / "small_student.md").read_text("utf-8")
    assert table.in_short(figures) in (ROOT / "README.md").read_text("utf-8")
    # The control: another figure makes other tables.
    figures["models"]["distilled"]["2"]["sampled"] += 0.1
    assert table.in_short(figures) not in (ROOT / "README.md").read_text("utf-8")


def test_the_readme_has_a_part_of_the_table(scripts: dict[str, ModuleType]) -> None:
    lines = scripts["table"].in_short(FIGURES).splitlines()
    assert lines[0].startswith("| model | greedy, % | T=1, % | distilled minus it, T=1 |")
    assert lines[-1].startswith("| **distilled: top-8 reverse KL on frozen rollouts** | 97.0")
    assert len({line.count("|") for line in lines}) == 1, "as many cells as titles"
