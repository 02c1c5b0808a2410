"""The study: what is made again and what is not, what is measured, and what a model has cost."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from examples.study import arms, collect, make, measure
from examples.study.arms import HABIT, Arm, Claim, Verdict
from examples.study.claims import arms_of, load_claims
from examples.study.small import needed, small_arm
from lopd.artifacts import identify_model, read_complete, remove_folder
from lopd.config import load_config
from tests.stand_ins import StandIns


def test_every_arm_of_every_claim_has_commands_that_the_configuration_accepts() -> None:
    for arm in arms_of(load_claims()).values():
        if arm.name.startswith("small/"):
            continue
        for command in arm.commands(arm.place(3)):
            full = make.full_command(arm, command, 3)
            if command[0] == "python":
                assert (make.HERE / f"{command[1]}.py").exists(), command
                continue
            config = load_config(Path(full[2]), full[3:])
            assert not config.evaluate.enabled
            assert config.run.dir.is_relative_to(arms.RUNS)
    # The control: a key that does not exist is refused.
    wrong = arms.distilled("wrong", "wrong", "distill.absent=1")
    full = make.full_command(wrong, wrong.commands(wrong.place(3))[0], 3)
    with pytest.raises(Exception, match="absent"):
        load_config(Path(full[2]), full[3:])


def test_arms_come_after_those_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.study.claims.load_claims", lambda *_: [])
    own = Arm("own", "own", arms.SMALL, lambda _: (), (("small/main", "score"),), ("later",))
    later = dataclasses.replace(own, name="later", copied=(), after=())
    claim = Claim(1, "", "", "", (own, later), judge=lambda _: Verdict("open", ""))
    names = [*arms_of([claim])]
    assert names == ["small/sft", "small/distilled", "small/main", "later", "own"]
    assert needed(names) == ["sft", "distilled"]
    with pytest.raises(ValueError, match="nobody defines"):
        arms_of([dataclasses.replace(claim, arms=(own,))])
    twice = dataclasses.replace(claim, number=2, arms=(dataclasses.replace(own),))
    with pytest.raises(ValueError, match="two arms"):
        arms_of([claim, twice])


def test_the_small_students_models_lie_where_its_own_command_makes_them() -> None:
    place = arms.HABIT_SFT.place(3)
    assert place.run == arms.RUNS / "seed-3" / "habit_sft"
    assert place.of("small/distilled") == place.of("small/main") == place.of("small/sft")
    assert place.of("small/lightning") == arms.SMALL_RUNS / "seed-3" / "lightning"
    assert small_arm("small/sft").model == "sft/model"
    assert small_arm("small/lightning").copied[0] == ("small/main", "demonstrate")
    with pytest.raises(KeyError):
        small_arm("small/absent")


class Recorder:
    """Stands for run_measured(): it notes commands and makes what the next ones need."""

    def __init__(self) -> None:
        self.verbs: list[str] = []
        self.fails = ""

    def __call__(self, command: Sequence[Any], log: Path, **_: Any) -> float:
        verb = command[1]
        run = Path(command[3].partition("=")[2])
        (run / verb).mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text("{}")
        self.verbs.append(verb)
        if verb == self.fails:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("error: the key is wrong\n")
            raise subprocess.CalledProcessError(2, command)
        return 1.5


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    for module in (arms, make):
        monkeypatch.setattr(module, "RUNS", tmp_path)
    monkeypatch.setattr(make, "run_measured", recorder)
    return recorder


FIRST = Arm("first", "", HABIT, lambda _: (("lopd", "demonstrate"), ("lopd", "sft")))
SECOND = Arm("second", "", HABIT, lambda _: (("lopd", "distill"),), (("first", "sft"),))
BOTH = {"first": FIRST, "second": SECOND}


def made(known: Mapping[str, Arm], name: str) -> None:
    make.make_arm(known[name], 2, make.Identities(known).of(name, 2))


def test_what_is_finished_is_not_made_again_and_what_was_changed_is(recorder: Recorder) -> None:
    made(BOTH, "first")
    made(BOTH, "second")
    assert recorder.verbs == ["demonstrate", "sft", "distill"]
    found = sorted(path.name for path in SECOND.place(2).run.iterdir())
    assert found == ["config.json", "distill", "sft"], "it began with a copy of what it shares"
    assert all(job.is_made for job in make.jobs_of(BOTH, [2]))
    made(BOTH, "second")
    assert len(recorder.verbs) == 3
    # Another command of the first arm: the second one began with something else than that.
    changed = {
        **BOTH,
        "first": dataclasses.replace(
            FIRST, commands=lambda _: (("lopd", "demonstrate", "run.seed=9"), ("lopd", "sft"))
        ),
    }
    assert not any(job.is_made for job in make.jobs_of(changed, [2]))
    (SECOND.place(2).run / "stale").mkdir()
    made(changed, "first")
    made(changed, "second")
    assert recorder.verbs[3:] == ["demonstrate", "sft", "distill"]
    assert not (SECOND.place(2).run / "stale").exists()


def test_a_killed_command_goes_on_in_its_own_run(recorder: Recorder) -> None:
    made(BOTH, "first")
    recorder.fails = "distill"
    with pytest.raises(subprocess.CalledProcessError):
        made(BOTH, "second")
    (SECOND.place(2).run / "distill" / "checkpoint").mkdir()
    recorder.fails = ""
    made(BOTH, "second")
    assert (SECOND.place(2).run / "distill" / "checkpoint").exists()
    marks = make.marks_of(SECOND, 2)
    assert [mark.verb for mark in marks] == ["", "distill"]
    assert marks[1].processor_seconds == 1.5
    assert marks[1].is_resumed, "its seconds are those of the last attempt"
    assert not any(mark.is_resumed for mark in make.marks_of(FIRST, 2))


def test_a_failed_arm_is_named_with_its_log_and_the_others_go_on(
    recorder: Recorder, capfd: pytest.CaptureFixture[str]
) -> None:
    recorder.fails = "distill"
    other = dataclasses.replace(FIRST, name="other", commands=lambda _: (("lopd", "score"),))
    third = dataclasses.replace(FIRST, name="third", after=("second",))
    known = {**BOTH, "other": other, "third": third}
    failures = make.run_jobs(make.jobs_of(known, [2]), workers=2)
    assert len(failures) == 2
    assert "seed-2/second: FAILED: error: the key is wrong" in failures[0]
    assert str(make.log_of("second", 2)) in failures[0]
    assert failures[1] == "seed-2/third: not begun, because seed-2/second failed"
    assert make.is_made(other, 2, make.Identities(known).of("other", 2))
    assert "seed-2/other: done in 0 s" in capfd.readouterr().out
    # The same call goes on with what is missing.
    assert len(make.run_jobs(make.jobs_of(BOTH, [2]), workers=1)) == 1


def test_the_sft_student_is_the_one_that_the_model_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "RUNS", tmp_path)
    run = tmp_path / "seed-2" / "longer"
    run.mkdir(parents=True)
    config = run / "config.json"
    # Distilled.
    assert measure.sft_of(run / "distill/model", run) == run / "sft/model"
    # SFT that has gone on, and SFT of the base student.
    began = tmp_path / "seed-2" / "habit_sft" / "sft" / "model"
    config.write_text(json.dumps({"models.student": str(began)}))
    assert measure.sft_of(run / "sft/model", run) == began
    for base in (arms.MODELS / "student", tmp_path / "models" / "base" / "sft" / "model"):
        config.write_text(json.dumps({"models.student": str(base)}))
        assert measure.sft_of(run / "sft/model", run) == run / "sft/model"


def test_figures_of_other_models_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "MEASURED", tmp_path)
    config = load_config(HABIT.config, HABIT.overrides(2))
    student = arms.MODELS / "student"
    subject = measure.Subject("seed-2/a", student, student, config)
    measure._begin(subject)
    assert subject.identity["model"] == identify_model(student).weights
    (subject.folder / "greedy").mkdir()
    subject.result.write_text(json.dumps({"made_from": subject.identity}))
    assert subject.is_measured()
    measure._begin(subject)
    assert (subject.folder / "greedy").exists()
    # Another SFT student: its answers were scored by the wrong model.
    other = measure.Subject("seed-2/a", student, arms.MODELS / "teacher", config)
    assert not other.is_measured()
    measure._begin(other)
    assert not (other.folder / "greedy").exists()
    assert not other.result.exists()


def test_one_server_for_each_architecture_and_the_teachers_own_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "MEASURED", tmp_path)
    stand_ins = StandIns().install(monkeypatch)
    few = "prompts.eval={num_prompts=8,seed=3}"

    def subject(name: str, model: str, sft: str, setting: arms.Setting) -> measure.Subject:
        config = load_config(setting.config, [*setting.overrides(2), few])
        return measure.Subject(f"seed-2/{name}", arms.MODELS / model, arms.MODELS / sft, config)

    subjects = [
        subject("sft", "student", "student", HABIT),
        subject("distilled", "teacher", "student", HABIT),
        subject("small", "small_student", "small_student", arms.SMALL),
        subject("by_other", "student", "teacher", HABIT),
    ]
    measure.measure(subjects)
    assert len(stand_ins.served) == 2, "one for the small student, one for all others"
    results = [json.loads(one.result.read_text()) for one in subjects]
    # The stand-in samples every token with -0.5 and scores it with -0.4.
    assert [round(one["kl_from_sft"], 6) for one in results] == [0, -0.1, 0, -0.1]
    # The second model is the teacher itself.
    assert [round(one["reverse_kl"], 6) for one in results] == [-0.1, 0, -0.1, -0.1]
    assert all(one["tokens"] == 13 and one["num_prompts"] == 8 for one in results)
    first = read_complete(subjects[0].folder / "sampled")
    other = read_complete(subjects[3].folder / "sampled")
    assert first.shards[0].sha256 != other.shards[0].sha256, "each model has draws of its own"
    measure.measure(subjects)
    assert len(stand_ins.served) == 2, "what is measured is not measured again"
    # After a kill before the last scores only these are made.
    subjects[3].result.unlink()
    remove_folder(subjects[3].folder / "by_teacher")
    answered = stand_ins.engine.answered
    measure.measure(subjects)
    assert stand_ins.engine.answered == answered + 8


def test_costs_count_each_command_once_and_none_that_came_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resumed: set[str] = set()
    seconds = {"demonstrate": 10.0, "sft": 20.0, "rollout": 5.0, "score": 7.0, "distill": 40.0}

    def marks(arm: Arm, seed: int) -> list[make.Mark]:
        verbs = [command[1] for command in arm.commands(arm.place(seed))]
        begun = make.Mark("", "", 0.0, 0.0)
        return [
            begun,
            *(make.Mark(verb, "", seconds[verb], 1.0, verb in resumed) for verb in verbs),
        ]

    tokens = {"demonstrate": 100.0, "score": 300.0, "scores": 50.0}
    monkeypatch.setattr(collect, "marks_of", marks)
    monkeypatch.setattr(collect, "_tokens", lambda artifact: tokens[artifact.name])
    monkeypatch.setattr(collect, "_refreshes", lambda run: [run / "scores"] * 2)
    gone_on = Arm(
        "gone_on", "", HABIT, lambda _: (("lopd", "sft"),), after=("habit_sft",), model="sft/model"
    )
    known = {arm.name: arm for arm in (arms.HABIT_SFT, arms.HABIT_LIGHTNING, gone_on)}
    found = {name: collect.costs_of(known, arm, 2) for name, arm in known.items()}
    assert found["habit_sft"]["processor_seconds"] == 30, "no rollouts, no scores"
    assert found["habit_sft"]["scored"] == 0
    assert found["habit_sft"]["cache_processor_seconds"] == 0
    assert found["habit_lightning"]["cache_processor_seconds"] == 12, "rollouts and scores"
    assert found["habit_lightning"]["processor_seconds"] == 82
    assert found["habit_lightning"]["decoded"] == 100
    assert found["habit_lightning"]["scored"] == 400, "of the cache and of two refreshes"
    assert found["gone_on"]["processor_seconds"] == 50
    assert found["gone_on"]["decoded"] == 100
    # Seconds of a command that was killed in between are not known, and its tokens are.
    resumed.add("distill")
    again = collect.costs_of(known, arms.HABIT_LIGHTNING, 2)
    seconds_of = {"processor_seconds", "wall_seconds"}
    unknown = seconds_of | {f"cache_{name}" for name in seconds_of}
    assert again.keys() == found["habit_lightning"].keys() - unknown
    assert "wall_seconds" in collect.costs_of(known, arms.HABIT_SFT, 2)
