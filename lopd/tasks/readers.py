"""Makes prompts from the rows of a data set.

The columns come from the format's table or from a field map. Rows are chosen by their columns, and
repeated questions are left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from decimal import Decimal
from typing import Any

from lopd.config import PromptSet
from lopd.errors import ConfigError, DataError
from lopd.records import Prompt
from lopd.tasks.formats import FIELDS, FORMATS, INSTRUCTIONS, OWN, PLAIN, PromptFormat
from lopd.tasks.messages import content_of, id_from, parsed_messages, refusal_of, role_of
from lopd.tasks.own_form import OWN_FORM, own_prompt
from lopd.tasks.rows import MISSING, Row, parse_path, read_rows, value_at
from lopd.tasks.values import as_text, is_missing, is_no_answer, scalar_text

# How many prompt ids are kept as examples of each reason.
_EXAMPLES = 5


@dataclass
class ReadCounts:
    """What happened to the rows of a set.

    Attributes:
        rows: The number of rows that were read.
        places: For each prompt id the row that it was read from, without its values.
        answer_field: The column of the answers.
        left_out: For each reason the number of prompts that were left out.
        examples: For each reason the ids of the first such prompts.
    """

    rows: int = 0
    places: dict[str, Row] = field(default_factory=dict)
    answer_field: str = "answer"
    left_out: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, prompt_id: str = "") -> None:
        """Count a prompt that is left out. A row that was not chosen has no prompt id yet."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1
        # Ids as examples, so that a user can look at such rows.
        examples = self.examples.setdefault(reason, [])
        if prompt_id and len(examples) < _EXAMPLES:
            examples.append(prompt_id)


def read_candidates(prompt_set: PromptSet, domain: str, counts: ReadCounts) -> Iterator[Prompt]:
    """Yield the prompts of a file or folder, in order.

    Rows that are not chosen, prompts that are too long, and repeated questions are left out.

    Args:
        prompt_set: A set with a file.
        domain: The domain of prompts if their format names none.
        counts: A record that is filled while rows are read.

    Raises:
        DataError: See lopd.tasks.prompts.read_prompts.
        ConfigError: The fields, the choice of rows or the instruction of the set are impossible.
    """
    # Mistakes in the settings are found before the first row is read.
    reader = _RowReader(prompt_set, domain)
    assert prompt_set.file is not None
    places = counts.places
    # For messages about an answer, which are written after the reading.
    counts.answer_field = reader.answer_field
    # How often each question was read. Hashes: a data set may have millions of long questions.
    questions: dict[bytes, int] = {}
    for row in read_rows(prompt_set.file, reader.columns):
        # A line of JSONL may hold anything.
        if not isinstance(row.values, dict):
            raise DataError(
                f"a JSON object is needed, but the row is a {type(row.values).__name__}",
                where=row.where,
                remedy=reader.remedy,
            )
        counts.rows += 1
        # Rows are chosen before their columns are read: a row of no interest may have another form.
        if not reader.chooses(row):
            counts.leave_out("not chosen by where")
            continue
        prompt = reader.prompt(row)
        # Counted after the instruction was added, because the model reads it too.
        num_chars = sum(len(message["content"]) for message in prompt.messages)
        if prompt_set.max_prompt_chars is not None and num_chars > prompt_set.max_prompt_chars:
            counts.leave_out("too long", prompt.prompt_id)
            continue
        # The instruction is part of every prompt of the set, so it does not change which are equal.
        key = question_key(prompt)
        before = questions.get(key, 0)
        questions[key] = before + 1
        # The first one stays, so that the order of a file decides which rows are kept.
        if before and reader.duplicates == "drop":
            counts.leave_out("repeated", prompt.prompt_id)
            continue
        if before and reader.makes_id(row):
            # A repeated question is kept under another id, because ids are the keys of rollouts.
            again = f"{prompt.prompt_id}#{before + 1}"
            prompt = replace(prompt, prompt_id=again)
        # Rollouts and caches use the id as a key. Two prompts with one id would be mixed up.
        if prompt.prompt_id in places:
            raise _repeated_id(prompt.prompt_id, row, places[prompt.prompt_id])
        # Without the values, which would keep the whole data set in memory.
        places[prompt.prompt_id] = Row(None, row.file, row.number)
        yield prompt


