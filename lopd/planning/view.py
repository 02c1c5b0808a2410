"""A plan as tables on screen."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lopd.errors import LopdError
from lopd.planning.assumptions import WORK, meanings, sources
from lopd.planning.horizon import short_horizon
from lopd.planning.hours import StageTime
from lopd.planning.layouts import Suggestion
from lopd.planning.plan import TIGHT, Plan
from lopd.planning.stages import LIGHTNING

_GIB = 2**30
_TIB = 2**40
# Columns of tables in a file or a pipe, which have no width of their own.
WIDTH = 118


def show_plan(plan: Plan, *, assumptions: bool = True) -> None:
    """Print models, memory, hours, disk, what was assumed, and the verdict.

    Args:
        plan: The plan.
        assumptions: Whether to print the table of assumptions.
    """
    console = _console()
    for line in _head(plan):
        # Tables adapt to the width. Lines of text are left to the terminal, so that they can be
        # copied as one line.
        console.print(Text(line), soft_wrap=True)
    # From what most often decides whether a run fits to what seldom does.
    tables = [_memory_table(plan), _hours_table(plan), _disk_table(plan)]
    if not plan.has_gpus:
        tables = [_work_table(plan), _disk_table(plan)]
    for table in tables:
        console.print(table)
    shorter = short_horizon(plan)
    if shorter is not None:
        console.print(Text(shorter.line), soft_wrap=True)
    if assumptions:
        console.print(_assumption_table(plan))
    _show_verdict(plan, console)


def _show_verdict(plan: Plan, console: Console) -> None:
    """Print one line for each stage that does not fit or is tight, or that all fits."""
    if not plan.has_gpus:
        line = (
            "memory and hours (launch.device is cpu): the plan's rates and sizes are those of "
            "GPUs. For a node with GPUs: --gpus 8 --gpu h100-80gb"
        )
        _print_marked(console, "not estimated", "bold yellow", line)
        return
    if plan.fits:
        _print_marked(console, "fits", "bold green", f"{plan.node.num_gpus} x {plan.node.gpu.name}")
    # Tight is a warning: the run fits by the plan, and the plan is an estimate.
    for stage in plan.tight:
        line = f"{stage}: less than {1 - TIGHT:.0%} of a GPU is left"
        _print_marked(console, "tight", "bold yellow", line)
    for problem in plan.problems:
        _print_marked(console, "does not fit", "bold red", f"{problem.stage}: {problem.what}")


def show_refused(problems: Iterable[LopdError]) -> None:
    """Print the errors of a configuration that no machine can run."""
    console = _console()
    for problem in problems:
        _print_marked(console, "refused", "bold red", str(problem))


def show_suggestion(found: Suggestion | None) -> None:
    """Print the nearest settings that fit, as overrides to paste."""
    console = _console()
    # What to change is said in the order of its cost.
    if found is None:
        line = (
            "no layout that was searched fits this node: "
            "more GPUs, a smaller student, or fewer tokens per microbatch"
        )
    elif not found.changes:
        line = "the configuration fits as it is"
    else:
        line = f"the nearest that fits: {' '.join(map(_quoted, found.overrides))}"
    console.print(Text(line), soft_wrap=True)
    # The verdict may still say "tight", so it is shown for the found settings too.
    if found is not None and found.changes:
        _show_verdict(found.plan, console)


def _print_marked(console: Console, mark: str, style: str, line: str) -> None:
    console.print(Text.assemble((mark, style), f" {line}"), soft_wrap=True)


def _quoted(override: str) -> str:
    """Return an override as a shell takes it."""
    return f"'{override}'" if any(sign in override for sign in ' {}"') else override


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def _head(plan: Plan) -> Iterable[str]:
    """Yield the lines above the tables: models, layouts and the node."""
    for role, model in plan.models.items():
        # A run with one teacher has the roles teacher and student only.
        domain = role.removeprefix("teachers.")
        # teachers.math is a key of the configuration. People read "teacher of math".
        title = role if domain == role else f"teacher of {domain}"
        yield f"{title}: {model.name}, by {model.source}"
    yield (
        f"student: {_short(plan.total)} parameters, "
        f"{_short(plan.active)} of them active for a token"
    )
    for name in plan.trained:
        parallel = getattr(plan.config, name).parallel
        # Sizes of 1 say nothing. The number of ranks is always shown.
        layout = ", ".join(
            f"{key} {value}"
            for key, value in parallel.model_dump().items()
            if key != "distributed_optimizer" and (value > 1 or key == "ranks")
        )
        # One figure for each pipeline stage.
        held = " / ".join(_short(stage.total) for stage in plan.per_rank[name])
        yield f"{name}: {layout}, data {parallel.data}: a rank holds {held} parameters"
    if not plan.has_gpus:
        return
    for name, use in plan.memory.items():
        if use.turns:
            turns = ", ".join(f"{program} {_gib(size)}" for program, size in use.turns.items())
            yield f"{name}, in turns with the GPUs, GiB: {turns}"
    node = plan.node
    yield (
        f"node: {node.num_gpus} x {node.gpu.name} ({node.gpu.memory / _GIB:.1f} GiB), "
        f"{node.host_memory / _TIB:.2f} TiB of memory"
    )


def _short(number: float) -> str:
    """Return a number as ``30.53B``, ``64.1M`` or ``751.0k``."""
    for size, letter, decimals in ((1e9, "B", 2), (1e6, "M", 1), (1e3, "k", 1)):
        if number >= size:
            return f"{number / size:,.{decimals}f}{letter}"
    return f"{number:.0f}"


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / _GIB:,.1f}"


def _memory_table(plan: Plan) -> Table:
    table = Table(title="memory of the fullest GPU, GiB", title_justify="left")
    table.add_column("")
    for stage in plan.memory:
        table.add_column(stage, justify="right", no_wrap=True)
    uses = list(plan.memory.values())
    # Every term of any stage has a row. A dict keeps them in the order in which they first come.
    for term in dict.fromkeys(term for use in uses for term in use.gpu):
        table.add_row(term, *(_gib(use.gpu.get(term)) for use in uses))
    table.add_section()
    limit = plan.node.gpu.memory
    # What does not fit is red, and the line of the verdict names it again.
    totals = [
        Text(_gib(use.gpu_total), style="" if use.gpu_total <= limit else "bold red")
        for use in uses
    ]
    table.add_row(f"all (of {limit / _GIB:.1f})", *totals, style="bold")
    # Host memory is one row: its terms are in the JSON, and few users lack it.
    table.add_row("host memory", *(_gib(use.host_total) for use in uses))
    table.add_row("sequences at once", *(_concurrency(plan, stage) for stage in plan.memory))
    return table


def _concurrency(plan: Plan, stage: str) -> str:
    """Return the number of requests that all servers of a stage serve at once."""
    figures = plan.memory[stage].figures
    return f"{figures['concurrency'] * figures['copies']:,.0f}" if "concurrency" in figures else ""


def _hours_table(plan: Plan) -> Table:
    table = Table(
        title="time, by assumption (hours include the starts, tokens/s do not)",
        title_justify="left",
    )
    titles = (
        "stage",
        "tokens",
        "operations",
        "GPUs used",
        "tokens/s",
        "MFU",
        "hours",
        "GPU hours",
    )
    for title in titles:
        table.add_column(title, justify="left" if title == "stage" else "right", no_wrap=True)
    for stage, time in plan.times.items():
        # This run does not make the stage. A row says so, so that nobody misses the stage.
        if time.seconds == 0:
            # No result of evaluate can be given. It can only be switched off.
            table.add_row(stage, *[""] * 5, "off" if stage == "evaluate" else "given", "")
            continue
        table.add_row(stage, *_time_cells(time), f"{plan.gpu_hours(stage):,.1f}")
        # This row is part of the row above. It shows what the learning curve costs.
        if stage == "distill" and plan.syncs.seconds > 0:
            hours = plan.syncs.seconds / 3600
            table.add_row(
                "  syncs, evaluations in it",
                *[""] * 5,
                f"{hours:,.2f}",
                f"{hours * plan.node.num_gpus:,.1f}",
            )
    table.add_section()
    # The first sum is what the paper publishes. The second is what a user waits for.
    for title, stages in (("rollout, score, distill", LIGHTNING), ("all", tuple(plan.times))):
        hours = sum(plan.times[stage].seconds for stage in stages) / 3600
        gpu_hours = sum(plan.gpu_hours(stage) for stage in stages)
        table.add_row(title, *[""] * 5, f"{hours:,.2f}", f"{gpu_hours:,.1f}", style="bold")
    return table


def _work_table(plan: Plan) -> Table:
    """Return what each stage does, without how long it takes."""
    table = Table(title="work, by assumption", title_justify="left")
    for title in ("stage", "tokens", "operations"):
        table.add_column(title, justify="left" if title == "stage" else "right", no_wrap=True)
    for stage, time in plan.times.items():
        # The result of this stage is given.
        if time.tokens == 0:
            table.add_row(stage, "given", "")
        else:
            table.add_row(stage, *_work_cells(time))
    return table


def _work_cells(time: StageTime) -> tuple[str, str]:
    # Operations as a power of ten: the digits behind are far below the error of the plan.
    return _short(time.tokens), f"{time.flops:.1e}"


def _time_cells(time: StageTime) -> tuple[str, ...]:
    """Return the cells of a stage from its tokens to its hours."""
    return (
        *_work_cells(time),
        str(time.gpus),
        # Of a tiny model hardly anything but the starts takes time, and a rate says nothing.
        f"{time.tokens_per_s:,.0f}" if time.startup_s < time.seconds / 2 else "starts",
        f"{time.utilisation:.1%}" if time.utilisation else "",
        f"{time.seconds / 3600:,.2f}",
    )


def _disk_table(plan: Plan) -> Table:
    total = sum(plan.disk.values())
    # A tiny run would have 0.0 GiB in every row.
    unit, size_of_unit = ("GiB", _GIB) if total >= _GIB else ("MiB", 2**20)
    table = Table(title=f"disk, {unit}", title_justify="left")
    table.add_column("")
    table.add_column(unit, justify="right")
    for term, size in plan.disk.items():
        table.add_row(term, f"{size / size_of_unit:,.1f}")
    table.add_section()
    table.add_row("all", f"{total / size_of_unit:,.1f}", style="bold")
    return table


def _assumption_table(plan: Plan) -> Table:
    table = Table(title="assumed (change one: --assume name=value)", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("from", no_wrap=True)
    table.add_column("meaning")
    for name, meaning in meanings().items():
        # Without GPUs the rates are not used, and a reader must not think that they were.
        if not plan.has_gpus and name not in WORK:
            continue
        value = getattr(plan.assumed, name)
        # Small sizes, such as bytes per token, read better as numbers.
        is_size = name.endswith("_bytes") and value >= _GIB / 4
        shown = f"{value / _GIB:.2f} GiB" if is_size else f"{value:,g}"
        table.add_row(name, shown, sources()[name], meaning)
    return table
