"""The command line as a user types it: it answers at once, teaches, and says in one line what was
typed wrongly, wherever and however it is run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from lopd import cli
from lopd.config import known_keys
from lopd.stages.order import STAGES as REAL_STAGES
from tests.stand_ins import CONFIG, STAGES, Result, command, write_project

LOPD = Path(sys.executable).with_name("lopd")
VERBS = ("run", *STAGES, "status", "check", "knobs")
HEAVY = ("torch", "transformers", "sglang", "megatron", "pyarrow", "matplotlib", "tensorboard")


def lopd(
    *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Result:
    """The script that installation made, in a process of its own, without a terminal."""
    done = subprocess.run(
        [LOPD, *arguments],
        cwd=cwd,
        env=dict(env or os.environ),
        capture_output=True,
        timeout=500,
        stdin=subprocess.DEVNULL,
    )
    return Result(
        done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    )


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """The same in this process, which takes no time to start."""
    return command(monkeypatch, capsys)


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a project nobody has run."""
    return write_project(tmp_path_factory.mktemp("project"))


# ---- help ----


def modules_of(arguments: Sequence[str]) -> set[str]:
    """Top-level modules in memory when the command has ended."""
    code = f"""
import sys
from lopd.cli import main
sys.argv = ["lopd", *{list(arguments)!r}]
try:
    main()
except SystemExit:
    pass
sys.stderr.write("MODULES " + " ".join({{name.partition(".")[0] for name in sys.modules}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=True
    )
    return set(done.stderr.rpartition("MODULES ")[2].split())


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("run", "--help"), ("knobs",), ("run", "absent.toml"), ("run",)],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_before_a_verb_runs(arguments: tuple[str, ...]) -> None:
    loaded = modules_of(arguments)
    assert "typer" in loaded, "the control: what is imported is seen"
    assert loaded.isdisjoint(HEAVY)


def test_help_lists_every_verb_with_its_sentence() -> None:
    shown = lopd("--help").succeeded().out
    for verb in VERBS:
        assert re.search(rf"│ {verb} +\w", shown), verb
    alone = lopd()
    assert (alone.code, alone.out) == (2, shown), "lopd alone teaches"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches(verb: str, here: Callable[..., Result]) -> None:
    shown = " ".join(here(verb, "--help").succeeded().out.split())
    expected = {
        "knobs": ("PREFIX", "default"),
        "status": ("outdated", "CONFIG"),
        "check": ("without starting", "exit code 2"),
        "run": ("reused", "Example:"),
    }
    for fragment in expected.get(
        verb, ("Reads ", "Publishes ", f"run.dir/{verb}", f"lopd knobs {verb}", "KEY=VALUE")
    ):
        assert fragment in shown, f"{fragment!r} is not in the help of {verb}"
    assert "Any" not in shown
    assert "[[" not in shown


def test_the_sentences_of_the_help_are_those_of_the_stages() -> None:
    assert {stage.name: stage.summary for stage in REAL_STAGES} == cli.STAGE_SUMMARIES


def test_the_version() -> None:
    assert re.fullmatch(r"lopd \d+\.\d+\.\d+\S*\n", lopd("--version").succeeded().out)


# ---- knobs ----


def test_knobs_read_well() -> None:
    shown = lopd("knobs").succeeded().out
    for line in (
        "distill.num_steps = 150  (whole number, >= 1)",
        "run.dir  (path, required, changes no result)",
        "sglang.port  (whole number, >= 1, <= 65535, absent, changes no result)",
        'sft.dtype = "bfloat16"  ("float32" | "bfloat16")',
        "rollout.top_p = 1.0  (number, > 0, <= 1)",
        "score.allow_foreign_teacher = false  (true or false)",
    ):
        assert f"{line}\n    " in shown, line
    assert not re.search(
        r"ge=|Ge\(|BeforeValidator|NoneType|typing|<class|PydanticUndefined", shown
    )
    sections = {key.rpartition(".")[0] for key in known_keys()}
    listed = {line.split()[0] for line in shown.splitlines() if not line.startswith("    ")}
    assert listed == set(known_keys()) - sections, "every knob and no section"


def test_knobs_of_a_section_and_of_none(here: Callable[..., Result]) -> None:
    shown = here("knobs", "distill.optimizer").succeeded().out
    assert {line.split()[0] for line in shown.splitlines()[::2]} == {
        key for key in known_keys() if key.startswith("distill.optimizer.")
    }
    here("knobs", "distil.optimiser.lr").refused(
        "no knob starts with 'distil.optimiser.lr'", "distill.optimizer.lr"
    )


def test_a_reader_that_leaves_early_is_no_error() -> None:
    with subprocess.Popen(
        [LOPD, "knobs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


# ---- typed wrongly ----


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        *(
            ((verb,), (f"lopd {verb}: missing argument 'CONFIG'", "give a TOML file"))
            for verb in ("run", "distill", "status", "check")
        ),
        (("chek", "x.toml"), ("no such command 'chek'", "check", "lopd --help")),
        (
            ("run", "x.toml", "--distill.num_steps=3"),
            ("no such option: --distill.num_steps", "overrides have no dashes: distill.num_steps="),
        ),
        (("run", "x.toml", "-q"), ("no such option: -q", "lopd run --help")),
        (("knobs", "a", "b"), ("unexpected extra argument", "lopd knobs --help")),
        (("run", "absent.toml"), ("absent.toml: no such file", "examples/tiny_moe.toml")),
        (
            ("run", "distill.num_steps=3", "x.toml"),
            (
                "is an override, but a TOML file is needed here",
                "lopd VERB CONFIG section.key=value",
            ),
        ),
        (("run", "/"), ("/: cannot be read (Is a directory)",)),
        (("run", ""), ("cannot be read",)),
        (("run", "x" * 5000), ("File name too long",)),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_wrong_usage_is_one_line(
    arguments: tuple[str, ...],
    fragments: tuple[str, ...],
    tmp_path: Path,
    here: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    here(*arguments).refused(*fragments)
    assert list(tmp_path.iterdir()) == []


# ---- wherever and however ----


def states(result: Result) -> list[str]:
    return [row["state"] for row in json.loads(result.succeeded().out)]


@pytest.mark.parametrize(
    "changes",
    [
        {"HOME": None},
        {"HOME": "/nonexistent"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"TERM": "dumb"},
        {"TERM": None, "COLUMNS": "30"},
        {"PATH": "/usr/bin"},
    ],
    ids=str,
)
def test_any_environment(project: Path, changes: dict[str, str | None]) -> None:
    env = {key: value for key, value in {**os.environ, **changes}.items() if value is not None}
    shown = lopd("status", project, env=env).succeeded().out
    assert len(re.findall("absent", shown)) == len(STAGES)
    lopd("status", project, "distill.nmu_steps=1", env=env).refused("distill.num_steps")


def test_any_folder_and_any_name(tmp_path: Path) -> None:
    # The two names together also form the markup [/red].
    folder = tmp_path / "a folder [red] with ü and 'quotes'[" / "red]"
    folder.mkdir(parents=True)
    config = folder / "my config.toml"
    config.write_text(
        CONFIG.replace('"teacher"', f'"{write_project(tmp_path / "models").parent / "teacher"}"')
    )
    (tmp_path / "link.toml").symlink_to(config)
    for path, cwd in (
        (config, None),
        (Path(config.name), folder),
        (tmp_path / "link.toml", Path("/")),
        (Path("..") / folder.name / config.name, folder),
    ):
        shown = lopd("status", path, "--json", cwd=cwd)
        assert states(shown) == ["absent"] * len(STAGES)
    titled = lopd("status", config, env={**os.environ, "COLUMNS": "300"}).succeeded().out
    assert f"run {folder}/run" in titled, (
        "run.dir is beside the config, and its brackets are no markup"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [folder.parent.name, "link.toml", "models"]
    ), "status writes nothing"
    assert [path.name for path in folder.iterdir()] == [config.name]


def test_the_current_folder_may_be_gone(
    tmp_path: Path, project: Path, here: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert states(here("status", project, "--json")) == ["absent"] * len(STAGES)
    (tmp_path / "config.toml").write_text(CONFIG)
    here("status", "../config.toml").refused(
        "../config.toml: the current folder does not exist any more",
        "change to a folder that exists, then run the command again",
    )


def test_overrides_may_be_many_and_long(project: Path) -> None:
    many = [f"distill.num_steps={number}" for number in range(1, 400)]
    assert states(lopd("status", project, "--json", *many)) == ["absent"] * len(STAGES)
    line = lopd("status", project, f"distill.num_steps='{'9' * 100_000}'").refused(
        "distill.num_steps", "a whole number"
    )
    assert len(line) < 400
