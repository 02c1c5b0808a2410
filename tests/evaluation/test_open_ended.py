"""Prompts without answers have reverse KL, lengths and truncation alone; evaluation can be off."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from lopd import pipeline
from lopd.artifacts import read_manifest
from lopd.config import load_config
from lopd.errors import ConfigError
from lopd.launching import make_plan
from lopd.planning.stages import planned_stages
from lopd.records import Response
from lopd.report.console import show_summary
from lopd.report.html.curves import charts_of
from lopd.report.html.learning_curve import learning_charts
from lopd.report.html.source import open_sources
from lopd.stages import held_out
from lopd.stages.order import STAGES as ALL
from lopd.stages.order import is_needed
from lopd.tasks import Verifier, get_task
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest
from tests.checking import wrong
from tests.stand_ins import (
    CONFIG,
    STAGES,
    Engine,
    Lopd,
    StandIns,
    command,
    states,
    write_project,
    write_prompts,
)

OPEN = """[task]
name = "open_ended"
[prompts]
sft = { file = "sft.jsonl" }
opd = { file = "opd.jsonl" }
eval = { file = "eval.jsonl" }
"""
GENERATED = CONFIG[CONFIG.index("[task]") : CONFIG.index("[sglang]")]
OFF = "evaluate.enabled=false"


class CutOff(Engine):
    """Cuts off the answers to the first prompts of a set: ``share`` of them."""

    share = 0.75

    def generate(
        self,
        requests: Iterable[SamplingRequest],
        params: SamplingParams,
        *,
        version: str | None = None,
    ) -> Iterator[Response]:
        answers = super().generate(requests, params, version=version)
        for number, response in enumerate(answers):
            is_cut = number % 8 < 8 * self.share
            yield replace(response, finish_reason="length") if is_cut else response


@pytest.fixture
def lopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lopd:
    return command(monkeypatch, capsys)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns().install(monkeypatch)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """An open-ended project. No row has an answer."""
    for number, (name, count) in enumerate((("sft", 24), ("opd", 24), ("eval", 8))):
        questions = (f"{10 + number}+{10 + index}=?" for index in range(count))
        rows = [{"prompt_id": question, "question": question} for question in questions]
        write_prompts(tmp_path / f"{name}.jsonl", rows)
    return write_project(tmp_path, CONFIG.replace(GENERATED, OPEN))


def summary_of(config: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((config.parent / "run" / "summary.json").read_text())
    return summary


def test_a_run_without_a_verifier_has_no_accuracy_anywhere(
    project: Path, capsys: pytest.CaptureFixture[str], stand_ins: StandIns
) -> None:
    pipeline.run(load_config(project), STAGES[:-1])
    show_summary(summary_of(project))
    shown = capsys.readouterr().out
    summary = summary_of(project)
    extra = read_manifest(project.parent / "run" / "evaluate").extra
    for figures in (summary, extra):
        assert not [name for name in figures if "accuracy" in name]
        assert figures["reverse_kl"]
        assert figures["responses"]["distilled"]["truncated_share"] == 0.0
    assert summary["responses"]["teacher"]["response_len"] == 13
    assert "accuracy" not in (project.parent / "run" / "metrics.jsonl").read_text()
    assert "this task has no verifier" in shown
    assert "cut off, %" in shown
    assert "accuracy" not in shown
    charts = learning_charts(charts_of(open_sources([project.parent / "run"])))
    assert [one["name"] for one in charts if one["levels"]] == ["held_out_reverse_kl"]
    assert "accuracy" not in [one["name"] for one in charts]


def test_the_same_prompts_need_answers_where_they_are_compared(project: Path) -> None:
    assert not wrong(project)
    (finding,) = wrong(project, 'task.name="plain"')
    assert "has no answer to verify a response with" in finding
    assert isinstance(get_task("plain", {}), Verifier)
    assert not isinstance(get_task("open_ended", {}), Verifier)
    with pytest.raises(ConfigError, match="task open_ended has no option judge_truncated"):
        get_task("open_ended", {"judge_truncated": True})


def test_a_sync_reports_what_it_can(project: Path) -> None:
    config = load_config(project)
    engine = cast(Any, CutOff())
    answers = held_out.HeldOutAnswers(config, config.models.student, engine)
    figures = answers.figures("stand-in")
    assert figures == {"num_prompts": 8, "response_len": 13.0, "truncated_share": 0.75}
    assert "13 tokens a response, 75% cut off on 8 prompts" in held_out._told(figures, 4)
    # The control: a verifier's verdicts and their interval.
    verified = config.model_copy(
        update={"task": config.task.model_copy(update={"name": "plain"})},
    )
    write_prompts(
        project.parent / "eval.jsonl",
        [{"prompt_id": f"p{n}", "question": f"1+{n}=?", "answer": "7"} for n in range(8)],
    )
    figures = held_out.HeldOutAnswers(verified, config.models.student, engine).figures("stand-in")
    assert figures["accuracy"] == 0.0
    assert figures["accuracy_interval"] == pytest.approx([0.0, 0.3244], abs=1e-4)
    assert "accuracy 0.000 on 8 prompts" in held_out._told(figures, 4)


def test_a_sync_keeps_the_answers_to_the_same_prompts(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers come in the order of their lengths, and the shortest are no fair choice."""

    class Reversed(CutOff):
        def generate(self, *arguments: Any, **named: Any) -> Any:
            yield from reversed([*super().generate(*arguments, **named)])

    monkeypatch.setattr(held_out, "NUM_SHOWN", 3)
    config = load_config(project)
    write_prompts(
        project.parent / "eval.jsonl",
        [{"prompt_id": f"p{n}", "question": f"1+{n}=?", "answer": "7"} for n in range(8)],
    )
    verified = config.model_copy(
        update={"task": config.task.model_copy(update={"name": "plain"})},
    )
    for engine in (CutOff(), Reversed()):
        answers = held_out.HeldOutAnswers(verified, config.models.student, cast(Any, engine))
        answers.figures("stand-in")
        rows = answers.transcripts
        assert [row["prompt_id"] for row in rows] == ["p0", "p1", "p2"]
        assert [row["messages"][-1]["content"] for row in rows] == ["1+0=?", "1+1=?", "1+2=?"]
        assert {row["right"] for row in rows} == {False}
        assert all(row["reason"] for row in rows)


