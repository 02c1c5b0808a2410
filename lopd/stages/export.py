"""Export: the distilled student as a Hugging Face folder that transformers and SGLang load as it
is, with a model card that says how it was made.
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
from lopd.config.secrets import scrubbed
from lopd.errors import ArtifactError
from lopd.stages.context import Stage, StageContext
from lopd.stages.training import MODEL


def run(context: StageContext) -> None:
    source = context.folder_of("distill") / MODEL
    target = context.config.export.dir or context.folder / MODEL
    lineage = context.manifest_of("distill").lineage
    writer = context.writer(models={"student": context.identity("student")}, lineage=lineage)
    check_replaceable(target, EXPORT_MARK)
    partial = target.with_name(target.name + ".copying")
    remove_folder(partial)
    with storage_errors(target):
        partial.mkdir(parents=True)
        for path in source.iterdir():
            shutil.copyfile(path, partial / path.name)
    publish_bytes(partial / "README.md", _card(context).encode())
    publish_json(
        partial / EXPORT_MARK,
        {
            "lineage": dict(lineage),
            "parents": context.parents,
            "config": scrubbed(context.config.model_dump(mode="json")),
        },
    )
    check_loads(partial)
    remove_folder(target)
    partial.rename(target)
    fsync_folder(target.parent)
    writer.finish(files=(path for path in target.iterdir() if path.is_file()), model=str(target))


def check_loads(folder: Path) -> None:
    """ArtifactError unless transformers loads the folder with no weight missing, unexpected or of
    another shape.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, trust_remote_code=False
    )
    report: dict[str, Any] = loaded[1]
    problems: dict[str, Any] = {
        name: sorted(map(str, found))
        for name, found in report.items()
        if found and name != "error_msgs"
    }
    if problems:
        raise ArtifactError(
            f"transformers does not load the exported weights as they are: {json.dumps(problems)[:300]}",
            where=str(folder),
        )


def _card(context: StageContext) -> str:
    distilled, lineage = context.manifest_of("distill"), context.manifest_of("distill").lineage
    same = (
        "the teacher of the demonstrations"
        if lineage.get("consistent")
        else "NOT shown to be the teacher of the demonstrations"
    )
    return f"""---
library_name: transformers
tags: [lightning-opd, distillation]
---
Distilled by Lightning OPD (offline on-policy distillation, arXiv 2604.13010) with lopd.

- base student: `{context.config.models.student.name}`
- teacher: `{context.config.models.teacher.name}` ({same}; evidence: {lineage.get("evidence")})
- {distilled.extra["num_steps"]} steps, {distilled.extra["num_tokens"]} tokens, loss {distilled.extra["first_loss"]:.4g} to {distilled.extra["last_loss"]:.4g}
- artifact fingerprint: `{distilled.fingerprint}`
"""


STAGE = Stage(
    name="export",
    summary="The distilled student as a Hugging Face checkpoint, checked by loading it with transformers.",
    kind="exported_student",
    knobs=("export",),
    models=("student",),
    prompts=(),
    parents=lambda config: ("distill",),
    run=run,
)
