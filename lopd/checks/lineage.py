"""Whose scores are whose: teachers of single domains, and artifacts that were made elsewhere.

lopd.artifacts.lineage has the rules. Here they are applied to what a configuration names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lopd.artifacts import identify_model, identify_tokenizer, read_manifest, verify
from lopd.artifacts import lineage as consistency
from lopd.cache.reader import CacheReader
from lopd.cache.verdicts import read_verdict_manifest
from lopd.checks.findings import Finding, architecture_of
from lopd.checks.training import batch_problem
from lopd.config import Config
from lopd.config.hub import absent, hub_name
from lopd.errors import ConfigError, DataError, LopdError
from lopd.megatron.weights.architecture import read_architecture
from lopd.megatron.weights.checkpoint_files import inspect_checkpoint
from lopd.records import ModelIdentity
from lopd.tasks import get_task
from lopd.tasks.prompts import read_prompts


def teachers(config: Config) -> Iterator[Finding]:
    """Check the teachers of single domains.

    They must be whole, have the student's tokenizer, and have prompts to score.
    """
    models = config.models
    for domain, folder in models.teachers.items():
        if not folder.is_dir():
            raise absent(
                folder,
                f"models.teachers.{domain}: no such folder",
                otherwise="give the folder of a Hugging Face checkpoint",
            )
        # The headers, which name every tensor.
        yield from inspect_checkpoint(folder, read_architecture(folder)).problems
        # A teacher scores the student's token ids, so the ids must mean the same text. That there
        # is one teacher alone with another tokenizer is refused by its own check.
        if not config.aligns_tokenizers:
            consistency.check_same_tokenizer(*map(identify_tokenizer, (folder, models.student)))
        yield f"{domain}: {folder}"
    if models.teacher_base is not None:
        yield from _base_problems(config, models.teacher_base)
        # One cache may serve several trainings, so this is no mistake.
        is_read = config.distill.objective.advantage == "delta"
        note = "" if is_read else '; only distill.objective.advantage = "delta" reads its scores'
        yield f"base of the teacher: {models.teacher_base}{note}"
    if not models.teachers:
        return
    # Servers of the user serve one teacher, and lopd cannot give them another one.
    if config.sglang.teacher_urls:
        yield ConfigError(
            "sglang.teacher_urls and models.teachers cannot be used together",
            where="sglang.teacher_urls",
            limit="sglang.teacher_urls are servers of exactly one teacher",
            remedy="remove sglang.teacher_urls: lopd then starts a server for each teacher, one "
            "after the other",
        )
    task = get_task(config.task.name, config.task.options)
    domains = {prompt.domain for prompt in read_prompts(config.prompts.opd, task)}
    # A misspelt domain would never be used, and its prompts would go to the general teacher.
    for domain in models.teachers.keys() - domains:
        yield ConfigError(
            f"models.teachers.{domain}: no prompt has this domain",
            where="models.teachers",
            limit=f"one of the domains of prompts.opd: {', '.join(sorted(domains))}",
            remedy="remove this teacher, or correct the name of its domain",
        )


def _base_problems(config: Config, folder: Path) -> Iterator[LopdError]:
    """Yield why the teacher's base cannot score, or would score for nothing."""
    if not folder.is_dir():
        raise absent(
            folder,
            "models.teacher_base: no such folder",
            otherwise="give the folder of a Hugging Face checkpoint",
        )
    yield from inspect_checkpoint(folder, read_architecture(folder)).problems
    # That no base goes together with a teacher of another tokenizer is refused by its own check.
    if not config.aligns_tokenizers:
        consistency.check_same_tokenizer(*map(identify_tokenizer, (folder, config.models.student)))
    for key, is_used in (
        ("models.teachers", config.models.teachers),
        ("sglang.teacher_urls", config.sglang.teacher_urls),
    ):
        # Servers of the user serve one model, and each domain's teacher would need a base.
        if is_used:
            yield ConfigError(
                f"models.teacher_base and {key} cannot be used together",
                where="models.teacher_base",
                limit="exactly one teacher, whose servers lopd starts",
                remedy=f"remove models.teacher_base or {key}",
            )


