"""SFT: the base student learns the teacher's demonstrations. The result is the policy pi_ref.

    theta += lr * E[ sum_t grad log pi_theta(x_t | s_t) ],  x ~ pi_T(. | q)

``train`` below is the loop; every rank runs it. ``run`` starts the ranks.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lopd.artifacts import identify_model, read_manifest, remove_folder, storage_errors
from lopd.artifacts.lineage import declared, lineage_of
from lopd.config import Config
from lopd.objective import Supervised
from lopd.stages.context import Stage, StageContext
from lopd.stages.sample_shards import end_token_ids
from lopd.stages.training import MODEL, TrainingJob, require_batch, train_on_ranks
from lopd.stages.training_data import load_samples
from lopd.tasks.chat_template import complete_student_files, template_folder

# What is taken from a checkpoint that was made elsewhere: no code and no pickles.
_TAKEN_SUFFIXES = frozenset({".safetensors", ".json", ".jinja"})


def train(job: TrainingJob) -> None:
    """Train the student. Every rank calls this function with the same job."""
    # Imported here, because the parent process imports this file and needs no Megatron-Core.
    from lopd.stages.training_rank import Training

    # Prompts q and the teacher's responses x ~ pi_T(. | q).
    samples = load_samples(job)
    # The loss is -log pi_theta(x_t | s_t) of every response token.
    training = Training(job, samples, Supervised())
    # After a kill it continues at the newest checkpoint, with the batches that it would have had.
    for step in training.remaining_steps():
        batch = training.batches.of_step(step)
        # Per microbatch one forward and one backward pass, then one update of the weights.
        result = training.trainer.train_step(batch.microbatches)
        training.record(result, batch)
        training.save_checkpoint_if_needed()
    training.trainer.finish_checkpoint()
    training.publish_model()


def run(context: StageContext) -> None:
    """Publish the SFT student: train it, or take over ``sft.checkpoint``."""
    config = context.config
    # A student that was fine-tuned elsewhere takes the place of this stage's result.
    if config.sft.checkpoint is not None:
        _take_over(context, config.sft.checkpoint)
        return
    demonstrations, lineage = demonstrations_of(context)
    writer = context.writer(models={"student": context.identity("student")}, lineage=lineage)
    job = TrainingJob(
        objective="sft",
        config=config,
        folder=context.folder,
        data=demonstrations,
        initial=config.models.student,
        init=config.sft.init,
        num_steps=config.sft.num_steps,
        order_seed=config.run.seed,
    )
    require_batch(job)
    result = train_on_ranks(job)
    # Before the files are listed with their checksums, because it changes some of them.
    complete_student_files(job.model, template_folder(config), end_token_ids(context.end_models))
    # The model is part of the artifact: its files stand in the manifest with their checksums.
    writer.finish(files=job.files, **result)


def demonstrations_of(context: StageContext) -> tuple[Path, dict[str, object]]:
    """Return the folder of the demonstrations, and what is known of the teacher that made them."""
    settings = context.config.sft
    if settings.demonstrations is None:
        return context.folder_of("demonstrate"), dict(context.manifest_of("demonstrate").lineage)
    # Demonstrations from elsewhere. Their manifest may name the teacher; what the user declares is
    # recorded as declared.
    teacher = settings.declared_teacher
    identity = identify_model(teacher) if teacher is not None else None
    return settings.demonstrations, lineage_of(read_manifest(settings.demonstrations), identity)


def _take_over(context: StageContext, checkpoint: Path) -> None:
    """Publish an SFT student that was made elsewhere as the result of this stage.

    The manifest records its teacher as declared, because nothing here can prove who it was.
    """
    teacher = context.config.sft.declared_teacher
    lineage = declared(identify_model(teacher) if teacher is not None else None)
    writer = context.writer(models={"student": context.identity("student")}, lineage=lineage)
    target = context.folder / MODEL
    # A copy, not a link: the checkpoint may change or go away, and later stages verify these files.
    partial = target.with_name(target.name + ".copying")
    remove_folder(partial)
    with storage_errors(target):
        partial.mkdir(parents=True)
        for path in sorted(checkpoint.iterdir()):
            if path.suffix in _TAKEN_SUFFIXES:
                shutil.copyfile(path, partial / path.name)
        config = context.config
        ends = end_token_ids(context.end_models)
        complete_student_files(partial, template_folder(config), ends)
        remove_folder(target)
        # Only a whole copy gets the final name, whatever ends this process.
        partial.rename(target)
    context.log(
        f"{checkpoint} is the SFT student; its teacher: {teacher or 'unknown'} "
        f"({lineage['evidence']})"
    )
    writer.finish(
        files=(path for path in target.iterdir() if path.is_file()),
        taken_from=str(checkpoint),
        # The metrics of a training without steps.
        num_steps=0,
        num_tokens=0,
        first_loss=None,
        last_loss=None,
        weight_syncs=0,
    )


def _parents(config: Config) -> tuple[str, ...]:
    """Demonstrations or a checkpoint from elsewhere need no earlier stage."""
    is_given = config.sft.demonstrations is not None or config.sft.checkpoint is not None
    return () if is_given else ("demonstrate",)


STAGE = Stage(
    name="sft",
    summary="The base student, on Megatron-Core, learns the demonstrations.",
    kind="sft_student",
    knobs=("sft",),
    models=("student",),
    prompts=(),
    parents=_parents,
    run=run,
)

if __name__ == "__main__":
    from lopd.stages.training_rank import run_rank

    run_rank(train)
