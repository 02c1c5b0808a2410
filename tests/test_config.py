"""Every mistake in a configuration is one line with key and remedy, and every example parses."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopd.config import Config, known_keys, load_config, result_keys
from lopd.errors import ConfigError

ROOT = Path(__file__).parent.parent
MINIMAL = """
[run]
dir = "runs/x"
[models]
teacher = "teacher"
student = "student"
[task]
name = "register_arithmetic"
[prompts.sft]
num_prompts = 4
[prompts.opd]
num_prompts = 4
[prompts.eval]
num_prompts = 4
"""


def written(folder: Path, text: str = MINIMAL) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def test_defaults_and_paths_relative_to_the_file(tmp_path: Path) -> None:
    config = load_config(written(tmp_path))
    assert config.models.teacher == tmp_path / "teacher"
    assert config.run.dir == tmp_path / "runs/x"
    assert config.distill.advantage_clip == 10.0
    assert config.distill.aggregation == "response_mean"


def test_dotted_overrides_take_toml_values_and_bare_words(tmp_path: Path) -> None:
    config = load_config(
        written(tmp_path),
        ["distill.optimizer.lr=1e-4", "distill.aggregation=token_mean", "sft.parallel.tensor = 2"],
    )
    assert config.distill.optimizer.lr == 1e-4
    assert config.distill.aggregation == "token_mean"
    assert config.sft.parallel.tensor == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("distill.optimiser.lr=1", "nearest known key is distill.optimizer"),
        ("distill.optimizer.lrr=1", "nearest known key is distill.optimizer.lr"),
        ("rollout.temprature=1", "nearest known key is rollout.temperature"),
        ("distill.num_steps='many'", "distill.num_steps"),
        ("distill.num_steps=0", "limit: at least 1"),
        ("rollout.top_p=1.5", "limit: at most 1"),
        ("distill.aggregation=mean", "response_mean"),
        ("models.trust_remote_code=true", "never run"),
        ("no_equals_sign", "not of the form section.key=value"),
        ("run.seed.deep=1", "run.seed"),
        ("run.dir.deep=1", "dir is a value, not a section"),
        (
            "models.teachers.math=5",
            (
                "models.teachers.math = 5 is not allowed; limit: a path in quotes; remedy: "
                "change models.teachers.math (One teacher per domain"
            ),
        ),
        (
            "sglang.student_urls=[5]",
            "sglang.student_urls.0 = 5 is not allowed; limit: text in quotes",
        ),
        ("sglang.student_urls=http://localhost:30000", 'limit: a list ["...", "..."]'),
        (
            "sync.host=localhost",
            (
                'sync.host = "localhost" is not an IPv4 address; limit: an IPv4 address of '
                "this machine, or auto; remedy: set sync.host"
            ),
        ),
        (
            "sync.delta=true",
            (
                'sync.delta = true cannot be used with transport = "disk": a folder must hold '
                'every tensor; limit: only with transport = "tensor" or "distributed"; '
                "remedy: set"
            ),
        ),
        (
            "sync={colocate=true,transport='distributed'}",
            'sync.colocate = true cannot be used with transport = "distributed"',
        ),
        (
            "sync={colocate=true,transport='tensor',delta=true}",
            "sync.delta = true cannot be used with colocate = true: a server that has given",
        ),
        (
            "sync={transport='tensor',running_requests='finish'}",
            'sync.running_requests = "finish" cannot be used with transport = "tensor"',
        ),
    ],
)
def test_mistakes_are_one_line_with_the_key_and_the_remedy(
    tmp_path: Path, override: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path), [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_broken_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(written(tmp_path, "[run\n"))
    with pytest.raises(ConfigError, match=r"models\.teacher is missing"):
        load_config(written(tmp_path, MINIMAL.replace('teacher = "teacher"', "")))


def test_every_knob_says_what_it_means() -> None:
    sections = {key.rpartition(".")[0] for key in known_keys()}
    silent = [
        key for key, field in known_keys().items() if not field.description and key not in sections
    ]
    assert silent == []
    unfinished = [
        key
        for key, field in known_keys().items()
        if field.description and not field.description.endswith(".")
    ]
    assert unfinished == [], "a whole sentence each"


def test_speed_knobs_do_not_decide_results(tmp_path: Path) -> None:
    one = load_config(written(tmp_path))
    other = load_config(written(tmp_path), ["sglang.max_in_flight=3", "distill.checkpoint_every=7"])
    sections = ("sglang", "distill")
    assert result_keys(one, sections) == result_keys(other, sections)
    assert result_keys(one, sections) != result_keys(
        load_config(written(tmp_path), ["distill.optimizer.lr=1"]), sections
    )


def read_anywhere(key: str) -> bool:
    """True if some library file outside lopd/config mentions the knob's own name as an attribute or
    key.
    """
    name = key.rpartition(".")[2]
    files = [
        path
        for package in ("lopd", "sglang_rollout")
        for path in (ROOT / package).rglob("*.py")
        if "config" not in path.parts
    ]
    return any(
        f".{name}" in text or f'"{name}"' in text for text in (path.read_text() for path in files)
    )


def test_every_knob_is_read_somewhere() -> None:
    sections = {key.rpartition(".")[0] for key in known_keys()}
    unread = [
        key
        for key in known_keys()
        if key not in sections and key != "models.trust_remote_code" and not read_anywhere(key)
    ]
    assert unread == []
    assert not read_anywhere("section.a_knob_that_nothing_reads")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").rglob("*.toml")), ids=lambda path: path.name
)
def test_every_example_parses(path: Path) -> None:
    assert isinstance(load_config(path), Config)