def checkpoint(config: Config) -> Iterator[Finding]:
    """Check an SFT student that was made elsewhere.

    It must be whole and have the student's architecture and tokenizer. Its declared teacher must be
    the one that will score.
    """
    folder = config.sft.checkpoint
    if folder is None:
        return
    # First the knobs, since they need no file of the checkpoint.
    yield from checkpoint_problems(config)
    own = read_architecture(config.models.student)
    other = read_architecture(folder)
    # The shapes must be equal: the student continues from these weights.
    if own != other:
        raise ConfigError(
            "the model has another architecture than models.student",
            where=str(folder),
            limit=f"the architecture of {config.models.student}",
            remedy="set models.student to the base model of this checkpoint",
        )
    # Every tensor must be there: a checkpoint cut short would fail only when training reads it.
    yield from inspect_checkpoint(folder, other).problems
    consistency.check_same_tokenizer(*map(identify_tokenizer, (config.models.student, folder)))
    # A checkpoint does not say who taught it. Only the user can.
    found = consistency.check_scoring_teacher(
        consistency.declared(_declared_teacher(config)),
        identify_model(config.models.teacher),
        allow_foreign=config.score.allow_foreign_teacher,
    )
    if found["consistent"]:
        yield f"{folder}, its teacher declared"
    else:
        yield (f"{folder}, its teacher NOT that of the scores (score.allow_foreign_teacher is set)")


def checkpoint_problems(config: Config, *, to_fetch: bool = False) -> Iterator[ConfigError]:
    """Yield knobs that do not go together with an SFT student that was made elsewhere.

    Args:
        config: The configuration.
        to_fetch: Whether a student that is still on the hub is no problem.

    Raises:
        ConfigError: The folder is missing, or demonstrations are given besides.
    """
    sft = config.sft
    folder = sft.checkpoint
    if folder is None:
        return
    # Nobody could say which of the two the student was made from.
    if sft.demonstrations is not None:
        raise ConfigError(
            "sft.checkpoint and sft.demonstrations cannot be used together",
            where="sft",
            limit="exactly one of the two",
            remedy="remove the one that you do not want",
        )
    # Random weights are for a student that SFT trains, and with a checkpoint SFT trains nothing.
    if sft.init == "random":
        yield ConfigError(
            'sft.init = "random" and sft.checkpoint cannot be used together: nothing is '
            "trained from a given checkpoint",
            where="sft",
            remedy="remove the one that you do not want",
        )
    # The baseline continues SFT, so it needs the demonstrations, which a given student lacks.
    if config.evaluate.equal_compute_baseline:
        yield ConfigError(
            "the equal-compute baseline continues SFT, but a given student has no "
            "demonstrations to continue with",
            where="sft.checkpoint",
            remedy="set evaluate.equal_compute_baseline = false",
        )
    # lopd plan is used before lopd fetch, so for it a name on the hub is enough.
    if not folder.is_dir() and not (to_fetch and hub_name(folder) is not None):
        raise absent(
            folder,
            "sft.checkpoint: no such folder",
            otherwise="give the folder of a Hugging Face checkpoint",
        )


def cache(config: Config) -> Iterator[Finding]:
    """Check a teacher cache that is given.

    It must be complete. If the SFT student is there already, it must be that student's.
    """
    folder = config.distill.cache
    if folder is None:
        return
    manifest = read_manifest(folder)
    yield from batch_problem(config, "distill", manifest.rows)
    _require_known_ids(config, folder)
    student = config.run.dir / "sft" / "model"
    # Before the sft stage there is no student to compare with. distill compares again.
    if not (student / "config.json").is_file():
        yield (
            f"{manifest.kind} of {manifest.rows:,} responses; "
            "whose they are is compared once the SFT student is there"
        )
        return
    # The manifest of the cache says whose responses it has, by a hash of the weights.
    found = consistency.check_given_cache(
        manifest, folder, identify_model(student), allow_foreign=config.distill.allow_foreign_cache
    )
    yield str(found["cache"]["note"])