def test_one_checkpoint_on_open_ended_prompts(
    project: Path, lopd: Lopd, stand_ins: StandIns
) -> None:
    out = project.parent / "out"
    flags = ["--task", "open_ended", "--prompts", project.parent / "eval.jsonl", "--out", out]
    arguments = ["evaluate", "--model", project.parent / "student", *flags, "sglang.dtype=float32"]
    for _ in range(2):
        # The second time the transcripts are read.
        shown = lopd(*arguments).succeeded().out
        assert "no accuracy over 8 problems: open_ended has no verifier" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert summary["response_len"] == 13
    assert not {"mean", "interval", "pass_at", "reasons"} & set(summary)
    (line, *_) = map(json.loads, (out / "problems.jsonl").read_text().splitlines())
    assert not {"num_right", "pass_at", "found"} & set(line)
    (row, *_) = map(json.loads, next((out / "transcripts").glob("shard*")).open())
    assert "right" not in row
    assert row["response_len"] == 13


def test_evaluation_switched_off_is_off_everywhere(
    project: Path, lopd: Lopd, stand_ins: StandIns
) -> None:
    (project.parent / "eval.jsonl").unlink()
    project.write_text(project.read_text().replace('eval = { file = "eval.jsonl" }\n', ""))
    # The control: without the knob the prompts are missed at once.
    lopd("run", project).refused("prompts.eval is missing", "evaluate.enabled = false")
    sync = "distill.sync_every=1"
    assert not wrong(project, OFF, sync)
    assert [outcome.name for outcome in pipeline.run(load_config(project, [OFF]), STAGES[:5])]
    run = project.parent / "run"
    assert not (run / "evaluate").exists()
    wanted = [stage.name for stage in ALL if is_needed(stage, load_config(project, [OFF]))]
    assert wanted == [name for name in STAGES if name != "evaluate"]
    assert "evaluated" not in stand_ins.served
    # Nothing is served beside the training, although the syncs have an interval.
    assert not load_config(project, [OFF, sync]).evaluates_at_syncs
    assert not {"accuracy", "reverse_kl"} & set(summary_of(project))
    assert "evaluate" not in states(lopd, project, OFF)
    lopd("evaluate", project, OFF).refused("evaluate.enabled is false", "evaluate.enabled=true")
    config = load_config(project, [OFF])
    assert "evaluate" not in planned_stages(config)
    jobs = make_plan(config, "local", config_file=project).jobs
    assert [job.stage for job in jobs][-2:] == ["distill", "export"]


