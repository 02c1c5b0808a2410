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
from typing import Any, get_args, get_type_hints

import pytest
import typer

from lopd import cli
from lopd.config import known_keys
from lopd.stages.order import STAGES as REAL_STAGES
from lopd.verbs.arguments import input_path
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


TEACHER = Path(__file__).resolve().parents[1] / "examples/tiny_models/teacher"

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
        "knobs": ("SECTION", "--search", "--changed", "default"),
        "status": ("outdated", "CONFIG"),
        "check": ("without starting", "exit code is 2"),
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
    shown = lopd("knobs", "--all").succeeded().out
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
    listed = {line.split()[0] for line in shown.splitlines() if line[:1] not in ("", " ", "[")}
    assert listed == set(known_keys()) - sections, "every knob and no section"


def test_knobs_of_a_section_and_of_none(here: Callable[..., Result]) -> None:
    shown = here("knobs", "distill.optimizer").succeeded().out
    assert shown.startswith("[distill.optimizer]  AdamW"), "a heading"
    listed = [line.split()[0] for line in shown.splitlines()[1:] if not line.startswith(" ")]
    assert listed == [key for key in known_keys() if key.startswith("distill.optimizer.")]
    here("knobs", "distil.optimiser.lr").refused(
        "no knob starts with 'distil.optimiser.lr'", "distill.optimizer.lr"
    )


def test_knobs_without_a_section_lists_the_sections(here: Callable[..., Result]) -> None:
    shown = here("knobs").succeeded().out
    assert len(shown.splitlines()) < 60, "no wall"
    sections = {key.rpartition(".")[0] for key in known_keys()} - {"", "prompts"}
    assert sections <= {line.split()[0] for line in shown.splitlines() if line.strip()}


def test_knobs_by_a_word(here: Callable[..., Result]) -> None:
    shown = here("knobs", "--search", "Checkpoint").succeeded().out
    # By the key, and by the meaning alone.
    assert "sft.checkpoint_every = 50" in shown
    assert "launch.retries = 2" not in shown, "the control"
    only = here("knobs", "distill", "--search", "checkpoint").succeeded().out
    assert "sft.checkpoint_every" not in only
    assert "distill.checkpoint_every" in only
    here("knobs", "--search", "nosuchword").refused("no knob has 'nosuchword'", "--search")


def test_knobs_that_a_configuration_changes(
    here: Callable[..., Result], project: Path, tmp_path: Path
) -> None:
    config = tmp_path / "changed.toml"
    text = project.read_text(encoding="utf-8")
    config.write_text(f"{text}\n[export]\nshard_bytes = 123456789\n", "utf-8")
    shown = here("knobs", "--changed", str(config)).succeeded().out
    (line,) = (line for line in shown.splitlines() if line.startswith("export.shard_bytes"))
    assert re.fullmatch(r"export\.shard_bytes = 123456789  \(default: \d+\)", line)
    assert "distill.advantage_clip" not in shown, "what is not set is not shown"
    assert "run.dir" in shown
    assert "(has no default)" in shown


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_knobs_fit_the_terminal(columns: int) -> None:
    env = {**os.environ, "COLUMNS": str(columns)}
    for arguments in (("knobs",), ("knobs", "--all")):
        lines = lopd(*arguments, env=env).succeeded().out.splitlines()
        assert max(map(len, lines)) <= columns
        assert max(map(len, lines)) > columns - 12, "the control: the width is used"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    with subprocess.Popen(
        [LOPD, "knobs", "--all"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


# ---- options that become knobs, and what is not downloaded yet ----


@pytest.mark.parametrize(
    ("given", "option", "knob"),
    [
        (("--model", "absent"), "--model: no such folder", "models."),
        (
            ("--out", "/dev/null"),
            "--out cannot be created: a file has this path; remedy: set --out to another folder",
            "run.",
        ),
        (("--format", "bogus"), "--format = 'bogus'", "prompts.eval"),
        (("--preset", "bogus"), "--preset = 'bogus'", "evaluate.preset"),
        (("--task", "bogus"), "--task: unknown task 'bogus'", "task.name"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_an_error_names_the_option_and_not_the_knob(
    here: Callable[..., Result], tmp_path: Path, given: tuple[str, str], option: str, knob: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_id": "1", "prompt": "1+1", "answer": "2"}\n', encoding="utf-8")
    options = {"--model": str(TEACHER), "--prompts": str(prompts), "--out": str(tmp_path / "out")}
    words = [word for pair in {**options, given[0]: given[1]}.items() for word in pair]
    refused = here("evaluate", *words)
    refused.refused(option)
    assert knob not in refused.err


def test_a_knob_that_was_typed_is_named_as_it_was(here: Callable[..., Result]) -> None:
    """The control: an override stays what it is."""
    words = ("--model", str(TEACHER), "--prompts", "p.jsonl", "--out", "out")
    here("evaluate", *words, "evaluate.temperature=-1").refused("evaluate.temperature = -1")


def test_prompts_prepare_names_its_options(here: Callable[..., Result], tmp_path: Path) -> None:
    words = ("prompts", "prepare", "x.jsonl", "--out", str(tmp_path / "y.jsonl"))
    refused = here(*words, "--format", "bogus")
    refused.refused("--format = 'bogus'", "gsm8k")
    assert "Input should be" not in refused.err


def test_what_is_not_downloaded_has_its_own_word_and_exit_code(
    here: Callable[..., Result],
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOPD_HUB", str(tmp_path / "hub"))
    absent = "models.teacher=hf://someone/tiny@main"
    shown = here("check", project, absent)
    assert shown.code == 3
    assert re.search(r"(?m)^fetch teacher .*someone/tiny@main is not downloaded yet", shown.out)
    assert "wrong" not in shown.out
    assert shown.out.endswith(f"not downloaded yet: lopd fetch {project}\n")
    assert here("run", project, absent).code == 3
    # The control: a mistake beside it, and a path that no download can fill.
    assert here("check", project, absent, "sglang.context_length=99999999").code == 2
    other = here("check", project, "models.student=absent")
    assert (other.code, "wrong student" in other.out) == (2, True)


def readers_of_paths(group: typer.Typer) -> dict[str, Any]:
    """Return what reads each path that names a model, a tokenizer or prompts, by the parameter."""
    found: dict[str, Any] = {}
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        found |= readers_of_paths(inner.typer_instance)
    for verb in group.registered_commands:
        assert verb.callback is not None
        for name, kind in get_type_hints(verb.callback, include_extras=True).items():
            about = next((one for one in get_args(kind) if hasattr(one, "parser")), None)
            if about is None or Path not in (get_args(kind)[0], *get_args(get_args(kind)[0])):
                continue
            if re.search(r"Hugging Face folder|older of a tokenizer|or Parquet", about.help or ""):
                found[f"{verb.callback.__name__} {name}"] = about.parser
    return found


def test_every_path_of_a_model_or_of_prompts_may_be_a_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = readers_of_paths(cli.app)
    assert {"prepare source", "show tokenizer", "audit teacher", "chat source"} <= set(readers)
    assert set(readers.values()) == {input_path}, readers
    monkeypatch.setenv("LOPD_HUB", str(tmp_path))
    assert input_path("hf://org/it@main") == tmp_path / "models/org--it@main"
    assert input_path("~/x") == Path.home() / "x"
    # The control: a path that was made absolute first is no such name any more.
    absolute = Path("hf://org/it@main").absolute()
    assert input_path(str(absolute)) == absolute


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
