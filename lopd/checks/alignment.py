"""A teacher with another tokenizer: what goes together with it, and what does not."""

from __future__ import annotations

from collections.abc import Iterator

from lopd.artifacts import identify_tokenizer
from lopd.checks.findings import Finding
from lopd.config import Config
from lopd.errors import ConfigError
from lopd.tasks.token_bytes import TokenBytes


def alignment(config: Config) -> Iterator[Finding]:
    """Check that the scores of a teacher with another tokenizer can be brought to the student."""
    if not config.aligns_tokenizers:
        yield 'not used (score.tokenizer = "same")'
        return
    problems = [*alignment_problems(config)]
    yield from problems
    teacher = config.models.teacher
    student = config.models.student
    # Without the folders there is nothing to read, and their own checks say so.
    if problems or not (teacher.is_dir() and student.is_dir()):
        return
    # With one tokenizer the teacher can score the very ids. Alignment would lose the tokens to
    # which the text does not encode again.
    if identify_tokenizer(teacher).tokenizer == identify_tokenizer(student).tokenizer:
        yield ConfigError(
            'score.tokenizer = "aligned" gains nothing: both models have one tokenizer',
            where="score.tokenizer",
            remedy='set score.tokenizer="same": the teacher then scores the very ids that were '
            "sampled",
        )
        return
    # Tokenizers whose tokens say nothing about bytes are refused here, and not after the rollouts.
    for folder in (teacher, student):
        TokenBytes(folder)
    yield "scores are brought to the student's tokens by their bytes; each model has its template"


def alignment_problems(config: Config) -> Iterator[ConfigError]:
    """Yield knobs that do not go together with a teacher of another tokenizer."""
    if not config.aligns_tokenizers:
        return
    score = config.score
    models = config.models
    # The ids and the entropy are of the teacher's vocabulary, at the places of its own tokens.
    for name, is_set in (("top_k", score.top_k > 0), ("entropy", score.entropy)):
        if is_set:
            yield ConfigError(
                f'score.{name} cannot be used with score.tokenizer = "aligned": it belongs to the '
                "teacher's vocabulary, and only log-probabilities of text can be brought over",
                where=f"score.{name}",
                remedy=f"remove score.{name}",
            )
    if models.teachers:
        yield ConfigError(
            'models.teachers cannot be used with score.tokenizer = "aligned"',
            where="models.teachers",
            limit="exactly one teacher",
            remedy="remove models.teachers, or use teachers with the student's tokenizer",
        )
    # Its scores would need an alignment of their own, and the column holds one.
    if models.teacher_base is not None:
        yield ConfigError(
            'models.teacher_base cannot be used with score.tokenizer = "aligned"',
            where="models.teacher_base",
            limit="a teacher and its base with the student's tokenizer",
            remedy="remove models.teacher_base, or use a teacher with the student's tokenizer",
        )
    # The prompts of rollouts are rendered in the template's own tokens.
    if models.chat_template != "student":
        yield ConfigError(
            'score.tokenizer = "aligned" needs the student\'s chat template for the student: each '
            "model sees its own",
            where="models.chat_template",
            remedy='set models.chat_template="student"',
        )
