"""What the checkpoints' tests run under torchrun: bodies for tests.megatron.launch.run_ranks."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np

from lopd.config import TrainSection
from lopd.megatron.checkpoints import optimizer_state, writing
from lopd.megatron.checkpoints.integrity import problem_of
from lopd.megatron.ranks import parallel
from tests.megatron.trainer_cases import (
    microbatches_of,
    refused,
    settings_of,
    train,
    trainer_of,
    weights_digest,
)

SAVED_AT, LAST_STEP = 3, 6
CASES: dict[str, dict[str, Any]] = {
    "tensor and expert": {"layout": {"tensor": 2, "expert": 2}},
    "data": {"layout": {}},
    "expert": {"layout": {"expert": 2}},
    "pipeline": {"layout": {"pipeline": 2}},
    "plain optimizer": {"layout": {"tensor": 2, "expert": 2, "distributed_optimizer": False}},
    "pipeline, bfloat16": {"layout": {"pipeline": 2}, "dtype": "bfloat16"},
    "bfloat16, plain optimizer": {"layout": {"distributed_optimizer": False}, "dtype": "bfloat16"},
}
LAYOUTS = {
    "tensor": {"tensor": 2},
    "expert tensor": {"tensor": 2, "expert_tensor": 2},
    "tied": {"tensor": 2},
    "tied pipeline": {"pipeline": 2},
    "one rank": {},
} | {name: case["layout"] for name, case in CASES.items() if "dtype" not in case}
# Which training goes on under which layout; those to one rank are resumed there.
CROSSINGS = [
    ("one rank", "tensor and expert"),
    ("expert", "data"),
    ("data", "tensor"),
    ("pipeline", "tensor and expert"),
    ("plain optimizer", "expert tensor"),
    ("tensor and expert", "plain optimizer"),
]
TO_ONE_RANK = ["tensor and expert", "plain optimizer", "pipeline"]


def _case(name: str) -> TrainSection:
    return settings_of(**{"num_steps": LAST_STEP, "keep_checkpoints": 2, **CASES[name]})


def _settings(layout: str) -> TrainSection:
    return settings_of(LAYOUTS[layout], num_steps=LAST_STEP)


def save_and_die(model: str, dense: str, folder: str) -> None:
    """Saves after steps 1, 2 and 3 in every layout, goes on for one step that is lost, and is
    killed without a chance to clean up.
    """
    for name in CASES:
        trainer = trainer_of(model, _case(name), checkpoints=f"{folder}/{name}")
        assert trainer.resume() is None
        for step in range(SAVED_AT):
            trainer.train_step(microbatches_of(step))
            if name == "data" or trainer.step == SAVED_AT:
                trainer.save_checkpoint({"cursor": trainer.step, "note": name})
        trainer.train_step(microbatches_of(SAVED_AT))
    tied = trainer_of(dense, _settings("tied"), checkpoints=f"{folder}/tied")
    train(tied, SAVED_AT)
    tied.save_checkpoint({})
    parallel.barrier()
    print("all saved, one step lost", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def on_one_rank(model: str, folder: str) -> dict[str, Any]:
    """An unbroken training, whose checkpoint others go on from, and those of two ranks gone on
    here.
    """
    trainer = trainer_of(model, _settings("one rank"), checkpoints=f"{folder}/one rank")
    first = train(trainer, SAVED_AT)
    trainer.save_checkpoint({"cursor": SAVED_AT})
    second = train(trainer, LAST_STEP)
    return {"unbroken": {key: first[key] + second[key] for key in first}} | {
        name: _cross(model, folder, name, "one rank") for name in TO_ONE_RANK
    }


def _cross(model: str, folder: str, saved: str, layout: str) -> dict[str, Any]:
    notes: list[str] = []
    trainer = trainer_of(model, _settings(layout), checkpoints=f"{folder}/{saved}")
    state = trainer.resume(notes.append)
    assert state is not None
    return {"cursor": state.get("cursor"), "notes": notes, **train(trainer, LAST_STEP)}


def resume_and_compare(model: str, dense: str, folder: str) -> dict[str, Any]:
    """In a new process: every layout resumed, and run without a break; then under other layouts;
    then what must not be resumed.
    """
    results: dict[str, Any] = {}
    for name in CASES:
        resumed = trainer_of(model, _case(name), checkpoints=f"{folder}/{name}")
        state = resumed.resume()
        results[name] = {
            "state": state,
            "resumed": train(resumed, LAST_STEP),
            "resumed weights": weights_digest(resumed),
        }
        unbroken = trainer_of(model, _case(name))
        results[name] |= {
            "unbroken": train(unbroken, LAST_STEP),
            "unbroken weights": weights_digest(unbroken),
        }
    for saved, layout in CROSSINGS:
        results[f"{saved} -> {layout}"] = _cross(model, folder, saved, layout)
    results["tied"] = train(trainer_of(dense, _settings("tied")), LAST_STEP)
    results["tied -> tied pipeline"] = _cross(dense, folder, "tied", "tied pipeline")
    results["without moments"] = _without_moments(model, folder, "data", "data")
    results["without moments, another layout"] = _without_moments(model, folder, "data", "tensor")
    results["there and back"] = _there_and_back(model, Path(folder))
    bfloat16 = settings_of(num_steps=LAST_STEP, dtype="bfloat16")
    results["refused"] = refused(
        lambda: trainer_of(model, bfloat16, checkpoints=f"{folder}/data").resume()
    )
    results["damaged"] = _damaged(model, Path(folder))
    results["no room"] = _no_room(model, Path(folder))
    results["background"] = _in_background(model, Path(folder) / "background")
    copies, writing.own_copies = writing.own_copies, lambda staged, sources: staged
    results["background, not copied"] = _in_background(model, Path(folder) / "not copied")
    writing.own_copies = copies
    return results


def _without_moments(model: str, folder: str, saved: str, layout: str) -> dict[str, Any]:
    forgetful = trainer_of(model, _settings(layout), checkpoints=f"{folder}/{saved}")
    forgetful.resume(lambda note: None)
    for chained in forgetful.optimizer.megatron.chained_optimizers:
        for state in chained.optimizer.state.values():
            state["exp_avg"].zero_()
    return train(forgetful, LAST_STEP)


def _there_and_back(model: str, folder: Path) -> dict[str, Any]:
    """A bfloat16 training, which keeps float32 weights in its optimizer, saved anew by another
    layout and gone on with in its own; reading in small parts.
    """
    passing = settings_of({"tensor": 2, "expert": 2}, num_steps=LAST_STEP, dtype="bfloat16")
    trainer = trainer_of(model, passing, checkpoints=str(folder / "pipeline, bfloat16"))
    trainer.resume(lambda note: None)
    trainer._checkpoints._folder = folder / "passed on"  # type: ignore[union-attr]
    trainer.save_checkpoint({})
    chunk_bytes, optimizer_state.CHUNK_BYTES = optimizer_state.CHUNK_BYTES, 100_000
    back = trainer_of(model, _case("pipeline, bfloat16"), checkpoints=str(folder / "passed on"))
    back.resume(lambda note: None)
    optimizer_state.CHUNK_BYTES = chunk_bytes
    return train(back, LAST_STEP)


def _damaged(model: str, folder: Path) -> dict[str, Any]:
    """The newest checkpoint cut short, with leftovers of a save that was killed; a bit flipped in
    each file; a bit flipped in both checkpoints.
    """
    copy, newest = folder / "damaged", folder / "damaged" / "step-000003"
    if parallel.rank() == 0:
        shutil.copytree(folder / "data", copy)
        longest = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
        os.truncate(longest, longest.stat().st_size // 2)
        (copy / "step-000004.tmp").mkdir()
        (copy / "step-000004.tmp" / "half").write_bytes(b"x")
    parallel.barrier()
    notes: list[str] = []
    trainer = trainer_of(model, _case("data"), checkpoints=str(copy))
    results: dict[str, Any] = {
        "state": trainer.resume(notes.append),
        "notes": notes,
        "left": sorted(path.name for path in copy.iterdir()),
    }
    results["latest"] = (copy / "latest").read_text()
    parallel.barrier()
    trainer.train_step(microbatches_of(trainer.step))
    trainer.save_checkpoint({})
    results["later"] = sorted(path.name for path in copy.iterdir())
    generator = np.random.default_rng(0)
    results["flips"] = {}
    for path in sorted(newest.iterdir()):
        place, bit = generator.integers(path.stat().st_size), generator.integers(8)
        _flip(path, place, bit)
        results["flips"][path.name] = problem_of(newest)
        _flip(path, place, bit)
    results["whole"] = problem_of(newest)
    files = [
        next(iter(sorted((copy / step).glob("*.distcp"))))
        for step in ("step-000002", "step-000003")
    ]
    for path in files:
        _flip(path, path.stat().st_size // 2, 3)
    results["both"] = refused(
        lambda: trainer_of(model, _case("data"), checkpoints=str(copy)).resume()
    )
    return results


def _flip(path: Path, place: int, bit: int) -> None:
    parallel.barrier()
    if parallel.rank() == 0:
        with path.open("r+b") as handle:
            handle.seek(place)
            byte = handle.read(1)[0]
            handle.seek(place)
            handle.write(bytes([byte ^ (1 << bit)]))
    parallel.barrier()


def _no_room(model: str, folder: Path) -> dict[str, Any]:
    """A checkpoint where files cannot grow beyond 50 kB, which fails as a full disk does: in the
    writers' processes. Then with room again.
    """
    trainer = trainer_of(model, _case("data"), checkpoints=str(folder / "no room"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        why = refused(lambda: trainer.save_checkpoint({}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    nothing = trainer.resume() is None
    trainer.save_checkpoint({"cursor": 0})
    return {"refused": why, "nothing published": nothing, "then": trainer.resume()}


def _in_background(model: str, folder: Path) -> dict[str, Any]:
    """Two steps are taken while the writer of a checkpoint is held up; then it is let go, the
    checkpoint published, and gone on from.
    """
    settings = settings_of(
        {"tensor": 2, "expert": 2}, num_steps=LAST_STEP, checkpoint_in_background=True
    )
    go_on = threading.Event()
    write, writing.Writing._write = writing.Writing._write, _held_up(go_on)
    trainer = trainer_of(model, settings, checkpoints=str(folder))
    train(trainer, SAVED_AT)
    trainer.save_checkpoint({"cursor": SAVED_AT})
    before = train(trainer, SAVED_AT + 2)
    results: dict[str, Any] = {
        "while it is written": sorted(path.name for path in folder.iterdir())
    }
    go_on.set()
    trainer.finish_checkpoint()
    parallel.barrier()
    results["then"] = sorted(path.name for path in folder.iterdir())
    parallel.barrier()  # every rank has looked before one begins the next
    writing.Writing._write = write  # type: ignore[method-assign]
    trainer.save_checkpoint({})  # the last one, published by the next step, however long it takes
    while (folder / "latest").read_text() != f"step-{SAVED_AT + 2:06d}\n":
        parallel.barrier()
        trainer._checkpoints.publish_written()  # type: ignore[union-attr]
        parallel.barrier()
    parallel.barrier()
    if parallel.rank() == 0:
        shutil.rmtree(folder / f"step-{SAVED_AT + 2:06d}")
    parallel.barrier()
    resumed = trainer_of(model, settings, checkpoints=str(folder))
    results["state"] = resumed.resume()
    return {**results, "unbroken": before, "resumed": train(resumed, SAVED_AT + 2)}


def _held_up(go_on: threading.Event) -> Any:
    write = writing.Writing._write

    def wait_and_write(self: writing.Writing, act: Any) -> None:
        go_on.wait(60)
        write(self, act)

    return wait_and_write