def _repeated_id(prompt_id: str, row: Row, first: Row) -> DataError:
    """Return the error for an id that two rows have."""
    place = f"on line {first.number}" if first.file == row.file else f"at {first.where}"
    return DataError(
        f"the prompt_id {prompt_id!r} is not unique: it is also {place}",
        where=row.where,
        remedy="give every prompt its own prompt_id",
    )


def question_key(prompt: Prompt) -> bytes:
    """Return a key that is equal for prompts with the same messages. White space does not count.

    16 bytes: among a billion questions no two have the same key by chance.
    """
    spoken = [
        (message["role"], " ".join(message["content"].split())) for message in prompt.messages
    ]
    text = json.dumps(spoken, ensure_ascii=False)
    # JSON may hold half of a surrogate pair, which UTF-8 does not allow.
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:16]


class _RowReader:
    """Makes a prompt from a row, by the format, the field map and the instruction of one set.

    Attributes:
        own: Whether the file has our own form.
        paths: For each field the paths where it may stand.
        columns: The top-level columns that are needed. Empty means all.
    """

    def __init__(self, prompt_set: PromptSet, domain: str) -> None:
        # A field map makes another form of it, even on top of our own one.
        self.name = prompt_set.format
        self.format: PromptFormat = FORMATS[self.name]
        self.own = self.name == OWN and not prompt_set.fields
        self.remedy = OWN_FORM
        if not self.own:
            needs = f"format {self.name} needs {self.format.note or 'prompts.*.fields'}"
            self.remedy = f"{needs}; prompts.*.fields says where else to look"
        # The format knows its domain; our own form and a bare field map do not.
        self.domain = self.format.domain or domain
        self.duplicates = prompt_set.duplicates or self.format.duplicates
        self.instruction = _instruction(prompt_set.instruction, self.format.instruction)
        self.paths = self._paths(prompt_set)
        # Paths are parsed once, and not for every row.
        self.where = {
            key: (parse_path(key, "prompts.*.where"), wanted)
            for key, wanted in prompt_set.where.items()
        }
        # Parquet reads only the columns that are asked for, so all of them must be known first.
        tops = [str(steps[0]) for found in self.paths.values() for steps in found]
        tops += [str(steps[0]) for steps, _ in self.where.values()]
        self.columns = () if self.own else tuple(dict.fromkeys([*tops, *self.format.needed]))

    def _paths(self, prompt_set: PromptSet) -> dict[str, list[list[str | int]]]:
        """Return the format's paths, with those of the field map above them."""
        paths = {
            name: [parse_path(path, self.name) for path in found]
            for name, found in self.format.columns.items()
        }
        # The values of the table are any TOML, so their type is checked here.
        for name, path in prompt_set.fields.items():
            if name not in FIELDS or not isinstance(path, str):
                raise ConfigError(
                    f"{name} = {path!r:.60} is not allowed",
                    where="prompts.*.fields",
                    limit=f"the names {', '.join(FIELDS)}, each with a path in quotes",
                    remedy="correct the names and paths in prompts.*.fields",
                )
            paths[name] = [parse_path(path, f"prompts.*.fields.{name}")]
        # Messages stand above a question. If the user names only one of the two, the format's other
        # column must not win.
        if "question" in prompt_set.fields and "messages" not in prompt_set.fields:
            paths.pop("messages", None)
        if "messages" in prompt_set.fields and "question" not in prompt_set.fields:
            paths.pop("question", None)
        if not {"question", "messages"} & {*paths, *self.format.computed}:
            raise ConfigError(
                f"format {self.name} does not name the column of the questions",
                where="prompts.*.fields",
                remedy=(
                    'set prompts.*.fields = { question = "column" } (other names: '
                    "messages, answer, prompt_id, domain, hint)"
                ),
            )
        return paths

    @property
    def answer_field(self) -> str:
        """Return the column of the answers, for a message. Several are joined by "or"."""
        paths = [_written(steps) for steps in self.paths.get("answer", ())]
        return " or ".join(paths) or "answer"

    def chooses(self, row: Row) -> bool:
        """Return whether all conditions of prompts.*.where hold for the row."""
        return all(
            _matches(value_at(row.values, steps), wanted) for steps, wanted in self.where.values()
        )

    def makes_id(self, row: Row) -> bool:
        """Return whether a repeated question of this row gets an id of ours.

        In our own form an id that is given twice is a mistake. Other data sets repeat theirs.
        """
        return not self.own or row.values.get("prompt_id") is None

    def prompt(self, row: Row) -> Prompt:
        """Return the prompt of a row."""
        if self.own:
            own = own_prompt(row, self.domain)
            return replace(own, messages=_instructed(own.messages, self.instruction))
        # Each of the four is found by the same rules: the paths in order, then the format's
        # function.
        messages = self._messages(row)
        answer = self._value(row, "answer")
        given = self._value(row, "prompt_id")
        domain = self._value(row, "domain")
        hint = self._value(row, "hint")
        if given is MISSING:
            # Without the instruction: the same question has the same id with every instruction.
            prompt_id = id_from(self.name, messages)
        else:
            # A number as an id gets the format's name, so that two sets do not share it.
            text = scalar_text(given, row.where)
            prompt_id = given if isinstance(given, str) else f"{self.name}-{text}"
        return Prompt(
            prompt_id=prompt_id,
            messages=_instructed(messages, self.instruction),
            # Rows of mixed data sets name their own domain.
            domain=domain if isinstance(domain, str) else self.domain,
            # An answer may be a number, a list or a date in its column.
            answer=None if is_no_answer(answer) else as_text(answer, row.where),
            hint=None if hint is MISSING else as_text(hint, row.where),
        )

    def _value(self, row: Row, name: str) -> Any:
        """Return the field's value, or MISSING.

        Blank text, null and not-a-number count as missing.
        """
        for steps in self.paths.get(name, ()):
            value = value_at(row.values, steps)
            if not (is_no_answer(value) if name == "answer" else is_missing(value)):
                return value
        # A path of the field map replaces the format's own function.
        if name in self.format.computed and name not in self.paths:
            # For example the number behind #### in GSM8K's answers.
            value = self.format.computed[name](row.values)
            return MISSING if is_missing(value) else value
        return MISSING

    def _messages(self, row: Row) -> tuple[Mapping[str, str], ...]:
        """Return the messages of a row, or its question as the only message."""
        found = self._value(row, "messages")
        # Parquet columns without the type "string" come as bytes.
        if isinstance(found, bytes):
            found = scalar_text(found, row.where)
        if isinstance(found, str):
            found = parsed_messages(found, row.where, self.remedy)
        if found is MISSING:
            found = self._value(row, "question")
            found = scalar_text(found, row.where) if isinstance(found, bytes) else found
        if isinstance(found, str):
            # A column with text alone is a question of the user.
            messages: Any = [{"role": "user", "content": found}]
        elif found is MISSING:
            # The columns that are there show most quickly which one is meant.
            names = sorted(str(name) for name in row.values)
            raise DataError(
                "this row has no question",
                where=row.where,
                limit=f"one of the columns of this row: {', '.join(names):.200}",
                remedy=self.remedy,
            )
        else:
            messages = found
        return tuple(_until_answer(messages, row.where, self.remedy))


