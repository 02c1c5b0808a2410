"""Servers of the user's of another SGLang than those that a former stage had for the same role: one
line says so, and the manifest has both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lopd.artifacts import ArtifactWriter, software_versions
from lopd.stages.context import StageContext
from sglang_rollout.requests.external import PROBE_LEN, check_external, connect
from tests.sglang.fake_server import KEY, LOGPROB, FakeServer
from tests.sglang.test_external import context_of, expected

PROBE = [LOGPROB] * (PROBE_LEN - 1)


@pytest.fixture
def served(student_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("LOPD_SGLANG_KEY", KEY)
    with FakeServer() as fake:
        fake.model_path = str(student_dir)
        fake.version = "0.5.22"
        fake.model_info = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
        fake.server_info = {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enable_deterministic_inference": True,
            "max_req_input_len": 130,
        }
        yield fake


def done(folder: Path, stage: str, role: str, **about: Any) -> None:
    """The artifact of a stage whose servers of this role were such."""
    ArtifactWriter(folder / stage, kind="rollouts", inputs={}).finish(served={role: about})


def record(context: StageContext, role: str, model: Path) -> dict[str, Any]:
    with context.serve(role, model):
        pass
    return dict(context.served[role])


def warnings_in(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]


@pytest.mark.parametrize("former", ["0.5.20", "0.5.22"])
@pytest.mark.parametrize("probe", [PROBE, None], ids=["probe", "no probe"])
def test_another_version_than_the_demonstrations_had_is_said_and_recorded(
    served: FakeServer,
    student_dir: Path,
    other_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    former: str,
    probe: list[float] | None,
) -> None:
    done(tmp_path, "demonstrate", "teacher", version=former, probe=probe)
    served.model_path = "/nowhere/model"
    found = record(
        context_of(tmp_path, student_dir, other_dir, teacher_urls=[served.url]),
        "teacher",
        student_dir,
    )
    assert (found["version"], found["version_on_record"]) == (
        "0.5.22",
        {"stage": "demonstrate", "version": former},
    )
    said = [line for line in warnings_in(capsys) if "run SGLang" in line]
    if former == "0.5.22":
        assert said == []
        return
    [line] = said
    assert (
        "these servers run SGLang 0.5.22, those of demonstrate ran 0.5.20: "
        "log-probabilities and samples may differ"
    ) in line
    assert ("(the probe on record agrees)" if probe else "(no probe is on record)") in line


@pytest.mark.parametrize("another", [True, False])
def test_servers_of_our_own_were_of_the_sglang_that_was_installed(
    served: FakeServer,
    student_dir: Path,
    other_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    another: bool,
) -> None:
    installed = software_versions()["sglang"]
    served.version = "0.9.9" if another else installed
    done(
        tmp_path,
        "demonstrate",
        "teacher",
        servers=[{"arguments": {}, "num_restarts": 0}],
        probe=PROBE,
    )
    found = record(
        context_of(tmp_path, student_dir, other_dir, teacher_urls=[served.url]),
        "teacher",
        student_dir,
    )
    assert found["version_on_record"] == {"stage": "demonstrate", "version": installed}
    lines = warnings_in(capsys)
    assert len(lines) == another
    assert all(
        f"run SGLang 0.9.9, those of demonstrate ran {installed}" in line
        and "the model folder is the same, and the probe" in line
        for line in lines
    )


def test_each_role_is_held_against_its_own(
    served: FakeServer,
    student_dir: Path,
    other_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    context = context_of(tmp_path, student_dir, other_dir, student_urls=[served.url])
    done(tmp_path, "demonstrate", "teacher", version="0.5.18")
    assert record(context, "student", other_dir)["version_on_record"] is None
    assert warnings_in(capsys) == []
    done(tmp_path, "rollout", "student", version="0.5.19")
    assert record(context, "student", other_dir)["version_on_record"] == {
        "stage": "rollout",
        "version": "0.5.19",
    }
    [line] = warnings_in(capsys)
    assert "those of rollout ran 0.5.19" in line
    assert "the weights are put in anew" in line


def test_servers_of_two_versions_are_recorded_as_such(
    served: FakeServer, student_dir: Path
) -> None:
    with FakeServer() as second:
        second.model_path = served.model_path
        second.model_info = served.model_info
        second.server_info = served.server_info
        second.version = "0.5.21"
        found = check_external(
            connect([served.url, second.url], served.engine(dtype="float32").settings, student_dir),
            expected(student_dir),
        )
    assert found["version"] == "0.5.21, 0.5.22"
