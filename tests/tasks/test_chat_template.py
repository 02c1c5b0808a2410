"""One chat template renders the prompts of every stage, and the student's files say what is true.

The pair that is published: a thinking teacher, whose template opens the answer with ``<think>``,
and a base student, whose template does not and whose files name another end token.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd import cache, checks
from lopd.artifacts import read_manifest
from lopd.config import Config, load_config
from lopd.errors import LopdError
from lopd.tasks import light_tokenizer
from lopd.tasks.chat_template import (
    RECORD,
    complete_student_files,
    render_time,
    template_inputs,
    template_text,
)
from lopd.tasks.tokenizer import load_tokenizer, stop_token_ids
from tests.stand_ins import TINY_MODELS, Lopd, StandIns, command, contents, write_project

THINK = "<think>"
END = 2  # <|im_end|>
# ChatML, as the example's models have it. It ends with "assistant" and a new line.
MESSAGES = (TINY_MODELS / "teacher/chat_template.jinja").read_text()


def with_template(folder: Path, text: str, **fields: Any) -> None:
    """Give a model folder a chat template, and its tokenizer_config.json some fields."""
    path = folder / "tokenizer_config.json"
    table = json.loads(path.read_text()) | fields
    table.pop("chat_template", None)
    path.write_text(json.dumps(table))
    (folder / "chat_template.jinja").write_text(text)


@pytest.fixture
def lopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lopd:
    return command(monkeypatch, capsys)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The student's template ends with the question, the teacher's goes on with THINK."""
    config = write_project(tmp_path)
    with_template(tmp_path / "student", MESSAGES)
    with_template(tmp_path / "teacher", MESSAGES + THINK)
    return config


def last_tokens(folder: Path) -> set[str]:
    """The last token of every prompt of an artifact."""
    tokenizer = load_tokenizer(folder.parents[1] / "teacher")
    rows = cache.read_rows(folder)
    return {tokenizer.convert_ids_to_tokens(int(row.prompt_ids[-1])) for row, _ in rows}


@pytest.mark.parametrize(("owner", "ends"), [("teacher", {THINK}), ("student", {"\n"})])
def test_every_stage_has_prompts_of_one_template(
    owner: str, ends: set[str], project: Path, lopd: Lopd, monkeypatch: pytest.MonkeyPatch
) -> None:
    StandIns().install(monkeypatch)
    lopd("run", project, f"models.chat_template={owner}").succeeded()
    run = project.parent / "run"
    for stage in ("demonstrate", "rollout", "score", "evaluate/answers-distilled"):
        folder = run / stage
        # evaluate keeps each model's answers in a folder of its own.
        shown = last_tokens(folder) if "/" not in stage else _last(folder, run)
        assert shown == ends, stage
    for student in (run / "sft/model", run / "distill/model", run / "export/model"):
        assert template_text(student) == template_text(project.parent / owner)
    hashes = {
        read_manifest(run / stage).inputs["chat_template"]
        for stage in ("demonstrate", "sft", "rollout", "evaluate")
    }
    assert len(hashes) == 1


def _last(folder: Path, run: Path) -> set[str]:
    tokenizer = load_tokenizer(run.parent / "teacher")
    rows = cache.read_rows(folder)
    return {tokenizer.convert_ids_to_tokens(int(row.prompt_ids[-1])) for row, _ in rows}


def test_another_template_is_another_run(
    project: Path, lopd: Lopd, monkeypatch: pytest.MonkeyPatch
) -> None:
    StandIns().install(monkeypatch)
    lopd("run", project).succeeded()
    again = lopd("run", project).succeeded()
    assert again.out.count("reused") >= 7
    with_template(project.parent / "teacher", MESSAGES + THINK + THINK)
    stand_ins = StandIns().install(monkeypatch)
    lopd("run", project).succeeded()
    assert stand_ins.served, "nothing was sampled with the new template"


def test_check_shows_one_prompt_under_both_templates(project: Path, lopd: Lopd) -> None:
    before = contents(project.parent)
    shown = lopd("check", project).succeeded().out
    assert "the teacher's chat template renders the prompts of every stage" in _flat(shown)
    assert "the student's own template would render prompt" in _flat(shown)
    assert f"assistant\\n{THINK}'" in _flat(shown)
    assert contents(project.parent) == before


