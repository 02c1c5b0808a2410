"""Rollout, score and distill against TRL's DistillationTrainer, to the same bar.

    python benchmarks/versus_trl.py --work runs/versus_trl --json versus_trl.json

Both sides begin with the SFT student of examples/tiny_moe.toml and its prompts, and end with a
student that must pass the bar: accuracy at least 0.95 and reverse KL at most 0.002 nats a token, on
held-out prompts, by one evaluator. The recipes are constants: of each side the one that comes to
the bar with the least work among those that were tried.

TRL has teacher, student and all logits in one process, samples anew for each step, and learns from
the exact reverse KL over the vocabulary. lopd samples once, asks the teacher once (for its TOP_K
likeliest tokens at each place), and trains without a teacher.

`ratio_with_starts` is our wall time over TRL's from the shell's command to the saved model.
`ratio_without_starts` leaves out what is no work: imports, loading, starts of servers and ranks.
Ours then is the sampling, the scoring and the training steps. The sides run in turn. The ratios are
medians over pairs.

TRL goes into an environment of its own (WORK/env), with torch and transformers of this one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lopd.cache import read_rows
from lopd.config import load_config
from lopd.stages.context import StageContext
from lopd.stages.order import stage_named
from lopd.stages.training import MODEL
from lopd.tasks import Verifier, get_task
from lopd.tasks.tokenizer import load_tokenizer, response_text

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "tiny_moe.toml"
# What TRL needs beside torch, transformers and what they need. Pinned, and installed without
# dependencies: another torch would be gigabytes and another comparison.
PINS = (
    "trl==1.16.0",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "multiprocess==0.70.19",
    "dill==0.4.1",
    "xxhash==4.1.0",
    "pandas==3.1.1",
    "python-dateutil==4.0.0",
)
MIN_ACCURACY = 0.95
MAX_REVERSE_KL = 0.002
# The recipes, and our top-K signal.
TRL = {"num_steps": 3, "batch_size": 32, "lr": 6e-4}
TOP_K = 8
OURS = (
    "prompts.opd.num_prompts=128",
    f"score.top_k={TOP_K}",
    "distill.objective.loss=top_k_reverse_kl",
    "distill.batch_size=32",
    "distill.num_steps=4",
    "distill.optimizer.lr=6e-4",
    "distill.sync_every=0",
    "distill.checkpoint_every=1000",
    "sglang.replicas=1",
    "evaluate.enabled=false",
)
# lopd, with the seconds of its work added up in a file.
_OURS_PROGRAM = """
import json, sys, time
from pathlib import Path
import lopd.stages.sample_shards as sampling, lopd.stages.score as scoring
out = Path(sys.argv.pop(1))
times = {}
def timed(module, name):
    inner = getattr(module, name)
    def call(*args, **about):
        began = time.perf_counter()
        try:
            return inner(*args, **about)
        finally:
            times[name] = time.perf_counter() - began
            out.write_text(json.dumps(times))
    setattr(module, name, call)
timed(sampling, "sample_into")
timed(scoring, "score_into")
from lopd.cli import main
main()
"""


@dataclass(frozen=True)
class Side:
    """What one side's run came to. Seconds of wall time; bytes of memory of all its processes."""

    wall_s: float
    work_s: float
    rollouts: int
    teacher_tokens: int
    peak_bytes: int
    model: Path


def main() -> None:
    """Run the pairs, check the bar, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--work", type=Path, default=Path("runs/versus_trl"), help="its folder")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    # Small products gain nothing from more threads, and lose much on a busy machine.
    parser.add_argument("--threads", type=int, default=1, help="TRL's threads of torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = environment(work / "env")
    prepare(work / "prepared")
    pairs: list[tuple[Side, Side]] = []
    for number in range(arguments.pairs):
        # The order changes, so that neither side always has the warmer files.
        trl = None if number % 2 else run_trl(python, work, arguments.threads)
        ours = run_ours(work)
        pairs.append((ours, trl or run_trl(python, work, arguments.threads)))
    report = {
        "ratio_with_starts": statistics.median(a.wall_s / b.wall_s for a, b in pairs),
        "ratio_without_starts": statistics.median(a.work_s / b.work_s for a, b in pairs),
        "lopd": described([ours for ours, _ in pairs], work),
        "trl": described([trl for _, trl in pairs], work),
        "pins": PINS,
    }
    print(json.dumps(report, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def environment(folder: Path) -> str:
    """Return the Python of an environment with TRL, which is made where it is missing."""
    python = folder / "bin" / "python"
    done = folder / "pins.json"
    if done.is_file() and json.loads(done.read_text()) == list(PINS):
        return str(python)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", site]
    subprocess.run([*pip, *PINS], check=True)
    # Behind its own packages come those of this environment: torch, transformers, pyarrow.
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "with_lopds.pth").write_text("\n".join(ours) + "\n")
    done.write_text(json.dumps(PINS))
    return str(python)


def prepare(folder: Path) -> None:
    """Make the SFT student that both sides begin with."""
    for stage in ("demonstrate", "sft"):
        lopd(stage, folder, ())


def lopd(verb: str, folder: Path, overrides: Sequence[str]) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "lopd.cli", verb, EXAMPLE]
    subprocess.run([*command, f"run.dir={folder}", *overrides], check=True, env=quiet())


def quiet() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_ours(work: Path) -> Side:
    """Run rollout, score and distill from the prepared student."""
    folder = work / "ours"
    subprocess.run(["rm", "-rf", folder], check=True)
    folder.mkdir()
    subprocess.run(
        ["cp", "-r", *(work / "prepared" / name for name in ("demonstrate", "sft")), folder],
        check=True,
    )
    times = folder / "times.json"
    program = [sys.executable, "-W", "ignore", "-c", _OURS_PROGRAM, times, "run", EXAMPLE]
    wall_s, peak = measured([*program, f"run.dir={folder}", *OURS])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row["seconds"] for row in rows if row["stage"] == "distill" and row["kind"] == "train"]
    manifest = json.loads((folder / "score" / "manifest.json").read_text())
    return Side(
        wall_s,
        sum(json.loads(times.read_text()).values()) + sum(steps),
        sum(shard["rows"] for shard in manifest["shards"]),
        # The teacher reads the prompt too, as TRL's does.
        sum(shard["tokens"] for shard in manifest["shards"]) + prompt_tokens(folder),
        peak,
        folder / "distill" / MODEL,
    )


def prompt_tokens(folder: Path) -> int:
    """Return the prompt tokens that the teacher has read."""
    return sum(len(response.prompt_ids) for response, _ in read_rows(folder / "score"))


def run_trl(python: str, work: Path, threads: int) -> Side:
    """Run TRL's trainer from the prepared student on the same prompts."""
    out = work / "trl"
    subprocess.run(["rm", "-rf", out], check=True)
    out.mkdir()
    config = load_config(EXAMPLE, [f"run.dir={work / 'prepared'}", *OURS])
    # The prompts that our side rolls out, of which TRL needs fewer.
    prompts, _ = StageContext(config, stage_named("rollout")).prompts("opd")
    count = int(TRL["num_steps"]) * int(TRL["batch_size"])
    order = {
        **TRL,
        "student": str(work / "prepared" / "sft" / MODEL),
        "teacher": str(config.models.teacher),
        "prompts": [{"prompt": [dict(one) for one in row.messages]} for row in prompts[:count]],
        "max_new_tokens": config.rollout.max_new_tokens,
        "threads": threads,
        "seed": config.run.seed,
        "out": str(out),
    }
    (out / "order.json").write_text(json.dumps(order))
    script = Path(__file__).with_name("versus_trl_side.py")
    wall_s, peak = measured([python, "-W", "ignore", script, out / "order.json"])
    found = json.loads((out / "figures.json").read_text())
    return Side(
        wall_s, found["work_s"], found["rollouts"], found["teacher_tokens"], peak, out / "model"
    )


