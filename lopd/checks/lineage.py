"""What ``lopd check`` says of whose scores are whose: teachers of single domains, demonstrations
from elsewhere, a cache that is given. Starts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from lopd.artifacts import identify_model, read_manifest, verify
from lopd.artifacts import lineage as consistency
from lopd.checks.findings import Finding
from lopd.config import Config
from lopd.config.hub import hub_name, remedy_for
from lopd.errors import ConfigError, DataError
from lopd.megatron.weights.architecture import read_architecture
from lopd.megatron.weights.hf_files import CheckpointReader
from lopd.tasks import get_task
from lopd.tasks.prompts import read_prompts


def teachers(config: Config) -> Iterator[Finding]:
    """Those of single domains are whole, have the student's tokenizer, and prompts to score."""
    models = config.models
    for domain, folder in models.teachers.items():
        if not folder.is_dir():
            raise ConfigError(
                f"models.teachers.{domain}: no such folder",
                where=str(folder),
                remedy=remedy_for(folder, "give the folder of a Hugging Face checkpoint"),
            )
        with CheckpointReader(folder, read_architecture(folder)):
            pass
        consistency.check_same_tokenizer(identify_model(folder), identify_model(models.student))
        yield f"{domain}: {folder}"
    if not models.teachers:
        return
    if config.sglang.teacher_urls:
        remedy = "leave sglang.teacher_urls out: lopd then starts a server for each teacher, one after the other"
        yield ConfigError(
            "sglang.teacher_urls with models.teachers",
            where="sglang.teacher_urls",
            limit="servers of one teacher",
            remedy=remedy,
        )
    present = {
        prompt.domain
        for prompt in read_prompts(
            config.prompts.opd, get_task(config.task.name, config.task.options)
        )
    }
    for domain in models.teachers.keys() - present:
        limit = f"the domains of prompts.opd: {', '.join(sorted(present))}"
        yield ConfigError(
            f"models.teachers.{domain}: no prompt of this domain",
            where="models.teachers",
            limit=limit,
            remedy="leave it out, or mend its name",
        )


def checkpoint(config: Config) -> Iterator[Finding]:
    """An SFT student made elsewhere is whole, of the student's architecture and tokenizer, and its
    declared teacher is the one that is to score.
    """
    sft, folder = config.sft, config.sft.checkpoint
    if folder is None:
        return
    yield from checkpoint_problems(config)
    own, other = read_architecture(config.models.student), read_architecture(folder)
    if own != other:
        raise ConfigError(
            "another architecture than models.student",
            where=str(folder),
            limit=str(config.models.student),
            remedy="give its own base model",
        )
    with CheckpointReader(folder, other):
        pass
    consistency.check_same_tokenizer(identify_model(config.models.student), identify_model(folder))
    teacher = identify_model(sft.declared_teacher) if sft.declared_teacher is not None else None
    found = consistency.check_scoring_teacher(
        consistency.declared(teacher),
        identify_model(config.models.teacher),
        allow_foreign=config.score.allow_foreign_teacher,
    )
    yield f"{folder}, its teacher {'declared' if found['consistent'] else 'NOT that of the scores (score.allow_foreign_teacher is set)'}"


def checkpoint_problems(config: Config, *, to_fetch: bool = False) -> Iterator[ConfigError]:
    """What does not go with an SFT student made elsewhere. to_fetch: one that is still on the hub
    is no problem. ConfigError: it is not there.
    """
    sft, folder = config.sft, config.sft.checkpoint
    if folder is None:
        return
    if sft.demonstrations is not None:
        raise ConfigError(
            "sft.checkpoint and sft.demonstrations",
            where="sft",
            limit="one of the two",
            remedy="leave out what is not to be used",
        )
    if sft.init == "random":
        yield ConfigError(
            'sft.init = "random" with sft.checkpoint',
            where="sft",
            limit="nothing is trained",
            remedy="leave out what is not to be used",
        )
    if config.evaluate.equal_compute_baseline:
        remedy = "set evaluate.equal_compute_baseline = false"
        yield ConfigError(
            "the equal-compute baseline goes on with SFT",
            where="sft.checkpoint",
            limit="no demonstrations to go on with",
            remedy=remedy,
        )
    if not folder.is_dir() and not (to_fetch and hub_name(folder) is not None):
        raise ConfigError(
            "sft.checkpoint: no such folder",
            where=str(folder),
            remedy=remedy_for(folder, "give the folder of a Hugging Face checkpoint"),
        )


def cache(config: Config) -> Iterator[Finding]:
    """A cache that is given is complete, and, where the SFT student is there already, that
    student's.
    """
    folder = config.distill.cache
    if folder is None:
        return
    manifest, student = read_manifest(folder), config.run.dir / "sft" / "model"
    if not (student / "config.json").is_file():
        yield f"{manifest.kind} of {manifest.rows:,} responses; whose they are is compared once the SFT student is there"
        return
    found = consistency.check_given_cache(
        manifest, folder, identify_model(student), allow_foreign=config.distill.allow_foreign_cache
    )
    yield str(found["cache"]["note"])


def lineage(config: Config) -> Iterator[Finding]:
    """Demonstrations from elsewhere were made by the teacher that is to score (those of the
    demonstrate stage always are).
    """
    folder = config.sft.demonstrations
    if (
        folder is None or not (config.models.teacher / "config.json").is_file()
    ):  # the teacher's own check has said so
        return
    manifest = read_manifest(folder)
    declared = (
        identify_model(config.sft.declared_teacher)
        if config.sft.declared_teacher is not None
        else None
    )
    known = consistency.lineage_of(manifest, declared)
    for domain, teacher in config.models.teachers.items() or (("", config.models.teacher),):
        own = consistency.lineage_in(known, domain) if domain else known
        found = consistency.check_scoring_teacher(
            own, identify_model(teacher), allow_foreign=config.score.allow_foreign_teacher
        )
        name = f"models.teachers.{domain}" if domain else "models.teacher"
        yield (
            f"made by {name}"
            if found["consistent"]
            else f"NOT made by {name} (score.allow_foreign_teacher is set)"
        )


def demonstrations(config: Config) -> Iterator[Finding]:
    """Demonstrations from elsewhere are whole, and of the student's tokenizer."""
    folder = config.sft.demonstrations
    if folder is None:
        return
    manifest = read_manifest(folder)
    if not manifest.complete or manifest.rows == 0:
        what = (
            f"{manifest.rows} demonstrations, {'complete' if manifest.complete else 'not complete'}"
        )
        raise DataError(
            what,
            where=str(folder),
            limit="at least 1, complete",
            remedy="finish the run that makes them",
        )
    verify(folder, manifest)
    if "teacher" in manifest.models and (config.models.student / "config.json").is_file():
        consistency.check_same_tokenizer(
            manifest.models["teacher"], identify_model(config.models.student)
        )
    yield f"{manifest.rows} from {folder}"
