"""A distill that was made again without a new evaluation: nothing may pass the old figures off.

Each test has the same run before that as its control.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lopd.artifacts import published_weights, read_manifest, write_manifest
from lopd.config import load_config
from lopd.report.console import show_summary
from lopd.report.html.chart_picture import short_name
from lopd.report.html.outdated import outdated_stages
from lopd.report.html.page import gather
from lopd.report.html.source import open_sources
from lopd.summary import write as write_summary
from tests.report.made_run import make_run
from tests.stand_ins import command

# The rules that read the evaluation.
RULES = {
    "accuracy of the distilled student",
    "equal compute",
    "distance to the teacher",
    "length of answers",
    "end token",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("current"))


@pytest.fixture(scope="module")
def again(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run as ``lopd distill`` with another knob leaves it."""
    copy = tmp_path_factory.mktemp("again") / "run_b"
    shutil.copytree(run, copy)
    former = copy / "superseded/distill-0123"
    shutil.copytree(run / "distill", former)
    manifest = read_manifest(copy / "distill")
    # Other weights: the checksums of the manifest are what names them.
    shards = tuple(replace(one, sha256="a" * 64) for one in manifest.shards)
    write_manifest(copy / "distill", replace(manifest, fingerprint="b" * 64, shards=shards))
    return copy


@pytest.fixture(scope="module")
def data(run: Path, again: Path) -> dict[str, Any]:
    return gather(open_sources([run, again]))


def weights(folder: Path) -> str:
    return published_weights(folder, read_manifest(folder).shards)[:12]


