"""Finds the training prompts that share word n-grams with an evaluation prompt.

Words are runs of letters and digits in lower case, and a Chinese character is a word. So spacing,
punctuation and LaTeX marks do not hide a copy. An n-gram that many prompts of one evaluation set
have (an instruction around every question) shows nothing and is ignored.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lopd.records import Prompt

# \u3400 to \u9fff are the Chinese characters. They are written without spaces between words.
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")
# An evaluation prompt of fewer words says too little to be recognised.
_SHORTEST = 5
# An n-gram in more than this share of an evaluation set's prompts is boilerplate; in at most
# _COMMON_LEAST prompts it never is, because two versions of one question may share much.
_COMMON = 0.1
_COMMON_LEAST = 2


@dataclass(frozen=True, slots=True)
class Match:
    """A training prompt, and the evaluation prompt that it shares most with.

    Attributes:
        prompt_id: The training prompt.
        evaluation_set: The name of the evaluation set.
        evaluation_id: The evaluation prompt.
        num_shared: The number of n-grams that both have.
        coverage: The share of the evaluation prompt's n-grams that the training prompt has, 0 to 1.
        ngram: The first common n-gram in alphabetical order, as an example.
    """

    prompt_id: str
    evaluation_set: str
    evaluation_id: str
    num_shared: int
    coverage: float
    ngram: str


def words_of(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return _WORD.findall(text.lower())


def question_of(prompt: Prompt) -> str:
    """Return the text of a prompt's messages, without system messages."""
    return "\n".join(
        message["content"] for message in prompt.messages if message["role"] != "system"
    )


class EvaluationIndex:
    """The n-grams of evaluation sets.

    An evaluation prompt of fewer than n words is recognised as a whole; one of fewer than 5 words
    is not recognised at all.

    Args:
        ngram: The number n of words.
        min_coverage: The share of an evaluation prompt's n-grams that a match needs, 0 to 1. 0
            means that one n-gram is enough.
    """

    def __init__(self, ngram: int, *, min_coverage: float = 0.0) -> None:
        self.ngram = ngram
        self.min_coverage = min_coverage
        # For the report: the n-grams that are ignored, and the prompts that are too short.
        self.boilerplate: list[str] = []
        self.too_short: list[str] = []
        # The evaluation prompts by number: set, prompt id, number of n-grams. And for each n-gram
        # the numbers of the prompts that have it.
        self._prompts: list[tuple[str, str, int]] = []
        self._owners: dict[tuple[str, ...], set[int]] = {}
        # These two make a match fast: most words of a training prompt begin no known n-gram.
        self._first_words: set[str] = set()
        self._sizes: set[int] = set()

    def add(self, name: str, prompts: Sequence[Prompt]) -> None:
        """Add one evaluation set.

        Args:
            name: The name of the set, for the matches.
            prompts: All its prompts. Boilerplate is found by their number, so a set is added at
                once.
        """
        grams_of = []
        for prompt in prompts:
            words = words_of(question_of(prompt))
            grams: set[tuple[str, ...]] = set()
            if len(words) < _SHORTEST:
                self.too_short.append(prompt.prompt_id)
            else:
                grams = _grams(words, min(self.ngram, len(words)))
            grams_of.append(grams)
        # Each prompt counts an n-gram once, however often it has it.
        frequency = Counter(gram for grams in grams_of for gram in grams)
        limit = max(_COMMON_LEAST, _COMMON * len(prompts))
        common = {gram for gram, count in frequency.items() if count > limit}
        # Sorted, because the order of a set differs from run to run.
        self.boilerplate += sorted(" ".join(gram) for gram in common)
        for prompt, grams in zip(prompts, grams_of, strict=True):
            # If all n-grams of a prompt are boilerplate, nothing is left by which it could be
            # found.
            left = grams - common
            number = len(self._prompts)
            self._prompts.append((name, prompt.prompt_id, len(left)))
            for gram in left:
                self._owners.setdefault(gram, set()).add(number)
                self._first_words.add(gram[0])
                self._sizes.add(len(gram))

    def match(self, prompt: Prompt) -> Match | None:
        """Return the evaluation prompt that this prompt covers most.

        Returns:
            None if it shares nothing, or less than ``min_coverage``.
        """
        words = words_of(question_of(prompt))
        shared: dict[int, set[tuple[str, ...]]] = {}
        for position, word in enumerate(words):
            # Most words begin no n-gram of an evaluation prompt, so most positions end here.
            if word in self._first_words:
                # Short evaluation prompts are one n-gram of their own length, so there are several
                # lengths.
                for size in self._sizes:
                    gram = tuple(words[position : position + size])
                    for owner in self._owners.get(gram, ()):
                        shared.setdefault(owner, set()).add(gram)
        if not shared:
            return None

        def coverage_of(number: int) -> float:
            return len(shared[number]) / self._prompts[number][2]

        # Of equal ones the first, so that the report does not depend on the order of a set.
        owner = max(shared, key=lambda number: (coverage_of(number), -number))
        coverage = coverage_of(owner)
        if coverage < self.min_coverage:
            return None
        name, evaluation_id, _ = self._prompts[owner]
        return Match(
            prompt_id=prompt.prompt_id,
            evaluation_set=name,
            evaluation_id=evaluation_id,
            num_shared=len(shared[owner]),
            coverage=coverage,
            ngram=" ".join(min(shared[owner])),
        )


def _grams(words: Sequence[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}
