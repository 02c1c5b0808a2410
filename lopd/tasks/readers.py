"""From the rows of a data set to prompts: columns by the format's table or by a field map, rows
chosen by their columns, repeated questions left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from typing import Any

from lopd.config import PromptSet
from lopd.errors import ConfigError, DataError
from lopd.records import Prompt
from lopd.tasks.formats import FIELDS, FORMATS, INSTRUCTIONS, OWN, PLAIN, PromptFormat
from lopd.tasks.rows import MISSING, Row, parse_path, read_rows, value_at
from lopd.tasks.turns import content_of, opened_turns, refusal_of, role_of
from lopd.tasks.values import MISSING_TEXTS, as_text, is_missing, is_no_answer, scalar_text

OWN_FORM = 'a line is {"prompt_id": "...", "messages": [{"role": "user", "content": "..."}], "answer": "..."}, or "question" in place of "messages"'


@dataclass
class ReadCounts:
    """What became of the rows of a set: how many were read, and for each reason how many were left
    out, with the ids of the first.

    places: of each prompt the row that it was read from. answer_field: where answers stand in it.
    """

    rows: int = 0
    places: dict[str, Row] = field(default_factory=dict)
    answer_field: str = "answer"
    left_out: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, prompt_id: str = "") -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if prompt_id and len(examples) < 5:
            examples.append(prompt_id)


def read_candidates(prompt_set: PromptSet, domain: str, counts: ReadCounts) -> Iterator[Prompt]:
    """Every prompt of the set's file or folder that its columns choose and that is no repetition,
    in order.

    domain: of prompts whose format names none. DataError: see lopd.tasks.prompts; ConfigError:
    fields, where or instruction of the set.
    """
    reader = _RowReader(prompt_set, domain)
    assert prompt_set.file is not None
    places = counts.places
    counts.answer_field = reader.answer_field
    questions: dict[bytes, int] = {}
    for row in read_rows(prompt_set.file, reader.columns):
        if not isinstance(row.values, dict):
            raise DataError(
                f"a JSON object is needed, found {type(row.values).__name__}",
                where=row.where,
                remedy=reader.remedy,
            )
        counts.rows += 1
        if not reader.chooses(row):
            counts.leave_out("not chosen by where")
            continue
        prompt = reader.prompt(row)
        if (
            prompt_set.max_prompt_chars is not None
            and sum(len(message["content"]) for message in prompt.messages)
            > prompt_set.max_prompt_chars
        ):
            counts.leave_out("too long", prompt.prompt_id)
            continue
        key = question_key(prompt)
        before = questions.get(key, 0)
        questions[key] = before + 1
        if before and reader.duplicates == "drop":
            counts.leave_out("repeated", prompt.prompt_id)
            continue
        if before and reader.own_ids is False:
            prompt = Prompt(
                f"{prompt.prompt_id}#{before + 1}", prompt.messages, prompt.domain, prompt.answer
            )
        if prompt.prompt_id in places:
            first = places[prompt.prompt_id]
            place = f"on line {first.number}" if first.file == row.file else f"at {first.where}"
            raise DataError(
                f"duplicate prompt_id {prompt.prompt_id!r}, first {place}",
                where=row.where,
                remedy="give every prompt its own prompt_id",
            )
        places[prompt.prompt_id] = Row(None, row.file, row.number)
        yield prompt


def question_key(prompt: Prompt) -> bytes:
    """What two prompts with the same messages, up to white space, have in common."""
    turns = [(message["role"], " ".join(message["content"].split())) for message in prompt.messages]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode()).digest()[:16]


class _RowReader:
    """The format, the field map, the instruction and the choice of rows of one set."""

    def __init__(self, prompt_set: PromptSet, domain: str) -> None:
        self.name = prompt_set.format
        self.format: PromptFormat = FORMATS[self.name]
        self.own = self.name == OWN and not prompt_set.fields
        self.remedy = (
            OWN_FORM
            if self.own
            else f"format {self.name} needs {self.format.note or 'prompts.*.fields'}; prompts.*.fields says where else to look"
        )
        self.domain = self.format.domain or domain
        self.duplicates = prompt_set.duplicates or self.format.duplicates
        self.instruction = _instruction(prompt_set.instruction, self.format.instruction)
        self.paths = self._paths(prompt_set)
        self.own_ids = True if self.own else False if self.duplicates == "keep" else None
        self.where = {
            key: (parse_path(key, "prompts.*.where"), wanted)
            for key, wanted in prompt_set.where.items()
        }
        tops = [str(steps[0]) for found in self.paths.values() for steps in found] + [
            str(steps[0]) for steps, _ in self.where.values()
        ]
        self.columns = () if self.own else tuple(dict.fromkeys([*tops, *self.format.needed]))

    def _paths(self, prompt_set: PromptSet) -> dict[str, list[list[str | int]]]:
        paths = {
            name: [parse_path(path, self.name) for path in found]
            for name, found in self.format.columns.items()
        }
        for name, path in prompt_set.fields.items():
            if name not in FIELDS or not isinstance(path, str):
                raise ConfigError(
                    f"{name} = {path!r:.60}",
                    where="prompts.*.fields",
                    limit=f"names {', '.join(FIELDS)}; paths as text",
                    remedy="mend the field map",
                )
            paths[name] = [parse_path(path, f"prompts.*.fields.{name}")]
        if "question" in prompt_set.fields and "messages" not in prompt_set.fields:
            paths.pop("messages", None)
        if "messages" in prompt_set.fields and "question" not in prompt_set.fields:
            paths.pop("question", None)
        if not {"question", "messages"} & {*paths, *self.format.computed}:
            remedy = 'give prompts.*.fields = { question = "column" } (also messages, answer, prompt_id, domain)'
            raise ConfigError(
                f"format {self.name}: no column of questions is named",
                where="prompts.*.fields",
                remedy=remedy,
            )
        return paths

    @property
    def answer_field(self) -> str:
        """Where answers are looked for, for whoever mends one."""
        paths = [_written(steps) for steps in self.paths.get("answer", ())]
        return " or ".join(paths) or "answer"

    def chooses(self, row: Row) -> bool:
        return all(
            _matches(value_at(row.values, steps), wanted) for steps, wanted in self.where.values()
        )

    def prompt(self, row: Row) -> Prompt:
        if self.own:
            return _own_prompt(row, self.domain, self.instruction)
        messages = self._messages(row)
        answer = self._value(row, "answer")
        given = self._value(row, "prompt_id")
        domain = self._value(row, "domain")
        if given is MISSING:
            digest = hashlib.sha256(
                json.dumps([dict(message) for message in messages], ensure_ascii=False).encode()
            ).hexdigest()[:16]
            prompt_id = f"{self.name}-{digest}"
        else:
            text = scalar_text(given, row.where)
            prompt_id = given if isinstance(given, str) else f"{self.name}-{text}"
        return Prompt(
            prompt_id=prompt_id,
            messages=_instructed(messages, self.instruction),
            domain=domain if isinstance(domain, str) else self.domain,
            answer=None if is_no_answer(answer) else as_text(answer, row.where),
        )

    def _value(self, row: Row, name: str) -> Any:
        """The field's value, or MISSING; blank text, null and not-a-number count as missing."""
        for steps in self.paths.get(name, ()):
            value = value_at(row.values, steps)
            if not (is_no_answer(value) if name == "answer" else is_missing(value)):
                return value
        if name in self.format.computed and name not in self.paths:
            value = self.format.computed[name](row.values)
            return MISSING if is_missing(value) else value
        return MISSING

    def _messages(self, row: Row) -> tuple[Mapping[str, str], ...]:
        found = self._value(row, "messages")
        if isinstance(found, bytes):
            found = scalar_text(found, row.where)
        if isinstance(found, str):
            found = opened_turns(found, row.where, self.remedy)
        if found is MISSING:
            found = self._value(row, "question")
            found = scalar_text(found, row.where) if isinstance(found, bytes) else found
        if isinstance(found, str):
            turns: Any = [{"role": "user", "content": found}]
        elif found is MISSING:
            names = sorted(str(name) for name in row.values)
            raise DataError(
                "no question in this row",
                where=row.where,
                limit=f"its columns: {', '.join(names):.200}",
                remedy=self.remedy,
            )
        else:
            turns = found
        return tuple(_turns(turns, row.where, self.remedy))


