"""Bytes on disk of a run, by what takes them, and whether the disks have room for them.

``lopd plan`` shows the terms. ``lopd check`` and ``lopd doctor`` judge the disks of this machine,
both by judge_room, so that they cannot disagree.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from lopd.config import Config, ParallelSection, TrainSection
from lopd.config.hub import hub_folder, hub_name
from lopd.errors import ConfigError
from lopd.megatron.weights.architecture import Architecture
from lopd.planning.assumptions import Assumptions
from lopd.planning.hours import Amounts
from lopd.planning.memory import SIZES
from lopd.planning.models import planned_models
from lopd.planning.parameters import adapter_parameters, total_and_active

_GIB = 2**30
# Bytes of a parameter in a published checkpoint, which is bfloat16.
_FETCHED_BYTES = 2.0

# Per parameter of a checkpoint besides the weights: two moments and the master weights of AdamW,
# each in float32.
CHECKPOINT_BYTES = 12
# Hugging Face folders of a run: SFT student, longer SFT, distilled student, export.
MODELS = 4


def disk_bytes(
    config: Config, student: Architecture, amounts: Amounts, assumed: Assumptions
) -> dict[str, float]:
    """Return bytes on disk by what takes them.

    Args:
        config: The configuration of the run.
        student: The shape of the student.
        amounts: Numbers of prompts and lengths of responses.
        assumed: Bytes per token of an artifact.
    """
    parameters = total_and_active(student)[0]
    demonstrations = (
        amounts.sft_prompts * config.demonstrate.samples_per_prompt * amounts.demonstration_len
    )
    # A published size, without the padding of the vocabulary.
    parameters = total_and_active(student)[0]
    # Response tokens. Those of prompts are few beside them.
    rollouts = amounts.opd_prompts * config.rollout.samples_per_prompt * amounts.rollout_len
    # Teacher, base, SFT and distilled student answer, and the longer SFT if it is trained.
    evaluated = 5 if config.evaluate.equal_compute_baseline else 4
    answers = (
        amounts.eval_prompts * config.evaluate.samples_per_prompt * amounts.answer_len * evaluated
    )
    if not config.evaluate.enabled:
        answers = 0.0
    # What the configuration gives lies elsewhere.
    if config.sft.demonstrations is not None or config.sft.checkpoint is not None:
        demonstrations = 0.0
    if config.distill.cache is not None:
        rollouts = 0.0
    # About a byte for an expert: a number of a dictionary has as many bits as the experts need.
    is_routed = config.rollout.routed_experts
    experts = student.num_layers * student.experts_per_token if is_routed else 0
    # Prompts are routed as well.
    routed = rollouts * (1 + amounts.prompt_len / max(1, amounts.rollout_len)) * experts
    return {
        "checkpoints to resume from": _checkpoint_bytes(config, student),
        "models": float(MODELS * parameters * SIZES[config.distill.dtype]),
        "demonstrations": demonstrations * assumed.bytes_per_token,
        # The cache has all columns of the rollouts, and the teacher's log-probabilities besides.
        "rollouts and cache": 2 * (rollouts * assumed.bytes_per_token + routed),
        "answers": answers * assumed.bytes_per_token,
    }


def room_needed(config: Config) -> dict[Path, float]:
    """Return the bytes that a run needs by the folder that gets them: run.dir, and the hub's.

    Raises:
        LopdError: The shape of a model cannot be found.
    """
    assumed = Assumptions()
    models = planned_models(config, {})
    sizes = {role: total_and_active(model.arch)[0] for role, model in models.items()}
    run = disk_bytes(config, models["student"].arch, Amounts.of(config, assumed), assumed)
    # Prompt files are small beside models, and are not counted.
    paths = {"teacher": config.models.teacher, "student": config.models.student}
    paths |= {f"teachers.{domain}": folder for domain, folder in config.models.teachers.items()}
    if config.models.teacher_base is not None:
        # What the teacher was before has the teacher's size.
        paths["teacher_base"] = config.models.teacher_base
        sizes["teacher_base"] = sizes["teacher"]
    # A set, because two roles may have one model, which is fetched once.
    missing = {
        (path, sizes[role])
        for role, path in paths.items()
        if hub_name(path) is not None and not path.exists()
    }
    to_fetch = sum(size for _, size in missing) * _FETCHED_BYTES
    return {config.run.dir: sum(run.values()), hub_folder(): to_fetch}


def disk_of(folder: Path) -> tuple[int, int]:
    """Return the number of the disk of a folder, and its free bytes.

    Raises:
        OSError: A folder on the way may not be entered, or a name is too long.
    """
    # The folder itself need not exist yet. The nearest one above it is on the same disk.
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return existing.stat().st_dev, shutil.disk_usage(existing).free


def judge_room(
    needs: Mapping[Path, float], disks: Mapping[Path, tuple[int, int]]
) -> Iterator[str | ConfigError]:
    """Yield for each disk whether it has the room that is needed.

    Args:
        needs: The bytes that each folder gets (see room_needed).
        disks: The number of the disk and the free bytes of each folder.
    """
    # If both folders are on one disk, it must have room for the sum.
    folders_of: dict[int, list[Path]] = {}
    for folder, size in needs.items():
        # A folder that gets nothing needs no mention.
        if size > 0:
            folders_of.setdefault(disks.get(folder, (0, 0))[0], []).append(folder)
    # One finding for each disk, not for each folder.
    for folders in folders_of.values():
        needed = sum(needs[folder] for folder in folders)
        free = disks.get(folders[0], (0, 0))[1]
        where = " and ".join(map(str, folders))
        # The figure is that of a plan, and an estimate.
        if free < needed:
            yield ConfigError(
                f"the disk has only {_room(free)} free",
                where=where,
                limit=f"at least about {_room(needed)}",
                remedy="delete files on this disk, or set run.dir and LOPD_HUB to other disks",
            )
        else:
            yield f"{where}: {_room(free)} free, about {_room(needed)} needed"


def _room(size: float) -> str:
    """Return bytes in a unit in which they are not 0."""
    return f"{size / _GIB:,.0f} GiB" if size >= _GIB else f"{size / 2**20:,.0f} MiB"


def _checkpoint_bytes(config: Config, student: Architecture) -> float:
    """Return the bytes of all checkpoints to resume from."""
    trainings: list[TrainSection] = [config.distill]
    # A given student is not trained, so that SFT has no checkpoints.
    if config.sft.checkpoint is None:
        trainings.append(config.sft)
    size = 0.0
    for settings in trainings:
        # At the end a model is exported, and no checkpoint is needed. So a training that saves
        # none before its last step has none.
        before_the_end = (settings.num_steps - 1) // settings.checkpoint_every
        # One more than is kept: the oldest is removed when the newest is whole.
        saved = min(before_the_end, settings.keep_checkpoints + 1)
        # Of a training of adapters a checkpoint has the adapters alone.
        if settings.lora.is_on:
            parameters = adapter_parameters(student, ParallelSection(), settings.lora).total
        else:
            parameters = total_and_active(student)[0]
        size += saved * parameters * (CHECKPOINT_BYTES + SIZES[settings.dtype])
    return size
