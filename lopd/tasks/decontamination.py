"""Which training prompts hold a piece of an evaluation prompt: word n-grams in common.

Words are runs of letters and digits in lower case (a Chinese character is a word), so that spacing,
punctuation and LaTeX marks do not hide a copy. An n-gram that stands in many prompts of one
evaluation set (an instruction around every question) tells nothing and is left aside.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lopd.records import Prompt

_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")
_SHORTEST = 5  # words; a shorter evaluation prompt says too little to be recognised
# share of an evaluation set's prompts (and more than 2) from which an n-gram is boilerplate
_COMMON = 0.1


@dataclass(frozen=True, slots=True)
class Match:
    """A training prompt and the evaluation prompt that it shares most with. coverage: share of the
    evaluation prompt's n-grams found in it.
    """

    prompt_id: str
    evaluation_set: str
    evaluation_id: str
    num_shared: int
    coverage: float
    ngram: str  # the first one in common


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def question_of(prompt: Prompt) -> str:
    """The text of a prompt's turns, system turns aside."""
    return "\n".join(
        message["content"] for message in prompt.messages if message["role"] != "system"
    )


class EvaluationIndex:
    """The n-grams of evaluation sets. A prompt of fewer than n words is recognised as a whole; one
    of fewer than 5 not at all.

    min_coverage: share of an evaluation prompt's n-grams that a match needs; 0: a single one is
    enough.
    """

    def __init__(self, ngram: int, *, min_coverage: float = 0.0) -> None:
        self.ngram, self.min_coverage = ngram, min_coverage
        self.boilerplate: list[str] = []  # n-grams left aside
        self.too_short: list[str] = []  # evaluation prompts that cannot be recognised
        self._owners: dict[tuple[str, ...], set[int]] = {}
        self._prompts: list[tuple[str, str, int]] = []  # set, prompt id, number of its n-grams
        self._first_words: set[str] = set()
        self._sizes: set[int] = set()

    def add(self, name: str, prompts: Sequence[Prompt]) -> None:
        """Adds one evaluation set."""
        grams_of = []
        for prompt in prompts:
            words = words_of(question_of(prompt))
            if len(words) < _SHORTEST:
                self.too_short.append(prompt.prompt_id)
            grams_of.append(
                _grams(words, min(self.ngram, len(words))) if len(words) >= _SHORTEST else set()
            )
        frequency = Counter(gram for grams in grams_of for gram in grams)
        common = {
            gram for gram, count in frequency.items() if count > max(2, _COMMON * len(prompts))
        }
        self.boilerplate += sorted(" ".join(gram) for gram in common)
        for prompt, grams in zip(prompts, grams_of, strict=True):
            left = grams - common
            number = len(self._prompts)
            self._prompts.append((name, prompt.prompt_id, len(left)))
            for gram in left:
                self._owners.setdefault(gram, set()).add(number)
                self._first_words.add(gram[0])
                self._sizes.add(len(gram))

    def match(self, prompt: Prompt) -> Match | None:
        """The evaluation prompt that shares most n-grams with this one, or None where none shares
        any.
        """
        words = words_of(question_of(prompt))
        shared: dict[int, set[tuple[str, ...]]] = {}
        for position, word in enumerate(words):
            if word in self._first_words:
                for size in self._sizes:
                    gram = tuple(words[position : position + size])
                    for owner in self._owners.get(gram, ()):
                        shared.setdefault(owner, set()).add(gram)
        if not shared:
            return None
        owner = max(
            shared, key=lambda number: (len(shared[number]) / self._prompts[number][2], -number)
        )
        name, evaluation_id, total = self._prompts[owner]
        if len(shared[owner]) / total < self.min_coverage:
            return None
        first = min(shared[owner])
        return Match(
            prompt.prompt_id,
            name,
            evaluation_id,
            len(shared[owner]),
            len(shared[owner]) / total,
            " ".join(first),
        )


def _grams(words: Sequence[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}
