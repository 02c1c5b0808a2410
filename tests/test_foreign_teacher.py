"""A stage run alone with another teacher than everything before it was made with says so, rather
than that earlier stages are out of date.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stand_ins import Lopd, StandIns, command, contents, write_project


@pytest.fixture
def lopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lopd:
    return command(monkeypatch, capsys)


def test_scoring_alone_with_another_teacher_names_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lopd: Lopd
) -> None:
    started = StandIns().install(monkeypatch)
    config = write_project(tmp_path)
    for stage in ("demonstrate", "sft", "rollout", "score"):
        lopd(stage, config).succeeded()
    before = contents(tmp_path / "run")
    served = list(started.served)
    another = f"models.teacher={tmp_path / 'student'}"
    lopd("score", config, another).refused(
        "is not the teacher that made the artifact of demonstrate, from which rollout was made",
        f"limit: exactly {tmp_path / 'teacher'}",
    )
    lopd("score", config, "demonstrate.temperature=0.5").refused(
        "score needs rollout, which was made with other settings (parent sft)"
    )
    lopd("score", config, another, "demonstrate.temperature=0.5").refused(
        "made with other settings"
    )
    assert started.served == served, "nothing was started"
    assert {name: sha for name, sha in contents(tmp_path / "run").items() if "log" not in name} == {
        n: s for n, s in before.items() if "log" not in n
    }
