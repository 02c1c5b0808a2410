"""Measures the models of the study on the held-out prompts: accuracy, reverse KL and length.

    python -m examples.study.measure --arms habit_sft habit_lightning --seeds 2 3 --part 0/2

Few servers are started: one for all models of one architecture, whose weights are exchanged. Every
model answers first, greedily and at temperature 1. The SFT students score the answers of the models
that began with them, and last the teachers score all answers. What is published is not made again,
as long as the models are the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.small_student.measure import MODES, answers_writer, share_right
from examples.study.arms import RUNS, SMALL_RUNS, Arm
from examples.study.claims import arms_of, load_claims
from examples.study.make import Identities, is_made
from examples.study.small import is_small
from lopd.artifacts import (
    ArtifactWriter,
    identify_model,
    publish_json,
    read_complete,
    remove_folder,
)
from lopd.config import Config, load_config
from lopd.records import Manifest, Prompt
from lopd.stages.context import StageContext
from lopd.stages.evaluate import reverse_kl_of
from lopd.stages.evaluate_checkpoint import ANSWERS
from lopd.stages.overlap import architecture_of
from lopd.stages.sample_shards import sample_into, sampling_params
from lopd.stages.score_shards import score_into
from lopd.stages.serving import ModelServer

if TYPE_CHECKING:
    from sglang_rollout.requests.client import SGLangEngine

MEASURED = RUNS / "measured"
_SFT_MODEL = "sft/model"
# The scores of a model's answers: by its teacher, and by the SFT student that it began with.
_BY_TEACHER = "by_teacher"
_BY_SFT = "by_sft"


@dataclass(frozen=True)
class Subject:
    """A model to be measured."""

    # "seed-2/habit_lightning"
    name: str
    model: Path
    # The SFT student that it began with. It may be the model itself.
    sft: Path
    config: Config

    @property
    def folder(self) -> Path:
        return MEASURED / self.name

    @property
    def result(self) -> Path:
        return MEASURED / f"{self.name}.json"

    @cached_property
    def identity(self) -> dict[str, str]:
        """What decides its figures: the weights of three models, the prompts, and the sampling."""
        models = {"model": self.model, "sft": self.sft, "teacher": self.config.models.teacher}
        config = self.config
        return {
            **{role: weights_of(model) for role, model in models.items()},
            "prompts": config.prompts.eval.model_dump_json(),
            "evaluate": config.evaluate.model_dump_json(),
        }

    def is_measured(self) -> bool:
        """Return whether the figures of these very models are published."""
        if not self.result.exists():
            return False
        measured = json.loads(self.result.read_text())["made_from"]
        return bool(measured == self.identity)


@cache
def weights_of(model: Path) -> str:
    """Return what names the weights of a model."""
    weights: str = identify_model(model).weights
    return weights


def subjects_of(arms: Mapping[str, Arm], names: Iterable[str], seed: int) -> list[Subject]:
    """Return the models of arms of a seed that are made as the arms are now.

    Args:
        arms: All arms, by name.
        names: The arms whose models are measured.
        seed: The seed.
    """
    identities = Identities(arms)
    subjects: list[Subject] = []
    for name in names:
        arm = arms[name]
        run = arm.place(seed).run
        model = run / arm.model
        # A model of an arm that has changed since would be taken for that of the arm as it is.
        is_current = is_small(name) or is_made(arm, seed, identities.of(name, seed))
        if arm.model and is_current and (model / "config.json").exists():
            config = load_config(arm.setting.config, arm.setting.overrides(seed))
            sft = sft_of(model, run).resolve()
            subjects.append(Subject(f"seed-{seed}/{name}", model.resolve(), sft, config))
    return subjects


def sft_of(model: Path, run: Path) -> Path:
    """Return the SFT student that a model began with.

    Args:
        model: The model.
        run: The folder of its run.
    """
    own = run / _SFT_MODEL
    if model != own:
        return own
    # SFT that has gone on from the SFT student of another run of the study.
    student = Path(json.loads((run / "config.json").read_text())["models.student"])
    of_seeds = {student.relative_to(runs) for runs in (RUNS, SMALL_RUNS) if runs in student.parents}
    # Other models of the study, such as a base student, do not lie in the folder of a seed.
    return student if any(path.parts[0].startswith("seed-") for path in of_seeds) else own


def measure(subjects: Sequence[Subject], servers: str = "servers") -> None:
    """Publish the figures of models that have none yet.

    Args:
        subjects: The models.
        servers: The folder of the servers' logs, beside the results.
    """
    missing = [subject for subject in subjects if not subject.is_measured()]
    for subject in missing:
        _begin(subject)
    # Settings may want different servers.
    by_server: dict[str, list[Subject]] = {}
    for subject in missing:
        by_server.setdefault(subject.config.sglang.model_dump_json(), []).append(subject)
    for group in by_server.values():
        with ModelServer(_context(group[0].config, servers)) as server:
            _Measuring(server, group).run()


def _begin(subject: Subject) -> None:
    """Remove answers of other models that had this name, and the figures made from them."""
    about = subject.folder / "made_from.json"
    if not about.exists() or json.loads(about.read_text()) != subject.identity:
        subject.result.unlink(missing_ok=True)
        remove_folder(subject.folder)
        publish_json(about, subject.identity)


def _context(config: Config, name: str = "servers") -> StageContext:
    """Return a context whose servers write their logs beside the results, in a folder of a name."""
    run = config.run.model_copy(update={"dir": MEASURED})
    context = StageContext(
        config.model_copy(update={"run": run}), dataclasses.replace(ANSWERS, name=name)
    )
    context.folder.mkdir(parents=True, exist_ok=True)
    return context


@dataclass
class _Measuring:
    """Measures models by one server."""

    server: ModelServer
    subjects: Sequence[Subject]
    # The model that the server has, and its engine.
    _held: tuple[Path, SGLangEngine] | None = None
    _answered: int = 0
    _began: float = field(default_factory=time.monotonic)

    def _use(self, model: Path) -> SGLangEngine:
        if self._held is None or self._held[0] != model:
            self._held = (model, self.server.use(model, version=_version(model)))
        return self._held[1]

    def run(self) -> None:
        architectures: dict[str, list[Subject]] = {}
        for subject in self.subjects:
            architectures.setdefault(_architecture(subject.model), []).append(subject)
        # The teacher's own last: its server then needs no second start to score.
        teachers = {_architecture(subject.config.models.teacher) for subject in self.subjects}
        for _, members in sorted(architectures.items(), key=lambda item: item[0] in teachers):
            for subject in members:
                self._answer(subject)
                self._tell(subject)
            self._score(members, _BY_SFT, lambda subject: subject.sft)
        self._score(self.subjects, _BY_TEACHER, lambda subject: subject.config.models.teacher)
        for subject in self.subjects:
            publish_json(subject.result, _figures(subject))

    def _tell(self, subject: Subject) -> None:
        """Print how many models have answered, and how long the others will take."""
        self._answered += 1
        passed = time.monotonic() - self._began
        left = passed / self._answered * (len(self.subjects) - self._answered)
        print(
            f"{subject.name} has answered ({self._answered} of {len(self.subjects)} models; "
            f"{left / 60:.0f} min left)",
            flush=True,
        )

    def _answer(self, subject: Subject) -> None:
        """Publish a model's answers in both modes."""
        prompts, prompt_ids = _prompts(subject)
        context = _context(subject.config)
        for mode, changes in MODES.items():
            writer = answers_writer(context, subject.folder / mode, subject.model, changes)
            if not writer.missing(1):
                writer.finish()
                continue
            sample_into(
                writer,
                self._use(subject.model),
                prompts,
                prompt_ids,
                sampling_params(subject.config.evaluate, [subject.model], **changes),
                samples_per_prompt=1,
                seed=subject.config.run.seed,
                # Each model has draws of its own, so that errors of two models are independent.
                purpose=f"{mode} {subject.name}",
                title=f"{mode} {subject.name}",
            )
            writer.finish()

    def _score(
        self, subjects: Iterable[Subject], part: str, scorer_of: Callable[[Subject], Path]
    ) -> None:
        """Publish the scores of answers at temperature 1, one scorer after the other."""
        by_scorer: dict[Path, list[Subject]] = {}
        for subject in subjects:
            by_scorer.setdefault(scorer_of(subject), []).append(subject)
        for scorer, members in by_scorer.items():
            for subject in members:
                # The divergence from itself is 0.
                if weights_of(scorer) == subject.identity["model"]:
                    continue
                answers = subject.folder / "sampled"
                manifest = read_complete(answers)
                writer = ArtifactWriter(
                    subject.folder / part,
                    kind="evaluation_scores",
                    inputs={"answers": manifest.fingerprint, "scorer": weights_of(scorer)},
                    models={"teacher": identify_model(scorer)},
                )
                if writer.missing(len(manifest.shards)):
                    title = f"{part} {subject.name}"
                    score_into(writer, self._use(scorer), answers, manifest, title=title)
                writer.finish()


