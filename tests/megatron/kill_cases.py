"""Trainings killed at random moments and started again: ``python -m tests.megatron.kill_cases MODEL
FOLDER NUM_KILLS SEED`` prints what came of it as JSON.

One process does the slow imports and forks the ranks of every attempt, so an attempt costs a
second. Nothing of torch runs before a fork.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from lopd.megatron.ranks.forking import fork_store, rank_environment
from tests.megatron.trainer_cases import microbatches_of, settings_of, trainer_of, weights_digest

LAYOUT = {"tensor": 2, "expert": 2}
NUM_RANKS = 2
NUM_STEPS = 8
CHECKPOINT_EVERY = 2


def train(model: str, folder: Path) -> None:
    """Continue from what exists. Write the figures of each step to steps.jsonl, then done.json."""
    # The other folders wait for each checkpoint.
    background = folder.name in ("training-0", "training-2", "training-4")
    settings = settings_of(
        LAYOUT, num_steps=NUM_STEPS, keep_checkpoints=2, checkpoint_in_background=background
    )
    trainer = trainer_of(model, settings, checkpoints=str(folder / "checkpoints"))
    state = trainer.resume() or {"steps": []}
    assert len(state["steps"]) == trainer.step, (
        "the caller's state is of another step than the weights"
    )
    main = os.environ["RANK"] == "0"
    with (folder / "steps.jsonl").open("a") as lines:
        for step in range(trainer.step, NUM_STEPS):
            result = trainer.train_step(microbatches_of(step))
            state["steps"].append([result.loss.hex(), result.grad_norm.hex()])
            if main:
                lines.write(json.dumps([step, *state["steps"][-1]]) + "\n")
                lines.flush()
            if trainer.step % CHECKPOINT_EVERY == 0 and trainer.step < NUM_STEPS:
                trainer.save_checkpoint(state)
    trainer.finish_checkpoint()
    digest = weights_digest(trainer)
    if main:
        (folder / "done.json").write_text(json.dumps({"steps": state["steps"], "weights": digest}))


def fork_ranks(model: str, folder: Path, port: int) -> list[int]:
    children = []
    for rank in range(NUM_RANKS):
        child = os.fork()
        if child == 0:
            os.environ |= rank_environment(rank, NUM_RANKS, port)
            code = 1
            try:
                train(model, folder)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return children


def _num_lines(folder: Path) -> int:
    path = folder / "steps.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def attempt(model: str, folder: Path, generator: random.Random | None) -> str:
    """A start of the training; with a generator killed at a moment of its choice, if it has not
    ended by then: killed, done or failed.
    """
    store, port = fork_store()
    try:
        was_killed = _watch(fork_ranks(model, folder, port), folder, generator)
    finally:
        os.kill(store, signal.SIGKILL)
        os.waitpid(store, 0)
    if (folder / "done.json").exists():
        return "done"
    return "killed" if was_killed else "failed"


def _watch(children: list[int], folder: Path, generator: random.Random | None) -> bool:
    """Until both ranks have ended; kills as the generator says. Whether it has."""
    began = time.monotonic()
    before = _num_lines(folder)
    num_steps = (
        generator.choice([0, 0, 1, 1, 2, 2, 3, 4, 5]) if generator is not None else NUM_STEPS
    )
    pause_s = (
        generator.uniform(0.0, 2.0 if num_steps == 0 else 0.3) if generator is not None else 0.0
    )
    victims = (
        generator.choice([children, children[:1], children[1:]]) if generator is not None else []
    )
    was_killed = False
    reached: float | None = None
    codes: dict[int, int] = {}  # what waitpid says of those that have ended
    while len(codes) < NUM_RANKS:
        if reached is None and _num_lines(folder) - before >= num_steps:
            reached = time.monotonic()
        if victims and reached is not None and time.monotonic() - reached >= pause_s:
            for child in victims:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
                    was_killed = True
            victims = []
        for child in children:
            if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0] == child:
                codes[child] = ended[1]
        assert time.monotonic() - began < 400, "an attempt hangs"
        if any(codes.values()) and len(codes) < NUM_RANKS:
            time.sleep(0.2)  # what torchrun does when a rank has died
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return was_killed


def main(model: str, root: Path, num_kills: int, seed: int) -> dict[str, Any]:
    """Kills at least so many times, and until some training has gone on from a checkpoint: where in
    a training a kill lands is the machine's choice too.
    """
    generator = random.Random(seed)
    whole = root / "unbroken"
    whole.mkdir()
    assert attempt(model, whole, None) == "done", "the unbroken training failed"
    results: dict[str, Any] = {
        "unbroken": json.loads((whole / "done.json").read_text()),
        "trainings": [],
        "kills": 0,
        "saves_interrupted": 0,
        "resumed_at": [],
    }

    def more() -> bool:
        return results["kills"] < num_kills or not any(results["resumed_at"])

    while more():
        folder = root / f"training-{len(results['trainings'])}"
        folder.mkdir()
        while not (folder / "done.json").exists():
            outcome = attempt(model, folder, generator if more() else None)
            assert outcome != "failed", (
                f"a training that was killed cannot go on; see above (seed {seed})"
            )
            if outcome == "killed":
                results["kills"] += 1
                results["saves_interrupted"] += len(list(folder.glob("checkpoints/*.tmp")))
                results["resumed_at"].append(
                    max(
                        (int(path.name[5:]) for path in folder.glob("checkpoints/step-??????")),
                        default=0,
                    )
                )
        lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        results["trainings"].append(
            {**json.loads((folder / "done.json").read_text()), "lines": lines}
        )
        shutil.rmtree(folder)
    return results


if __name__ == "__main__":
    print(
        "result "
        + json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
    )
