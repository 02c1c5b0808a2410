"""Another checkpoint of the training that unlearned.py has made, as a Hugging Face folder.

    python -m examples.study.unlearned_at STEP

writes the student after STEP of its 600 steps, for claim 10. A finished one is left as it is.
"""

from __future__ import annotations

import fcntl
import sys
from pathlib import Path

from examples.study.one_rank import export
from examples.study.unlearned import MODELS, RUN


def model_at(step: int) -> Path:
    """Return the folder of the student after so many steps."""
    return RUN / f"step-{step}"


def main() -> None:
    step = int(sys.argv[1])
    # Arms of two seeds are made at the same time. The lock ends with the process.
    with (MODELS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        export(RUN, step, model_at(step), stage="sft")


if __name__ == "__main__":
    main()