def _written(steps: Sequence[str | int]) -> str:
    """Return a path as users write it."""
    # An index has no dot before it.
    parts = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps]
    return "".join(parts).removeprefix(".")


def _instruction(given: str | None, default: str) -> str:
    # "plain" and "boxed" are short for texts.
    text = default if given is None else INSTRUCTIONS.get(given, given)
    if "{question}" not in text:
        remedy = f"write the text with {{question}} in it, or one of {', '.join(INSTRUCTIONS)}"
        raise ConfigError(
            f"{given!r:.80} does not contain {{question}}",
            where="prompts.*.instruction",
            remedy=remedy,
        )
    return text


def _instructed(
    messages: Sequence[Mapping[str, str]], instruction: str
) -> tuple[Mapping[str, str], ...]:
    """Write the instruction around the last message, which is the user's."""
    if instruction == PLAIN:
        return tuple(messages)
    *before, last = messages
    # replace() and not format(): questions in LaTeX are full of braces.
    content = instruction.replace("{question}", last["content"])
    return (*before, {"role": last["role"], "content": content})


def _until_answer(value: Any, where: str, remedy: str) -> list[Mapping[str, str]]:
    """Return the messages up to the last one of the user.

    What an assistant answers to that is not part of a prompt. A message has role and content, or
    from and value.
    """
    messages: list[Mapping[str, str]] = []
    for index, message in enumerate(value if isinstance(value, list) else [value]):
        about = message if isinstance(message, dict) else {}
        # The names of OpenAI's form, or those of ShareGPT's.
        role = about.get("role", about.get("from"))
        content = about.get("content", about.get("value"))
        reason = refusal_of(role, content) if about else "it is no message"
        if reason:
            what = f"messages[{index}] is {message!r:.60}: {reason}"
            limit = "a table with role and content, or with from and value"
            raise DataError(what, where=where, limit=limit, remedy=remedy)
        messages.append({"role": str(role_of(role)), "content": str(content_of(content))})
    # Data sets with solutions have them as the last message.
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or not messages[-1]["content"].strip():
        raise DataError(
            "the question is empty",
            where=where,
            remedy="remove this row, or set prompts.*.where so that this row is not read",
        )
    return messages


