"""What the report warns of, each with a control, and when it says that what ran."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from lopd.artifacts import write_manifest
from lopd.records import Manifest
from lopd.report.html.checks import checks_of
from lopd.report.html.responses import Answers
from lopd.report.html.source import open_sources
from lopd.report.html.timeline import Span, timeline_of
from lopd.report.html.transcripts import Scanned
from lopd.report.metrics import METRICS, MetricsLog
from lopd.tasks.verdicts import Verdict

ROOT = Path(__file__).resolve().parents[2]


def stage(folder: Path, name: str, **changed: Any) -> None:
    fields: dict[str, Any] = {
        "kind": name,
        "schema_version": 1,
        "complete": True,
        "inputs": {},
        "parents": {},
        "models": {},
        "sampling": {},
        "lineage": {},
        "rows": 0,
        "shards": (),
        "versions": {},
        "fingerprint": "f" * 64,
    }
    (folder / name).mkdir(parents=True, exist_ok=True)
    write_manifest(folder / name, Manifest(**{**fields, **changed}))


def found(
    folder: Path,
    steps: Sequence[Mapping[str, float]] = (),
    scans: Sequence[Scanned] = (),
    tokens: Sequence[Mapping[str, Any]] = (),
) -> dict[str, str]:
    """The state of each check, by its title."""
    if not (folder / "distill").exists():
        stage(folder, "distill")
    lines = [
        json.dumps({"kind": "train", "stage": "distill", "step": step, **figures})
        for step, figures in enumerate(steps, start=1)
    ]
    (folder / METRICS).write_text("".join(f"{line}\n" for line in lines))
    checks = checks_of(open_sources([folder])[0], scans, tokens)
    for check in checks:
        # Whoever is warned is told where to read on, and the place is there.
        if check.state == "warning":
            page, _, anchor = check.doc.partition("#")
            text = (ROOT / "docs" / page).read_text()
            headings = [
                line.lstrip("# ").lower().replace("?", "").replace(",", "").replace(" ", "-")
                for line in text.splitlines()
                if line.startswith("#")
            ]
            assert not anchor or anchor in headings, check.doc
    return {check.title: check.state for check in checks}


@pytest.mark.parametrize(
    ("title", "name", "fine", "bad"),
    [
        ("drift from the rollouts", "effective_sample_share", 0.6, 0.4),
        ("clipped share", "clipped_share", 0.01, 0.2),
        ("mean advantage", "advantage", -0.1, -0.6),
        ("advantage of end tokens", "end_token_advantage", 0.1, -2.0),
    ],
)
def test_figures_of_the_last_steps(
    tmp_path: Path, title: str, name: str, fine: float, bad: float
) -> None:
    assert found(tmp_path, [{name: fine}] * 6)[title] == "fine"
    assert found(tmp_path, [{name: bad}] * 6)[title] == "warning"
    # What was bad at the beginning and has become good is no warning.
    assert found(tmp_path, [{name: bad}] * 2 + [{name: fine}] * 4)[title] == "fine"
    # What was not measured is not judged.
    assert title not in found(tmp_path, [{"loss": 1.0}])


@pytest.mark.parametrize(("gap", "state"), [(0.1, "fine"), (0.5, "warning")])
def test_a_gradient_that_the_rollouts_decide(tmp_path: Path, gap: float, state: str) -> None:
    steps = [{"gradient_gap": gap, "advantage_std": 0.4}] * 4
    assert found(tmp_path, steps)["gap of the gradient"] == state


def test_the_worst_step_is_named(tmp_path: Path) -> None:
    """A mean of the last steps can hide it."""
    stage(tmp_path, "distill")
    steps = [0.9, 0.3, 0.9, 0.9, 0.9, 0.9]
    lines = [
        json.dumps(
            {
                "kind": "train",
                "stage": "distill",
                "step": step,
                "effective_sample_share": share,
                "clipped_share": 1 - share,
            }
        )
        for step, share in enumerate(steps, start=1)
    ]
    (tmp_path / METRICS).write_text("".join(f"{line}\n" for line in lines))
    checks = {one.title: one for one in checks_of(open_sources([tmp_path])[0], [], [])}
    drift = checks["drift from the rollouts"]
    assert drift.state == "fine"
    assert drift.text.endswith("The lowest was 0.30, at step 2.")
    assert checks["clipped share"].text.endswith("The highest was 70.00%, at step 2.")


def scanned(model: str, prompt_set: str, lengths: list[int], cut: int) -> Scanned:
    one = Scanned(Answers(prompt_set, model, model, Path(), {}))
    one.lengths = lengths
    one.finish = {"length": cut, "stop": len(lengths) - cut}
    return one


@pytest.mark.parametrize(
    ("length", "cut", "states"),
    [
        (11, 0, ("fine", "fine")),
        (20, 0, ("warning", "fine")),
        (11, 10, ("fine", "warning")),
    ],
)
def test_answers_that_blow_up_or_lose_their_end(
    tmp_path: Path, length: int, cut: int, states: tuple[str, str]
) -> None:
    scans = [
        scanned("sft", "held_out", [10] * 100, 0),
        scanned("distilled", "held_out", [length] * 100, cut),
    ]
    checks = found(tmp_path, scans=scans)
    assert (checks["length of answers"], checks["end token"]) == states


def judged(model: str, right: Sequence[bool]) -> Scanned:
    one = scanned(model, "held_out", [10] * len(right), 0)
    verdicts = {(f"p{index}", 0): Verdict(value) for index, value in enumerate(right)}
    one.answers = replace(one.answers, verdicts=verdicts)
    one.prompts = {f"p{index}": 1 for index in range(len(right))}
    return one


@pytest.mark.parametrize(
    ("before", "after", "state"), [(60, 90, "fine"), (60, 58, "fine"), (60, 30, "warning")]
)
def test_a_training_that_did_harm(tmp_path: Path, before: int, after: int, state: str) -> None:
    scans = [
        judged("sft", [index < before for index in range(100)]),
        judged("distilled", [index < after for index in range(100)]),
    ]
    assert found(tmp_path, scans=scans)["accuracy of the distilled student"] == state
    # Of the baseline of equal compute one also wants to know that it may be as good.
    scans[0].answers = replace(scans[0].answers, model="sft_longer")
    expected = {90: "fine", 58: "note", 30: "warning"}[after]
    assert found(tmp_path, scans=scans)["equal compute"] == expected


@pytest.mark.parametrize(("after", "state"), [(0.01, "fine"), (0.2, "warning")])
def test_a_student_that_left_the_teacher(tmp_path: Path, after: float, state: str) -> None:
    divergence = {"sft": {"mean": 0.1}, "distilled": {"mean": after}}
    stage(tmp_path, "evaluate", extra={"reverse_kl": divergence})
    assert found(tmp_path)["distance to the teacher"] == state


def test_rollouts_that_are_cut_off(tmp_path: Path) -> None:
    title = "ends of the training prompts (rollouts)"
    for cut, state in ((19, "fine"), (21, "warning")):
        scans = [scanned("sft", "rollouts", [10] * 100, cut)]
        assert found(tmp_path, scans=scans)[title] == state


@pytest.mark.parametrize(
    ("lineage", "state"),
    [
        ({"consistent": True, "evidence": "proven"}, "fine"),
        ({"consistent": False, "evidence": "unknown"}, "warning"),
        ({}, None),
    ],
)
def test_a_foreign_teacher(tmp_path: Path, lineage: dict[str, Any], state: str | None) -> None:
    stage(tmp_path, "score", lineage=lineage)
    assert found(tmp_path).get("one teacher") == state


@pytest.mark.parametrize(
    ("far", "over", "knobs", "state"),
    [
        (0.01, 0.002, {}, "warning"),
        # Beyond 3 nats alone, and two tokens of 10,000.
        (0.01, 0.0, {}, "fine"),
        (0.001, 0.0002, {}, "fine"),
        (0.0, 0.0, {}, "fine"),
        # Losses that end the push.
        (0.01, 0.002, {"loss": "top_k_reverse_kl"}, "fine"),
        (0.01, 0.002, {"importance_cap": 1.0}, "fine"),
        (0.01, 0.002, {"loss": "lightning", "importance_cap": None}, "warning"),
    ],
)
def test_a_sharp_teacher(
    tmp_path: Path, far: float, over: float, knobs: dict[str, Any], state: str
) -> None:
    panel = {"set": "rollouts", "overall": {"tokens": 10_000, "over_far": far, "over_clip": over}}
    given = {f"distill.objective.{name}": value for name, value in knobs.items()}
    stage(tmp_path, "distill")
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert found(tmp_path, tokens=[panel])["sharp teacher"] == state


def test_an_evaluation_of_an_earlier_student_is_a_warning(tmp_path: Path) -> None:
    for parent, state in (("f" * 64, None), ("e" * 64, "warning")):
        stage(tmp_path, "evaluate", parents={"distill": parent})
        assert found(tmp_path).get("outdated evaluate") == state


def test_servers_that_died_and_warnings_of_stages(tmp_path: Path) -> None:
    for restarts, state in ((0, "fine"), (2, "warning")):
        served = {"student": {"servers": [{"num_restarts": restarts}]}}
        stage(tmp_path, "rollout", extra={"served": served})
        assert found(tmp_path)["servers"] == state
    stage(tmp_path, "distill", extra={"warnings": ["the reverse KL rose"]})
    assert found(tmp_path)["warning of distill"] == "warning"


def at(text: str) -> float:
    return datetime.fromisoformat(f"2026-01-02T{text}+00:00").timestamp()


def test_the_times_of_a_run_that_was_killed_and_continued(tmp_path: Path) -> None:
    stage(tmp_path, "rollout")
    (tmp_path / "rollout/log.txt").write_text(
        "2026-01-02T10:00:00Z rollout: The SFT student answers.\n"
        "2026-01-02T10:00:01Z rollout: starting SGLang\n"
        "2026-01-02T12:00:00Z rollout: The SFT student answers.\n"
        "2026-01-02T12:00:01Z rollout: starting SGLang\n"
        "2026-01-02T12:01:00Z rollout: done in 60.0 s\n"
    )
    # In the local time of a machine that is five and a half hours ahead.
    (tmp_path / "rollout/sglang-student.log").write_text(
        "--- starting the student server on port 1, 2026-01-02 17:30:01\n"
        "[2026-01-02 17:30:21] The server is fired up and ready to roll!\n"
    )
    spans = timeline_of(open_sources([tmp_path])[0])
    start = "start of the student's server"
    assert spans == [
        Span("rollout", "stage", "rollout (not finished)", at("10:00:00"), at("10:00:01")),
        Span("rollout", "stage", "rollout", at("12:00:00"), at("12:01:00")),
        Span("rollout", "server start", start, at("12:00:01"), at("12:00:21")),
    ]


def test_the_times_of_steps_and_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage(tmp_path, "distill")
    (tmp_path / "distill/log.txt").write_text(
        "2026-01-02T10:00:00Z distill: The update.\n2026-01-02T10:02:00Z distill: done in 120.0 s\n"
    )
    clock = at("10:00:00")
    monkeypatch.setattr("time.time", lambda: clock)
    log = MetricsLog(tmp_path)
    # Steps of 10 s; a sync of 20 s after the first, and a pause of 5 s after the second.
    for moment, kind, step in ((20, "train", 1), (40, "eval", 1), (50, "train", 2)):
        clock = at("10:00:00") + moment
        (log.train if kind == "train" else log.eval)("distill", step, {"seconds": 10.0})
    clock = at("10:00:00") + 65
    log.train("distill", 3, {"seconds": 10.0})
    log.close()
    spans = [span for span in timeline_of(open_sources([tmp_path])[0]) if span.kind != "stage"]
    began = at("10:00:00")
    shown = [(span.kind, round(span.start - began), round(span.end - began)) for span in spans]
    assert shown == [
        ("step", 10, 20),
        ("sync", 20, 40),
        ("step", 40, 50),
        ("between steps", 50, 55),
        ("step", 55, 65),
    ]
    assert datetime.fromtimestamp(spans[0].start, UTC).minute == 0