def measured(command: Sequence[str | Path]) -> tuple[float, int]:
    """Run a command; return its wall time in seconds, and the most memory of its processes.

    The memory is the sum of proportional set sizes, which counts a shared page once.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, env=quiet(), stdout=subprocess.DEVNULL)
    peak = [0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            peak[0] = max(peak[0], memory_of(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    wall_s = time.perf_counter() - began
    ended.set()
    watcher.join()
    if code != 0:
        raise SystemExit(f"{command[0]} ended with code {code}")
    return wall_s, peak[0]


def memory_of(pid: int) -> int:
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:
        # A process has ended meanwhile; the next look sees the others.
        return 0
    return total


def described(sides: Sequence[Side], work: Path) -> dict[str, Any]:
    """Return one side's figures: of its last run what it used, and whether it passes the bar."""
    last = sides[-1]
    accuracy, divergence = evaluate(last.model, work)
    return {
        "wall_s": [side.wall_s for side in sides],
        "work_s": [side.work_s for side in sides],
        "rollouts": last.rollouts,
        "teacher_tokens": last.teacher_tokens,
        "peak_mib": max(side.peak_bytes for side in sides) / 2**20,
        "accuracy": accuracy,
        "reverse_kl": divergence,
        "passes": accuracy >= MIN_ACCURACY and divergence <= MAX_REVERSE_KL,
    }


def evaluate(model_dir: Path, work: Path, count: int | None = None) -> tuple[float, float]:
    """Return accuracy and reverse KL (nats a token, exact over the vocabulary) of a student.

    By transformers alone, for both sides: the example's held-out prompts (or the first ``count``),
    one response each at temperature 1.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(EXAMPLE, [f"run.dir={work / 'prepared'}"])
    prompts, ids = StageContext(config, stage_named("evaluate")).prompts("eval")
    prompts, ids = prompts[:count], ids[:count]
    task = get_task(config.task.name, config.task.options)
    assert isinstance(task, Verifier)
    tokenizer = load_tokenizer(config.models.student)
    end, pad = 2, 0
    student = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    teacher = AutoModelForCausalLM.from_pretrained(config.models.teacher, dtype=torch.float32)
    torch.manual_seed(config.run.seed)
    right = 0
    divergence = 0.0
    tokens = 0
    for first in range(0, len(prompts), 100):
        rows = [row.tolist() for row in ids[first : first + 100]]
        width = max(map(len, rows))
        # Padding stands on the left, where generate() wants it.
        batch = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            full = student.generate(
                batch,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=config.evaluate.max_new_tokens,
                eos_token_id=end,
                pad_token_id=pad,
            )
            answer = full[:, width:]
            # A token counts up to the first end token, which counts too.
            counts = (torch.cumsum(answer == end, 1) - (answer == end).long()) == 0
            whole = torch.cat([mask, counts.long()], 1)
            positions = (whole.cumsum(1) - 1).clamp(min=0)
            student_logprobs, teacher_logprobs = (
                one(full, attention_mask=whole, position_ids=positions)
                .logits[:, width - 1 : -1]
                .log_softmax(-1)
                for one in (student, teacher)
            )
        kl = (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum(-1)
        divergence += float((kl * counts).sum())
        tokens += int(counts.sum())
        for prompt, row, kept in zip(prompts[first : first + 100], answer, counts, strict=True):
            reason = "stop" if end in row else "length"
            right += task.verify(
                prompt, response_text(tokenizer, row[kept].numpy(), reason), reason
            )
    return right / len(prompts), divergence / tokens


if __name__ == "__main__":
    main()
