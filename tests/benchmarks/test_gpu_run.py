"""benchmarks/gpu: the runner keeps what a part has found, however the part ends; parts start on a
CPU; the page's table is made of figures of a GPU and of nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import report, run
from benchmarks.gpu.part import last_line
from benchmarks.gpu.sheet import CUT, DONE, FAILED, STARTED, Sheet
from lopd.errors import ArtifactError
from lopd.megatron.weights.architecture import read_architecture
from tests.megatron.gpu_cases import layers_that_fit, write_stage

Patch = pytest.MonkeyPatch
SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu/run.sh"
WRITES = """
import sys
from pathlib import Path
from benchmarks.gpu import sheet as module
module.machine = dict  # torch would cost every part seconds
sheet = module.Sheet(Path(sys.argv[1]), "fake", dry_run=True)
sheet.add("first", {"seconds": 1.5})
"""
ENDINGS = {
    "done": "sheet.done()",
    "fails": "raise RuntimeError('no such kernel')",
    "dies": "import os; os._exit(9)",
    "hangs": "import time; time.sleep(600)",
}


class Fake(run.Part):
    """A part of these lines of Python."""

    def command(self, out: Path, *, dry_run: bool) -> list[str]:
        return [sys.executable, "-c", WRITES + ENDINGS[self.module], str(out)]


def fake(ending: str) -> Fake:
    return Fake(f"1-{ending}", ending, "", 60.0)


def run_fake(part: run.Part, folder: Path) -> tuple[bool, dict[str, Any]]:
    whole = run.run_part(part, folder, folder / "site", time.monotonic() + 100, dry_run=True)
    return whole, json.loads((folder / f"{part.name}.json").read_text())


def test_what_a_part_has_found_is_kept_however_it_ends(tmp_path: Path, monkeypatch: Patch) -> None:
    followed = run.followed

    def cut_when_it_hangs(process: Any, limit_s: float) -> bool:
        file = tmp_path / "1-hangs.json"
        if "hangs" not in process.args[2] and "sleep" not in process.args[2]:
            return followed(process, limit_s)
        while not (file.exists() and json.loads(file.read_text())["figures"]):
            time.sleep(0.01)
        return followed(process, 0.01)

    monkeypatch.setattr(run, "followed", cut_when_it_hangs)
    found = {ending: run_fake(fake(ending), tmp_path) for ending in ENDINGS}
    assert {ending: whole for ending, (whole, _) in found.items()} == {
        "done": True,
        "fails": False,
        "dies": False,
        "hangs": False,
    }
    status = {ending: sheet["status"] for ending, (_, sheet) in found.items()}
    assert status == {"done": DONE, "fails": FAILED, "dies": FAILED, "hangs": CUT}
    for _, sheet in found.values():
        assert sheet["figures"] == {"first": {"seconds": 1.5}}
    assert found["fails"][1]["reason"] == "RuntimeError: no such kernel"
    assert "code 9" in found["dies"][1]["reason"]
    screen = report.table(tmp_path)
    assert screen.count("seconds 1.5") == 4
    assert "no such kernel" in screen


def test_a_part_without_time_is_named_and_not_started(tmp_path: Path) -> None:
    part = fake("done")
    late = time.monotonic() + run.LEAST_S / 2
    assert not run.run_part(part, tmp_path, tmp_path / "site", late, dry_run=True)
    sheet = json.loads((tmp_path / "1-done.json").read_text())
    assert (sheet["status"], sheet["figures"]) == (CUT, {})


def test_a_sheet_is_whole_at_any_time(tmp_path: Path) -> None:
    file = tmp_path / "sheet.json"
    sheet = Sheet(file, "part", dry_run=True)
    assert json.loads(file.read_text())["status"] == STARTED
    sheet.add("a", {"x": 1})
    sheet.lacks("b", "needs a GPU: it is one")
    content = json.loads(file.read_text())
    assert (content["figures"], content["needs"]) == (
        {"a": {"x": 1}},
        {"b": "needs a GPU: it is one"},
    )
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.json"]


def test_the_limits_of_the_parts_fit_into_the_time() -> None:
    """Those that measure what is worth most get their whole limit; the last one what is left."""
    assert sum(part.limit_s for part in run.PARTS[:-2]) < run.MINUTES * 60
    assert [part.name for part in run.PARTS] == sorted(part.name for part in run.PARTS)


def test_last_line() -> None:
    assert last_line("a\nb: c\n\n") == "b: c"
    assert last_line("\n") == ""


# ---- on a CPU ----


@pytest.mark.timeout(240)
def test_a_dry_run_starts_the_kernels(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(SCRIPT), "--dry-run", "--out", str(tmp_path), "--only", "1-kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sheet = json.loads((tmp_path / "1-kernels.json").read_text())
    assert (sheet["status"], sheet["dry_run"]) == (DONE, True)
    figures = sheet["figures"]
    assert figures["blocks"]["error_of_values"] < 1e-5  # computed in float32
    assert figures["blocks"]["error_control"] > 1e-2
    assert figures["dense"]["error_of_values"] > 1e-5  # its logits are rounded to bfloat16
    assert sheet["needs"]["triton"].startswith("needs a GPU")
    assert "dry run on a CPU" in done.stdout


def test_without_a_gpu_the_run_says_what_to_do(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(SCRIPT), "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stdout
    assert "--dry-run" in done.stdout


def test_as_many_layers_as_fit(tmp_path: Path) -> None:
    arch = read_architecture(write_stage(tmp_path, 48))
    free = 150e9
    with_recompute, without = (layers_that_fit(arch, free, way) for way in ("full", "none"))
    assert 0 < without < with_recompute < 48
    assert layers_that_fit(arch, 20e9, "full") <= 0
    assert layers_that_fit(arch, 1e15, "full") == 48


# ---- the page ----


def sheet_of_a_gpu(**changes: Any) -> dict[str, Any]:
    machine = {"gpu": "NVIDIA H100", "gpus": 1, "versions": {"torch": "2.11.0"}}
    return {
        "part": "kernels",
        "dry_run": False,
        "status": DONE,
        "machine": machine,
        "figures": {"dense": {"seconds": 0.25, "bytes": 10}},
        "needs": {"liger": "needs | it"},
        **changes,
    }


def test_the_table_has_every_figure_and_what_is_missing() -> None:
    cut = sheet_of_a_gpu(part="parity", status=CUT, figures={}, needs={}, reason="cut after 9 s")
    other = {"torch": "2.11.0", "sglang": "0.5.17"}
    cut["machine"] = {**cut["machine"], "versions": other}
    text = report.markdown([sheet_of_a_gpu(), cut])
    assert text.splitlines()[0] == "1 x NVIDIA H100; torch 2.11.0, sglang 0.5.17."
    assert "| kernels | dense | seconds 0.25, bytes 10 |" in text
    assert "| kernels | liger | needs / it |" in text
    assert "| parity | cut | cut after 9 s |" in text


@pytest.mark.parametrize(
    ("sheets", "message"),
    [
        ([], "no figures are here"),
        ([sheet_of_a_gpu(dry_run=True)], "those of a dry run on a CPU"),
        ([sheet_of_a_gpu(machine={"gpu": None})], "no part has seen a GPU"),
    ],
)
def test_figures_of_a_cpu_never_reach_the_page(sheets: list[Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        report.markdown(sheets)


def test_the_page_takes_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    folder = tmp_path / "found"
    page.write_text(report.PAGE.read_text())
    folder.mkdir()
    (folder / "1-kernels.json").write_text(json.dumps(sheet_of_a_gpu()))
    report.write_page(folder, page)
    report.write_page(folder, page)  # again: in its own place
    text = page.read_text()
    assert text.count("| kernels | dense |") == 1
    before, _, _ = report.PAGE.read_text().partition(report.BEGIN)
    assert text.startswith(before)
    page.write_text("no marks")
    with pytest.raises(ArtifactError, match="marks"):
        report.write_page(folder, page)
