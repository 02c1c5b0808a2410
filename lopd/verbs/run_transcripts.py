"""Chooses responses of a run and finds what several models answered to the same prompts."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopd.artifacts import MANIFEST
from lopd.cache import read_rows
from lopd.errors import DataError, LopdError
from lopd.records import Floats, Key, Response
from lopd.report.html.outdated import earlier_models, outdated_stages
from lopd.report.html.source import open_sources
from lopd.report.token_pieces import pieces_of
from lopd.report.transcripts_view import Comparison, Transcript
from lopd.tasks.light_tokenizer import light_tokenizer
from lopd.tasks.tokenizer import Decodes, decode, token_texts
from lopd.tasks.verdict_files import read_verdicts
from lopd.tasks.verdicts import Verdict
from lopd.verbs.run_answers import tokenizer_of

# The models that are shown if none is named, from left to right.
_SHOWN = ("teacher", "sft", "distilled")


@dataclass(frozen=True, slots=True)
class Source:
    """One model's responses.

    Attributes:
        model: Its name.
        responses: The artifact.
        scores: The artifact with the teacher's log-probabilities of them, perhaps the same one, or
            None.
        title: What readers call the model, where that is not its usual title.
    """

    model: str
    responses: Path
    scores: Path | None
    title: str = ""


@dataclass(frozen=True, slots=True)
class Earlier:
    """Answers that are not of the present models.

    Attributes:
        told: What to say of them before they are shown; "" where all are of the present ones.
        titles: The titles of the earlier models, by name.
    """

    told: str
    titles: Mapping[str, str]


def earlier_answers(place: Path, stage: str) -> Earlier:
    """Return which answers of a stage are of models that have been made again since.

    Args:
        place: A run directory, or one artifact of responses.
        stage: "evaluate" or "score".
    """
    # A damaged stage has errors of its own, and does not hide the answers of another one.
    with contextlib.suppress(LopdError):
        (run,) = open_sources([place])
        wrong = outdated_stages(run).get(stage)
        if wrong is not None:
            told = f"{stage} is of {wrong.told}. Run `lopd run CONFIG` again."
            return Earlier(told, earlier_models(run, stage))
    return Earlier("", {})


def sources_of(place: Path, models: Sequence[str], *, scored: bool) -> list[Source]:
    """Return the responses of a run that belong side by side.

    Args:
        place: A run directory, or one artifact of responses.
        models: The names of models; empty: those that a reader wants to compare.
        scored: Whether the teacher must have scored the responses.

    Raises:
        DataError: There are none.
    """
    # An artifact that the user names has its scores in it, if it has any.
    if (place / MANIFEST).is_file():
        return [Source(place.name, place, place)]
    evaluate = place / "evaluate"
    # Where answers are not sampled from the policy as it is, other responses were scored.
    purpose = "policy" if scored and any(evaluate.glob("policy-*")) else "answers"
    titles = earlier_answers(place, "evaluate").titles
    found = []
    # A model of the default choice that the run does not have is left out. One that the user has
    # named must be there.
    for name in models or _SHOWN:
        responses = evaluate / f"{purpose}-{name}"
        scores = evaluate / f"scores-{name}"
        if (responses / MANIFEST).is_file():
            known = scores if (scores / MANIFEST).is_file() else None
            found.append(Source(name, responses, known, titles.get(name, "")))
        elif models:
            there = sorted(path.name for path in evaluate.glob(f"{purpose}-*"))
            raise DataError(
                f"no responses of the model {name!r:.60}",
                where=str(evaluate),
                limit=", ".join(path.removeprefix(f"{purpose}-") for path in there),
                remedy="name one of these models, or run the stage evaluate",
            )
    # Before the evaluation there are only the SFT student's rollouts, with their scores.
    if not found and (place / "score" / MANIFEST).is_file():
        titles = earlier_answers(place, "score").titles
        return [Source("sft", place / "score", place / "score", titles.get("sft", ""))]
    if not found:
        raise DataError(
            "there are no responses that can be compared",
            where=str(place),
            limit="a run that has come as far as score",
            remedy=f"run further, or look at one artifact: lopd show {place / 'demonstrate'}",
        )
    return found


def worst(source: Source, count: int) -> list[Key]:
    """Return the responses on whose tokens teacher and student disagree most, on average.

    Raises:
        DataError: The teacher has scored none of them.
    """
    if source.scores is None:
        raise _unscored(source)
    # A heap of so many, because a cache may have a million responses.
    rows: list[tuple[float, Key]] = []
    for response, scores in read_rows(source.scores):
        mean = _disagreement(response, scores)
        if mean is None:
            continue
        # With the key behind the mean, so that equal means are ordered the same in every call.
        entry = (mean, response.key)
        if len(rows) < count:
            heapq.heappush(rows, entry)
        else:
            heapq.heappushpop(rows, entry)
    if not rows:
        raise _unscored(source)
    return [key for _, key in sorted(rows, reverse=True)]


def changed(before: Source, after: Source, count: int, *, to_right: bool) -> list[Key]:
    """Return answers that were wrong and are right now, or the other way round.

    Args:
        before: The model before.
        after: The model after.
        count: How many, at most one for each prompt.
        to_right: Whether they are right now.

    Raises:
        DataError: There are no verdicts.
    """
    was = read_verdicts(before.responses)
    now = read_verdicts(after.responses)
    if not was or not now:
        raise DataError(
            "these answers have no verdicts",
            where=str(after.responses.parent),
            limit="a task with a verifier, whose stage evaluate is done",
            remedy="choose by --worst or --prompt",
        )
    # One response for each prompt, so that a short list shows many prompts.
    chosen: dict[str, Key] = {}
    for key, verdict in now.items():
        # Only prompts that both models have answered can have changed.
        if key in was and verdict.right == to_right and was[key].right != to_right:
            chosen.setdefault(key[0], key)
    return [*chosen.values()][:count]


def of_prompt(sources: Sequence[Source], name: str) -> list[Key]:
    """Return the responses to a prompt; all samples of it.

    Args:
        sources: Where to look.
        name: A prompt's name, or one response as PROMPT/SAMPLE.

    Raises:
        DataError: The artifact has no such prompt.
    """
    found: dict[Key, None] = {}
    examples: list[str] = []
    for response, _ in read_rows(sources[0].responses):
        prompt_id, index = response.key
        if name in (prompt_id, f"{prompt_id}/{index}"):
            found[response.key] = None
        # A mistyped name is easiest to correct beside real ones.
        elif len(examples) < 3 and prompt_id not in examples:
            examples.append(prompt_id)
    if not found:
        raise DataError(
            f"no prompt {name!r:.80}",
            where=str(sources[0].responses),
            limit=f"names such as {', '.join(examples):.200}",
            remedy="give the name of a prompt of this artifact",
        )
    return [*found]


def compare(
    sources: Sequence[Source], keys: Sequence[Key], place: Path, tokenizer: Path | None
) -> list[Comparison]:
    """Return what each model answered, in the order of the keys.

    Each artifact is read once, and only the chosen rows are kept.
    """
    folder = tokenizer or _tokenizer(place)
    loaded = light_tokenizer(folder) if folder is not None else None
    prompts: dict[Key, str] = {}
    columns: dict[Key, list[Transcript]] = {key: [] for key in keys}
    for source in sources:
        # Scores may be an artifact of their own, whose rows are found by the same keys.
        scores = dict(_chosen(source.scores, keys)) if source.scores is not None else {}
        verdicts = read_verdicts(source.responses)
        for key, (response, own) in _chosen(source.responses, keys):
            # A cache has the scores beside its responses. Then no other artifact is asked.
            known = own if own is not None else _scores_for(response, scores.get(key))
            columns[key].append(_transcript(source, response, known, verdicts.get(key), loaded))
            # All models were asked the same prompt, so the first one's text is enough.
            prompts.setdefault(key, _text(loaded, response.prompt_ids))
    return [Comparison(*key, prompts[key], tuple(found)) for key, found in columns.items() if found]


def _chosen(
    folder: Path, keys: Collection[Key]
) -> Iterator[tuple[Key, tuple[Response, Floats | None]]]:
    # A set, because each row of the artifact is looked up in it.
    wanted = set(keys)
    for row in read_rows(folder):
        if row[0].key in wanted:
            yield row[0].key, row


def _scores_for(response: Response, row: tuple[Response, Floats | None] | None) -> Floats | None:
    """Return scores of exactly these tokens; the same prompt may have been sampled twice."""
    if row is None or not np.array_equal(row[0].token_ids, response.token_ids):
        return None
    return row[1]


def _transcript(
    source: Source,
    response: Response,
    scores: Floats | None,
    verdict: Verdict | None,
    tokenizer: Decodes | None,
) -> Transcript:
    ids = response.token_ids.tolist()
    texts = [f"{token} " for token in ids] if tokenizer is None else token_texts(tokenizer, ids)
    advantage = None if scores is None else _advantage(response, scores)
    about = ""
    if verdict is not None:
        found = f"found {verdict.found}" if verdict.found else ""
        about = ", ".join(filter(None, (verdict.reason, found)))
    return Transcript(
        model=source.model,
        earlier_title=source.title,
        pieces=tuple(pieces_of(texts, advantage, len(ids))),
        num_tokens=len(ids),
        finish_reason=response.finish_reason,
        right=None if verdict is None else verdict.right,
        about=about,
        disagreement=_disagreement(response, scores),
    )


def _advantage(response: Response, scores: Floats) -> Any:
    """Return log pi_T - log pi_S, float64 [R]. It is 0 where a token carries no loss."""
    # In float64: both are stored in 16 or 32 bits, and their difference is small beside them.
    advantage = scores.astype(np.float64) - response.sampling_logprobs
    # Such a token was not sampled, or has no score: what stands there is about nothing.
    if response.loss_mask is not None:
        advantage[~response.loss_mask] = 0.0
    return advantage


def _disagreement(response: Response, scores: Floats | None) -> float | None:
    mask = response.loss_mask
    num_tokens = 0 if scores is None else len(scores) if mask is None else int(mask.sum())
    if scores is None or num_tokens == 0:
        return None
    # Not the mean over all tokens: the zeros of a tool's tokens would look like agreement.
    return float(np.abs(_advantage(response, scores)).sum() / num_tokens)


def _text(tokenizer: Decodes | None, ids: Any) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else decode(tokenizer, ids)


def _tokenizer(place: Path) -> Path | None:
    """Return the tokenizer of a run, or of the run that an artifact lies in."""
    # The place is a run, a stage of one (run/score), or an artifact inside a stage
    # (run/evaluate/answers-sft).
    for run_dir in (place, place.parent, place.parent.parent):
        found = tokenizer_of(run_dir)
        if found is not None:
            return found
    return None


def _unscored(source: Source) -> DataError:
    return DataError(
        "the teacher has scored none of these responses",
        where=str(source.responses),
        limit="an artifact with teacher_logprobs, as of the stages score and evaluate",
        remedy="choose by --prompt",
    )
