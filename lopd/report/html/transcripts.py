"""Responses as the page shows them: pieces of text with the figures of each token.

A run may have more responses than a file should hold. Then some prompts are chosen, the same ones
for every model: those of the strongest disagreement and others at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lopd.cache.columns import ROUTED_EXPERTS, TAIL, TOP_IDS, TOP_LOGPROBS
from lopd.cache.reader import CacheReader, ScoredRow
from lopd.records import Bools, Floats, Response, TeacherScores
from lopd.report.html.responses import Answers
from lopd.report.html.tokens import Deviations, TokenFigures
from lopd.tasks.tokenizer import decode, load_tokenizer, token_texts
from lopd.tasks.tokenizer_folder import tokenizer_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of the prompts that are kept where not all fit: one in so many has the strongest disagreement.
_STRONGEST = 5
# How chat templates call who speaks. A name has few tokens.
_ROLES = ("system", "developer", "user", "human", "assistant", "model", "tool")
_ROLE_TOKENS = 6
_THOUGHTS = ("<think>", "</think>")
# The columns of a top-K and of the experts' routing take many times the memory of all others.
_NOT_READ = (TOP_IDS, TOP_LOGPROBS, TAIL, ROUTED_EXPERTS)


@dataclass(slots=True)
class Scanned:
    """What one pass over the responses of a model has found.

    Attributes:
        answers: Whose responses they are.
        deviations: The sums over all responses.
        rows: By prompt, the indices of its responses in the artifact.
        tokens: By prompt, the tokens of its responses and of the prompt itself.
        disagreement: By prompt, the mean absolute deviation of its tokens, in nats.
        prompts: By prompt, the hash of its token ids.
        lengths: Tokens of each response.
        finish: How often each finish reason occurs.
    """

    answers: Answers
    deviations: Deviations = field(default_factory=Deviations)
    rows: dict[str, list[int]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    disagreement: dict[str, float] = field(default_factory=dict)
    prompts: dict[str, int] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    finish: dict[str, int] = field(default_factory=dict)

    @property
    def cut_share(self) -> float:
        """The share of responses that were cut off at a token limit."""
        return self.finish.get("length", 0) / max(1, len(self.lengths))

    def add(self, index: int, response: Response, scored: TeacherScores | None) -> None:
        """Add one response with what the teacher says of it, if there is anything."""
        name = response.prompt_id
        self.rows.setdefault(name, []).append(index)
        self.prompts[name] = hash(response.prompt_ids.tobytes())
        # Each response repeats the prompt in the artifact, and the page has it once.
        known = self.tokens.get(name, len(response.prompt_ids))
        self.tokens[name] = known + len(response.token_ids)
        self.lengths.append(len(response.token_ids))
        self.finish[response.finish_reason] = self.finish.get(response.finish_reason, 0) + 1
        if scored is not None and len(scored.teacher_logprobs):
            scores = scored.teacher_logprobs
            self.deviations.add(response, scores, scored.entropy)
            deviation = np.abs(scores - response.sampling_logprobs)
            # Tokens of a tool have no log-probabilities of the student, and no part in this.
            if response.loss_mask is not None:
                deviation = deviation[response.loss_mask]
            difference = float(np.mean(deviation)) if len(deviation) else np.nan
            # A cache without sampling log-probabilities has no deviation.
            if np.isfinite(difference):
                self.disagreement[name] = max(self.disagreement.get(name, 0.0), difference)


def scan(answers: Answers) -> Scanned:
    """Read all responses of a model once, with one row group in memory.

    Raises:
        ArtifactError: A shard is damaged.
    """
    found = Scanned(answers)
    for index, (response, scored) in enumerate(_reader(answers.folder).scored_rows()):
        found.add(index, response, scored)
    return found


def _reader(folder: Path) -> CacheReader:
    return CacheReader(folder, leave_out=_NOT_READ, without_sampling=True)


class Texts:
    """The texts of tokens, by the tokenizer of an artifact; ids where there is no tokenizer.

    Args:
        folder: An artifact of the run.
        named: The tokenizer's folder that the user names, or None.
    """

    def __init__(self, folder: Path, named: Path | None) -> None:
        source = tokenizer_folder(folder, named)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        if source is not None:
            self._tokenizer = load_tokenizer(source)
        self._known: dict[int, str] = {}
        special = self._tokenizer.all_special_ids if self._tokenizer is not None else []
        self.special = {int(token) for token in special}
        self._shown: set[int] = set()
        if self._tokenizer is not None:
            # Marks such as <think> are added to a vocabulary too, and need not be "special".
            added = [*self._tokenizer.added_tokens_decoder.items()]
            self.special |= {int(token) for token, what in added if what.special}
            self._shown = {int(token) for token, what in added if what.content in _THOUGHTS}

    def is_hidden(self, token: int) -> bool:
        """Return whether a token is a mark that the page shows on demand alone."""
        # Where the thinking ends is a part of the answer, whatever the tokenizer calls its marks.
        return token in self.special and token not in self._shown

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def of(self, token: int) -> str:
        """Return the text of one token, or its number without a tokenizer."""
        if token not in self._known:
            text = f"{token} " if self._tokenizer is None else decode(self._tokenizer, [token])
            self._known[token] = text
        return self._known[token]

    def pieces(self, token_ids: Iterable[int]) -> list[str]:
        """Return the text that each token adds, as lopd.tasks.tokenizer.token_texts does."""
        if self._tokenizer is None:
            return [f"{token} " for token in token_ids]
        return [*token_texts(self._tokenizer, token_ids)]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The prompts of a set that the page holds.

    Attributes:
        prompt_ids: The chosen prompts, in the order of the artifact.
        strongest: Those that were chosen for their disagreement; empty where all fit.
    """

    prompt_ids: Sequence[str]
    strongest: frozenset[str] = frozenset()


