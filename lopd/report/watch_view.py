"""What ``lopd watch`` shows: one frame of a run as text, or one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lopd.report.console import duration, model_table
from lopd.report.gpus import Gpu
from lopd.report.metric_schema import metric_of
from lopd.report.run_state import RunState, ServerState, StageState
from lopd.report.sparkline import BLOCKS, sparkline
from lopd.report.text_width import printable

# The metrics of a frame: kind, name and format. A metric that a training lacks has no line.
FIGURES = (
    ("train", "loss", ".4f"),
    ("train", "reverse_kl", ".4f"),
    ("train", "advantage", "+.4f"),
    ("train", "effective_sample_share", ".3f"),
    ("train", "grad_norm", ".3f"),
    ("eval", "accuracy", ".3f"),
    ("eval", "training_reverse_kl", ".4f"),
    ("eval", "response_len", ".1f"),
    ("eval", "truncated_share", ".3f"),
    ("train", "processed_tokens_per_s", ",.0f"),
    ("train", "peak_memory_gib", ".2f"),
)
_STAGE_STYLE = {"done": "green", "begun": "bold yellow", "outdated": "yellow", "absent": "dim"}
# Columns of a frame that are no curve, and the longest curve.
_NO_CURVE = 75
_CURVE = 40
_MIB_PER_GIB = 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that a frame shows.

    Attributes:
        prompt: The question.
        text: The response.
        verdict: "right", or "wrong" with the reason; None where nothing has judged it.
        finish_reason: "length" where it was cut off.
    """

    prompt: str
    text: str
    verdict: str | None
    finish_reason: str


def frame(
    state: RunState,
    answers: Sequence[Answer],
    answers_from: str,
    gpus: Sequence[Gpu],
    *,
    width: int,
    levels: str = BLOCKS,
) -> Group:
    """Return a frame for a console of rich.

    Args:
        state: The run.
        answers: The newest answers.
        answers_from: What they are of, for the title.
        gpus: Of this machine, if the run is on it.
        width: The columns.
        levels: The characters of the curves.
    """
    parts: list[Any] = [Text(f"run {state.run_dir}", style="bold"), Text(_life(state))]
    # What a reader looks for first stands first: where the run is, and how long it will take.
    parts += [_stage_line(state), _stages(state.stages)]
    if state.last_line:
        parts.append(Text(_cut(state.last_line, width), style="dim"))
    # A curve of fewer columns than 8 shows nothing. A narrow terminal then wraps the line instead.
    figures = [*_figures(state, levels, max(8, min(_CURVE, width - _NO_CURVE)))]
    if figures:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for title in (str(state.training()), "first", "newest", "", "unit"):
            right = title in ("first", "newest")
            table.add_column(title, justify="right" if right else "left", no_wrap=True)
        for cells in figures:
            table.add_row(*(Text(cell) for cell in cells))
        parts += ["", table]
    # The table compares models, so it waits until all of them are evaluated.
    if state.is_done and state.summary.get("reverse_kl"):
        parts += ["", model_table(state.summary)]
    if state.servers or gpus:
        parts += ["", *map(_server_line, state.servers), *map(_gpu_line, gpus)]
    if answers:
        parts += ["", Text(answers_from, style="bold"), *_answer_lines(answers, width)]
    return Group(*parts)


def status_line(state: RunState) -> str:
    """Return a run as one line, for a file or a pipe."""
    parts = [_stage_line(state).plain]
    stage = state.training()
    # One line has room for three: the loss, the reverse KL and the accuracy at syncs.
    for kind, name, form in FIGURES[:2] + FIGURES[5:6]:
        values = _values(state.rows, stage, kind, name)
        if values:
            parts.append(f"{name} {values[-1]:{form}}")
    return "  ".join(parts)


def progress_of(state: RunState) -> tuple[object, ...]:
    """Return what differs whenever the run gets on: the stages, and what is done of each."""
    return tuple(
        (one.name, one.state, one.work and (one.work.part, one.work.done)) for one in state.stages
    )


def as_json(state: RunState, answers: Sequence[Answer], gpus: Sequence[Gpu]) -> dict[str, Any]:
    """Return a frame for programs."""
    stage = state.training()
    # The last line of each kind. Evaluations are rarer than steps, so the two are of different
    # steps.
    newest: dict[str, Any] = {}
    for row in state.rows:
        if row["stage"] == stage:
            newest[row["kind"]] = row
    return {
        "run": str(state.run_dir),
        "process": state.process,
        "seconds_since_change": state.age_s,
        "stages": [
            {
                "name": one.name,
                "state": one.state,
                "seconds": one.seconds,
                "work": None
                if one.work is None
                else {
                    "unit": one.work.unit,
                    "done": one.work.done,
                    "total": one.work.total,
                    "part": one.work.part,
                    "per_second": one.work.rate,
                    "seconds_left": one.work.seconds_left,
                },
            }
            for one in state.stages
        ],
        "newest": newest,
        "servers": [
            {"name": one.name, "starts": one.starts, "load": dict(one.load), "age_s": one.age_s}
            for one in state.servers
        ],
        "gpus": [
            {"index": one.index, "used_mib": one.used, "total_mib": one.total, "busy": one.busy}
            for one in gpus
        ],
        "answers": [
            {
                "prompt": one.prompt,
                "response": one.text,
                "verdict": one.verdict,
                "finish_reason": one.finish_reason,
            }
            for one in answers
        ],
    }


