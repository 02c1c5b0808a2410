"""What the user sees: lines, progress bars, the line of a training step, tables, errors.

Everything goes through one rich console, so that lines stay above a running progress bar. If the
output is not a terminal, a bar becomes a plain line every ten seconds.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from lopd.errors import LopdError

# How often a plain line reports progress. A log file should stay readable after hours.
PLAIN_INTERVAL_S = 10.0
# The models of a summary in the order of its table.
MODEL_TITLES = {
    "base": "base student",
    "sft": "SFT student",
    "sft_longer": "SFT of equal compute",
    "distilled": "distilled student",
    "teacher": "teacher",
}
# highlight=False: rich would colour numbers and paths in the middle of a line.
_console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False)
# The metrics on the line of a training step: their name, title and format. The first three are in
# nats.
_STEP_FIGURES = (
    ("loss", "loss", ".4f"),
    ("advantage", "advantage", "+.4f"),
    ("reverse_kl", "reverse KL", ".4f"),
    ("grad_norm", "grad norm", ".3f"),
    ("lr", "lr", ".1e"),
    ("processed_tokens_per_s", "tokens/s", ",.0f"),
)


def print_line(line: str, log: Path | None = None) -> None:
    """Print a line, and append it to a log file with the time (UTC) before it.

    Args:
        log: The log file. None means the screen alone.
    """
    # Without markup, because a path may hold [brackets]. Without wrapping, so that a line can be
    # found with grep and copied as it is.
    _console.print(line, markup=False, soft_wrap=True)
    if log is not None:
        # The first line of a stage may come before anything has made its folder.
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as handle:
            handle.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {line}\n")


def show_error(error: LopdError) -> None:
    """Print an error as one line on stderr."""
    # The line breaks of a quoted reason become spaces.
    line = " ".join(str(error).split())
    _errors.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)


def training_line(stage: str, step: int, num_steps: int, figures: Mapping[str, float]) -> str:
    """Return the line of an optimizer step.

    Args:
        figures: Those of _STEP_FIGURES are shown if they are there. With ``seconds``, the duration
            of this step, the line also has the time left.
    """
    # The step has the width of the last one, so that the columns of all lines stand below each
    # other.
    parts = [f"{stage} {step:>{len(str(num_steps))}}/{num_steps}"]
    for name, title, form in _STEP_FIGURES:
        if name in figures:
            parts.append(f"{title} {figures[name]:{form}}")
    # As if every further step took as long as this one.
    if step < num_steps and "seconds" in figures:
        parts.append(f"{duration(figures['seconds'] * (num_steps - step))} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Return ``1:02:03``, ``4:05``, or ``0.8 s`` for less than a second."""
    # Below a second, minutes and seconds would show 0:00.
    if seconds < 1:
        return f"{seconds:.1f} s"
    # Rounded before it is divided. Otherwise 59.6 seconds would become 0:60.
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Bar(Protocol):
    """A progress bar, as progress() yields it."""

    def advance(self, count: int = 1) -> None:
        """Count more items as done."""
        ...


@contextlib.contextmanager
def progress(
    title: str, *, total: int, done: int = 0, unit: str = "items", on_stderr: bool = False
) -> Iterator[Bar]:
    """Show a progress bar with rate and time left while the body runs.

    Args:
        total: How many items there are.
        done: The number of items that an earlier run has done. They do not count in the rate.
        unit: What is counted, for the screen.
        on_stderr: Whether the bar goes to stderr, because stdout may have a result for programs.
    """
    console = _errors if on_stderr else _console
    # A bar redraws itself, which would fill a file with control characters.
    kind = _RichBar if console.is_terminal else _PlainBar
    bar = kind(title, total, done, unit, console)
    # Also after an error: a running rich bar would hide the cursor and overwrite the error.
    try:
        yield bar
    finally:
        bar.close()


class _Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        # finished_speed is the mean of the whole task, speed that of the last seconds.
        speed = task.finished_speed or task.speed
        return Text(f"{_rate(speed)}/s" if speed else "", style="progress.data.speed")


