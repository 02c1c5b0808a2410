"""An artifact from transcripts of agents: messages with roles, or token ids with a mask.

What a tool, a user or the chat template wrote is conditioned on and carries no loss. docs/
multi_turn.md has the form of a row.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lopd import cache
from lopd.artifacts import ArtifactWriter, identify_model, sha256_json
from lopd.artifacts.lineage import declared
from lopd.cache.row_checks import Findings, RowChecks
from lopd.cache.table import TEACHER_CACHE
from lopd.errors import DataError
from lopd.records import (
    FINISH_REASONS,
    Bools,
    Floats,
    Ints,
    Manifest,
    ModelIdentity,
    Response,
    TeacherScores,
    int32,
    token_hash,
)
from lopd.tasks.chat_template import template_text
from lopd.tasks.rendering import ConversationRenderer
from lopd.tasks.rows import Row, content_hash, read_rows
from lopd.tasks.tokenizer import load_tokenizer, stop_token_ids
from lopd.tasks.turns import render_conversation

Kind: TypeAlias = Literal["rollouts", "demonstrations"]
# Optional columns of a row with token ids, and what a cache lacks without them.
_SAMPLING = "sampling_logprobs"
_TEACHER = "teacher_logprobs"
_LACKS_IDS = (
    "sampled token ids: the messages were rendered and tokenised, so a trained token need not be "
    "a sampled one"
)
_LACKS_SAMPLING = "sampling log-probabilities: no importance weights, no advantage at the start"
_LACKS_STUDENT = (
    "identity: it is not recorded which model wrote the answers; so distill.cache takes it with "
    "allow_foreign_cache alone"
)
_FORM = (
    'write {"messages": [...]}, or {"prompt_ids": [...], "token_ids": [...], "loss_mask": [...]} '
    "(docs/multi_turn.md)"
)


def is_reference_file(file: str | Path) -> bool:
    """Return whether a file has the column that only the reference code's files have.

    A file that cannot be read is taken for one, because that import says what is wrong with it.
    """
    if Path(file).suffix != ".parquet":
        return False
    try:
        names = pq.read_schema(file).names
    except (OSError, ValueError):
        return True
    return not {"messages", "token_ids"} & set(names)


def import_transcripts(
    file: str | Path,
    out: str | Path,
    tokenizer_folder: str | Path,
    *,
    kind: Kind = "rollouts",
    student: str | Path | None = None,
    teacher: str | Path | None = None,
    batch_rows: int = 256,
) -> Manifest:
    """Publish an artifact with the transcripts of a file. ``extra.lacks`` says what they lack.

    Args:
        file: A JSONL or Parquet file, or a folder of such files.
        out: The folder of the new artifact.
        tokenizer_folder: The folder whose tokenizer has the ids, and whose chat template renders
            messages.
        kind: What the artifact is. With teacher_logprobs it is a teacher_cache.
        student: The model that the user declares as the one that wrote the answers of rollouts.
        teacher: The model that the user declares as the one that wrote the demonstrations, or
            whose log-probabilities the rows have.
        batch_rows: The number of rows in a shard.

    Raises:
        DataError: A row cannot be used. The message names its line.
    """
    file = Path(file)
    folder = Path(tokenizer_folder)
    importer = _Importer(folder)
    identities = {
        role: identify_model(Path(path))
        for role, path in (("student", student), ("teacher", teacher))
        if path is not None
    }
    rows = importer.rows(file)
    first = next(rows, None)
    if first is None:
        raise DataError("the file has no row", where=str(file), remedy=_FORM)
    # The first row says which columns there are. One that differs is refused.
    kind_of_all = TEACHER_CACHE if first.scores is not None else kind
    writer = ArtifactWriter(
        Path(out),
        kind=kind_of_all,
        inputs={
            # By content, so that a changed file of the same name is not continued.
            "import.file": content_hash(file),
            "import.tokenizer": content_hash(folder / "tokenizer.json"),
            # It decides the ids of messages. Rows of ids do not need one.
            "import.template": sha256_json(template_text(folder)),
            "import.kind": kind_of_all,
            "import.batch_rows": batch_rows,
        },
        models=identities,
        lineage=_lineage(kind_of_all, identities.get("teacher")),
    )
    findings = Findings()
    checks = RowChecks(findings, vocab_size=importer.vocab_size, kind=kind_of_all)
    for index, batch in enumerate(_batches(_as_first(first, rows), batch_rows)):
        table = _table_of(batch)
        # The rows are checked before they are published: nothing unsound gets into a cache.
        checks.add(table, file.name)
        for finding in findings:
            raise DataError(str(finding), where=str(file), remedy="correct or remove these rows")
        if not writer.is_published(index):
            writer.publish_shard(index, table)
    return writer.finish(
        lacks=importer.lacks(first, "student" in identities or kind_of_all == "demonstrations"),
        vocab_size=importer.vocab_size,
        end_token_ids=list(importer.end_ids),
        logprob_bits=32,
        logprob_loss=None,
        **importer.figures(),
    )


@dataclass(frozen=True, slots=True)
class _Imported:
    """A row as records, and which columns it had."""

    response: Response
    scores: TeacherScores | None
    is_sampled: bool
    where: str


def _as_first(first: _Imported, rows: Iterator[_Imported]) -> Iterator[_Imported]:
    """Yield the first row and the others, which must have its columns."""
    yield first
    for row in rows:
        for name, has, all_have in (
            (_SAMPLING, row.is_sampled, first.is_sampled),
            (_TEACHER, row.scores is not None, first.scores is not None),
        ):
            if has != all_have:
                raise DataError(
                    f"this row has {'' if has else 'no '}{name}, unlike the first one",
                    where=row.where,
                    limit="either all rows have it, or none",
                    remedy="give the two kinds of rows in two files",
                )
        yield row


def _table_of(rows: Sequence[_Imported]) -> pa.Table:
    """Return rows that have the same columns as a shard."""
    scores = [row.scores for row in rows if row.scores is not None]
    table = cache.to_table([row.response for row in rows], scores or None)
    # A record has this column always. Where the rows had none, the shard has none.
    return table if rows[0].is_sampled else table.drop_columns([_SAMPLING])


def _batches(rows: Iterator[_Imported], size: int) -> Iterator[list[_Imported]]:
    """Yield the rows in lists of this size. The file may be larger than the memory."""
    batch: list[_Imported] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _lineage(kind: str, teacher: ModelIdentity | None) -> dict[str, Any]:
    """Return the lineage of an import. Scores are never consistent, because nothing proves it."""
    if kind == "demonstrations":
        return declared(teacher)
    unknown = declared(None)
    if kind != TEACHER_CACHE:
        return unknown
    return {
        **unknown,
        "score_teacher": teacher.weights if teacher else "",
        "score_evidence": "declared" if teacher else "unknown",
        "consistent": False,
    }


@dataclass
class _Importer:
    """Reads rows, and counts what they have."""

    folder: Path
    _seen: Counter[str] = field(default_factory=Counter)
    _tokens: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._tokenizer = load_tokenizer(self.folder)
        self.vocab_size = len(self._tokenizer)
        self.end_ids = stop_token_ids(self.folder, self._tokenizer)
        # Made at the first row with messages: rows of ids need no chat template.
        self._renderer: ConversationRenderer | None = None

    def rows(self, file: Path) -> Iterator[_Imported]:
        """Yield every row of a file."""
        for row in read_rows(file):
            if not isinstance(row.values, dict):
                raise DataError("the row is no JSON object", where=row.where, remedy=_FORM)
            given = {name for name in ("messages", "token_ids") if row.values.get(name) is not None}
            if len(given) != 1:
                raise DataError(
                    "a row must have either messages or token_ids", where=row.where, remedy=_FORM
                )
            read = self._from_messages if given == {"messages"} else self._from_ids
            yield read(row)

    def lacks(self, first: _Imported, knows_writer: bool) -> list[str]:
        """Return what the imported rows lack."""
        reasons = {
            _LACKS_IDS: self._tokens["rendered"] > 0,
            _LACKS_SAMPLING: not first.is_sampled,
            _LACKS_STUDENT: not knows_writer,
        }
        return [reason for reason, is_lacking in reasons.items() if is_lacking]

    def figures(self) -> dict[str, Any]:
        """Return how many turns there are, and how many tokens carry loss."""
        return {"num_turns": self._tokens["turns"], "num_loss_tokens": self._tokens["loss"]}

    def _from_messages(self, row: Row) -> _Imported:
        messages = row.values["messages"]
        is_list = isinstance(messages, list) and all(isinstance(one, dict) for one in messages)
        if not is_list or not all(isinstance(one.get("role"), str) for one in messages):
            raise DataError(
                "messages must be a list of objects with a role", where=row.where, remedy=_FORM
            )
        for name in ("loss_mask", _SAMPLING, _TEACHER):
            # They belong to ids, and which ids messages become is only known here.
            if row.values.get(name) is not None:
                raise DataError(
                    f"{name} is given for messages, but belongs to token_ids",
                    where=row.where,
                    remedy=f"remove {name}, or give prompt_ids and token_ids in place of messages",
                )
        if self._renderer is None:
            self._renderer = ConversationRenderer(self._tokenizer)
        found = render_conversation(
            self._renderer,
            # Parquet fills the keys that a message lacks with null.
            [{key: value for key, value in one.items() if value is not None} for one in messages],
            self.end_ids,
            where=row.where,
            tools=row.values.get("tools"),
        )
        self._tokens["rendered"] += len(found.token_ids)
        return self._imported(row, found.prompt_ids, found.token_ids, found.loss_mask, None, None)

    def _from_ids(self, row: Row) -> _Imported:
        prompt_ids = self._ids(row, "prompt_ids")
        token_ids = self._ids(row, "token_ids")
        mask = self._mask(row, len(token_ids))
        sampling = self._logprobs(row, _SAMPLING, mask)
        return self._imported(
            row, prompt_ids, token_ids, mask, sampling, self._logprobs(row, _TEACHER, mask)
        )

    def _imported(
        self,
        row: Row,
        prompt_ids: Ints,
        token_ids: Ints,
        mask: Bools,
        sampling: Floats | None,
        teacher: Floats | None,
    ) -> _Imported:
        prompt_id = row.values.get("prompt_id") or _prompt_id(prompt_ids)
        if not isinstance(prompt_id, str):
            raise DataError("prompt_id must be a string", where=row.where, remedy=_FORM)
        index = row.values.get("sample_index")
        index = self._seen[prompt_id] if index is None else index
        self._seen[prompt_id] += 1
        ended = "stop" if int(token_ids[-1]) in self.end_ids else "length"
        reason = row.values.get("finish_reason") or ended
        if reason not in FINISH_REASONS or not isinstance(index, int):
            raise DataError(
                f"finish_reason {reason!r:.40} or sample_index {index!r:.40} is wrong",
                where=row.where,
                limit=f"one of {', '.join(FINISH_REASONS)}, and a number",
                remedy="correct this row",
            )
        self._tokens["loss"] += int(mask.sum())
        begins = mask & ~np.concatenate([[False], mask[:-1]])
        self._tokens["turns"] += int(begins.sum())
        response = Response(
            prompt_id=prompt_id,
            sample_index=index,
            prompt_ids=prompt_ids,
            token_ids=token_ids,
            # Without them only to fill the record. The caller drops the column.
            sampling_logprobs=np.zeros(len(mask), np.float32) if sampling is None else sampling,
            finish_reason=reason,
            weight_version=str(row.values.get("weight_version") or "unknown"),
            loss_mask=mask,
        )
        scores = None
        if teacher is not None:
            name = token_hash(prompt_ids, token_ids)
            scores = TeacherScores(prompt_id, index, name, teacher)
        return _Imported(response, scores, sampling is not None, row.where)

    def _ids(self, row: Row, name: str) -> Ints:
        values = row.values.get(name)
        if not _is_list_of(values, int) or not values:
            raise DataError(
                f"{name} must be a list of at least one token id", where=row.where, remedy=_FORM
            )
        wrong = [value for value in values if not 0 <= value < self.vocab_size]
        # Ids of another tokenizer, or a column that is no ids. Within the bound nothing shows it.
        if wrong:
            raise DataError(
                f"{name} has the token id {wrong[0]}",
                where=row.where,
                limit=f"0 to {self.vocab_size - 1}: the tokenizer of {self.folder} has "
                f"{self.vocab_size} tokens",
                remedy="give the tokenizer that made these ids",
            )
        return int32(values)

    def _mask(self, row: Row, length: int) -> Bools:
        values = row.values.get("loss_mask")
        if values is None:
            raise DataError(
                "loss_mask is missing, so tokens of a tool would be taken for the model's own",
                where=row.where,
                limit="one value for each of token_ids",
                remedy="add loss_mask: true for the tokens that the model wrote",
            )
        if not _is_list_of(values, int) or not set(values) <= {0, 1}:
            raise DataError(
                "loss_mask must be a list of true and false", where=row.where, remedy=_FORM
            )
        _require_length(row, "loss_mask", values, length)
        mask = np.array(values, bool)
        if not mask.any():
            raise DataError(
                "loss_mask is false everywhere, so nothing can be learnt from this row",
                where=row.where,
                remedy="remove this row",
            )
        return mask

    def _logprobs(self, row: Row, name: str, mask: Bools) -> Floats | None:
        """Return a column of log-probabilities; what it has at masked tokens does not count."""
        values = row.values.get(name)
        if values is None:
            return None
        if not isinstance(values, list):
            raise DataError(f"{name} must be a list of numbers", where=row.where, remedy=_FORM)
        _require_length(row, name, values, len(mask))
        for place, value in enumerate(values):
            known = isinstance(value, (int, float)) and math.isfinite(value)
            if not known and mask[place]:
                raise DataError(
                    f"{name} is {value} at token {place}, which carries loss",
                    where=row.where,
                    limit="a number wherever loss_mask is true",
                    remedy="set loss_mask to false there, or add the log-probability",
                )
        # 0 where there is none. Nothing counts it, because the token carries no loss.
        return np.array(
            [value if is_kept else 0.0 for value, is_kept in zip(values, mask, strict=True)],
            np.float32,
        )


def _prompt_id(prompt_ids: Ints) -> str:
    # The same prompt has the same name in every file.
    return f"ids-{hashlib.sha256(prompt_ids.tobytes()).hexdigest()[:16]}"


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _require_length(row: Row, name: str, values: Sequence[Any], length: int) -> None:
    if len(values) != length:
        raise DataError(
            f"{name} has {len(values)} values for {length} token_ids",
            where=row.where,
            limit="one value for each token of the response",
            remedy="correct or remove this row",
        )