def _architecture(model: Path) -> str:
    return json.dumps(architecture_of(model), sort_keys=True, default=str)


def _version(model: Path) -> str:
    """Return the weight version that names a model's content."""
    return weights_of(model)[:16]


_PROMPTS: dict[str, tuple[list[Prompt], list[Any]]] = {}


def _prompts(subject: Subject) -> tuple[list[Prompt], list[Any]]:
    """Return the held-out prompts of a model's setting, which are the same for all seeds."""
    config = subject.config
    key = f"{config.prompts.eval.model_dump_json()} {config.task} {config.models.student}"
    if key not in _PROMPTS:
        _PROMPTS[key] = _context(config).prompts("eval")
    return _PROMPTS[key]


def _figures(subject: Subject) -> dict[str, Any]:
    """Return what was measured of a model, for its file."""
    prompts, _ = _prompts(subject)
    context = _context(subject.config)
    figures: dict[str, Any] = {"made_from": subject.identity, "num_prompts": len(prompts)}
    manifests: dict[str, Manifest] = {}
    for mode in MODES:
        manifests[mode] = read_complete(subject.folder / mode)
        figures[mode] = share_right(context, subject.folder / mode, manifests[mode], prompts)
    sampled = manifests["sampled"]
    figures["tokens"] = sum(shard.tokens for shard in sampled.shards) / sampled.rows
    for name, part in (("reverse_kl", _BY_TEACHER), ("kl_from_sft", _BY_SFT)):
        folder = subject.folder / part
        # There are no scores by the model itself.
        is_scored = folder.exists()
        figures[name] = reverse_kl_of(folder, read_complete(folder))["mean"] if is_scored else 0.0
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--part", default="0/1", metavar="I/N", help="only part I of N")
    options = parser.parse_args()
    index, count = map(int, options.part.split("/"))
    arms = arms_of(load_claims())
    subjects = [
        subject for seed in options.seeds for subject in subjects_of(arms, options.arms, seed)
    ]
    # Two processes that measure side by side have servers of their own.
    measure(subjects[index::count], f"servers-{index}-of-{count}")


if __name__ == "__main__":
    main()