def _matches(value: Any, wanted: Any) -> bool:
    """Return whether a value fulfils a condition.

    Args:
        value: The value of a column, or MISSING.
        wanted: A value, a list of allowed values, or { min, max }. Both ends are included. Dates
            compare as text, so 2024-08-01 works with and without quotes.
    """
    value = _comparable(value)
    wanted = _comparable(wanted)
    if isinstance(wanted, Mapping):
        # A nested condition is written with a path (a.b = 1) and not with a table.
        if not wanted or not set(wanted) <= {"min", "max"}:
            raise ConfigError(
                f"the condition {dict(wanted)!r:.80} has a wrong form",
                where="prompts.*.where",
                limit="{ min = ..., max = ... }, or only one of the two",
                remedy="correct the conditions in prompts.*.where",
            )
        bounds = {name: _comparable(bound) for name, bound in wanted.items()}
        # Text and numbers have no common order, so such a row is not chosen.
        kind = str if isinstance(value, str) else int | float
        if not all(isinstance(one, kind) for one in (value, *bounds.values())):
            return False
        too_low = "min" in bounds and value < bounds["min"]
        too_high = "max" in bounds and value > bounds["max"]
        return not too_low and not too_high
    if isinstance(wanted, list):
        return any(_matches(value, one) for one in wanted)
    # In Python true equals 1, but a row with 1 does not fulfil { flag = true }.
    same_kind = isinstance(value, bool) == isinstance(wanted, bool)
    return value is not MISSING and value == wanted and same_kind


def _comparable(value: Any) -> Any:
    """Return a value in a type that TOML has."""
    # A datetime is a date too.
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bytes):
        # Only compared with a condition, so bytes that are no text may become anything.
        return value.decode(errors="replace")
    # TOML has no decimals, so a condition on such a column holds a float.
    return float(value) if isinstance(value, Decimal) else value