def _written(steps: Sequence[str | int]) -> str:
    """A path as users write it."""
    parts = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps]
    return "".join(parts).removeprefix(".")


def _instruction(given: str | None, default: str) -> str:
    text = default if given is None else INSTRUCTIONS.get(given, given)
    if "{question}" not in text:
        remedy = f"write the text with {{question}} in it, or one of {', '.join(INSTRUCTIONS)}"
        raise ConfigError(
            f"{given!r:.80} has no place for the question",
            where="prompts.*.instruction",
            remedy=remedy,
        )
    return text


def _instructed(
    messages: Sequence[Mapping[str, str]], instruction: str
) -> tuple[Mapping[str, str], ...]:
    """The instruction goes around the last message, which is the user's."""
    if instruction == PLAIN:
        return tuple(messages)
    *before, last = messages
    return (
        *before,
        {"role": last["role"], "content": instruction.replace("{question}", last["content"])},
    )


def _turns(value: Any, where: str, remedy: str) -> list[Mapping[str, str]]:
    """Turns (role, content or from, value) up to the last one of the user; what an assistant
    answers to it is no prompt.
    """
    turns: list[Mapping[str, str]] = []
    for index, turn in enumerate(value if isinstance(value, list) else [value]):
        about = turn if isinstance(turn, dict) else {}
        role = about.get("role", about.get("from"))
        content = about.get("content", about.get("value"))
        reason = refusal_of(role, content) if about else "it is no message"
        if reason:
            what = f"messages[{index}] is {turn!r:.60}: {reason}"
            limit = "role and content, or from and value"
            raise DataError(what, where=where, limit=limit, remedy=remedy)
        turns.append({"role": str(role_of(role)), "content": str(content_of(content))})
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or not turns[-1]["content"].strip():
        raise DataError(
            "the question is empty",
            where=where,
            remedy="remove this row, or choose rows with prompts.*.where",
        )
    return turns


