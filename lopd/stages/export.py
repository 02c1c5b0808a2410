"""Export: the distilled student as a Hugging Face folder, with a card that says how it was made.

transformers and SGLang load the folder as it is.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lopd.artifacts import (
    EXPORT_MARK,
    check_replaceable,
    fsync_folder,
    publish_bytes,
    publish_json,
    remove_folder,
    storage_errors,
)
from lopd.config.distill import LOSS_TITLES
from lopd.config.secrets import scrubbed
from lopd.errors import ArtifactError
from lopd.stages.context import Stage, StageContext
from lopd.stages.training import ADAPTER, MODEL


def run(context: StageContext) -> None:
    """Write the student as a Hugging Face checkpoint, and check that transformers can load it."""
    source = context.folder_of("distill") / MODEL
    target = context.config.export.dir or context.folder / MODEL
    lineage = context.manifest_of("distill").lineage
    writer = context.writer(models={"student": context.identity("student")}, lineage=lineage)
    # export.dir may be any folder of the user's. Only an earlier export is ever replaced.
    check_replaceable(target, EXPORT_MARK)
    # All of it is made beside the target and renamed at the end, so that nobody who uses the folder
    # sees half of a model.
    partial = target.with_name(target.name + ".copying")
    remove_folder(partial)
    with storage_errors(target):
        partial.mkdir(parents=True)
        # Copied and not moved: the artifact of distill stays what its manifest says.
        for path in source.iterdir():
            shutil.copyfile(path, partial / path.name)
        # In a folder of its own: beside the weights, PEFT would add it to them a second time.
        if context.config.distill.lora.is_on:
            shutil.copytree(context.folder_of("distill") / ADAPTER, partial / ADAPTER)
    publish_bytes(partial / "README.md", _card(context).encode())
    # This file marks the folder as an export of lopd, which a later export may replace.
    record = {
        "lineage": dict(lineage),
        "parents": context.parents,
        "config": scrubbed(context.config.model_dump(mode="json")),
    }
    publish_json(partial / EXPORT_MARK, record)
    # Before the previous export is removed: a folder that does not load must not take its place.
    _check_loads(partial)
    remove_folder(target)
    partial.rename(target)
    # The rename is on disk before the manifest says that the model is there.
    fsync_folder(target.parent)
    # Files outside of the run directory are listed by their whole path.
    writer.finish(files=(path for path in target.rglob("*") if path.is_file()), model=str(target))


def _check_loads(folder: Path) -> None:
    """Raise ArtifactError unless transformers loads every weight of the folder as it is."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # From this folder alone and without its code: as a user without network would load it.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, trust_remote_code=False
    )
    # The second value names the weights that are missing, unexpected or of another shape.
    report: dict[str, Any] = loaded[1]
    problems: dict[str, Any] = {
        name: sorted(map(str, found))
        for name, found in report.items()
        if found and name != "error_msgs"
    }
    if problems:
        raise ArtifactError(
            "transformers cannot load the exported weights without changes: "
            f"{json.dumps(problems)[:300]}",
            where=str(folder),
            remedy="install the version of transformers that lopd pins, and run the stage export "
            "again",
        )


def _card(context: StageContext) -> str:
    """Return the README of the exported folder."""
    config = context.config
    distilled = context.manifest_of("distill")
    figures = distilled.extra
    evidence = distilled.lineage.get("evidence")
    # A card must not claim what the lineage does not show.
    same = "NOT shown to be the teacher of the demonstrations"
    if distilled.lineage.get("consistent"):
        same = "the teacher of the demonstrations"
    first_loss = f"{figures['first_loss']:.4g}"
    last_loss = f"{figures['last_loss']:.4g}"
    loss = config.distill.objective.loss
    tags = "lightning-opd, distillation"
    method = "offline on-policy distillation, arXiv 2604.13010"
    # The card names the loss that was used, which need not be the paper's.
    if loss != "lightning":
        tags = "distillation"
        method = f"`{loss}`, on rollouts and a cache as in Lightning OPD, arXiv 2604.13010"
    # The weights are those of the base and of the adapter together.
    lora = config.distill.lora
    adapter = ""
    if lora.is_on:
        adapter = (
            f"- trained by LoRA ({lora.describe()}); the weights have the adapter in them, and\n"
            f"  `{ADAPTER}/` has it alone, for the SFT student, as PEFT reads it\n"
        )
    return f"""---
library_name: transformers
tags: [{tags}]
---
Distilled by {LOSS_TITLES[loss]} ({method}) with lopd.

- base student: `{config.models.student.name}`
- teacher: `{config.models.teacher.name}` ({same}; evidence: {evidence})
- {figures["num_steps"]} steps, {figures["num_tokens"]} tokens, loss {first_loss} to {last_loss}
{adapter}- artifact fingerprint: `{distilled.fingerprint}`
"""


STAGE = Stage(
    name="export",
    summary=(
        "The distilled student as a Hugging Face checkpoint, "
        "checked by loading it with transformers."
    ),
    kind="exported_student",
    knobs=("export",),
    models=("student",),
    prompts=(),
    parents=lambda config: ("distill",),
    run=run,
)
