"""Makes the student that lacks knowledge, for claim 9: BASE.

    python -m examples.study.unlearned

It is made once, for all seeds, by this project's own stage sft (unlearned.toml): random weights of
the teacher's architecture learn from written solutions, and a checkpoint of before the end of this
training is taken. It takes some minutes of one core. What is finished is not made again, and of two
calls at the same time the second waits.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

from examples.study.arms import ROOT, RUNS
from examples.study.one_rank import export

HERE = Path(__file__).resolve().parent
MODELS = RUNS / "models"
RUN = MODELS / "unlearned"
# The checkpoint that is taken. Its loss on the texts was 0.0048 nats per token, so 0.25 nats in a
# response of 52 tokens: it samples some 78% of them without an error.
STEP = 500
BASE = RUN / f"step-{STEP}"
_TINY = ROOT / "examples" / "tiny_models"
# As many as 600 steps of 64 learn from, each once. Seeds of texts: 11 to 15 are those of the models
# of the examples.
_NUM_TEXTS = 38_400
_SEED = 16


def commands() -> tuple[tuple[str, ...], ...]:
    """Return the commands that train it."""
    lopd = str(Path(sys.executable).with_name("lopd"))
    architecture = str(MODELS / "architecture")
    make_texts = (str(_TINY / "make_demonstrations.py"), "careful", str(MODELS / "demonstrations"))
    how_many = ("--tokenizer", architecture, "--num", str(_NUM_TEXTS), "--seed", str(_SEED))
    return (
        (sys.executable, str(_TINY / "make_architecture.py"), architecture),
        (sys.executable, *make_texts, *how_many),
        (lopd, "sft", str(HERE / "unlearned.toml"), f"run.dir={RUN}"),
    )


def make() -> None:
    """Make the student, unless it is there."""
    MODELS.mkdir(parents=True, exist_ok=True)
    # Arms of two seeds are made at the same time, and each begins with this call. The lock ends
    # with the process, whatever ends it.
    with (MODELS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if BASE.exists():
            return
        for command in commands():
            subprocess.run(command, check=True)
        export(RUN, STEP, BASE, stage="sft")


if __name__ == "__main__":
    make()
