"""What the user sees: lines, progress bars, the dense line of a training step, the final tables,
errors. All through one rich console, so that lines stay above a running bar. Where the output is no
terminal, a bar becomes a plain line now and then.
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

PLAIN_INTERVAL_S = 10.0
MODEL_TITLES = {
    "base": "base student",
    "sft": "SFT student",
    "sft_longer": "SFT, equal compute",
    "distilled": "distilled student",
    "teacher": "teacher",
}
_console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False)


# ---- lines ----------------------------------------------------------------------------------------------------------------------------------------


def say(line: str, log: Path | None = None) -> None:
    """A line on screen and, with the time (UTC) before it, at the end of a log file."""
    _console.print(line, markup=False, soft_wrap=True)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as handle:
            handle.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {line}\n")


def show_error(error: LopdError) -> None:
    """One line on stderr: what, where, limit, remedy."""
    _errors.print(
        Text.assemble(("error: ", "bold red"), " ".join(str(error).split())), soft_wrap=True
    )


def training_line(stage: str, step: int, num_steps: int, figures: Mapping[str, float]) -> str:
    """The dense line of an optimizer step. Shown where figures has them: loss, advantage and
    reverse_kl (nats), grad_norm, lr, processed_tokens_per_s.

    With ``seconds`` (of this step) also the time left, were every further step like this one.
    """
    parts = [f"{stage} {step:>{len(str(num_steps))}}/{num_steps}"]
    shown = (
        ("loss", "loss", ".4f"), ("advantage", "advantage", "+.4f"), ("reverse_kl", "reverse KL", ".4f"),
        ("grad_norm", "grad norm", ".3f"), ("lr", "lr", ".1e"), ("processed_tokens_per_s", "tokens/s", ",.0f"),
    )  # fmt: skip
    parts += [f"{title} {figures[name]:{form}}" for name, title, form in shown if name in figures]
    if step < num_steps and "seconds" in figures:
        parts.append(f"{duration(figures['seconds'] * (num_steps - step))} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """``1:02:03``, ``4:05``, or ``0.8 s`` below a second."""
    if seconds < 1:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# ---- progress -------------------------------------------------------------------------------------------------------------------------------------


class Bar(Protocol):
    """What ``progress`` yields."""

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        ...


@contextlib.contextmanager
def progress(title: str, *, total: int, done: int = 0, unit: str = "items") -> Iterator[Bar]:
    """A progress bar with rate and time left; done: how many an earlier run has done (they do not
    count in the rate).
    """
    bar: _RichBar | _PlainBar = (_RichBar if _console.is_terminal else _PlainBar)(
        title, total, done, unit
    )
    try:
        yield bar
    finally:
        bar.close()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_rate(speed)}/s" if speed else "", style="progress.data.speed")


class _RichBar:
    def __init__(self, title: str, total: int, done: int, unit: str) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=32), TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
            _Rate(), TimeRemainingColumn(elapsed_when_finished=True),
        )  # fmt: skip
        self._progress = Progress(*columns, console=_console)
        self._task: TaskID = self._progress.add_task(title, total=total, completed=done)
        self._progress.start()

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def close(self) -> None:
        self._progress.stop()


class _PlainBar:
    def __init__(self, title: str, total: int, done: int, unit: str) -> None:
        self._title, self._total, self._done, self._before, self._unit = (
            title,
            total,
            done,
            done,
            unit,
        )
        self._start = self._spoken = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._spoken >= PLAIN_INTERVAL_S and self._done < self._total:
            self._spoken = now
            rate = self._speed(now)
            left = f", {duration((self._total - self._done) / rate)} left" if rate else ""
            say(
                f"{self._title}: {self._done:,}/{self._total:,} {self._unit}, {_rate(rate)}/s{left}"
            )

    def close(self) -> None:
        now = time.monotonic()
        state = "" if self._done >= self._total else "stopped at "
        say(
            f"{self._title}: {state}{self._done:,}/{self._total:,} {self._unit}, {_rate(self._speed(now))}/s, {duration(now - self._start)}"
        )

    def _speed(self, now: float) -> float:
        return (self._done - self._before) / max(now - self._start, 1e-9)


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


# ---- the final tables -----------------------------------------------------------------------------------------------------------------------------


def show_summary(summary: Mapping[str, Any]) -> None:
    """Models by accuracy and reverse KL, then seconds per stage. summary: as in summary.json;
    ``*_standard_error`` and ``notes`` are optional.
    """
    if summary.get("accuracy"):
        _console.print(model_table(summary))
    if summary.get("stages"):
        _console.print(stage_table(summary))
    if summary.get("teacher_work"):
        say(teacher_line(summary["teacher_work"]))
    for note in summary.get("notes", ()):
        say(str(note))


def teacher_line(work: Mapping[str, float]) -> str:
    """``teacher: 212,992 response tokens scored in 0:21, 3 refreshes``; work: refreshes, tokens,
    seconds.
    """
    refreshes = (
        f", {work['refreshes']} refresh{'es' if work['refreshes'] > 1 else ''}"
        if work["refreshes"]
        else ""
    )
    return f"teacher: {work['tokens']:,} response tokens scored in {duration(work['seconds'])}{refreshes}"


def model_table(summary: Mapping[str, Any]) -> Table:
    """Accuracy in percent and reverse KL in nats per token, each with one standard error where the
    summary has it.
    """
    accuracy, divergence = summary["accuracy"], summary.get("reverse_kl", {})
    accuracy_error, divergence_error = (
        summary.get("accuracy_standard_error", {}),
        summary.get("reverse_kl_standard_error", {}),
    )
    table = Table(
        title="accuracy on held-out prompts, and distance to the teacher",
        title_justify="left",
        caption=_caption(summary),
        caption_justify="left",
    )
    table.add_column("model")
    table.add_column("accuracy, %", justify="right", no_wrap=True)
    table.add_column("reverse KL, nats per token", justify="right", no_wrap=True)
    for name, title in MODEL_TITLES.items():
        if name in accuracy:
            error = accuracy_error.get(name)
            percent = _percent(accuracy[name], error)
            nats = (
                with_error(divergence[name], divergence_error.get(name))
                if divergence.get(name) is not None
                else ""
            )
            table.add_row(title, percent, nats, style="bold" if name == "distilled" else None)
    return table


def _caption(summary: Mapping[str, Any]) -> str:
    accuracy = summary["accuracy"]
    num_prompts, samples = accuracy.get("num_prompts"), accuracy.get("samples_per_prompt")
    sizes = f"{num_prompts:,} prompts x {samples} samples; " if num_prompts and samples else ""
    return f"{sizes}± one standard error over prompts"


def _percent(share: float, error: float | None) -> str:
    known = error is not None and math.isfinite(error)
    return f"{100 * share:.1f}" + (f" ± {100 * error:.1f}" if known and error is not None else "")


def with_error(value: float, error: float | None) -> str:
    """``0.0022 ± 0.0003``: as many decimals as the error's first digit needs (two where it is 1);
    without an error three significant digits.

    Below 1e-5 it is rounding of float32 log-probabilities (the teacher against itself): ``<
    0.00001``.
    """
    if abs(value) < 1e-5 and (error or 0.0) < 1e-5:
        return "< 0.00001"
    if error is None or not math.isfinite(error) or error <= 0:
        return f"{value:#.3g}"
    exponent = math.floor(math.log10(error))
    leading_one = error / 10**exponent < 1.95
    decimals = min(9, max(0, (1 if leading_one else 0) - exponent))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def stage_table(summary: Mapping[str, Any]) -> Table:
    """Every stage with what happened to it and how long it took, and the sum."""
    stages = summary["stages"]
    table = Table(title="stages", title_justify="left", show_footer=True)
    table.add_column("stage", footer="all")
    table.add_column("status")
    table.add_column(
        "seconds", justify="right", footer=f"{sum(stage['seconds'] for stage in stages):.1f}"
    )
    for stage in stages:
        table.add_row(
            stage["name"],
            stage["status"],
            f"{stage['seconds']:.1f}",
            style="dim" if stage["status"] == "reused" else None,
        )
    return table
