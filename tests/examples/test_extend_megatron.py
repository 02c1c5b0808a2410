"""examples/extend_megatron: the bare loop learns from a teacher cache, and its first loss is that
of our trainer.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lopd import cache
from lopd.artifacts import ArtifactWriter
from lopd.batching import ResponseOrder, build_microbatch, make_sample, plan_step
from lopd.records import Response, TeacherScores, float32, int32, token_hash
from tests.limits import close
from tests.megatron.launch import ROOT, run_ranks, run_script
from tests.megatron.trainer_cases import settings_of, trainer_of
from tests.models import write_qwen3_moe

EXAMPLE = ROOT / "examples/extend_megatron"
NUM_RESPONSES = 12
MAX_TOKENS = 128
SEED = 17
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def write_cache(folder: Path) -> None:
    """A teacher cache of uneven responses, as the score stage publishes it."""
    rng = np.random.default_rng(0)
    responses = []
    scores = []
    for index in range(NUM_RESPONSES):
        prompt = int32(rng.integers(4, 512, 5))
        tokens = int32(rng.integers(4, 512, int(rng.integers(4, 40))))
        sampling, teacher = (float32(-3 * rng.random(len(tokens))) for _ in range(2))
        responses.append(Response(f"p{index}", 0, prompt, tokens, sampling, "stop", "v1"))
        scores.append(TeacherScores(f"p{index}", 0, token_hash(prompt, tokens), teacher))
    writer = ArtifactWriter(folder, kind="teacher_cache", inputs={})
    writer.publish_shard(0, cache.to_table(responses, scores))
    writer.finish()


def first_step_of_our_trainer(model: str, folder: str) -> dict[str, float]:
    """One rank; the same responses."""
    samples = [
        make_sample(response, teacher) for response, teacher in cache.read_rows(Path(folder))
    ]
    chosen = ResponseOrder(len(samples), NUM_RESPONSES, seed=SEED).batch_indices(0)
    plan = plan_step([len(samples[index]) for index in chosen], 1, MAX_TOKENS)
    step = trainer_of(model, settings_of()).train_step(
        [build_microbatch([samples[chosen[index]] for index in members]) for members in plan[0]]
    )
    return {"loss": step.loss, "advantage": step.metrics["advantage"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_moe(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def teacher_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "score"
    write_cache(folder)
    return folder


@pytest.fixture(scope="module")
def ours(model: Path, teacher_cache: Path) -> dict[str, float]:
    result: dict[str, float] = run_ranks(
        first_step_of_our_trainer, 1, model=str(model), folder=str(teacher_cache)
    )[0]
    return result


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(["--expert=2"], id="data and expert"),
        pytest.param(["--tensor=2", "--expert=2"], id="tensor and expert", marks=pytest.mark.slow),
    ],
)
def test_the_bare_loop_learns_and_starts_where_our_trainer_does(
    layout: list[str], model: Path, teacher_cache: Path, ours: dict[str, float]
) -> None:
    arguments = [
        f"--batch-size={NUM_RESPONSES}",
        f"--max-tokens={MAX_TOKENS}",
        f"--seed={SEED}",
        "--steps=6",
        "--lr=1e-3",
        *layout,
    ]
    text = run_script(EXAMPLE / "train.py", 2, str(model), str(teacher_cache), *arguments)
    losses = [
        float(loss) for loss in re.findall(r"^step \d+  loss (\S+)", text, flags=re.MULTILINE)
    ]
    assert len(losses) == 6
    close(losses[0], ours["loss"], rel=1e-6)
    assert losses[-1] < 0.8 * losses[0]
    assert f"advantage {ours['advantage']:+.3f}" in text


def test_one_process_needs_no_torchrun(
    model: Path, teacher_cache: Path, ours: dict[str, float]
) -> None:
    """The form of a laptop or of one GPU: `python train.py MODEL CACHE`."""
    arguments = [f"--batch-size={NUM_RESPONSES}", f"--max-tokens={MAX_TOKENS}", f"--seed={SEED}"]
    environment = {name: value for name, value in os.environ.items() if name not in _OF_TORCHRUN}
    text = subprocess.run(
        [sys.executable, EXAMPLE / "train.py", model, teacher_cache, *arguments, "--steps=1"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    [loss] = re.findall(r"^step 1  loss (\S+)", text, flags=re.MULTILINE)
    close(float(loss), ours["loss"], rel=1e-6)


def test_every_name_of_the_library_page_exists() -> None:
    names = re.findall(
        r"`((?:lopd|megatron_patches|sglang_rollout)(?:\.\w+)+)",
        (ROOT / "docs/library.md").read_text(),
    )
    assert len(names) > 20
    for name in names:
        module, _, attribute = name.rpartition(".")
        if module.endswith("TokenBatch"):
            module = module.rpartition(".")[0]
            attribute = "TokenBatch"
        assert hasattr(importlib.import_module(module), attribute), name


def test_its_readme_names_what_it_uses() -> None:
    readme = (EXAMPLE / "README.md").read_text()
    script = (EXAMPLE / "train.py").read_text()
    library = (ROOT / "docs/library.md").read_text()
    imported = {
        name.strip()
        for names in re.findall(r"^from lopd\S* import ([^#\n]+)", script, flags=re.MULTILINE)
        for name in names.split(",")
    }
    assert {"Lightning", "TokenBatch", "cache", "plan_step"} <= imported
    for name in imported:
        assert f"`{name}" in library or f".{name}" in library, (
            f"{name} is used by the example and not documented in docs/library.md"
        )
    assert "lopd.megatron.training.trainer" not in script
    assert "docs/library.md" in readme
    assert os.path.getsize(EXAMPLE / "train.py") < 12_000