def checks(of_run: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {check["title"]: check for check in of_run["checks"]}


def test_an_outdated_evaluation_is_not_compared(
    run: Path, again: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    former = weights(again / "superseded/distill-0123")
    present = weights(again / "distill")
    assert former != present
    assert [one["text"] for one in data["comparisons"]] == [
        "It cannot be said which run is better: the evaluation of run_b is of an earlier distilled "
        f"student (weights {former}), not of the present one ({present}). "
        "Run `lopd run CONFIG` again."
    ]
    # As the first run too, and where it cannot be known which weights the earlier one had.
    shutil.copytree(again, tmp_path / "b")
    shutil.rmtree(tmp_path / "b/superseded")
    shutil.rmtree(tmp_path / "b/export")
    (text,) = [one["text"] for one in gather(open_sources([tmp_path / "b", run]))["comparisons"]]
    assert f"(fingerprint {read_manifest(run / 'distill').fingerprint[:12]})" in text
    # The control: a copy with the same distill is compared.
    shutil.copytree(run, tmp_path / "same")
    (text,) = [one["text"] for one in gather(open_sources([run, tmp_path / "same"]))["comparisons"]]
    assert "cannot be said" not in text
    assert "prompts" in text


def test_the_export_knows_the_weights_of_the_earlier_student(again: Path, tmp_path: Path) -> None:
    shutil.copytree(again, tmp_path / "b")
    shutil.rmtree(tmp_path / "b/superseded")
    (source,) = open_sources([tmp_path / "b"])
    assert outdated_stages(source)["evaluate"].earlier == f"weights {weights(again / 'export')}"


def test_the_first_screen_says_whose_figures_they_are(data: dict[str, Any]) -> None:
    current, outdated = (one["overview"] for one in data["runs"])
    assert outdated["headline"].startswith("The evaluation is of an earlier distilled student (")
    assert "The earlier distilled student is right on 50.0%" in outdated["headline"]
    assert all(one.startswith("Of the earlier student: ") for one in outdated["further"])
    assert any("SFT of equal compute" in one for one in outdated["further"])
    titles = {row["name"]: row["title"] for row in outdated["models"]}
    assert titles["distilled"] == "earlier distilled student"
    assert titles["sft_longer"] == "SFT of equal compute (of the earlier student)"
    # The SFT student and the teacher are the same as before.
    assert (titles["sft"], titles["teacher"]) == ("SFT student", "teacher")
    assert outdated["outdated"].startswith("an earlier distilled student (weights ")
    assert current["headline"].startswith("The distilled student is right on 50.0%")
    assert current["outdated"] == ""
    assert "earlier" not in json.dumps(current["models"])


def test_rules_of_outdated_figures_have_not_found_nothing(data: dict[str, Any]) -> None:
    current, outdated = (checks(one) for one in data["runs"])
    fine = {title for title, check in current.items() if check["state"] == "fine"}
    assert len(fine & RULES) >= 2
    assert not {title for title, check in outdated.items() if check["state"] == "fine"} & RULES
    warning = outdated["outdated evaluate and export"]
    assert warning["state"] == "warning"
    begin, _, end = warning["text"].partition(" Not judged, because the figures are outdated: ")
    assert begin.startswith("evaluate and export were made from an earlier distill (weights ")
    assert begin.endswith(
        "): do not compare their figures, and do not use the exported model, until `lopd run "
        "CONFIG` has made them again."
    )
    assert {one for one in RULES if one in end} == fine & RULES
    # What they have found is still said.
    for title in RULES - fine:
        assert outdated[title]["text"].startswith("(From outdated figures.) "), title
    # Rules of the training read the present distill.
    assert not any(title.startswith("outdated") for title in current)


def test_other_places_are_marked_too(data: dict[str, Any]) -> None:
    current, outdated = data["runs"]
    states = [
        {row["name"]: row["state"] for row in one["overview"]["stages"]} for one in data["runs"]
    ]
    assert set(states[0].values()) == {"done"}
    assert {name for name, state in states[1].items() if state == "outdated"} == {
        "evaluate",
        "export",
    }
    for one, mark in ((current, ""), (outdated, " (outdated)")):
        held_out = next(of for of in one["sets"] if of["name"] == "held_out")
        assert held_out["title"] == f"held-out prompts{mark}"
        assert bool(held_out["outdated"]) == bool(mark)
        assert {panel["set_title"] for panel in one["tokens"] if panel["set"] == "held_out"} == {
            f"held-out prompts{mark}"
        }
        rollouts = next(of for of in one["sets"] if of["name"] == "rollouts")
        assert rollouts["title"] == "training prompts (rollouts)"
        titles = [model["title"] for model in held_out["models"]]
        assert ("earlier distilled student" in titles) == bool(mark)
    levels = [level for chart in data["charts"] for level in chart["levels"]]
    assert levels
    for level in levels:
        is_earlier = level["source"] == 1 and level["model"] in ("distilled", "sft_longer")
        assert ("earlier" in level["title"]) == is_earlier
        # In the pictures too, which have short names.
        assert short_name(level).startswith("earlier: ") == is_earlier


def test_what_is_made_from_an_outdated_stage_is_outdated(run: Path, tmp_path: Path) -> None:
    """The SFT student was made again: nothing after it is of the present one."""
    shutil.copytree(run, tmp_path / "run")
    manifest = read_manifest(tmp_path / "run/sft")
    write_manifest(tmp_path / "run/sft", replace(manifest, fingerprint="c" * 64))
    data = gather(open_sources([tmp_path / "run"]))
    states = {row["name"]: row["state"] for row in data["runs"][0]["overview"]["stages"]}
    later = {"rollout", "score", "distill", "evaluate", "export"}
    assert {name for name, state in states.items() if state == "outdated"} == later
    (warning,) = [one for title, one in checks(data["runs"][0]).items() if "outdated" in title]
    assert warning["text"].startswith("rollout, score, distill, evaluate and export were made from")
    titles = [
        one["models"][0]["title"] for one in data["runs"][0]["sets"] if one["name"] == "rollouts"
    ]
    assert titles == ["earlier SFT student"]
    # The distilled student itself is what it was made as; while it is made again, it is not there.
    shutil.copytree(run, tmp_path / "other")
    (tmp_path / "other/superseded").mkdir()
    (tmp_path / "other/distill").rename(tmp_path / "other/superseded/distill-9")
    wrong = outdated_stages(open_sources([tmp_path / "other"])[0])
    assert wrong["evaluate"].present == "not finished"
    # The control: somebody has removed the distilled student, and nothing is newer.
    shutil.rmtree(tmp_path / "other/superseded")
    shutil.rmtree(tmp_path / "other/export")
    assert outdated_stages(open_sources([tmp_path / "other"])[0]) == {}


def test_show_marks_the_answers(
    run: Path, again: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lopd = command(monkeypatch, capsys)
    present = lopd("show", run, "--worst", "1").succeeded().out
    marked = lopd("show", again, "--worst", "1").succeeded().out
    (line,) = [one for one in marked.splitlines() if one.startswith("outdated: ")]
    wrong = outdated_stages(open_sources([again])[0])["evaluate"]
    assert line == f"outdated: evaluate is of {wrong.told}. Run `lopd run CONFIG` again."
    assert "earlier distilled student" in marked.replace(line, "")
    # The control: the run as it was, and the models that were not made again.
    assert "earlier" not in present
    assert "earlier SFT student" not in marked
    for folder, expected in ((run, set()), (again, {"distilled"})):
        (one,) = json.loads(lopd("show", folder, "--worst", "1", "--json").succeeded().out)
        assert {row["model"] for row in one["responses"] if row["is_earlier"]} == expected
        titles = {row["model"]: row["title"] for row in one["responses"]}
        assert titles["distilled"].startswith("earlier") == bool(expected)
        assert titles["sft"] == "SFT student"


def test_the_summary_of_a_command_says_it(
    run: Path, again: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(run.parent / "config.toml")
    for folder, num_notes in ((run, 0), (again, 1)):
        copy = tmp_path / folder.parent.name / folder.name
        shutil.copytree(folder, copy)
        section = config.run.model_copy(update={"dir": copy})
        # As after a command that has made the student: nothing later is done.
        own = config.model_copy(update={"run": section})
        found = write_summary(own, [], ["demonstrate", "rollout", "score", "distill"])
        notes = [note for note in found.get("notes", ()) if "outdated" in note]
        assert len(notes) == num_notes
        capsys.readouterr()
        show_summary(found)
        shown = capsys.readouterr().out
        assert ("WARNING: outdated: evaluate and export were made from an" in shown) == (
            num_notes == 1
        )
