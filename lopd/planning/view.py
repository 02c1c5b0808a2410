"""A plan as tables on screen."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lopd.errors import LopdError
from lopd.planning.assumptions import meanings, sources
from lopd.planning.layouts import Suggestion
from lopd.planning.plan import LIGHTNING, TIGHT, Plan

_GIB = 2**30
WIDTH = 118  # of tables in a file or a pipe


def show_plan(plan: Plan, *, assumptions: bool = True) -> None:
    """Prints models, memory, hours, disk, what was assumed, and the verdict."""
    console = _console()
    for line in _head(plan):
        console.print(Text(line), soft_wrap=True)
    for table in (_memory_table(plan), _hours_table(plan), _disk_table(plan)):
        console.print(table)
    if assumptions:
        console.print(_assumption_table(plan))
    show_verdict(plan, console)


def show_verdict(plan: Plan, console: Console | None = None) -> None:
    console = console or _console()
    if plan.fits:
        console.print(
            Text.assemble(("fits", "bold green"), f" {plan.node.num_gpus} x {plan.node.gpu.name}"),
            soft_wrap=True,
        )
    for stage in plan.tight:
        console.print(
            Text.assemble(
                ("tight", "bold yellow"), f" {stage}: less than {1 - TIGHT:.0%} of a GPU is left"
            ),
            soft_wrap=True,
        )
    for problem in plan.problems:
        console.print(
            Text.assemble(("does not fit", "bold red"), f" {problem.stage}: {problem.what}"),
            soft_wrap=True,
        )


def show_refused(problems: Iterable[LopdError]) -> None:
    """What is wrong with the configuration whatever the node."""
    console = _console()
    for problem in problems:
        console.print(Text.assemble(("refused", "bold red"), f" {problem}"), soft_wrap=True)


def show_suggestion(found: Suggestion | None) -> None:
    """The nearest settings that fit, as overrides to paste."""
    console = _console()
    if found is None:
        console.print(
            Text(
                "no layout that was searched fits this node: more GPUs, a smaller student, or fewer tokens per microbatch"
            ),
            soft_wrap=True,
        )
    elif not found.changes:
        console.print(Text("the configuration fits as it is"), soft_wrap=True)
    else:
        console.print(
            Text(
                "the nearest that fits: "
                + " ".join(_quoted(override) for override in found.overrides)
            ),
            soft_wrap=True,
        )
        show_verdict(found.plan, console)


def _quoted(override: str) -> str:
    return f"'{override}'" if any(sign in override for sign in ' {}"') else override


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def _head(plan: Plan) -> Iterable[str]:
    for role, model in plan.models.items():
        domain = role.removeprefix("teachers.")
        yield f"{role if domain == role else f'teacher of {domain}'}: {model.name}, by {model.source}"
    yield f"student: {_many(plan.total)} parameters, {_many(plan.active)} of them active for a token"
    for name in plan.trained:
        parallel, stages = getattr(plan.config, name).parallel, plan.per_rank[name]
        layout = ", ".join(
            f"{key} {value}"
            for key, value in parallel.model_dump().items()
            if key != "distributed_optimizer" and (value > 1 or key == "ranks")
        )
        held = " / ".join(_many(stage.total) for stage in stages)
        yield f"{name}: {layout}, data {parallel.data}: a rank holds {held} parameters"
    for name, use in plan.memory.items():
        if use.turns:
            told = ", ".join(f"{who} {_gib(size)}" for who, size in use.turns.items())
            yield f"{name}, in turns with the GPUs, GiB: {told}"
    yield f"node: {plan.node.num_gpus} x {plan.node.gpu.name} ({plan.node.gpu.memory / _GIB:.1f} GiB), {plan.node.host_memory / 2**40:.2f} TiB of memory"


def _many(number: float) -> str:
    """``30.53B``, ``64.1M``, ``751.0k``."""
    for size, letter, decimals in ((1e9, "B", 2), (1e6, "M", 1), (1e3, "k", 1)):
        if number >= size:
            return f"{number / size:,.{decimals}f}{letter}"
    return f"{number:.0f}"


def _memory_table(plan: Plan) -> Table:
    stages = list(plan.memory)
    table = Table(title="memory of the fullest GPU, GiB", title_justify="left")
    table.add_column("")
    for stage in stages:
        table.add_column(stage, justify="right", no_wrap=True)
    terms = dict.fromkeys(term for use in plan.memory.values() for term in use.gpu)
    for term in terms:
        table.add_row(term, *(_gib(plan.memory[stage].gpu.get(term)) for stage in stages))
    table.add_section()
    limit = plan.node.gpu.memory
    totals = [
        (plan.memory[stage].gpu_total, plan.memory[stage].gpu_total <= limit) for stage in stages
    ]
    table.add_row(
        f"all (of {limit / _GIB:.1f})",
        *(Text(_gib(total), style="" if ok else "bold red") for total, ok in totals),
        style="bold",
    )
    table.add_row("host memory", *(_gib(plan.memory[stage].host_total) for stage in stages))
    table.add_row("sequences at once", *(_concurrency(plan, stage) for stage in stages))
    return table


def _concurrency(plan: Plan, stage: str) -> str:
    figures = plan.memory[stage].figures
    return f"{figures['concurrency'] * figures['copies']:,.0f}" if "concurrency" in figures else ""


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / _GIB:,.1f}"


def _hours_table(plan: Plan) -> Table:
    table = Table(title="time, by assumption", title_justify="left")
    for title in (
        "stage",
        "tokens",
        "operations",
        "GPUs used",
        "tokens/s",
        "MFU",
        "hours",
        "GPU hours",
    ):
        table.add_column(title, justify="left" if title == "stage" else "right", no_wrap=True)
    for stage, work in plan.work.items():
        if work.seconds == 0:
            table.add_row(stage, "", "", "", "", "", "given", "")
            continue
        rate = work.tokens / work.seconds
        cells = (
            _many(work.tokens),
            f"{work.flops:.1e}",
            str(work.gpus),
            f"{rate:,.0f}",
            f"{work.utilisation:.1%}" if work.utilisation else "",
            f"{work.seconds / 3600:,.2f}",
            f"{plan.gpu_hours(stage):,.1f}",
        )
        table.add_row(stage, *cells)
        if stage == "distill" and plan.syncs.seconds > 0:
            hours = plan.syncs.seconds / 3600
            table.add_row(
                "  syncs, evaluations in it",
                "",
                "",
                "",
                "",
                "",
                f"{hours:,.2f}",
                f"{hours * plan.node.num_gpus:,.1f}",
            )
    table.add_section()
    for title, stages in (("rollout, score, distill", LIGHTNING), ("all", tuple(plan.work))):
        seconds, hours = (
            sum(plan.work[stage].seconds for stage in stages),
            sum(plan.gpu_hours(stage) for stage in stages),
        )
        table.add_row(
            title, "", "", "", "", "", f"{seconds / 3600:,.2f}", f"{hours:,.1f}", style="bold"
        )
    return table


def _disk_table(plan: Plan) -> Table:
    table = Table(title="disk, GiB", title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    for term, size in plan.disk.items():
        table.add_row(term, f"{size / _GIB:,.1f}")
    table.add_section()
    table.add_row("all", f"{sum(plan.disk.values()) / _GIB:,.1f}", style="bold")
    return table


def _assumption_table(plan: Plan) -> Table:
    table = Table(title="assumed (change one: --assume name=value)", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("from", no_wrap=True)
    table.add_column("meaning")
    for name, meaning in meanings().items():
        value = getattr(plan.assumed, name)
        is_size = name.endswith("_bytes") and value >= _GIB / 4
        table.add_row(
            name, f"{value / _GIB:.2f} GiB" if is_size else f"{value:,g}", sources()[name], meaning
        )
    return table
