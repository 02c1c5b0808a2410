"""The recipes: their settings are the paper's, their plans fit, their scripts are sound and say
what a machine lacks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lopd.config import Config, load_config, result_keys
from lopd.planning import Assumptions, Plan, make_plan, node_of
from lopd.planning.models import planned_models
from lopd.planning.plan_json import as_json
from tests.planning import filled_hub

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PAPER = ("qwen3_4b", "qwen3_8b", "qwen3_30b_a3b")
ALL = (*PAPER, "qwen3_30b_a3b_cross_teacher", "qwen3_0_6b_one_gpu")


def recipe(name: str) -> Config:
    return load_config(EXAMPLES / f"run_{name}.toml")


def planned(name: str, gpu: str, gpus: int) -> Plan:
    config = recipe(name)
    return make_plan(
        config, planned_models(config, {}), node_of(gpu, gpus), Assumptions(), build=False
    )


@pytest.mark.parametrize("name", ALL)
def test_it_fits_what_it_was_written_for(name: str) -> None:
    one = name.endswith("one_gpu")
    plan = planned(name, "rtx4090-24gb" if one else "h100-80gb", 1 if one else 8)
    assert plan.fits, plan.problems
    assert not plan.tight
    if not one:
        assert not planned(name, "a100-40gb", 8).fits, "half of the memory would do"


@pytest.mark.parametrize("name", [*PAPER, "qwen3_30b_a3b_cross_teacher"])
def test_the_papers_settings(name: str) -> None:
    config = recipe(name)
    rollout = config.rollout
    distill = config.distill
    sft = config.sft
    assert (
        rollout.temperature,
        rollout.top_p,
        rollout.samples_per_prompt,
        rollout.max_new_tokens,
    ) == (0.8, 1.0, 1, 4096)
    assert (distill.num_steps, distill.batch_size, distill.advantage_clip) == (150, 256, 10.0)
    optimizer = distill.optimizer
    assert (optimizer.lr, optimizer.schedule, optimizer.beta1, optimizer.beta2) == (
        2e-6,
        "constant",
        0.9,
        0.98,
    )
    assert (optimizer.weight_decay, optimizer.clip_grad) == (0.1, 1.0)
    assert (sft.num_steps, sft.optimizer.lr, sft.optimizer.schedule, sft.optimizer.warmup) == (
        3000,
        8e-5,
        "cosine",
        0.1,
    )
    assert (config.evaluate.temperature, config.evaluate.top_p) == (0.6, 0.95)
    assert config.prompts.sft.num_prompts == 300_000
    moe = "30b" in name
    assert distill.max_tokens_per_microbatch == (12288 if moe else 16384)
    assert (distill.parallel.tensor, distill.parallel.expert) == (
        (4, 8) if moe else (2 if "4b" in name else 4, 1)
    )
    assert distill.recompute == sft.recompute == "none", (
        "of 30B-A3B not the paper's: by the plan there is room (docs/recipes.md)"
    )
    assert bool(distill.megatron.get("optimizer_cpu_offload")) is moe


def test_how_it_samples_decides_a_result_and_how_fast_it_updates_does_not() -> None:
    """A stage that was made with deterministic sampling is not reused without it, and the other
    way.
    """
    decides = result_keys(recipe("qwen3_30b_a3b"), ("sglang", "sft", "sync", "launch"))
    assert decides["sglang.deterministic"] is False
    for name in (
        "sft.threads_per_rank",
        "sglang.max_running_requests",
        "sync.colocate",
        "launch.device",
    ):
        assert name not in decides


def test_the_cross_teacher_recipe_differs_in_its_teacher_alone() -> None:
    same, cross = (
        recipe(name).model_dump(mode="json")
        for name in ("qwen3_30b_a3b", "qwen3_30b_a3b_cross_teacher")
    )

    def flat(table: Any, prefix: str = "") -> dict[str, Any]:
        return {
            path: value
            for key, inner in table.items()
            for path, value in (
                flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {prefix + key: inner}
            ).items()
        }

    theirs = flat(same)
    ours = flat(cross)
    assert {key for key in theirs | ours if theirs.get(key) != ours.get(key)} == {
        "run.dir",
        "models.teacher",
        "score.allow_foreign_teacher",
        "sft.demonstrations",
    }


def test_scripts_are_sound() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        [shellcheck, "-x", "-P", "SCRIPTDIR", *sorted(EXAMPLES.glob("*.sh"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for name in ALL:
        assert (EXAMPLES / f"run_{name}.sh").stat().st_mode & 0o100, "executable"


def run_script(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "LOPD_HUB": str(folder / "hub"),
        "LOPD_RUNS": str(folder / "runs"),
        "COLUMNS": "400",
    }
    return subprocess.run(
        ["bash", str(EXAMPLES / f"run_{name}.sh"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=500,
    )


def test_a_recipe_says_all_that_is_missing_and_goes_no_further(tmp_path: Path) -> None:
    done = run_script("qwen3_30b_a3b", tmp_path)
    assert done.returncode == 2
    for expected in (
        "wrong GPUs",
        "wrong memory",
        "wrong driver",
        "models.teacher",
        "models.student",
        "prompts.sft.file",
        "aime_2024",
        "hmmt_feb_2025",
    ):
        assert expected in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "hub").exists(), "nothing was fetched"
    assert not (tmp_path / "runs/qwen3_30b_a3b").exists(), "nothing was started"


def test_a_recipes_prompts_are_kept_clear_of_the_benchmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOPD_HUB", str(tmp_path / "hub"))
    filled_hub.fill()
    done = run_script("qwen3_8b", tmp_path, "--only", "fetch,prompts")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        json.loads(line)
        for line in (tmp_path / "runs/prompts/qwen3_8b-opd.jsonl").read_text().splitlines()
    ]
    contents = [row["messages"][0]["content"] for row in rows]
    assert len(contents) == 9
    assert filled_hub.question(filled_hub.IN_A_BENCHMARK) not in contents
    assert filled_hub.question(filled_hub.IN_A_BENCHMARK + 1) in contents
    assert len((tmp_path / "runs/prompts/qwen3_8b-sft.jsonl").read_text().splitlines()) == 20, (
        "repeated questions stay: each is demonstrated anew"
    )


def test_wrong_arguments_of_a_recipe(tmp_path: Path) -> None:
    done = run_script("qwen3_8b", tmp_path, "--fast")
    assert done.returncode == 2
    assert "usage: bash" in done.stderr


def test_the_plans_json(tmp_path: Path) -> None:
    """As the command line gives it, with parameters counted through Megatron-Core."""
    command = [
        sys.executable,
        "-m",
        "lopd.cli",
        "plan",
        str(EXAMPLES / "run_qwen3_30b_a3b.toml"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["parameters"]["total"] == 30_532_122_624
    assert 3.3e9 < plan["parameters"]["active"] < 3.4e9
    assert plan["fits"] is True
    assert set(plan["gpu_hours"]) >= {
        "demonstrate",
        "sft",
        "rollout",
        "score",
        "distill",
        "evaluate",
        "total",
        "lightning_opd",
    }
    assert plan["memory"]["distill"]["gpu_total"] == pytest.approx(
        sum(plan["memory"]["distill"]["gpu"].values())
    )
    assert plan["memory"]["rollout"]["concurrency"] > 1


def _page_table(text: str) -> dict[str, tuple[str, str]]:
    """Return hours and GiB of each stage in the README's table, as they are written there."""
    block = text.partition("| stage | hours on 8 GPUs |")[2].partition("\n\n")[0]
    rows = [line.strip("|").split("|") for line in block.splitlines()[2:]]
    return {row[0].split()[0]: (row[1].strip(), row[2].strip()) for row in rows}


def test_the_first_page_quotes_the_plan_of_the_flagship() -> None:
    plan = planned("qwen3_30b_a3b", "h100-80gb", 8)
    told = as_json(plan)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    hours = {name: f"{value / 8:.2f}" for name, value in told["gpu_hours"].items()}
    expected = {
        name: (hours[name], f"{use['gpu_total'] / 2**30:.1f}")
        for name, use in told["memory"].items()
    }
    table = _page_table(page)
    assert table == {**expected, "all": (hours["total"], "")}
    assert f"{told['disk']['total'] / 2**30:,.1f} GiB" in page
    own = f"{hours['lightning_opd']} hours, or {told['gpu_hours']['lightning_opd']:.1f} GPU hours"
    assert own in page
    # Estimates are never shown without this sentence.
    assert "Nothing of this has run on a GPU" in page
    changed = page.replace(hours["sft"], "1.00")
    assert _page_table(changed) != table, "the control"