def test_check_is_silent_about_equal_templates(project: Path, lopd: Lopd) -> None:
    with_template(project.parent / "student", MESSAGES + THINK)
    assert "would render" not in _flat(lopd("check", project).succeeded().out)


def test_a_student_without_a_template_gets_the_teachers(project: Path, lopd: Lopd) -> None:
    (project.parent / "student/chat_template.jinja").unlink()
    shown = _flat(lopd("check", project).succeeded().out)
    assert "the student's own template would render prompt" in shown
    assert "nothing (the tokenizer has no chat template)" in shown


def test_check_shows_sets_that_think_and_sets_that_do_not(project: Path, lopd: Lopd) -> None:
    with_template(
        project.parent / "teacher", MESSAGES + "{% if enable_thinking %}" + THINK + "{% endif %}"
    )
    shown = _flat(lopd("check", project, "prompts.opd.thinking=false").succeeded().out)
    assert "prompts.opd.thinking is false and prompts.sft.thinking is true" in shown
    assert "prompts.eval.thinking" not in shown
    with_template(project.parent / "teacher", MESSAGES)
    shown = _flat(lopd("check", project, "prompts.opd.thinking=false").succeeded().out)
    assert "thinking is" not in shown, "this template does not read the knob"


def test_a_template_with_chance_in_it_is_refused(project: Path, lopd: Lopd) -> None:
    choices = "{{ ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9'] | random }}"
    with_template(project.parent / "teacher", MESSAGES + choices * 12)
    result = lopd("check", project)
    assert result.code == 2
    assert "the chat template renders one prompt in two ways" in _flat(result.out + result.err)


# ---- the clock ----


def clock_project(tmp_path: Path) -> Config:
    path = write_project(tmp_path)
    for role in ("teacher", "student"):
        with_template(tmp_path / role, MESSAGES + "{{ strftime_now('%d') }}")
    return load_config(path)


def test_the_time_of_a_template_is_kept(
    tmp_path: Path, lopd: Lopd, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = clock_project(tmp_path)
    StandIns().install(monkeypatch)
    lopd("run", tmp_path / "config.toml").succeeded()
    recorded = json.loads((config.run.dir / RECORD).read_text())["time"]
    assert read_manifest(config.run.dir / "rollout").inputs["chat_template.time"] == recorded
    day = f"{datetime.datetime.fromisoformat(recorded).day:02d}"
    assert last_tokens(config.run.dir / "rollout") == {day[-1]}
    # Tomorrow the same prompts come out, and everything is reused.
    other_day = datetime.datetime(2031, 5, 27, 12)
    (config.run.dir / RECORD).write_text(json.dumps({"time": recorded}))
    stand_ins = StandIns().install(monkeypatch)
    monkeypatch.setattr("lopd.tasks.chat_template.datetime", _Clock(other_day))
    lopd("run", tmp_path / "config.toml").succeeded()
    assert not stand_ins.started
    # Control: without the record it is another run.
    (config.run.dir / RECORD).unlink()
    lopd("run", tmp_path / "config.toml").succeeded()
    assert stand_ins.served


class _Clock:
    """The module datetime with a fixed now()."""

    def __init__(self, now: datetime.datetime) -> None:
        class Fixed(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime.datetime:
                return now

        self.datetime = Fixed


def test_a_template_without_a_clock_has_no_time_in_the_manifest(project: Path) -> None:
    config = load_config(project)
    assert set(template_inputs(config)) == {"chat_template"}
    assert not (config.run.dir / RECORD).exists()
    assert render_time(config).microsecond == 0


# ---- the student's files ----


@pytest.fixture
def student(project: Path) -> Path:
    """As in the report: the student names its end of document, the teacher its end of turn."""
    folder = project.parent / "student"
    with_template(folder, MESSAGES, eos_token="<|endoftext|>")
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 0}))
    return folder


