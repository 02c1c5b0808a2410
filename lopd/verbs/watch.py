"""``lopd watch``: a run as it is now, again and again."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lopd.config import load_config
from lopd.errors import ConfigError
from lopd.verbs.arguments import AsJson
from lopd.verbs.interrupts import keyboard_interrupts

if TYPE_CHECKING:
    from rich.console import Console, Group

    from lopd.report.run_state import RunState

EPILOG = "Ctrl-C ends it, and nothing else.   Example:  lopd watch runs/tiny_moe"

RunFolder = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Run directory, or TOML file of a run.", show_default=False),
]


def watch(
    run: RunFolder,
    once: Annotated[bool, typer.Option("--once", help="Show one frame and end.")] = False,
    every: Annotated[
        float, typer.Option(min=0.2, max=3600, help="Seconds from one frame to the next.")
    ] = 2.0,
    answers: Annotated[
        int, typer.Option(min=0, max=100, help="How many of the newest answers are shown.")
    ] = 4,
    as_json: AsJson = False,
) -> None:
    """Show how a run goes on: stage, step, time left, curves, servers, GPUs and the newest answers.

    Reads the run directory alone, so the run may be on another machine that shares the file system.
    Nothing is written or locked. Without a terminal a line is printed whenever the run gets on.
    --json prints one frame for programs.
    """
    # Before rich is imported: a mistyped folder is refused at once.
    run_dir = run_directory(run)
    from rich.console import Console

    from lopd.report.text_width import text_width

    console = Console(highlight=False)
    if not console.is_terminal:
        # A file has no width of its own, and rich would take a narrow one.
        console = Console(highlight=False, width=text_width())
    watcher = _Watcher(run_dir, console, answers)
    if as_json:
        typer.echo(json.dumps(watcher.json(), indent=1))
    elif once:
        console.print(watcher.frame())
    else:
        # Ctrl-C is the way to end it, so it is no failure.
        with contextlib.suppress(KeyboardInterrupt), keyboard_interrupts():
            if console.is_terminal:
                _show_frames(watcher, console, every)
            else:
                _print_lines(watcher, every)


def run_directory(run: Path) -> Path:
    """Return the run directory of a folder or of a TOML file.

    Raises:
        ConfigError: There is no run.
    """
    folder = load_config(run, []).run.dir if run.is_file() else run.expanduser()
    # A run begins with its lock, and each stage leaves a manifest.
    if (folder / ".lock").exists() or any(folder.glob("*/manifest.json")):
        return folder
    raise ConfigError(
        "there is no run in this folder",
        where=str(folder),
        remedy="give the run.dir of a run that has begun, or the TOML file of the run",
    )


class _Watcher:
    """Makes frames of one run."""

    def __init__(self, run_dir: Path, console: Console, num_answers: int) -> None:
        from lopd.report.metrics import METRICS
        from lopd.report.run_state import MetricsTail
        from lopd.verbs.run_answers import NewestAnswers

        self._run_dir = run_dir
        self._console = console
        # These two remember what they have read, so a frame of a long run costs no more than its
        # news.
        self._tail = MetricsTail(run_dir / METRICS)
        self._answers = NewestAnswers(num_answers)
        self._num_answers = num_answers

    def state(self) -> RunState:
        from lopd.report.run_state import state_of

        return state_of(self._run_dir, self._tail)

    def frame(self, state: RunState | None = None) -> Group:
        from lopd.report.gpus import gpus
        from lopd.report.sparkline import BLOCKS, PLAIN
        from lopd.report.watch_view import frame

        state = state or self.state()
        found, source = self._answers.of(state) if self._num_answers else ([], "")
        # The GPUs of this machine are those of the run only if it is here.
        here = gpus() if state.process is not None else []
        # A terminal with another encoding cannot show the blocks of a curve.
        levels = BLOCKS if self._console.encoding.startswith("utf") else PLAIN
        return frame(state, found, source, here, width=self._console.width, levels=levels)

    def json(self) -> dict[str, object]:
        from lopd.report.gpus import gpus
        from lopd.report.watch_view import as_json

        state = self.state()
        found, _ = self._answers.of(state)
        return as_json(state, found, gpus() if state.process is not None else [])


def _show_frames(watcher: _Watcher, console: Console, every: float) -> None:
    from rich.live import Live

    state = watcher.state()
    shown = watcher.frame(state)
    try:
        # On a screen of its own, as top does: a frame may be of another height than the last.
        with Live(shown, console=console, screen=True, auto_refresh=False) as live:
            while not state.is_done:
                time.sleep(every)
                state = watcher.state()
                shown = watcher.frame(state)
                live.update(shown, refresh=True)
    finally:
        # The last frame stays on the screen.
        console.print(shown)


def _print_lines(watcher: _Watcher, every: float) -> None:
    from lopd.report.watch_view import progress_of, status_line

    # A file must not get the same line every two seconds, so only a change is printed.
    said = None
    while True:
        state = watcher.state()
        if progress_of(state) != said:
            said = progress_of(state)
            typer.echo(status_line(state))
        if state.is_done:
            return
        time.sleep(every)