def test_a_launch_leaves_out_what_a_given_cache_replaces(project: Path) -> None:
    config = load_config(project, ["distill.cache=elsewhere"])
    jobs = make_plan(config, "local", config_file=project).jobs
    assert [job.stage for job in jobs] == ["demonstrate", "sft", "distill", "evaluate", "export"]


def test_the_baseline_is_off_unless_asked_for(project: Path) -> None:
    text = project.read_text().replace("equal_compute_baseline = true\n", "")
    project.write_text(text)
    assert not load_config(project).evaluate.equal_compute_baseline
    example = Path(__file__).parents[2] / "examples" / "tiny_moe.toml"
    assert load_config(example).evaluate.equal_compute_baseline


@pytest.mark.parametrize(("share", "warns"), [(0.75, True), (0.125, False)])
def test_many_responses_without_an_end_are_told(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    warns: bool,
) -> None:
    monkeypatch.setattr(CutOff, "share", share)
    StandIns(engine=CutOff()).install(monkeypatch)
    # The limit is that of the responses, which have 13 tokens.
    limits = [f"{name}.max_new_tokens=13" for name in ("demonstrate", "rollout")]
    config = load_config(project, limits)
    # All stages but export, which loads a model.
    pipeline.run(config, STAGES[:-1])
    show_summary(summary_of(project))
    shown = capsys.readouterr().out
    run = project.parent / "run"
    rollout = read_manifest(run / "rollout").extra
    assert rollout["truncated_share"] == share
    assert summary_of(project)["truncated_share"]["rollout"] == rollout["truncated_share"]
    log = (run / "rollout" / "log.txt").read_text()
    notes = " ".join(summary_of(project).get("notes", ()))
    for text in (log, notes, shown):
        assert ("raise rollout.max_new_tokens = 13" in text) is warns
    # The answers end below their own limit, so it was the context.
    assert ("evaluate" in notes and "raise sglang.context_length = 128" in notes) is warns
    assert bool(rollout.get("warnings")) is warns


def test_a_stage_says_where_it_goes_on(project: Path, lopd: Lopd, stand_ins: StandIns) -> None:
    stand_ins.engine.fail_after = (18, ConfigError("stopped on purpose", where="here"))
    shown = lopd("demonstrate", project)
    assert shown.code == 2
    assert "continues at" not in shown.out
    stand_ins.engine.fail_after = None
    told = "continues at shard 3 of 3 (2 of them are published)"
    assert told in lopd("demonstrate", project).succeeded().out
    assert told in (project.parent / "run" / "demonstrate" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("override", "stage", "found"),
    [
        (
            "distill.batch_size=25",
            "distill",
            "distill.batch_size = 25 is more than the 24 responses",
        ),
        ("sft.batch_size=25", "sft", "sft.batch_size = 25 is more than the 24 responses"),
    ],
)
def test_a_step_larger_than_all_responses_is_found(
    project: Path, lopd: Lopd, stand_ins: StandIns, override: str, stage: str, found: str
) -> None:
    # The number of prompts is known from the file alone.
    assert any(found in finding for finding in wrong(project, override))
    assert not wrong(project, override.replace("25", "24"))
    lopd("run", project, override).refused(found)
    assert not stand_ins.started
    # Called without the checks, the stage finds it before it starts anything.
    pipeline.run(load_config(project), STAGES[: STAGES.index(stage)])
    trained = len(stand_ins.trained)
    with pytest.raises(Exception, match=found):
        pipeline.run(load_config(project, [override]), (stage,))
    assert len(stand_ins.trained) == trained
