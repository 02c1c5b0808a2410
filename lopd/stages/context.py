"""What a stage knows: the configuration, its folder, its parents, and how to serve a model.

The method itself is in the stages' own files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.artifacts import (
    MANIFEST,
    ArtifactWriter,
    Share,
    identify_model,
    identify_tokenizer,
    read_manifest,
)
from lopd.artifacts.file_hashes import HASHES, SHOWN_BYTES
from lopd.artifacts.fingerprints import weight_files
from lopd.config import Config, SGLangSection, result_keys
from lopd.config.secrets import scrubbed_inputs
from lopd.records import Manifest, ModelIdentity, Prompt
from lopd.report.console import print_line, progress
from lopd.tasks.chat_template import template_inputs
from lopd.tasks.environments import environment_identity
from lopd.tasks.rows import content_hash
from sglang_rollout.servers.shared_gpus import student_settings

if TYPE_CHECKING:
    from lopd.stages.overlap import Overlap
    from sglang_rollout.requests.client import SGLangEngine


# Knobs that the record of plain rollouts does not have.
_NOT_PLAIN = (
    "environment",
    "max_turns",
    "environment_timeout_s",
    "responses",
    "allow_foreign_responses",
)


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    ``knobs``, ``models``, ``prompts`` and ``parents`` decide its result. It is reused where none of
    them has changed.
    """

    # The verb that runs it, and the name of its folder.
    name: str
    # One sentence for --help.
    summary: str
    # What its artifact is, for the manifest.
    kind: str
    # Sections of the configuration.
    knobs: tuple[str, ...]
    # The roles, "teacher" and "student", whose content it depends on.
    models: tuple[str, ...]
    # The prompt sets that it reads.
    prompts: tuple[str, ...]
    # The stages whose artifacts it reads.
    parents: Callable[[Config], tuple[str, ...]]
    # Publishes the artifact.
    run: Callable[[StageContext], None]