class _RichBar:
    """A bar on a terminal."""

    def __init__(self, title: str, total: int, done: int, unit: str, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            # A count says more than a percentage: it can be compared with the log of another run.
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._progress = Progress(*columns, console=console)
        self._task: TaskID = self._progress.add_task(title, total=total, completed=done)
        self._progress.start()

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def close(self) -> None:
        self._progress.stop()


class _PlainBar:
    """Lines in a log, one every PLAIN_INTERVAL_S seconds and one at the end."""

    def __init__(self, title: str, total: int, done: int, unit: str, console: Console) -> None:
        self._console = console
        self._title = title
        self._total = total
        self._unit = unit
        self._done = done
        # What an earlier command has done must not count in this one's rate.
        self._done_before = done
        self._start = time.monotonic()
        self._last_line = self._start

    def advance(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        # The last line is that of close().
        if now - self._last_line >= PLAIN_INTERVAL_S and self._done < self._total:
            self._last_line = now
            speed = self._speed(now)
            left = f", {duration((self._total - self._done) / speed)} left" if speed else ""
            self._print(f"{self._title}: {self._count()}, {_rate(speed)}/s{left}")

    def close(self) -> None:
        now = time.monotonic()
        # An error ends the body before everything is done.
        state = "" if self._done >= self._total else "stopped at "
        took = duration(now - self._start)
        self._print(f"{self._title}: {state}{self._count()}, {_rate(self._speed(now))}/s, {took}")

    def _print(self, line: str) -> None:
        # As print_line does it.
        self._console.print(line, markup=False, soft_wrap=True)

    def _count(self) -> str:
        return f"{self._done:,}/{self._total:,} {self._unit}"

    def _speed(self, now: float) -> float:
        """Return the items per second of this run."""
        return (self._done - self._done_before) / max(now - self._start, 1e-9)


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


def show_summary(summary: Mapping[str, Any]) -> None:
    """Print the table of the models, the table of the stages, and the notes.

    Args:
        summary: The content of summary.json. Missing entries are not shown.
    """
    # A run that ends before the evaluation, or without one, has no metrics of models.
    if summary.get("reverse_kl"):
        _console.print(model_table(summary))
    if summary.get("stages"):
        _console.print(stage_table(summary))
    if summary.get("teacher_work"):
        print_line(teacher_line(summary["teacher_work"]))
    # For example that a foreign teacher was accepted. Notes come last, where they are read.
    for note in summary.get("notes", ()):
        print_line(str(note))


def teacher_line(work: Mapping[str, float]) -> str:
    """Return ``teacher: 212,992 response tokens scored in 0:21, 3 refreshes``.

    Args:
        work: ``refreshes``, ``tokens`` and ``seconds``.
    """
    count = work["refreshes"]
    refreshes = f", {count} refresh{'es' if count > 1 else ''}" if count else ""
    took = duration(work["seconds"])
    return f"teacher: {work['tokens']:,} response tokens scored in {took}{refreshes}"


def model_table(summary: Mapping[str, Any]) -> Table:
    """Return the models by accuracy (%) and reverse KL (nats per token).

    Each figure has its standard error if the summary has it. Where a task has no verifier, lengths
    and the share that was cut off stand in place of the accuracy.
    """
    if not summary.get("accuracy"):
        return _table_without_accuracy(summary)
    # Errors and intervals may be missing. The figures are then shown alone.
    accuracy = summary["accuracy"]
    accuracy_error = summary.get("accuracy_standard_error", {})
    intervals = summary.get("accuracy_interval", {})
    divergence = summary.get("reverse_kl", {})
    divergence_error = summary.get("reverse_kl_standard_error", {})
    table = Table(
        title="accuracy on held-out prompts, and distance to the teacher",
        title_justify="left",
        caption=_caption(summary),
        caption_justify="left",
    )
    table.add_column("model")
    # Figures must not be broken in two on a narrow screen. The names of the models may.
    table.add_column("accuracy, %", justify="right", no_wrap=True)
    table.add_column("reverse KL, nats per token", justify="right", no_wrap=True)
    for name, title in MODEL_TITLES.items():
        if name in accuracy:
            percent = _percent(accuracy[name], accuracy_error.get(name), intervals.get(name))
            # Without a teacher that scores it, a model has an accuracy only.
            nats = ""
            if divergence.get(name) is not None:
                nats = with_error(divergence[name], divergence_error.get(name))
            table.add_row(title, percent, nats, style="bold" if name == "distilled" else None)
    return table


def _table_without_accuracy(summary: Mapping[str, Any]) -> Table:
    """Return the models by reverse KL, mean length and the share that was cut off."""
    divergence = summary["reverse_kl"]
    errors = summary.get("reverse_kl_standard_error", {})
    responses = summary.get("responses", {})
    table = Table(
        title="distance to the teacher on held-out prompts (this task has no verifier)",
        title_justify="left",
        caption=_caption(summary),
        caption_justify="left",
    )
    table.add_column("model")
    table.add_column("reverse KL, nats per token", justify="right", no_wrap=True)
    table.add_column("tokens of a response", justify="right", no_wrap=True)
    table.add_column("cut off, %", justify="right", no_wrap=True)
    for name, title in MODEL_TITLES.items():
        if name in divergence:
            of_model = responses[name]
            table.add_row(
                title,
                with_error(divergence[name], errors.get(name)),
                f"{of_model['response_len']:,.1f}",
                f"{100 * of_model['truncated_share']:.1f}",
                style="bold" if name == "distilled" else None,
            )
    return table


def _caption(summary: Mapping[str, Any]) -> str:
    """Return what the metrics were measured on."""
    figures = summary.get("accuracy") or summary["reverse_kl"]
    num_prompts = figures.get("num_prompts")
    samples = figures.get("samples_per_prompt")
    # Without the sizes a difference of two models cannot be judged.
    sizes = f"{num_prompts:,} prompts x {samples} samples; " if num_prompts and samples else ""
    drawn = summary.get("evaluation")
    how = ""
    if summary.get("accuracy") and drawn:
        how = f"accuracy at temperature {drawn['temperature']:g}, top-p {drawn['top_p']:g}; "
    # A step's line has a smaller or larger figure of the same name, of other prompts.
    return (
        f"{sizes}± one standard error over prompts\n{how}reverse KL at temperature 1\n"
        "measured on prompts.eval, with fresh responses of each model; the reverse KL on a step's "
        "line is measured on the training rollouts (prompts.opd)"
    )


def _percent(share: float, error: float | None, interval: tuple[float, float] | None = None) -> str:
    # JSON has null for an error that could not be computed, as from one prompt.
    known = error is not None and math.isfinite(error)
    # Where all prompts are alike the standard error is 0, which is not what is known of the share.
    if interval is not None and not (known and error):
        low, high = interval
        return f"{100 * share:.1f} (95%: {100 * low:.1f} to {100 * high:.1f})"
    return f"{100 * share:.1f}" + (f" ± {100 * error:.1f}" if known and error is not None else "")


def with_error(value: float, error: float | None) -> str:
    """Return a value with its error as text, for example ``0.0022 ± 0.0003``.

    The error has one significant digit, or two if the first is 1. The value has as many decimals.

    Args:
        error: The standard error. Without one the value has three significant digits.
    """
    # The teacher's divergence from itself is the rounding of float32 log-probabilities.
    if abs(value) < 1e-5 and (error or 0.0) < 1e-5:
        return "< 0.00001"
    if error is None or not math.isfinite(error) or error <= 0:
        return f"{value:#.3g}"
    # The error shows its first digit, and a second one if the first is 1: between 0.1 and 0.2 one
    # digit would be off by up to a third.
    exponent = math.floor(math.log10(error))
    begins_with_one = error / 10**exponent < 1.95
    # A float has no more digits to show, and an error above 1 needs none.
    decimals = min(9, max(0, (1 if begins_with_one else 0) - exponent))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def stage_table(summary: Mapping[str, Any]) -> Table:
    """Return the stages with their status and seconds, and the sum of the seconds."""
    stages = summary["stages"]
    total = sum(stage["seconds"] for stage in stages)
    table = Table(title="stages", title_justify="left", show_footer=True)
    table.add_column("stage", footer="all")
    table.add_column("status")
    table.add_column("seconds", justify="right", footer=f"{total:.1f}")
    for stage in stages:
        # Reused stages took no time worth reading.
        style = "dim" if stage["status"] == "reused" else None
        table.add_row(stage["name"], stage["status"], f"{stage['seconds']:.1f}", style=style)
    return table
