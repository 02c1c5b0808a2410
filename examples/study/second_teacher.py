"""Makes the base student and the two teachers of two_teachers.py, and measures them.

    python -m examples.study.second_teacher [COPY]

The base student is the example's student, which goes on with written demonstrations in both
notations. Each teacher is this student, after written demonstrations with hardly a skipped step, in
mostly one notation. All three are made by ``lopd sft``, once and not for each seed. After a kill
the same command goes on; what is there is not made again. The study calls it before the arms that
need it, also from two processes at a time. COPY is where an arm keeps what was measured, for the
page.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.study.arms import MODELS, ROOT
from examples.study.two_teachers import BASE, CONFIG, MADE, ONE_RANK, SETTINGS, TEACHERS, Teacher

LOPD = Path(sys.executable).with_name("lopd")
MAKER = MODELS / "make_demonstrations.py"
# What the three models are, and what was measured of them.
RESULT = MADE / "teachers.json"
_BATCH = 64


@dataclass(frozen=True)
class Recipe:
    """One of the three models."""

    name: str
    # The Hugging Face folder that it goes on from.
    begins_with: Path
    num_steps: int
    # The peak of the learning rate, which falls to a tenth.
    lr: float
    # Shares of demonstrations without steps, and of steps that end with ";".
    skip: float
    semicolons: float
    # Of the written demonstrations: no set of prompts has it.
    seed: int

    def commands(self) -> tuple[list[str], list[str]]:
        """Return the command that writes the demonstrations, and that of SFT."""
        written = MADE / f"written_{self.name}"
        write = [sys.executable, str(MAKER), "notation", str(written)]
        write += ["--tokenizer", str(MODELS / "student")]
        write += ["--num", str(_BATCH * self.num_steps), "--seed", str(self.seed)]
        write += ["--skip", str(self.skip), "--semicolons", str(self.semicolons)]
        train = [str(LOPD), "sft", str(CONFIG), f"run.dir={MADE / self.name}", "run.seed=1"]
        train += [f"models.student={self.begins_with}", f"sft.demonstrations={written}"]
        # The demonstrations are written and not sampled, so the teacher that is named has no part.
        train += [f"models.teacher={self.begins_with}", "score.allow_foreign_teacher=true"]
        train += [f"sft.{ONE_RANK}", f"sft.batch_size={_BATCH}", f"sft.num_steps={self.num_steps}"]
        train += ["sft.moe_aux_loss=0.01", f"sft.checkpoint_every={self.num_steps}"]
        train += [f"sft.optimizer.lr={self.lr}", f"sft.optimizer.min_lr={self.lr / 10}"]
        train += ["sft.optimizer.schedule=cosine", "sft.optimizer.warmup=0.1"]
        return write, train


_BASE = Recipe("two_notations", MODELS / "student", 100, 1e-3, skip=0.6, semicolons=0.5, seed=16)
RECIPES = (
    _BASE,
    Recipe(TEACHERS["a"], BASE, 40, 5e-4, skip=0.03, semicolons=0.2, seed=17),
    Recipe(TEACHERS["b"], BASE, 40, 5e-4, skip=0.03, semicolons=0.8, seed=18),
)


def identity() -> str:
    """Return a hash of everything that decides the three models."""
    digest = hashlib.sha256()
    for file in (CONFIG, MAKER, MODELS / "student" / "model.safetensors"):
        digest.update(file.read_bytes())
    for recipe in RECIPES:
        write, train = recipe.commands()
        digest.update(json.dumps([write[1:], train[1:]]).encode())
    return digest.hexdigest()


def is_made() -> bool:
    """Return whether the three models are made as they are described now, and measured."""
    return RESULT.exists() and json.loads(RESULT.read_text())["identity"] == identity()


@contextmanager
def _alone() -> Iterator[None]:
    """Wait until no other process makes the models."""
    MADE.mkdir(parents=True, exist_ok=True)
    with (MADE / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def make() -> None:
    """Make the three models. lopd reuses what it has made from the same inputs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for recipe in RECIPES:
        for command in recipe.commands():
            subprocess.run(command, check=True, env=environment)


def measured() -> dict[str, Any]:
    """Measure each model against a teacher that it is not, and return what was found.

    Returns:
        The figures of measure.py by "MODEL_by_TEACHER": accuracies, and the reverse KL of the model
        from that teacher in nats per token.
    """
    # Imported here, because it takes seconds and most calls find everything made.
    from examples.study.measure import Subject, measure
    from lopd.config import load_config

    pairs: tuple[tuple[str, Teacher], ...] = (
        (_BASE.name, "a"),
        (_BASE.name, "b"),
        (TEACHERS["a"], "b"),
        (TEACHERS["b"], "a"),
    )
    subjects = []
    for model, teacher in pairs:
        setting = SETTINGS[teacher]
        folder = (MADE / model / "sft" / "model").resolve()
        config = load_config(setting.config, setting.overrides(1))
        name = f"models/{model}_by_{TEACHERS[teacher]}"
        subjects.append(Subject(name, folder, folder, config))
    measure(subjects, "servers-models")
    return {subject.result.stem: json.loads(subject.result.read_text()) for subject in subjects}


def main() -> None:
    from lopd.artifacts import publish_json

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("copy", type=Path, nargs="?")
    options = parser.parse_args()
    if not is_made():
        with _alone():
            # Another process may have made them in the meantime.
            if not is_made():
                make()
                publish_json(RESULT, {"identity": identity(), "measured": measured()})
    if options.copy is not None:
        options.copy.parent.mkdir(parents=True, exist_ok=True)
        publish_json(options.copy, json.loads(RESULT.read_text())["measured"])


if __name__ == "__main__":
    main()