def verdicts(config: Config) -> Iterator[Finding]:
    """Check that given verdicts are complete, and say how many responses they find right."""
    for name in ("verdicts", "teacher_verdicts"):
        folder = getattr(config.distill, name)
        if folder is not None:
            manifest = read_verdict_manifest(folder)
            # The name is shown, because verdicts of another task would be about another question.
            verifier = manifest.extra["verifier"]["name"]
            yield (
                f"distill.{name}: {manifest.extra['num_right']:,} of {manifest.rows:,} responses "
                f"right by {verifier}"
            )


def _require_known_ids(config: Config, folder: Path) -> None:
    """Check that the student has a row for every token id of an artifact."""
    student = architecture_of(config, "student")
    # Without its shape there is nothing to compare with, and its own check says why.
    if student is not None:
        CacheReader(folder).require_ids_below(student.vocab_size, "the student")


def lineage(config: Config) -> Iterator[Finding]:
    """Check that the teacher that will score also made the given sft.demonstrations.

    The demonstrate stage always uses that teacher, so its demonstrations need no check.
    """
    folder = config.sft.demonstrations
    # If the teacher cannot be read, its own check says so.
    if folder is None or not (config.models.teacher / "config.json").is_file():
        return
    known = consistency.lineage_of(read_manifest(folder), _declared_teacher(config))
    # With teachers of domains, each answers for its own domain's demonstrations.
    for domain, teacher in config.models.teachers.items() or (("", config.models.teacher),):
        found = consistency.check_scoring_teacher(
            consistency.lineage_in(known, domain) if domain else known,
            identify_model(teacher),
            allow_foreign=config.score.allow_foreign_teacher,
        )
        name = f"models.teachers.{domain}" if domain else "models.teacher"
        if found["consistent"]:
            yield f"made by {name}"
        else:
            yield f"NOT made by {name} (score.allow_foreign_teacher is set)"


def _declared_teacher(config: Config) -> ModelIdentity | None:
    """Return the teacher that the user names as the one of demonstrations or student."""
    folder = config.sft.declared_teacher
    return identify_model(folder) if folder is not None else None


def demonstrations(config: Config) -> Iterator[Finding]:
    """Check that demonstrations from elsewhere are whole, and of the student's tokenizer."""
    folder = config.sft.demonstrations
    if folder is None:
        return
    manifest = read_manifest(folder)
    # Half of the demonstrations would train another student, and the manifest would not say so.
    if not manifest.complete or manifest.rows == 0:
        state = "complete" if manifest.complete else "not complete"
        raise DataError(
            f"there are {manifest.rows} demonstrations, and the artifact is {state}",
            where=str(folder),
            limit="at least 1 demonstration in a complete artifact",
            remedy="finish the run that makes them",
        )
    # Checksums: a damaged shard would be noticed only when training reaches it.
    verify(folder, manifest)
    _require_known_ids(config, folder)
    # Those of a teacher with another tokenizer may have been brought to the student's tokens.
    aligned = consistency.alignment_of(manifest)
    if aligned is not None:
        consistency.check_same_tokenizer(
            consistency.scored_tokenizer(aligned, folder), identify_tokenizer(config.models.student)
        )
    elif "teacher" in manifest.models and (config.models.student / "config.json").is_file():
        consistency.check_same_tokenizer(
            manifest.models["teacher"], identify_tokenizer(config.models.student)
        )
    if config.sft.checkpoint is None:
        yield from batch_problem(config, "sft", manifest.rows)
    yield f"{manifest.rows} from {folder}"
