"""The verdicts of an evaluation on disk: which answers were right, and why the others were not.

The stage evaluate writes ``verdicts-NAME.jsonl`` beside the artifact ``answers-NAME``. The verb
``lopd evaluate --model`` writes transcripts beside ``answers``. Both have a line for each response.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lopd.artifacts import publish_bytes
from lopd.records import Key, Prompt
from lopd.tasks.verdicts import Verdict

_ANSWERS = "answers"
# Of an answer for people to read. The tests of a program are longer.
_MAX_EXPECTED_CHARS = 200


def write_verdicts(
    answers: Path, verdicts: Iterable[tuple[Key, Verdict]], prompts: Mapping[str, Prompt]
) -> None:
    """Publish the verdicts of one model's answers.

    Args:
        answers: The folder of the answers.
        verdicts: The verdict of each response, by its key.
        prompts: The prompts by their id.
    """
    lines = []
    for (prompt_id, sample_index), verdict in verdicts:
        # JSONL and no Parquet: people read these lines, and search them for a reason.
        line = {"prompt_id": prompt_id, "sample_index": sample_index, "right": verdict.right}
        line |= {"reason": verdict.reason, "found": verdict.found}
        lines.append(json.dumps(line | expected_answer(prompts[prompt_id])))
    # All at once: a reader finds the verdicts of all answers, or no file.
    publish_bytes(_file_of(answers), ("\n".join(lines) + "\n").encode())


def read_verdicts(answers: Path) -> dict[Key, Verdict]:
    """Return the verdicts of a folder of answers by the key of the response; {} if it has none."""
    return {
        (row["prompt_id"], row["sample_index"]): Verdict(
            row["right"], row["reason"], row["found"], row.get("expected", "")
        )
        for path in _files(answers)
        for row in map(json.loads, _lines(path))
        # Transcripts of a task without a verifier have no verdicts.
        if "right" in row
    }


def expected_answer(prompt: Prompt) -> dict[str, str]:
    """Return the prompt's own answer under the key of the files; {} where people cannot read it."""
    answer = prompt.answer or ""
    return {"expected": answer} if 0 < len(answer) <= _MAX_EXPECTED_CHARS else {}


def _file_of(answers: Path) -> Path:
    return answers.with_name(f"verdicts{answers.name.removeprefix(_ANSWERS)}.jsonl")


def _files(answers: Path) -> Iterator[Path]:
    # Only answers are judged. The samples of the policy beside them have no verdict.
    if answers.name.startswith(_ANSWERS):
        own = _file_of(answers)
        yield from [own] if own.is_file() else sorted(answers.parent.glob("transcripts/*.jsonl"))


def _lines(path: Path) -> list[str]:
    # Transcripts hold prompts, and a prompt may hold half of a surrogate pair. Lines end with a
    # line feed alone: splitlines() would also cut at characters that JSON does not escape.
    return path.read_text(encoding="utf-8", errors="surrogatepass").rstrip("\n").split("\n")
