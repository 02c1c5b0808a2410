"""When what was done in a run: stages, starts of servers, training steps, what lies between steps.

The times come from the stages' logs (whole seconds, UTC), from the servers' logs, and from the
event files, which hold the moment at which each step was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from lopd.report.html.source import STAGES, Source
from lopd.report.metrics import read_metrics
from lopd.report.trackers import TENSORBOARD

# A line of a stage's log begins with its moment.
_LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) (.*)")
# lopd writes the first form before each start of a server, in local time. SGLang writes the second
# one when the server answers.
_STARTING = re.compile(r"--- starting the .* server .*, (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)")
_READY = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d).*\] The server is fired up")
# The end of a line of the log with which a command ended a stage.
_DONE = re.compile(r"done in [\d.]+ s$")
# Behind the name of a stage whose command has ended, or not yet ended, without a result.
_UNFINISHED = "(not finished)"
# Steps that are nearer to each other than this many seconds have nothing between them.
_LEAST_GAP_S = 1.0


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time.

    Attributes:
        lane: The stage, for example "distill".
        kind: "stage", "server start", "step", "sync", "refresh" or "between steps".
        label: A short text.
        start: Seconds since 1970, UTC.
        end: The same.
    """

    lane: str
    kind: str
    label: str
    start: float
    end: float


def timeline_of(source: Source) -> list[Span]:
    """Return all spans of a run in the order of their start; of other sources none."""
    if source.kind != "run":
        return []
    spans: list[Span] = []
    for stage in STAGES:
        folder = source.folder / stage
        commands = _commands(folder / "log.txt", stage)
        spans += commands
        spans += _server_starts(folder, stage, commands)
    for stage in ("sft", "distill", "sft_longer"):
        # The longer SFT is a part of evaluate, and has its time.
        lane = "evaluate" if stage == "sft_longer" else stage
        spans += _steps(source, stage, [span for span in spans if span.lane == lane])
    return sorted(_prolonged(spans), key=lambda span: span.start)


def _prolonged(spans: Sequence[Span]) -> list[Span]:
    """Let a command that has not finished last as long as anything that it did."""
    last: dict[str, float] = {}
    for span in spans:
        last[span.lane] = max(last.get(span.lane, span.end), span.end)
    return [
        replace(span, end=max(span.end, last[span.lane]))
        if span.label.endswith(_UNFINISHED) and span == _last_command(spans, span.lane)
        else span
        for span in spans
    ]


def _last_command(spans: Sequence[Span], lane: str) -> Span:
    commands = [one for one in spans if one.lane == lane and one.kind == "stage"]
    return max(commands, key=lambda one: one.start)


def _commands(log: Path, stage: str) -> list[Span]:
    """Return a span for each command that has worked on the stage."""
    lines: list[tuple[float, str]] = []
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        match = _LOG_LINE.match(line)
        if match:
            at = datetime.strptime(match[1], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
            lines.append((at, match[2]))
    if not lines:
        return []
    # Every command that works on a stage begins with the sentence of the stage.
    beginning = lines[0][1]
    spans: list[Span] = []
    start = lines[0][0]
    last = start
    for at, text in lines[1:]:
        if text == beginning:
            # The former command has ended without a result. Its last sign of life is its end.
            spans.append(Span(stage, "stage", f"{stage} {_UNFINISHED}", start, last))
            start = at
        if _DONE.search(text):
            spans.append(Span(stage, "stage", stage, start, at))
        last = at
    if not _DONE.search(lines[-1][1]) and (not spans or spans[-1].start != start):
        spans.append(Span(stage, "stage", f"{stage} {_UNFINISHED}", start, last))
    return spans


def _server_starts(folder: Path, stage: str, commands: Sequence[Span]) -> Iterator[Span]:
    for log in sorted(folder.glob("sglang-*.log*")):
        if not log.name.endswith(".log"):
            continue
        role = log.name.removeprefix("sglang-").removesuffix(".log")
        # The clocks of the two logs are those of one machine, in two time zones.
        shift = 0.0
        begun: float | None = None
        # The log may be large, and two of its lines are needed.
        with log.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                starting = _STARTING.match(line)
                ready = _READY.match(line)
                if starting:
                    begun = _seconds(starting[1])
                    shift = _shift(begun, commands)
                elif ready and begun is not None:
                    ended = _seconds(ready[1])
                    label = f"start of the {role}'s server"
                    yield Span(stage, "server start", label, begun + shift, ended + shift)
                    begun = None


def _seconds(text: str) -> float:
    moment = datetime.strptime(text, "%Y-%m-%d %H:%M:%S")
    return moment.replace(tzinfo=UTC).timestamp()


def _shift(begun: float, commands: Sequence[Span]) -> float:
    """Return what to add to a moment in local time. Time zones differ by quarters of an hour."""
    quarter = 900.0
    for span in reversed(commands):
        shift = round((span.start - begun) / quarter) * quarter
        if span.start - 2 <= begun + shift <= span.end + 2:
            return shift
    return 0.0


def _moments(run_dir: Path, stage: str, kind: str) -> dict[int, float]:
    """Return the moment at which each line of a kind was written, by its step."""
    # It takes a second to import, and a run without event files does not need it.
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    moments: dict[int, float] = {}
    for path in (run_dir / TENSORBOARD / stage).glob("events.*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag.startswith(f"{kind}/"):
                    # A resumed run repeats steps in a newer file. What came last is what counts.
                    moments[event.step] = max(event.wall_time, moments.get(event.step, 0.0))
    return moments


def _steps(source: Source, stage: str, commands: Sequence[Span]) -> Iterator[Span]:
    """Yield training steps, and what lay between them within one command."""
    lane = commands[0].lane if commands else stage
    train = {row["step"]: row for row in read_metrics(source.folder, kind="train", stage=stage)}
    ends = _moments(source.folder, stage, "train")
    synced = _moments(source.folder, stage, "eval")
    refreshed = _refresh_steps(source.folder / stage)
    starts = {
        step: end - float(train.get(step, {}).get("seconds") or 0.0) for step, end in ends.items()
    }
    for step in sorted(ends):
        end = ends[step]
        yield Span(lane, "step", f"{stage} step {step}", starts[step], end)
        # A sync writes its figures when it is done. After the last step nothing else comes.
        if synced.get(step, 0.0) > end:
            label = f"sync and held-out answers after step {step}"
            yield Span(lane, "sync", label, end, synced[step])
            end = synced[step]
        gap = starts.get(step + 1, end) - end
        # A run that was continued the next day did nothing in between.
        if gap > _LEAST_GAP_S and _in_one_command(commands, end, starts[step + 1]):
            kind = "refresh" if step in refreshed else "between steps"
            label = f"{kind} after step {step}"
            yield Span(lane, kind, label, end, starts[step + 1])


def _in_one_command(commands: Sequence[Span], start: float, end: float) -> bool:
    # Logs have whole seconds.
    return any(
        one.kind == "stage" and one.start - 1 <= start and end <= one.end + 1 for one in commands
    )


def _refresh_steps(folder: Path) -> set[int]:
    """Return the number of steps after which new rollouts were made."""
    steps: set[int] = set()
    for path in folder.glob("refresh-*/rollouts/manifest.json"):
        try:
            steps.add(int(json.loads(path.read_text(encoding="utf-8"))["inputs"]["refresh.step"]))
        except (OSError, ValueError, KeyError, TypeError):
            # It tells something about the past and decides nothing.
            continue
    return steps
