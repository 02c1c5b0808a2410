"""Finds the newest answers of a run, with their texts and verdicts, while it goes on."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.errors import LopdError

if TYPE_CHECKING:
    from lopd.records import Response
    from lopd.report.run_state import RunState
    from lopd.report.watch_view import Answer


@dataclass(slots=True)
class NewestAnswers:
    """Looks for the newest answers again and again. What has not changed is not read again.

    Attributes:
        count: How many are shown.
        tokenizer: A folder with a tokenizer, or None: that of a model of the run.
    """

    count: int
    tokenizer: Path | None = None
    _file: Path | None = None
    _found: list[Answer] = field(default_factory=list)

    def of(self, state: RunState) -> tuple[list[Answer], str]:
        """Return the answers and what they are of. Nothing here is an error."""
        folder = state.run_dir / (state.current.name if state.current is not None else "distill")
        # A file may be replaced, or be of another version, at any moment.
        with contextlib.suppress(LopdError, OSError, ValueError, KeyError):
            # A training has no shards of responses. What it samples are the answers after a weight
            # sync.
            if folder.name == "distill" and not state.is_done and (found := self._of_syncs(folder)):
                return found
            # A stage that samples publishes its shards in its folder. evaluate has a folder for
            # each model.
            shards = [*folder.glob("shard-*.parquet"), *folder.glob("answers-*/shard-*.parquet")]
            # Of a finished run the result is shown: what the distilled student answers.
            if state.is_done:
                shards = [*state.run_dir.glob("evaluate/answers-distilled/shard-*.parquet")]
            if shards:
                newest = max(shards, key=lambda path: path.stat().st_mtime)
                # A shard never changes once it is published, so the same name has the same
                # responses.
                if newest != self._file:
                    self._found = self._of_shard(newest, state.run_dir)
                    self._file = newest
                where = newest.parent.relative_to(state.run_dir)
                return self._found, f"newest responses of {where}"
        return [], ""

    def _of_syncs(self, folder: Path) -> tuple[list[Answer], str] | None:
        from lopd.report.held_out import newest_transcripts
        from lopd.report.watch_view import Answer

        found = newest_transcripts(folder)
        if found is None:
            return None
        step, rows = found
        answers = [
            Answer(
                prompt=row["messages"][-1]["content"],
                text=row["response"],
                verdict=_verdict(row) if "right" in row else None,
                finish_reason=row["finish_reason"],
            )
            for row in rows[: self.count]
        ]
        return answers, f"answers to the same held-out prompts after step {step}"

    def _of_shard(self, path: Path, run_dir: Path) -> list[Answer]:
        from lopd.cache.newest import last_rows
        from lopd.report.watch_view import Answer
        from lopd.tasks.light_tokenizer import light_tokenizer
        from lopd.tasks.tokenizer import decode
        from lopd.tasks.verdict_files import read_verdicts

        responses = last_rows(path, self.count)
        folder = self.tokenizer or tokenizer_of(run_dir)
        tokenizer = light_tokenizer(folder) if folder is not None else None
        # Answers of the stage evaluate have verdicts beside them. Other responses have none.
        verdicts = read_verdicts(path.parent)

        def text(ids: Any) -> str:
            # Without a tokenizer the ids themselves are shown.
            return " ".join(map(str, ids)) if tokenizer is None else decode(tokenizer, ids)

        def answer(response: Response) -> Answer:
            verdict = verdicts.get(response.key)
            told = None
            if verdict is not None:
                told = _verdict({"right": verdict.right, "reason": verdict.reason})
            return Answer(
                text(response.prompt_ids), text(response.token_ids), told, response.finish_reason
            )

        return [answer(response) for response in responses]


def tokenizer_of(run_dir: Path) -> Path | None:
    """Return a folder with the tokenizer that the models of a run share; None where none is here.

    The folders in its manifests may be on another machine. A trained student is in the run.
    """
    from lopd.artifacts import MANIFEST, read_manifest

    # The run's own students first: they are on this machine if the run is.
    own = [run_dir / stage / "model" for stage in ("distill", "sft")]
    named = []
    for path in sorted(run_dir.glob(f"*/{MANIFEST}")):
        with contextlib.suppress(LopdError):
            models = read_manifest(path.parent).models
            named += [Path(identity.path) for identity in models.values()]
    return next((path for path in [*own, *named] if (path / "tokenizer.json").is_file()), None)


def _verdict(row: dict[str, Any]) -> str:
    """Return "right", or "wrong" with the reason."""
    if row["right"]:
        return "right"
    return f"wrong ({row['reason']})" if row["reason"] else "wrong"