def budgets(costs: Sequence[int], total: int) -> list[int]:
    """Share a number of tokens among sets: what a small set does not need is for the others.

    Args:
        costs: The tokens of each set.
        total: The tokens that the page may have.
    """
    shares = [0] * len(costs)
    left = total
    # The smallest first: each gets what it needs, and at most an equal part of what is left.
    for done, index in enumerate(sorted(range(len(costs)), key=lambda one: costs[one])):
        shares[index] = min(costs[index], left // (len(costs) - done))
        left -= shares[index]
    return shares


def choose(scans: Sequence[Scanned], max_tokens: int, seed: int) -> Chosen:
    """Return the prompts of one set of which the page holds the responses of all models.

    Args:
        scans: Of every model of every source that has answered this set.
        max_tokens: How many tokens these responses and prompts may have together.
        seed: For the choice at random.
    """
    cost: dict[str, int] = {}
    strength: dict[str, float] = {}
    for found in scans:
        for name, tokens in found.tokens.items():
            cost[name] = cost.get(name, 0) + tokens
            strength[name] = max(strength.get(name, 0.0), found.disagreement.get(name, 0.0))
    names = list(cost)
    if sum(cost.values()) <= max_tokens:
        return Chosen(names)
    drawn = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
    # Sorting is stable, so prompts of equal strength keep their order.
    strongest = sorted(names, key=lambda name: -strength[name]) if any(strength.values()) else []
    kept: set[str] = set()
    spent = 0
    for queue, limit in ((strongest, max_tokens // _STRONGEST), (drawn, max_tokens)):
        for name in queue:
            if name not in kept and spent + cost[name] <= limit:
                kept.add(name)
                spent += cost[name]
            # One prompt that is too long must not end the choice, and a hundred thousand of them
            # need not be tried.
            elif spent > 0.98 * limit:
                break
        if queue is strongest:
            chosen_first = frozenset(kept)
    return Chosen([name for name in names if name in kept], chosen_first)


class Vocabulary:
    """The distinct pieces of text of a page, each written once: [text, token id, is special]."""

    def __init__(self) -> None:
        self._index: dict[tuple[str, int, bool], int] = {}
        self.rows: list[list[Any]] = []

    def index(self, text: str, token: int, special: bool) -> int:
        key = (text, token, special)
        if key not in self._index:
            self._index[key] = len(self.rows)
            self.rows.append([text, token, int(special)])
        return self._index[key]


def prompt_set(
    name: str, scans: Sequence[Scanned], chosen: Chosen, texts: Texts, vocabulary: Vocabulary
) -> dict[str, Any]:
    """Return one set of prompts with the answers of all models, as JSON.

    Returns:
        name, title, outdated, total, strongest, models (their titles), and prompts: of each prompt
        ``id``, ``prompt`` (indices of the vocabulary) and ``answers``. An answer has the index of
        its model, its sample index, finish reason and tokens (indices of the vocabulary). Where
        they are known it has the verdict (``right``, ``reason``, ``found``, ``expected``), the
        log-probabilities of the model (``student``) and the teacher, and the teacher's ``entropy``,
        in thousandths of a nat.
    """
    # Several sources share a choice, and each need not have all of its prompts.
    names = {name for one in scans for name in one.rows}
    own = [name for name in chosen.prompt_ids if name in names]
    prompts: dict[str, dict[str, Any]] = {
        one: {"id": one, "prompt": [], "answers": []} for one in own
    }
    for number, found in enumerate(scans):
        for response, scored in _chosen_rows(found, chosen):
            row = prompts[response.prompt_id]
            if not row["prompt"]:
                row["prompt"] = _prompt(response.prompt_ids.tolist(), texts, vocabulary)
            row["answers"].append(
                _answer(number, found.answers, response, scored, texts, vocabulary)
            )
    return {
        "name": name,
        "title": scans[0].answers.set_title,
        "outdated": scans[0].answers.outdated,
        "total": len(names),
        "strongest": len(chosen.strongest & names),
        "models": [{"name": one.answers.model, "title": one.answers.title} for one in scans],
        "prompts": list(prompts.values()),
    }


def _chosen_rows(found: Scanned, chosen: Chosen) -> Iterator[ScoredRow]:
    """Yield the chosen responses of a model, in the order of the artifact."""
    indices = sorted(index for name in chosen.prompt_ids for index in found.rows.get(name, ()))
    reader = _reader(found.answers.folder)
    # In parts, so that the decoded rows of a large choice are not all in memory.
    for start in range(0, len(indices), 256):
        yield from reader.fetch_scored(indices[start : start + 256])


def _answer(
    number: int,
    answers: Answers,
    response: Response,
    scored: TeacherScores | None,
    texts: Texts,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": number,
        "sample": response.sample_index,
        "finish": response.finish_reason,
        "tokens": _indices(response.token_ids.tolist(), texts, vocabulary),
        "student": _milli(response.sampling_logprobs, response.loss_mask),
    }
    if scored is not None:
        row["teacher"] = _milli(scored.teacher_logprobs, response.loss_mask)
        if scored.entropy is not None:
            row["entropy"] = _milli(scored.entropy, response.loss_mask)
    verdict = answers.verdicts.get(response.key)
    if verdict is not None:
        row |= {"right": verdict.right, "reason": verdict.reason, "found": verdict.found}
        # The answer that was expected, where the evaluation has recorded it.
        row |= {"expected": verdict.expected} if verdict.expected else {}
    return row


def _indices(token_ids: Sequence[int], texts: Texts, vocabulary: Vocabulary) -> list[int]:
    pieces = texts.pieces(token_ids)
    # Bytes at the end that are no whole character come as one more piece. They are the text of the
    # last token.
    if len(pieces) > len(token_ids):
        pieces = [*pieces[: len(token_ids) - 1], "".join(pieces[len(token_ids) - 1 :])]
    return [
        vocabulary.index(text, token, texts.is_hidden(token))
        for text, token in zip(pieces, token_ids, strict=True)
    ]


def _prompt(token_ids: Sequence[int], texts: Texts, vocabulary: Vocabulary) -> list[int]:
    """Return a prompt like _indices(). Names of roles count as special tokens too."""
    rows = [vocabulary.rows[index] for index in _indices(token_ids, texts, vocabulary)]
    marked = list(rows)
    for start in [place + 1 for place, row in enumerate(rows) if row[2]]:
        # A chat template writes <mark>user and then a line break or another mark.
        end = next(
            (
                place
                for place in range(start, min(start + _ROLE_TOKENS, len(rows)))
                if rows[place][2] or rows[place][0].startswith("\n")
            ),
            start,
        )
        if "".join(row[0] for row in rows[start:end]).strip() in _ROLES:
            last = end if end < len(rows) and not rows[end][2] else end - 1
            for place in range(start, last + 1):
                marked[place] = [*rows[place][:2], 1]
    return [vocabulary.index(text, token, bool(special)) for text, token, special in marked]


def _milli(values: Floats, loss_mask: Bools | None) -> list[int | None]:
    """Return nats in thousandths.

    JSON has null for what is not finite, and for tokens without loss, whose values say nothing.
    """
    known = np.isfinite(values)
    if loss_mask is not None:
        known &= loss_mask
    pairs = zip(values.tolist(), known.tolist(), strict=True)
    return [round(1000 * value) if is_known else None for value, is_known in pairs]


def token_panels(scans: Sequence[Scanned], texts: Texts) -> list[dict[str, Any]]:
    """Return the figures of tokens of each model whose responses were scored, as JSON.

    Tokens that are shown of one model of a set are shown of all its models.
    """
    figures: list[tuple[Scanned, TokenFigures]] = []
    for found in scans:
        of_model = found.deviations.figures(texts.of, texts.special)
        if of_model is not None:
            figures.append((found, of_model))
    rows = []
    for found, of_model in figures:
        same_set = [
            other.tokens
            for one, other in figures
            if one.answers.prompt_set == found.answers.prompt_set
        ]
        rows.append(
            {
                "set": found.answers.prompt_set,
                "set_title": found.answers.set_title,
                "model": found.answers.model,
                "title": found.answers.title,
                "overall": of_model.overall,
                "positions": of_model.positions,
                "kinds": of_model.kinds,
                "tokens": _of_all(found.deviations, same_set, texts.of),
                "entropy": of_model.entropy,
            }
        )
    return rows


def _of_all(
    deviations: Deviations, shown: Sequence[Mapping[int, Any]], text_of: Callable[[int], str]
) -> dict[int, list[Any]]:
    ids = sorted({token for tokens in shown for token in tokens})
    rows = {token: deviations.row_of(token, text_of) for token in ids}
    return {token: row for token, row in rows.items() if row is not None}