def test_the_export_says_what_the_run_used(
    student: Path, project: Path, lopd: Lopd, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = project.parent / "teacher"
    ends = set(stop_token_ids(student, load_tokenizer(student)))
    ends |= set(stop_token_ids(teacher, load_tokenizer(teacher)))
    assert len(ends) > 1
    StandIns().install(monkeypatch)
    lopd("run", project).succeeded()
    exported = project.parent / "run/export/model"
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == sorted(ends)
    tokenizer = load_tokenizer(exported)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id in ends
    assert set(stop_token_ids(exported, tokenizer)) == ends
    # Control: the base student's files, which the run has not touched.
    assert load_tokenizer(student).eos_token == "<|endoftext|>"


def test_files_that_are_right_stay_as_they_are(student: Path) -> None:
    teacher = student.parent / "teacher"
    complete_student_files(student, teacher, (1, 2))
    before = {path: path.stat().st_mtime_ns for path in student.iterdir()}
    complete_student_files(student, teacher, (2, 1))
    assert {path: path.stat().st_mtime_ns for path in student.iterdir()} == before


def test_one_end_token_stays_a_number(student: Path) -> None:
    complete_student_files(student, student.parent / "teacher", (END,))
    generation = json.loads((student / "generation_config.json").read_text())
    assert generation["eos_token_id"] == END


def test_a_template_in_the_table_of_the_tokenizer_gives_way(student: Path) -> None:
    """Two templates in one folder would contradict each other."""
    path = student / "tokenizer_config.json"
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table | {"chat_template": "old"}))
    (student / "chat_template.jinja").unlink()
    assert template_text(student) == "old"
    complete_student_files(student, student.parent / "teacher", (END,))
    assert "chat_template" not in json.loads(path.read_text())
    assert template_text(student) == MESSAGES + THINK
    assert load_tokenizer(student).chat_template == MESSAGES + THINK


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("text", "text"),
        ([{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}], "b"),
        (None, ""),
    ],
)
def test_the_text_of_a_template(field: Any, expected: str, student: Path) -> None:
    path = student / "tokenizer_config.json"
    table = json.loads(path.read_text()) | {"chat_template": field}
    path.write_text(json.dumps(table))
    (student / "chat_template.jinja").unlink()
    assert template_text(student) == expected


def _flat(text: str) -> str:
    """The text of a table on the screen, without its lines."""
    return " ".join(text.replace("│", " ").split())


def test_checks_of_one_stage_show_the_template(project: Path) -> None:
    found = dict(checks.check(load_config(project), "rollout"))
    assert "template" in found
    assert not any(isinstance(finding, LopdError) for finding in found.values())
    assert np.all([name in checks.CHECKS for name in found])


# ---- signs of the template that the tokenizer cuts ----


def _forget_as_added(folder: Path, sign: str) -> None:
    """Leave a token in the vocabulary, and let the tokenizer no longer find it in a text."""
    path = folder / "tokenizer.json"
    about = json.loads(path.read_text())
    about["added_tokens"] = [one for one in about["added_tokens"] if one["content"] != sign]
    # Letters that the tiny vocabulary lacks.
    about["model"]["unk_token"] = "<|reserved_0|>"
    path.write_text(json.dumps(about))


@pytest.mark.parametrize("reader", ["light", "transformers"])
def test_a_sign_that_the_tokenizer_cuts_is_warned_of(
    project: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a tokenizer that transformers read from a GGUF file."""
    if reader == "transformers":
        monkeypatch.setattr(light_tokenizer, "_read", lambda folder, stamp: None)
    for role in ("teacher", "student"):
        _forget_as_added(project.parent / role, THINK)
        with_template(project.parent / role, MESSAGES + THINK)
    found = [line for line in map(str, checks.tokenizers(load_config(project))) if "cuts" in line]
    assert len(found) == 2
    assert found[0].startswith("WARNING: the tokenizer of the teacher cuts <think> into pieces, ")
    assert str(project.parent / "student") in found[1]


def test_the_control_signs_that_are_read_as_one(project: Path) -> None:
    """Neither a sign that is a token, nor one that is only text of the template."""
    with_template(project.parent / "student", MESSAGES + THINK + "<tools>")
    assert "cuts" not in "\n".join(map(str, checks.tokenizers(load_config(project))))