@dataclass
class StageContext:
    """A stage together with the configuration of the run."""

    config: Config
    stage: Stage
    # Models by role. The stages of one command share them: it takes long to hash the weights.
    identities: dict[str, ModelIdentity] = field(default_factory=dict)
    # What is known of the servers of each role. It is a function, because a server may be restarted
    # until the manifest is written.
    _served: dict[str, Callable[[], dict[str, Any]]] = field(default_factory=dict)
    # What this process does of a stage that several workers share.
    share: Share | None = None
    # What the stages of one command share, where they may overlap.
    overlap: Overlap | None = None

    def of_stage(self, stage: Stage) -> StageContext:
        """Return the context of another stage of the same run."""
        return StageContext(self.config, stage, self.identities)

    @property
    def folder(self) -> Path:
        return self.folder_of(self.stage.name)

    def folder_of(self, stage: str) -> Path:
        return self.config.run.dir / stage

    def manifest_of(self, stage: str) -> Manifest:
        """Return a stage's manifest. ArtifactError: The stage has published nothing."""
        return read_manifest(self.folder_of(stage))

    def identity(self, role: str) -> ModelIdentity:
        """Return a model by its content.

        Args:
            role: "teacher", "student" (the base student), "teacher_base" or "teachers.DOMAIN".
        """
        if role not in self.identities:
            # Only the first dot separates: the name of a domain may hold others.
            section, _, domain = role.partition(".")
            folder = getattr(self.config.models, section)
            self.identities[role] = _identify(role, folder[domain] if domain else folder)
        return self.identities[role]

    @property
    def end_models(self) -> tuple[Path, ...]:
        """The models whose files say how a response ends."""
        return self.config.student_token_models

    @cached_property
    def parents(self) -> dict[str, str]:
        """The fingerprint of each parent's artifact, by the parent's name."""
        # Fingerprints and not paths: a parent that was made again is another parent.
        names = self.stage.parents(self.config)
        return {name: self.manifest_of(name).fingerprint for name in names}

    @property
    def prompt_sets(self) -> tuple[str, ...]:
        """The prompt sets that the stage reads."""
        # Only with a prompt of the teacher's own does scoring read prompts.
        is_asked = "score" in self.stage.knobs and self.config.score.teacher_prompt is not None
        return (*self.stage.prompts, "opd") if is_asked else self.stage.prompts

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Everything but the parents that decides this stage's result, as a flat table."""
        config = self.config
        prompt_sections = [f"prompts.{name}" for name in self.prompt_sets]
        sections = ("run.seed", *self.stage.knobs, *prompt_sections)
        # A manifest is published, so it holds no secret. Knobs that change only the speed are left
        # out: with another value the artifact is the same.
        keys = scrubbed_inputs(result_keys(config, sections))
        # Models and files are named by content: the same weights in another folder are the same.
        for role in self.stage.models:
            identity = self.identity(role)
            keys[f"models.{role}"] = identity.weights
            keys[f"models.{role}.tokenizer"] = [identity.tokenizer, identity.template]
        if "teacher" in self.stage.models:
            for domain in config.models.teachers:
                keys[f"models.teachers.{domain}"] = self.identity(f"teachers.{domain}").weights
        if "score" in self.stage.knobs and config.models.teacher_base is not None:
            keys["models.teacher_base"] = self.identity("teacher_base").weights
        if config.aligns_tokenizers and "demonstrate" in self.stage.knobs:
            # The teacher's answers are kept in the student's tokens, behind the student's prompt.
            keys["score.tokenizer"] = config.score.tokenizer
            tokenizer = identify_tokenizer(config.models.student)
            keys["models.student.tokenizer"] = [tokenizer.tokenizer, tokenizer.template]
        if config.models.teachers and self.stage.prompts:
            # Prompts are sampled domain by domain, so the names of the domains decide the shards.
            keys["models.teachers"] = sorted(config.models.teachers)
        # SFT reads no prompts itself, but the template becomes a file of its student.
        if self.prompt_sets or "sft" in self.stage.knobs:
            keys |= template_inputs(config)
        for name in self.prompt_sets:
            file = getattr(config.prompts, name).file
            keys[f"prompts.{name}.file"] = content_hash(file) if file is not None else None
        # What comes from outside of this run has no parent whose fingerprint would stand for it.
        if "sft" in self.stage.knobs and config.sft.demonstrations is not None:
            keys["sft.demonstrations"] = read_manifest(config.sft.demonstrations).fingerprint
        if "sft" in self.stage.knobs and config.sft.checkpoint is not None:
            keys["sft.checkpoint"] = identify_model(config.sft.checkpoint).weights
        if "rollout" in self.stage.knobs and config.rollout.environment is not None:
            keys["rollout.environment"] = environment_identity(config.rollout.environment)
        if "rollout" in self.stage.knobs and config.rollout.responses is not None:
            keys["rollout.responses"] = read_manifest(config.rollout.responses).fingerprint
        if "distill" in self.stage.knobs and config.distill.cache is not None:
            keys["distill.cache"] = read_manifest(config.distill.cache).fingerprint
        for name in ("verdicts", "teacher_verdicts") if "distill" in self.stage.knobs else ():
            folder = getattr(config.distill, name)
            if folder is not None:
                keys[f"distill.{name}"] = read_manifest(folder).fingerprint
        return keys

    def writer(
        self, *, folder: Path | None = None, kind: str | None = None, **about: Any
    ) -> ArtifactWriter:
        """Open this stage's artifact, and continue from what is published.

        Args:
            folder: The folder of a part of the artifact, or None for the stage's own folder.
            kind: The kind of the part, or None for the stage's kind.
            about: More arguments of ArtifactWriter.
        """
        if (self.folder / MANIFEST).exists():
            # The same inputs, without the knobs that are newer than the artifact.
            inputs = self.manifest_of(self.stage.name).inputs
        else:
            inputs = self.inputs
        return ArtifactWriter(
            folder or self.folder,
            kind=kind or self.stage.kind,
            inputs=inputs,
            parents=self.parents,
            share=self.share,
            **about,
        )

    def sampling_record(self, section: Any) -> Mapping[str, Any]:
        """Return the sampling parameters of a section for a manifest."""
        # The shard size decides no response. The servers' number format does, by rounding.
        parameters = section.model_dump(mode="json", exclude={"shard_size", *_NOT_PLAIN})
        of_turns = {}
        if getattr(section, "environment", None) is not None:
            of_turns = {
                "environment": section.environment.name,
                "max_turns": section.max_turns,
            }
        return {**parameters, **of_turns, "dtype": self.config.sglang.dtype}

    def prompts(
        self, name: str, *, need_answers: bool | None = None, record: bool = True
    ) -> tuple[list[Prompt], list[Any]]:
        """Return a prompt set, and the token ids [P] of each prompt with the chat template.

        Args:
            name: "sft", "opd" or "eval".
            need_answers: Whether a prompt without an answer is refused. None: in "eval" alone.
            record: Whether a template's time may be recorded in the run directory.

        Raises:
            DataError: A prompt cannot be used. See lopd.tasks.prompts.
        """
        # Imported here: the ranks of a training need no tokenizer.
        from lopd.tasks import get_task
        from lopd.tasks.chat_template import prompt_tokenizer, render_time
        from lopd.tasks.prompts import load_prompts
        from lopd.tasks.rendered import kept_in

        return load_prompts(
            getattr(self.config.prompts, name),
            get_task(self.config.task.name, self.config.task.options),
            prompt_tokenizer(self.config),
            context_length=self.config.sglang.context_length,
            # The method itself needs no answers. Only held-out prompts are judged.
            need_answers=name == "eval" if need_answers is None else need_answers,
            # Recorded at the first use: every stage renders the prompts of the same moment.
            time=render_time(self.config, record=record),
            kept=kept_in(self.config.run.dir, name, can_write=record),
        )

    @contextlib.contextmanager
    def serve(
        self, role: str, model: Path, settings: SGLangSection | None = None
    ) -> Iterator[SGLangEngine]:
        """Serve a model with SGLang as long as the block lasts.

        The servers are those of sglang.teacher_urls or sglang.student_urls. Without such a list
        they are started here, and end with this process, whatever ends it.

        Args:
            role: The role of the model. It names the log of the servers and their record in the
                manifest.
            model: The model.
            settings: The settings of servers that are started here, or None for the section sglang.

        Raises:
            EngineError: A server does not start, or serves another model.
        """
        # Imported here: the ranks of a training import this file and start no server.
        from lopd.stages.user_servers import use_servers
        from sglang_rollout.requests.external import probe_logprobs, vocab_size_of
        from sglang_rollout.requests.fleet import serve

        # By the model, not by the role: evaluate serves the teacher under the role "evaluated".
        is_teacher = model == self.config.models.teacher
        urls = self.config.sglang.teacher_urls if is_teacher else self.config.sglang.student_urls
        if urls:
            # A teacher is fixed, so its servers have it already. The student's weights change.
            engine, found = use_servers(
                self.config, role, urls, model, loads_weights=not is_teacher, log=self.log
            )
            self._served[role] = lambda: found
            yield engine
            return
        is_kept = self.overlap is not None and self.overlap.has_server
        self.log(f"{'SGLang gets' if is_kept else 'starting SGLang with'} {model}")
        start = serve if self.overlap is None else self.overlap.serve
        log = self.folder / f"sglang-{role}.log"
        settings = settings or self._settings_of(role)
        with start(model, settings, log=log, name=role, tell=self.log) as engine:
            if self.overlap is not None:
                # The server works, and this process mostly waits for it.
                self.overlap.prepare_ranks_after(self.stage.name, self.config)
            # A later stage compares the user's servers with this probe, if it has to use them.
            probe = probe_logprobs(engine, vocab_size_of(model)) if is_teacher else None

            def record() -> dict[str, Any]:
                servers = [one.server for one in engine.engines if one.server is not None]
                return {"servers": [server.record() for server in servers], "probe": probe}

            self._served[role] = record
            yield engine

    def prepare_server(self) -> None:
        """Begin to start the server that this stage will need, where stages may overlap."""
        config = self.config
        # With teachers for domains, the first model follows from the prompts.
        if self.overlap is None or self.overlap.has_server or config.models.teachers:
            return
        by_teacher = self.stage.name == "demonstrate"
        urls = config.sglang.teacher_urls if by_teacher else config.sglang.student_urls
        # Responses that are given need no server.
        if self.stage.name == "rollout" and config.rollout.responses is not None:
            return
        # Servers of the user run already, and the other stages begin with something else than a
        # server.
        if urls or self.stage.name not in ("demonstrate", "rollout", "evaluate"):
            return
        # The other two begin with the student, whose architecture is that of its base.
        model = config.models.teacher if by_teacher else config.models.student
        role = {"demonstrate": "teacher", "rollout": "student"}.get(self.stage.name, "evaluated")
        log = self.folder / f"sglang-{role}.log"
        settings = self._settings_of(role)
        self.overlap.prepare_server(model, settings, log=log, name=role, tell=self.log)

    def _settings_of(self, role: str) -> SGLangSection:
        """Return the settings of the servers of a role that are started here."""
        # Under the name of the student it makes rollouts. evaluate gives it another name.
        return student_settings(self.config) if role == "student" else self.config.sglang

    @property
    def served(self) -> dict[str, Any]:
        """The record of the servers of each role, for the manifest.

        How they were started and how often again, or what the user's servers were found to be.
        """
        return {role: record() for role, record in self._served.items()}

    def log(self, line: str) -> None:
        """Show a line on the screen and write it to the stage's log."""
        print_line(f"{self.stage.name}: {line}", self.folder / "log.txt")


def _identify(role: str, folder: Path) -> ModelIdentity:
    """Return a model by its content. Show a progress bar if that takes long."""
    files = weight_files(folder)
    num_bytes = HASHES.unknown_bytes(files)
    if num_bytes < SHOWN_BYTES:
        return identify_model(folder)
    # On stderr: lopd status --json comes here too.
    title = f"reading the weights of the {role}"
    with progress(title, total=num_bytes, unit="bytes", on_stderr=True) as bar:
        # The hashes are remembered, so that the identity finds all of them known.
        HASHES.sha256_all(files, read=bar.advance)
    return identify_model(folder)