def _life(state: RunState) -> str:
    """Return who runs it, and when something has changed."""
    changed = "nothing is there yet"
    if state.age_s is not None:
        changed = f"last change {duration(state.age_s)} ago"
    if state.process is not None:
        return f"process {state.process} of this machine runs it, {changed}"
    # A lock of another machine cannot be seen.
    if state.is_done:
        return f"done, {changed}"
    return f"no process of this machine runs it, {changed}"


def _stage_line(state: RunState) -> Text:
    current = state.current
    if current is None:
        done = sum(stage.state == "done" for stage in state.stages)
        return Text(f"{done} of {len(state.stages)} stages are done", style="bold")
    number = 1 + [stage.name for stage in state.stages].index(current.name)
    parts = [f"stage {number} of {len(state.stages)}: {current.name}"]
    work = current.work
    if work is not None:
        of = "" if work.total is None else f" of {work.total:,}"
        part = f"{work.part}: " if work.part else ""
        parts.append(f"{part}{work.unit} {work.done:,}{of}")
        if work.rate:
            # Slow units are told by their duration.
            slow = f"{duration(1 / work.rate)} a {work.unit}"
            parts.append(f"{work.rate:.1f} {work.unit}s/s" if work.rate >= 1 else slow)
        if work.seconds_left:
            parts.append(f"{duration(work.seconds_left)} left")
    return Text("  ".join(parts), style="bold")


def _stages(stages: Sequence[StageState]) -> Text:
    line = Text()
    for stage in stages:
        took = f" {duration(stage.seconds)}" if stage.seconds is not None else ""
        # In words too, since a colour is not seen by everybody.
        about = "" if stage.state == "done" else f" ({stage.state})"
        line.append(f"{stage.name}{about}{took}  ", style=_STAGE_STYLE[stage.state])
    return line


def _figures(state: RunState, levels: str, width: int) -> Iterator[tuple[str, ...]]:
    """Yield name, first value, newest value, curve and unit of each metric."""
    stage = state.training()
    for kind, name, form in FIGURES:
        values = _values(state.rows, stage, kind, name)
        if values:
            metric = metric_of(kind, name)
            unit = "" if metric is None else metric.unit
            title = f"{name} at syncs" if kind == "eval" else name
            # All values of the training and not the newest alone, so that the shape of the curve
            # stays.
            curve = sparkline(values, width, levels)
            yield title, f"{values[0]:{form}}", f"{values[-1]:{form}}", curve, unit


def _values(
    rows: Sequence[Mapping[str, Any]], stage: str | None, kind: str, name: str
) -> list[float]:
    return [
        float(row[name])
        for row in rows
        if row["stage"] == stage and row["kind"] == kind and isinstance(row.get(name), int | float)
    ]


def _server_line(server: ServerState) -> Text:
    load = server.load
    parts = []
    # Only what the server has written. A server that has just started has told nothing of its load.
    if "running" in load:
        parts.append(f"{load['running']:.0f} running, {load.get('queued', 0):.0f} queued")
    if "cache_use" in load:
        parts.append(f"{load['cache_use']:.0%} of its cache")
    if "tokens_per_s" in load:
        parts.append(f"{load['tokens_per_s']:,.0f} tokens/s")
    if server.starts is not None and server.starts > 1:
        parts.append(f"started {server.starts} times")
    said = ", ".join(parts) or "no batch yet"
    return Text(f"server {server.name}: {said}; its last line {duration(server.age_s)} ago")


def _gpu_line(gpu: Gpu) -> Text:
    busy = "" if gpu.busy is None else f", {gpu.busy}% busy"
    used = gpu.used / _MIB_PER_GIB
    return Text(f"GPU {gpu.index}: {used:.1f} of {gpu.total / _MIB_PER_GIB:.1f} GiB{busy}")


def _answer_lines(answers: Sequence[Answer], width: int) -> Iterator[Text]:
    for answer in answers:
        verdict = answer.verdict or "not judged"
        style = "green" if verdict == "right" else "red" if answer.verdict else ""
        cut = ", cut off" if answer.finish_reason == "length" else ""
        yield Text.assemble((f"{verdict}{cut}: ", style), _cut(answer.prompt, width // 2))
        # What a response comes to stands at its end.
        yield Text(f"  {_cut(answer.text, width - 4, from_end=True)}", style="dim")


def _cut(text: str, width: int, *, from_end: bool = False) -> str:
    """Return text as one line of so many characters."""
    # A response may contain control characters, which would move the cursor of the terminal.
    line = " ".join(printable(text).split())
    if len(line) <= width:
        return line
    return f"...{line[3 - width :]}" if from_end else f"{line[: width - 3]}..."
