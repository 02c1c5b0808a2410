"""TRL's DistillationTrainer on a student of the study, for claim 3.

    python -m examples.study.with_trl environment FOLDER
    python -m examples.study.with_trl train SEED STUDENT FOLDER

TRL has an environment of its own, as in benchmarks/versus_trl.py, and its trainer is the one of
that comparison: teacher, student and all logits in one process, fresh responses at each step, and
the exact reverse KL over the vocabulary. "environment" makes it once for all seeds and writes into
FOLDER which packages it has. "train" writes the model into FOLDER/model, and what the teacher has
read into FOLDER/figures.json.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import subprocess
from pathlib import Path

from benchmarks.versus_trl import PINS, ROOT, environment, quiet
from examples.study.arms import HABIT, RUNS
from lopd.artifacts import publish_json
from lopd.config import load_config
from lopd.stages.context import StageContext
from lopd.stages.order import stage_named

ENVIRONMENT = RUNS / "models" / "trl"
# Those of the other arms of claim 3. Its rate decays nowhere either.
NUM_STEPS = 16
BATCH_SIZE = 64
RATE = 1e-4
_SIDE = ROOT / "benchmarks" / "versus_trl_side.py"
FIGURES = "figures.json"


def python_with_trl() -> str:
    """Return the Python of the environment, which is made where it is missing."""
    ENVIRONMENT.parent.mkdir(parents=True, exist_ok=True)
    # Arms of two seeds are made at the same time. The lock ends with the process.
    with ENVIRONMENT.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return environment(ENVIRONMENT)


def train(seed: int, student: Path, folder: Path) -> None:
    """Train, and write the model and what the teacher has read.

    Args:
        seed: The seed of the study.
        student: The SFT student.
        folder: The folder of the model and of the figures.
    """
    config = load_config(HABIT.config, (f"run.dir={folder}", *HABIT.overrides(seed)))
    prompts, ids = StageContext(config, stage_named("rollout")).prompts("opd")
    # The prompt tokens are then known, whatever order TRL takes.
    num_passes, rest = divmod(NUM_STEPS * BATCH_SIZE, len(prompts))
    assert rest == 0, "the steps must go through the prompts a whole number of times"
    folder.mkdir(parents=True, exist_ok=True)
    order = {
        "num_steps": NUM_STEPS,
        "batch_size": BATCH_SIZE,
        "lr": RATE,
        "student": str(student),
        "teacher": str(config.models.teacher),
        "prompts": [{"prompt": [dict(one) for one in prompt.messages]} for prompt in prompts],
        "max_new_tokens": config.rollout.max_new_tokens,
        "threads": 1,
        "seed": seed,
        "out": str(folder),
    }
    publish_json(folder / "order.json", order)
    command = [python_with_trl(), "-W", "ignore", _SIDE, folder / "order.json"]
    subprocess.run(command, check=True, env=quiet(), stdout=subprocess.DEVNULL)
    figures = json.loads((folder / FIGURES).read_text())
    read = figures["teacher_tokens"] - num_passes * sum(map(len, ids))
    publish_json(folder / FIGURES, {**figures, "response_tokens": read})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("environment").add_argument("folder", type=Path)
    of_train = parts.add_parser("train")
    of_train.add_argument("seed", type=int)
    of_train.add_argument("student", type=Path)
    of_train.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.part == "train":
        train(options.seed, options.student, options.folder)
        return
    python_with_trl()
    options.folder.mkdir(parents=True, exist_ok=True)
    publish_json(options.folder / "packages.json", [*PINS])


if __name__ == "__main__":
    main()
