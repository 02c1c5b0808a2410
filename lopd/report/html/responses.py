"""Which responses a source has: of whom, to which prompts, with scores or verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lopd.artifacts import read_manifest
from lopd.records import Key
from lopd.report.console import MODEL_TITLES
from lopd.report.html.outdated import earlier_models, outdated_stages
from lopd.report.html.source import Source, is_complete
from lopd.tasks.verdict_files import read_verdicts
from lopd.tasks.verdicts import Verdict

# The sets of prompts, in the order in which the page offers them.
SETS = {
    "held_out": "held-out prompts",
    "policy": "held-out prompts, sampled at temperature 1",
    "rollouts": "training prompts (rollouts)",
    "demonstrations": "demonstrations",
    "responses": "responses",
}
# The models of an evaluation, in the order of the page.
MODELS = ("base", "sft", "sft_longer", "distilled", "teacher")
# The folders of refreshes begin so. Each has answers of other weights to the training prompts.
_REFRESH = "refresh-"


@dataclass(frozen=True, slots=True)
class Answers:
    """The responses of one model to one set of prompts.

    Attributes:
        prompt_set: A key of SETS.
        model: The name of the model, for example "distilled".
        title: The name for people.
        folder: The artifact.
        verdicts: By the key of the response; {} where nobody judged.
        step: The optimizer step whose weights wrote the responses to training prompts; None where
            no training learns from them.
        outdated: Of which student they are, where that is not the present one; "" otherwise.
    """

    prompt_set: str
    model: str
    title: str
    folder: Path
    verdicts: Mapping[Key, Verdict]
    step: int | None = None
    outdated: str = ""

    @property
    def set_title(self) -> str:
        """The name of the prompts for people, with a mark where the answers are outdated."""
        return SETS[self.prompt_set] + (" (outdated)" if self.outdated else "")

    @property
    def is_refresh(self) -> bool:
        """Whether these are the rollouts of a refresh."""
        return self.model.startswith(_REFRESH)


def answers_of(source: Source) -> list[Answers]:
    """Return all complete artifacts of responses of a source, held-out prompts first."""
    if source.kind == "run":
        return _of_run(source)
    if source.kind == "evaluation":
        folder = source.folder / "answers"
        if not is_complete(folder):
            return []
        return [Answers("held_out", "model", "model", folder, read_verdicts(folder))]
    manifest = source.manifests["artifact"]
    if not manifest.complete:
        return []
    title = "student" if manifest.kind in ("teacher_cache", "rollouts") else "model"
    verdicts = read_verdicts(source.folder)
    return [Answers("responses", title, title, source.folder, verdicts)]


def _of_run(source: Source) -> list[Answers]:
    found: list[Answers] = []
    folder = source.folder / "evaluate"
    titles = {**MODEL_TITLES, **earlier_models(source, "evaluate")}
    wrong = outdated_stages(source).get("evaluate")
    outdated = "" if wrong is None else wrong.told
    for model in MODELS:
        title = titles[model]
        answers = folder / f"answers-{model}"
        scores = folder / f"scores-{model}"
        # Where the answers were sampled from the policy as it is, the teacher has scored them.
        # Otherwise it has scored samples of their own, which nobody judged.
        apart = (folder / f"policy-{model}").is_dir()
        if is_complete(answers):
            scored = scores if is_complete(scores) and not apart else answers
            verdicts = read_verdicts(answers)
            held_out = Answers("held_out", model, title, scored, verdicts, outdated=outdated)
            found.append(held_out)
        if apart and is_complete(scores):
            found.append(Answers("policy", model, title, scores, {}, outdated=outdated))
    rollouts = next((one for one in ("score", "rollout") if is_complete(source.folder / one)), None)
    if rollouts is not None:
        folder = source.folder / rollouts
        title = {**MODEL_TITLES, **earlier_models(source, rollouts)}["sft"]
        found.append(Answers("rollouts", "sft", title, folder, {}, step=0))
    found += _of_refreshes(source)
    demonstrations = source.folder / "demonstrate"
    if is_complete(demonstrations):
        found.append(
            Answers("demonstrations", "teacher", MODEL_TITLES["teacher"], demonstrations, {})
        )
    return found


def _of_refreshes(source: Source) -> Iterator[Answers]:
    """Yield the scored rollouts of each refresh of distill."""
    for scores in sorted((source.folder / "distill").glob(f"{_REFRESH}*/scores")):
        if is_complete(scores):
            step = int(read_manifest(scores).inputs.get("refresh.step", 0))
            title = f"student after step {step}"
            yield Answers("rollouts", scores.parent.name, title, scores, {}, step=step)
