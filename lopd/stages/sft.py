"""SFT: the base student learns the teacher's demonstrations by maximum likelihood. The result is
the reference policy pi_ref.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lopd.artifacts import identify_model, read_manifest, remove_folder, storage_errors
from lopd.artifacts import lineage as consistency
from lopd.config import Config
from lopd.stages.context import Stage, StageContext
from lopd.stages.training import MODEL, TrainingJob, train

TAKEN = frozenset(
    {".safetensors", ".json", ".jinja"}
)  # of a checkpoint made elsewhere: no code, no pickles


def demonstrations_of(context: StageContext) -> tuple[Path, dict[str, object]]:
    """Folder of the demonstrations, and what is known of the teacher that made them."""
    settings = context.config.sft
    if settings.demonstrations is None:
        return context.folder_of("demonstrate"), dict(context.manifest_of("demonstrate").lineage)
    teacher = (
        identify_model(settings.declared_teacher) if settings.declared_teacher is not None else None
    )
    return settings.demonstrations, consistency.lineage_of(
        read_manifest(settings.demonstrations), teacher
    )


def take_over(context: StageContext, checkpoint: Path) -> None:
    """Publishes an SFT student made elsewhere as this stage's; its teacher is what the
    configuration declares, and recorded as declared.
    """
    teacher, target = context.config.sft.declared_teacher, context.folder / MODEL
    lineage = consistency.declared(identify_model(teacher) if teacher is not None else None)
    writer = context.writer(models={"student": context.identity("student")}, lineage=lineage)
    partial = target.with_name(target.name + ".copying")
    remove_folder(partial)
    with storage_errors(target):
        partial.mkdir(parents=True)
        for path in sorted(checkpoint.iterdir()):
            if path.suffix in TAKEN:
                shutil.copyfile(path, partial / path.name)
        remove_folder(target)
        partial.rename(target)
    context.log(
        f"{checkpoint} is the SFT student; its teacher: {teacher or 'unknown'} ({lineage['evidence']})"
    )
    nothing = {
        "num_steps": 0,
        "num_tokens": 0,
        "first_loss": None,
        "last_loss": None,
        "weight_syncs": 0,
    }
    writer.finish(
        files=(path for path in target.iterdir() if path.is_file()),
        taken_from=str(checkpoint),
        **nothing,
    )


def run(context: StageContext) -> None:
    if context.config.sft.checkpoint is not None:
        take_over(context, context.config.sft.checkpoint)
        return
    config, student = context.config, context.config.models.student
    demonstrations, lineage = demonstrations_of(context)
    writer = context.writer(models={"student": context.identity("student")}, lineage=lineage)
    job = TrainingJob(
        objective="sft",
        config=config,
        folder=context.folder,
        data=demonstrations,
        initial=student,
        init=config.sft.init,
        num_steps=config.sft.num_steps,
        order_seed=config.run.seed,
    )
    result = train(job)
    writer.finish(files=(path for path in job.model.iterdir() if path.is_file()), **result)


def _parents(config: Config) -> tuple[str, ...]:
    return (
        ("demonstrate",)
        if config.sft.demonstrations is None and config.sft.checkpoint is None
        else ()
    )


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
