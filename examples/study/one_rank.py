"""The trainer of a published training in this process, as the only rank.

    python -m examples.study.one_rank RUN STEP OUT

writes the model of a checkpoint, that after STEP updates of the distillation in the folder RUN, as
a Hugging Face folder OUT. A finished OUT is left as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lopd.errors import ArtifactError
from lopd.stages.training import JOB, TrainingJob


def job_of(run: Path, stage: str = "distill") -> TrainingJob:
    """Return the training that a run has made.

    Raises:
        ArtifactError: The run has no such training.
    """
    file = run / stage / JOB
    if not file.exists():
        raise ArtifactError(
            f"the run has no training {stage}", where=str(file), remedy=f"run lopd {stage} first"
        )
    return TrainingJob.from_json(json.loads(file.read_text(encoding="utf-8")))


@contextlib.contextmanager
def only_rank(job: TrainingJob) -> Iterator[None]:
    """Form Megatron's groups of this process alone, as long as the block lasts."""
    import torch.distributed as dist

    from lopd.megatron.ranks import parallel

    # A store in memory: no port is opened, so several of these processes do not disturb each other.
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel.initialize(
        job.settings.parallel, seed=job.config.run.seed, timeout_s=job.settings.timeout_s
    )
    try:
        yield
    finally:
        parallel.shutdown()


def export(run: Path, step: int, out: Path, stage: str = "distill") -> None:
    """Write the model of a checkpoint as a Hugging Face folder.

    Args:
        run: The folder of the run.
        step: The number of updates of the checkpoint.
        out: The folder of the model.
        stage: "sft" or "distill".

    Raises:
        ArtifactError: There is no checkpoint of this step.
    """
    # save_hf publishes by a rename, so a folder of this name is whole.
    if out.exists():
        return
    job = job_of(run, stage)
    name = f"step-{step:06d}"
    if not (job.checkpoints / name).is_dir():
        found = sorted(path.name for path in job.checkpoints.glob("step-*"))
        raise ArtifactError(
            f"there is no checkpoint {name}",
            where=str(job.checkpoints),
            limit=f"one of {', '.join(found) or 'none'}",
            remedy=f"set {stage}.checkpoint_every and {stage}.keep_checkpoints so that it is kept",
        )
    from lopd.megatron.training.trainer import Trainer
    from lopd.megatron.weights.transfer import save_hf
    from lopd.objective.supervised import Supervised

    out.parent.mkdir(parents=True, exist_ok=True)
    # The trainer resumes the newest checkpoint of a folder. Here it finds this one alone.
    with tempfile.TemporaryDirectory(dir=out.parent) as alone, only_rank(job):
        shutil.copytree(job.checkpoints / name, Path(alone) / name)
        trainer = Trainer(
            job.settings,
            model_dir=job.initial,
            init=job.init,
            init_std=job.config.sft.init_std,
            seed=job.config.run.seed,
            # No step is made, so the loss does not matter.
            objective=Supervised(),
            checkpoint_dir=Path(alone),
        )
        trainer.resume()
        assert trainer.step == step, (trainer.step, step)
        save_hf(
            trainer.export(),
            out,
            source=job.initial,
            shard_bytes=job.config.export.shard_bytes,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("step", type=int)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    export(options.run, options.step, options.out)


if __name__ == "__main__":
    main()
