"""lopd init: a configuration for one's own models and prompts that is complete and right."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from lopd.config import load_config
from lopd.megatron.weights.architecture import read_architecture
from lopd.planning.first_values import batch_and_steps
from lopd.verbs.init import config_text
from tests.stand_ins import Result, StandIns, command, states, write_project, write_prompts

PAGE = Path(__file__).resolve().parents[1] / "docs/your_run.md"
ROLES = ("teacher", "student")
NOTHING = dict.fromkeys(("teacher", "student", "sft", "opd", "eval"))


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
    # Three passes over eight prompts, one response a step.
    assert (loaded.sft.batch_size, loaded.sft.num_steps) == (1, 24)
    assert loaded.prompts.opd.file == tmp_path / "opd.jsonl"
    StandIns().install(monkeypatch)
    lopd("check", config).succeeded()
    lopd("run", config).succeeded()
    assert set(states(lopd, config).values()) == {"done"}


def test_the_models_decide_context_and_learning_rates(tmp_path: Path, given: list[str]) -> None:
    options = {**NOTHING, **{role: str(tmp_path / "models" / role) for role in ROLES}}
    known = tomllib.loads(config_text(tmp_path / "mine", options, "math", "cpu"))
    shape = read_architecture(tmp_path / "models/student")
    assert known["sglang"]["context_length"] == shape.max_position_embeddings < 4096
    limits = {known[stage]["max_new_tokens"] for stage in ("demonstrate", "rollout", "evaluate")}
    assert limits == {shape.max_position_embeddings // 2}
    assert known["distill"]["optimizer"] == {"lr": 1e-3, "schedule": "cosine"}
    # The control: without the models, the paper's values for billions of parameters.
    unknown = tomllib.loads(config_text(tmp_path / "mine", NOTHING, "math", "cpu"))
    assert unknown["sglang"]["context_length"] == 4096
    assert unknown["distill"]["optimizer"] == {"lr": 2e-6}
    # The shape of a public model is known by its name, and its size with it.
    public = config_text(
        tmp_path, {**NOTHING, "student": "hf://Qwen/Qwen3-0.6B-Base@main"}, "math", "gpu"
    )
    assert tomllib.loads(public)["distill"]["optimizer"] == {"lr": 1e-5}
    assert "Size of the student: 596,049,920 parameters." in public


def test_the_teacher_with_fewer_positions_decides(tmp_path: Path, given: list[str]) -> None:
    path = tmp_path / "models/teacher/config.json"
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "max_position_embeddings": 48}))
    options = {**NOTHING, **{role: str(tmp_path / "models" / role) for role in ROLES}}
    text = config_text(tmp_path, options, "math", "cpu")
    assert tomllib.loads(text)["sglang"]["context_length"] == 48


@pytest.mark.parametrize(
    ("prompts", "batch", "steps"),
    [(1, 1, 3), (8, 1, 24), (11, 1, 33), (200, 18, 34), (10_000, 256, 118), (10**6, 256, 150)],
)
def test_few_prompts_make_small_batches_and_not_few_steps(
    prompts: int, batch: int, steps: int
) -> None:
    assert batch_and_steps(prompts) == (batch, steps)


def test_the_commented_lines_are_a_loss(tmp_path: Path) -> None:
    text = config_text(tmp_path, NOTHING, "math", "cpu")
    for line in ("top_k = 8", "objective = { loss"):
        assert f"\n# {line}" in text
        text = text.replace(f"\n# {line}", f"\n{line}")
    (tmp_path / "config.toml").write_text(text)
    loaded = load_config(tmp_path / "config.toml")
    assert (loaded.score.top_k, loaded.distill.objective.loss) == (8, "top_k_reverse_kl")


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