def _matches(value: Any, wanted: Any) -> bool:
    """wanted: a value, a list of allowed ones, or { min, max } (both may be equal; dates compare as
    text, so 2024-08-01 works with or without quotes).
    """
    value, wanted = _comparable(value), _comparable(wanted)
    if isinstance(wanted, Mapping):
        if not wanted or not set(wanted) <= {"min", "max"}:
            raise ConfigError(
                f"{dict(wanted)!r:.80}",
                where="prompts.*.where",
                limit="{ min = ..., max = ... }",
                remedy="mend the choice of rows",
            )
        bounds = {name: _comparable(bound) for name, bound in wanted.items()}
        kind = str if isinstance(value, str) else int | float
        if not isinstance(value, kind) or not all(
            isinstance(bound, kind) for bound in bounds.values()
        ):
            return False
        return not ("min" in bounds and value < bounds["min"]) and not (
            "max" in bounds and value > bounds["max"]
        )
    if isinstance(wanted, list):
        return any(_matches(value, one) for one in wanted)
    return (
        value is not MISSING
        and value == wanted
        and isinstance(value, bool) == isinstance(wanted, bool)
    )


def _comparable(value: Any) -> Any:
    if isinstance(value, date):  # datetime is a date too
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return float(value) if isinstance(value, Decimal) else value


# ---- our own form
# ---------------------------------------------------------------------------------------------------------------------------------


def _own_prompt(row: Row, domain: str, instruction: str) -> Prompt:
    values, where = row.values, row.where
    prompt_id = _text(values, "prompt_id", where)
    given = {name for name in ("messages", "question") if values.get(name) is not None}
    if len(given) != 1:
        raise DataError(
            f"prompt {prompt_id!r} needs either messages or question", where=where, remedy=OWN_FORM
        )
    told = values.get("messages")
    if told is None:
        told = [{"role": "user", "content": _text(values, "question", where)}]
    messages = _own_messages(told, where)
    answer = None if values.get("answer") is None else _text(values, "answer", where)
    if answer is not None and answer.strip() in MISSING_TEXTS:
        what = f"answer is {answer!r}, which is what a missing value is written as"
        raise DataError(what, where=where, remedy="leave the answer out, or write the right one")
    own_domain = domain if values.get("domain") is None else _text(values, "domain", where)
    return Prompt(
        prompt_id=prompt_id,
        messages=_instructed(messages, instruction),
        domain=own_domain,
        answer=answer,
    )


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        found = f"is {value!r:.60}" if key in row else "is missing"
        raise DataError(
            f"{key} {found}; it must be a non-empty string", where=where, remedy=OWN_FORM
        )
    return value


def _own_messages(value: Any, where: str) -> tuple[Mapping[str, str], ...]:
    """A role that is not known here goes to the chat template as it is."""
    if isinstance(value, str):
        value = opened_turns(value, where, OWN_FORM)
    if not isinstance(value, list) or not value:
        raise DataError("messages must be a non-empty list", where=where, remedy=OWN_FORM)
    messages: list[Mapping[str, str]] = []
    for index, message in enumerate(value):
        content = content_of(message.get("content")) if isinstance(message, dict) else None
        shaped = isinstance(message, dict) and set(message) == {"role", "content"}
        if content is None or not shaped or not isinstance(message["role"], str):
            what = f"messages[{index}] must have role and content, both strings, and nothing else"
            about = message if isinstance(message, dict) else {}
            reason = refusal_of(about.get("role"), about.get("content")) if about else ""
            raise DataError(what + (f": {reason}" if reason else ""), where=where, remedy=OWN_FORM)
        role = message["role"]
        known = role.strip().lower() in ("user", "assistant", "system")
        messages.append({"role": role.strip().lower() if known else role, "content": content})
    if messages[-1]["role"] == "assistant":
        raise DataError(
            "the last message is the assistant's: nothing is left to answer",
            where=where,
            remedy="end with the user's message",
        )
    return tuple(messages)
