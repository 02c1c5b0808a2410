"""lopd init: a configuration for one's own models and prompts that is complete and right."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from lopd.config import load_config
from lopd.verbs.init import config_text
from tests.stand_ins import Result, StandIns, command, states, write_project, write_prompts

PAGE = Path(__file__).resolve().parents[1] / "docs/your_run.md"
NOTHING = dict.fromkeys(("teacher", "student", "sft", "opd", "eval"))
# The example's models have 128 positions.
SMALL = (
    "sglang.context_length=128",
    *(f"{stage}.max_new_tokens=64" for stage in ("demonstrate", "rollout", "evaluate")),
)


@pytest.fixture
def lopd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    return command(monkeypatch, capsys)


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """The options of a user with two models and three files, one of them without ids."""
    write_project(tmp_path / "models")
    for number, name in enumerate(("sft", "opd", "eval")):
        rows = [
            {"question": f"{number}{index}+01=?", "answer": f"{number}{index + 1}"}
            for index in range(8)
        ]
        write_prompts(tmp_path / f"{name}.jsonl", rows)
    models = [f"--{role}={tmp_path / 'models' / role}" for role in ("teacher", "student")]
    files = [f"--{name}={tmp_path / name}.jsonl" for name in ("sft", "opd", "eval")]
    return [*models, *files, "--task=register_arithmetic", "--device=cpu"]


def test_what_it_writes_runs_as_it_is(
    lopd: Callable[..., Result],
    tmp_path: Path,
    given: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = lopd("init", tmp_path / "mine", *given).succeeded().out
    config = tmp_path / "mine/config.toml"
    assert "missing" not in out
    assert f"lopd check {config}" in out
    assert f"lopd run {config}" in out
    assert "lopd fetch" not in out
    loaded = load_config(config)
    # Half of the file a batch, about three passes.
    assert (loaded.sft.batch_size, loaded.sft.num_steps) == (4, 6)
    assert loaded.prompts.opd.file == tmp_path / "opd.jsonl"
    StandIns().install(monkeypatch)
    lopd("check", config, *SMALL).succeeded()
    lopd("run", config, *SMALL).succeeded()
    assert set(states(lopd, config, *SMALL).values()) == {"done"}


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_every_line_is_a_knob(tmp_path: Path, device: str) -> None:
    text = config_text(tmp_path, NOTHING, "math", device)
    (tmp_path / "config.toml").write_text(text)
    loaded = load_config(tmp_path / "config.toml")
    assert loaded.models.teacher == tmp_path / "models/teacher"
    assert loaded.launch.device == device, "lopd plan must not tell a laptop about eight GPUs"
    assert loaded.sglang.dtype == loaded.sft.dtype == loaded.distill.dtype
    # A line for each stage that has knobs, so that a reader sees where they go.
    stages = {"demonstrate", "sft", "rollout", "score", "distill", "evaluate"}
    assert stages <= set(tomllib.loads(text))
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_page_has_what_it_writes() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert config_text(Path("mine"), NOTHING, "math", "gpu") in blocks
    assert config_text(Path("mine"), NOTHING, "math", "cpu") not in blocks, "the control"


def test_without_options_it_says_what_is_missing(
    lopd: Callable[..., Result], tmp_path: Path
) -> None:
    out = lopd("init", tmp_path / "mine", "--student=hf://org/name@main").succeeded().out
    assert out.count("missing: ") == 4
    assert f"{tmp_path / 'mine/models/teacher'} (or give --teacher" in out
    # A name on the hub is downloaded first.
    assert "lopd fetch" in out
    lopd("init", tmp_path / "mine").refused("config.toml: the file exists")


def test_what_was_given_must_exist(lopd: Callable[..., Result], tmp_path: Path) -> None:
    new = tmp_path / "mine"
    lopd("init", new, f"--sft={tmp_path}/absent.jsonl").refused(
        "--sft", "no such file or folder", "leave --sft out"
    )
    lopd("init", new, f"--teacher={tmp_path}").refused("not a Hugging Face folder")
    lopd("init", new, "--task=maths").refused("unknown task", "math")
    lopd("init", new, "--device=tpu").refused("'tpu' is not a known", "gpu or cpu", "remedy: ")
    assert not new.exists()
