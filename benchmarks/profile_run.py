"""Where the processors' time of a whole run goes: in which processes, and in what.

    pip install py-spy==0.4.2
    python -m benchmarks.profile_run examples/tiny_moe.toml run.dir=runs/profiled --json out.json

py-spy looks at all processes of `lopd run` some times a second and notes the stacks of the threads
that compute. Each sample counts for one place: the process by its role (the command itself, a rank
of the trainer, a process of the SGLang server), and in it the first of the kinds of work below
whose functions stand in the stack. `processor_s` is the number of samples over the rate. Waiting is
no work and is not in it. `wall_s` is the time of the run, py-spy's own work included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

RATE = 50
# A role, and what stands in the command line of its processes. The first that fits counts.
ROLES = (
    ("sandbox", "sandbox"),
    ("guard", "-m lopd.processes"),
    ("rank", "lopd.stages"),
    ("rank", "lopd.megatron.ranks"),
    ("engine", "sglang"),
    ("engine", "multiprocessing"),
    ("command", "lopd"),
)
# A kind of work, and pieces of frames (function and file) that tell it. The first that fits counts.
KINDS = (
    ("imports", ("<frozen importlib",)),
    ("engine: the model", ("forward_batch", "model_runner.py", "tp_worker.py")),
    ("engine: the sampler", ("sampler.py",)),
    ("engine: scheduling and HTTP", ("scheduler", "tokenizer_manager", "uvicorn", "detokenizer")),
    ("trainer: optimizer", ("step_with_ready_grads", "clip_grad")),
    # Megatron-Core's schedule, whose own name has both words, calls these two.
    ("trainer: forward", ("forward_step (",)),
    ("trainer: backward", ("backward_step (",)),
    ("checkpoints and weights", ("safetensors", "checkpoint", "dist_checkpointing")),
    ("judging answers", ("verif", "judge")),
    ("reading and writing shards", ("parquet", "artifacts")),
)


def classify(line: str) -> tuple[str, str, int]:
    """Return role, kind and samples of a line of py-spy's raw format."""
    stack, _, samples = line.rpartition(" ")
    frames = stack.split(";")
    # With subprocesses the outermost frames name the processes, parents first.
    processes = [frame for frame in frames if frame.startswith("process ")]
    command_line = processes[-1] if processes else ""
    role = next((name for name, piece in ROLES if piece in command_line), "other")
    calls = "\n".join(frame for frame in frames if not frame.startswith("process "))
    kind = next((name for name, pieces in KINDS if any(one in calls for one in pieces)), "other")
    return role, kind, int(samples)


def summary(lines: Iterable[str]) -> dict[str, dict[str, float]]:
    """Return the processor seconds of each kind in each role, the largest first."""
    found: dict[str, Counter[str]] = {}
    for line in lines:
        role, kind, samples = classify(line)
        found.setdefault(role, Counter())[kind] += samples
    return {
        role: {kind: samples / RATE for kind, samples in kinds.most_common()}
        for role, kinds in sorted(found.items(), key=lambda entry: -entry[1].total())
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="configuration of a run")
    parser.add_argument("overrides", nargs="*", help="overrides, as for lopd run")
    parser.add_argument("--raw", type=Path, help="where py-spy's stacks are kept")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    spy = shutil.which("py-spy")
    if spy is None:
        raise SystemExit("py-spy is not installed: pip install py-spy==0.4.2")
    with tempfile.TemporaryDirectory() as folder:
        raw = arguments.raw or Path(folder, "stacks.txt")
        command = [sys.executable, "-m", "lopd.cli", "run", arguments.config, *arguments.overrides]
        options = ["--subprocesses", "--format", "raw", "--rate", str(RATE), "--output", str(raw)]
        began = time.perf_counter()
        subprocess.run([spy, "record", *options, "--", *command], check=True)
        wall_s = time.perf_counter() - began
        stacks = raw.read_text(encoding="utf-8").splitlines()
    # py-spy ends with 0 also where the command that it started has failed.
    if not stacks:
        raise SystemExit("py-spy saw nothing: the run did not start")
    report = {"wall_s": wall_s, "processor_s": summary(stacks)}
    print(json.dumps(report, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
