"""One shortened run of the example, shared by all tests of the pipeline: they read it, or go on
from a copy of some of its stages.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pipeline.running import STAGES, Command, Finished, clone, listening_addresses

NUM_STEPS = 8
SECRET = "hunter2"
SHORT = (
    f"""sglang.extra_args={{hicache_storage_backend_extra_config='{{"token": "{SECRET}"}}'}}""",
    "prompts.opd.num_prompts=1280",
    "score.top_k=0",
    "distill.objective.loss=lightning",
    "sglang.replicas=1",
    f"distill.num_steps={NUM_STEPS}",
    "distill.batch_size=160",
    "distill.optimizer.lr=2e-4",
    f"distill.sync_every={NUM_STEPS // 2}",
    "distill.sync_num_prompts=100",
    "prompts.eval.num_prompts=250",
    "evaluate.samples_per_prompt=1",
    "rollout.shard_size=256",
    "sft.log_every=1",
)
"""The example in less time, with the paper's loss: each rollout is seen once, at twice the learning
rate. The last two decide nothing of the result, nor does the first.
"""


EXAMPLE_RANKS = 2
THE_EXAMPLES = ("test_end_to_end", "test_kill", "test_reuse", "test_teachers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if len(os.sched_getaffinity(0)) < EXAMPLE_RANKS:
        for item in items:
            if item.path.parent == Path(__file__).parent and item.path.stem in THE_EXAMPLES:
                item.add_marker(
                    pytest.mark.skip(
                        reason=(
                            f"the example trains on {EXAMPLE_RANKS} ranks; "
                            "lopd refuses more ranks than CPU cores"
                        )
                    )
                )


@dataclass(frozen=True)
class CompletedRun:
    """``lopd run`` from nothing to the end, and what was seen meanwhile."""

    folder: Path
    command: Finished
    processes_left: list[int]
    listened: set[tuple[str, str]]  # (address, program)


@pytest.fixture(scope="session")
def completed(tmp_path_factory: pytest.TempPathFactory) -> CompletedRun:
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    command = Command("run", folder, SHORT)
    with listening_addresses(command) as listened:
        finished = command.wait()
        left = command.processes()
    assert finished.code == 0, f"{finished.stdout[-3000:]}\n{finished.stderr[-3000:]}"
    return CompletedRun(folder, finished, left, listened)


@pytest.fixture
def done_up_to(completed: CompletedRun, tmp_path: Path) -> Callable[[str], Path]:
    """done_up_to("sft") makes a run directory in which only demonstrate and sft are done."""
    return lambda stage: clone(
        completed.folder, tmp_path / "run", STAGES[: STAGES.index(stage) + 1]
    )
