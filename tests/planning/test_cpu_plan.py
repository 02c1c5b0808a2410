"""A plan of a trial on a CPU says what is known, and estimates neither memory nor hours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stand_ins import Result, command

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = str(ROOT / "examples/tiny_moe.toml")


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    return command(monkeypatch, capsys)


def test_the_example_is_planned_for_a_cpu(here: Callable[..., Result]) -> None:
    shown = here("plan", EXAMPLE).succeeded().out
    assert "not estimated memory and hours (launch.device is cpu)" in shown
    for absurd in ("GPU hours", "tokens/s", "h100", "MFU", "NCCL"):
        assert absurd not in shown.replace("--gpu h100-80gb", ""), absurd
    table = json.loads(here("plan", EXAMPLE, "--json").succeeded().out)
    assert (table["node"], table["fits"]) == ({"device": "cpu"}, None)
    assert not {"gpu_hours", "seconds", "memory", "mfu"} & table.keys()
    # 512 prompts, 64 new tokens, of which 60% are used. A context of 128 leaves room for them all,
    # although the assumed prompt of 200 tokens is longer than that.
    assert table["tokens"]["demonstrate"] == pytest.approx(512 * 0.6 * 64)
    assert table["assumptions"]["prompt_len"] == 64


@pytest.mark.parametrize("named", [("--gpus", "2"), ("launch.device=gpu",)])
def test_who_names_gpus_gets_a_plan_for_them(
    here: Callable[..., Result], named: tuple[str, ...]
) -> None:
    """The control: the same run on GPUs has hours. A rate of almost nothing but starts has none."""
    shown = here("plan", EXAMPLE, *named).succeeded().out
    assert "GPU hours" in shown
    assert "fits " in shown
    (line,) = (line for line in shown.splitlines() if "demonstrate  " in line and "e+" in line)
    assert "starts" in line


@pytest.mark.parametrize("option", ["--suggest", "--cohost"])
def test_what_needs_gpus_says_so(here: Callable[..., Result], option: str) -> None:
    here("plan", EXAMPLE, option).refused(f"lopd plan: {option} with launch.device = cpu", "--gpus")


def test_the_doctor_finds_the_example_at_home_here(
    here: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lopd.machine.facts._gpus", lambda: ((), "none"))
    rows = json.loads(here("doctor", EXAMPLE, "--json").succeeded().out)
    by_name = {row["name"]: row["finding"] for row in rows}
    assert by_name["GPUs"] == "none is needed: launch.device is cpu"
    assert "not estimated" in by_name["memory"]
    # The control: the same run for jobs on GPUs.
    refused = here("doctor", EXAMPLE, "launch.device=gpu", "--json")
    assert refused.code == 2
    wrong = {row["name"] for row in json.loads(refused.out) if row["state"] == "wrong"}
    assert "GPUs" in wrong
