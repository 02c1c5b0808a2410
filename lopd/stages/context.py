"""What a stage knows: the configuration, its folder, its parents' manifests, and how to serve a
model. The method itself is in the stages' own files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.artifacts import MANIFEST, ArtifactWriter, Share, identify_model, read_manifest
from lopd.config import Config, SGLangSection, result_keys
from lopd.config.secrets import scrubbed_inputs
from lopd.records import Manifest, ModelIdentity, Prompt
from lopd.report.console import say
from lopd.tasks.rows import content_hash

if TYPE_CHECKING:
    from sglang_rollout.requests.client import SGLangEngine


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline. Its result is decided by ``knobs``, ``models`` and ``parents``
    alone: where these are unchanged it is reused.
    """

    name: str
    summary: str  # one sentence for --help
    kind: str  # of its artifact
    knobs: tuple[str, ...]  # dotted config sections
    models: tuple[str, ...]  # roles among "teacher", "student" whose content it depends on
    prompts: tuple[str, ...]  # prompt sets it reads
    parents: Callable[[Config], tuple[str, ...]]  # stages whose artifacts it reads
    run: Callable[[StageContext], None]


@dataclass
class StageContext:
    config: Config
    stage: Stage
    identities: dict[str, ModelIdentity] = field(
        default_factory=dict
    )  # shared by the stages of one command: hashing weights is slow
    _served: dict[str, Callable[[], dict[str, Any]]] = field(default_factory=dict)
    share: Share | None = None  # of a stage that several workers do together

    @property
    def folder(self) -> Path:
        return self.folder_of(self.stage.name)

    def folder_of(self, stage: str) -> Path:
        return self.config.run.dir / stage

    def manifest_of(self, stage: str) -> Manifest:
        """ArtifactError unless that stage has published its artifact."""
        return read_manifest(self.folder_of(stage))

    def identity(self, role: str) -> ModelIdentity:
        """The teacher, the base student, or the teacher of a domain (teachers.DOMAIN) by content."""
        if role not in self.identities:
            section, _, domain = role.partition(".")
            folder = getattr(self.config.models, section)
            self.identities[role] = identify_model(folder[domain] if domain else folder)
        return self.identities[role]

    @property
    def end_models(self) -> tuple[Path, ...]:
        """The models whose files say how a response ends."""
        models = self.config.models
        return models.teacher, *models.teachers.values(), models.student

    @cached_property
    def parents(self) -> dict[str, str]:
        """Parent stage -> fingerprint of its artifact."""
        return {
            name: self.manifest_of(name).fingerprint for name in self.stage.parents(self.config)
        }

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Everything but the parents that decides this stage's result, flat."""
        keys = scrubbed_inputs(
            result_keys(
                self.config,
                (
                    "run.seed",
                    *self.stage.knobs,
                    *(f"prompts.{name}" for name in self.stage.prompts),
                ),
            )
        )
        for role in self.stage.models:
            identity = self.identity(role)
            keys[f"models.{role}"] = identity.weights
            keys[f"models.{role}.tokenizer"] = [identity.tokenizer, identity.template]
        for domain in self.config.models.teachers if "teacher" in self.stage.models else ():
            keys[f"models.teachers.{domain}"] = self.identity(f"teachers.{domain}").weights
        if (
            self.config.models.teachers and self.stage.prompts
        ):  # prompts are sampled domain by domain
            keys["models.teachers"] = sorted(self.config.models.teachers)
        for name in self.stage.prompts:
            file = getattr(self.config.prompts, name).file
            keys[f"prompts.{name}.file"] = content_hash(file) if file is not None else None
        if "sft" in self.stage.knobs and self.config.sft.demonstrations is not None:
            keys["sft.demonstrations"] = read_manifest(self.config.sft.demonstrations).fingerprint
        if "sft" in self.stage.knobs and self.config.sft.checkpoint is not None:
            keys["sft.checkpoint"] = identify_model(self.config.sft.checkpoint).weights
        if "distill" in self.stage.knobs and self.config.distill.cache is not None:
            keys["distill.cache"] = read_manifest(self.config.distill.cache).fingerprint
        return keys

    def writer(
        self, *, folder: Path | None = None, kind: str | None = None, **about: Any
    ) -> ArtifactWriter:
        """Opens this stage's artifact (or a part of it in another folder), going on from what is
        published.
        """
        begun = (self.folder / MANIFEST).exists()
        inputs = (
            self.manifest_of(self.stage.name).inputs if begun else self.inputs
        )  # the same, but for knobs newer than what was begun
        return ArtifactWriter(
            folder or self.folder,
            kind=kind or self.stage.kind,
            inputs=inputs,
            parents=self.parents,
            share=self.share,
            **about,
        )

    def sampling_record(self, section: Any) -> Mapping[str, Any]:
        """Sampling parameters for a manifest."""
        return {
            **section.model_dump(mode="json", exclude={"shard_size"}),
            "dtype": self.config.sglang.dtype,
        }

    def prompts(self, name: str, tokenizer_folder: Path) -> tuple[list[Prompt], list[Any]]:
        """A prompt set and its token ids [P] each, chat template applied. DataError: see
        lopd.tasks.prompts.
        """
        from lopd.tasks import get_task
        from lopd.tasks.prompts import load_prompts
        from lopd.tasks.tokenizer import load_tokenizer

        task, tokenizer = (
            get_task(self.config.task.name, self.config.task.options),
            load_tokenizer(tokenizer_folder),
        )
        chosen = getattr(self.config.prompts, name)
        return load_prompts(
            chosen,
            task,
            tokenizer,
            context_length=self.config.sglang.context_length,
            need_answers=name == "eval",
        )

    @contextlib.contextmanager
    def serve(
        self, role: str, model: Path, settings: SGLangSection | None = None
    ) -> Iterator[SGLangEngine]:
        """SGLang with this model, as long as the block lasts: servers of our own, which end with
        this process, whatever ends it, or those of sglang.teacher_urls or sglang.student_urls.
        settings: of ours, in place of the section sglang. EngineError: it does not start, or is
        another model.
        """
        from sglang_rollout.requests.external import probe_logprobs, vocab_size_of
        from sglang_rollout.requests.fleet import serve

        is_teacher = model == self.config.models.teacher
        urls = self.config.sglang.teacher_urls if is_teacher else self.config.sglang.student_urls
        if urls:
            engine, found = self._external(role, urls, model, loads_weights=not is_teacher)
            self._served[role] = lambda: found
            yield engine
            return
        self.log(f"starting SGLang with {model}")
        with serve(
            model,
            settings or self.config.sglang,
            log=self.folder / f"sglang-{role}.log",
            name=role,
            tell=self.log,
        ) as engine:
            probe = (
                probe_logprobs(engine, vocab_size_of(model)) if is_teacher else None
            )  # servers of others can be held against it later
            self._served[role] = lambda: {
                "servers": [
                    one.server.record() for one in engine.engines if one.server is not None
                ],
                "probe": probe,
            }
            yield engine

    @property
    def served(self) -> dict[str, Any]:
        """Role -> how its servers were started and how often again, or what those of the user were
        found to be: for a manifest.
        """
        return {role: tell() for role, tell in self._served.items()}

    def _external(
        self, role: str, urls: Sequence[str], model: Path, *, loads_weights: bool
    ) -> tuple[SGLangEngine, dict[str, Any]]:
        """Servers of the user's, found to be what they should be, with this model's weights in
        them.
        """
        from sglang_rollout.requests.external import Expected, check_external, connect

        identity = identify_model(model)
        engine = connect(urls, self.config.sglang, model)
        self.log(f"using the servers at {', '.join(urls)}")
        expected = Expected(
            model_dir=model,
            same_content=lambda folder: identify_model(folder).weights == identity.weights,
            loads_weights=loads_weights,
            tokenized=_tokenized(model, "What is 12 + 30? Think step by step."),
            probe=None if loads_weights else self._probe_on_record(),
        )
        found = check_external(engine, expected)
        found["version_on_record"] = self._compare_version(role, found)
        if found["weights"] == "declared":
            self.log(
                f"WARNING: that these servers hold the weights of {model} cannot be seen from here; their word is taken"
            )
        if loads_weights:
            from sglang_rollout.weight_sync import update_weights_from_disk

            update_weights_from_disk(engine, model, version=f"lopd-{identity.weights[:12]}")
            engine.call(
                "POST", "/continue_generation", {}
            )  # a trainer that was killed amid a sync in place has left them paused, with half of it
        return engine, found

    def _probe_on_record(self) -> list[float] | None:
        """What the teacher's servers of a former stage gave for the probe."""
        probes = (served.get("probe") for _, _, served in self._served_before("teacher"))
        return next((list(probe) for probe in probes if probe is not None), None)

    def _served_before(self, role: str) -> Iterator[tuple[str, Manifest, Mapping[str, Any]]]:
        """Stage, manifest and record of the servers that had this role in stages that are done."""
        for stage in ("demonstrate", "rollout", "score", "distill"):
            if (self.folder_of(stage) / MANIFEST).is_file():
                manifest = self.manifest_of(stage)
                served = manifest.extra.get("served", {}).get(role)
                if served is not None:
                    yield stage, manifest, served

    def _compare_version(self, role: str, found: Mapping[str, Any]) -> dict[str, str] | None:
        """The SGLang that a former stage had for this role, for the manifest; a warning where it is
        another one than was found now.
        """
        for stage, manifest, served in self._served_before(role):
            former = served.get(
                "version", manifest.versions.get("sglang")
            )  # servers of our own are of the SGLang that is installed
            if former is None:
                continue
            if former != found["version"]:
                told = {
                    "probe": "the probe on record agrees",
                    "content": "the model folder is the same",
                    "to be loaded": "the weights are put in anew",
                }
                seen = told.get(found["weights"], "no probe is on record")
                if found["weights"] == "content" and served.get("probe") is not None:
                    seen += ", and the probe on record agrees"
                self.log(
                    f"WARNING: these servers run SGLang {found['version']}, those of {stage} ran {former}: log-probabilities and samples may differ "
                    f"by rounding, a seed may give another response ({seen})"
                )
            return {"stage": stage, "version": former}
        return None

    def log(self, line: str) -> None:
        """A line on screen and in the stage's log."""
        say(f"{self.stage.name}: {line}", self.folder / "log.txt")


def _tokenized(model: Path, text: str) -> dict[str, list[int]]:
    """The text and its ids; nothing where the tokenizer has no word for something in it, as that of
    the tiny models.
    """
    from lopd.tasks.tokenizer import load_tokenizer

    try:
        return {text: load_tokenizer(model).encode(text, add_special_tokens=False)}
    except Exception as error:  # tokenizers raises nothing narrower
        if "Missing [UNK]" not in str(error):
            raise
        return {}
