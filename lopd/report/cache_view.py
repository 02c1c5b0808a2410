"""What ``lopd cache`` and ``lopd audit`` show in a terminal: figures, histograms, and responses
coloured by what teacher and student disagree on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lopd.records import Floats, Response

_BAR = 40
_COLOURS = (
    (-5.0, "bold white on red"),
    (-2.0, "bold red"),
    (-0.5, "red"),
    (0.5, ""),
    (2.0, "green"),
    (float("inf"), "bold green"),
)
LEGEND = "log pi_teacher - log pi_student of each token, nats:"


def _console() -> Console:
    return Console(highlight=False)


def show_findings(name: str, findings: Iterable[object], figures: Mapping[str, Any]) -> None:
    """One line a finding, then one line of what was looked at."""
    console, found = _console(), list(findings)
    for finding in found:
        console.print(Text.assemble(("wrong ", "bold red"), str(finding)), soft_wrap=True)
    size = figures["vocab_size"]
    against = (
        f"vocabulary of {size:,}"
        if size
        else "ids not compared with a vocabulary (give --vocab-size)"
    )
    verdict = ("sound ", "green") if not found else ("not sound ", "bold red")
    console.print(
        Text.assemble(
            verdict,
            f"{name}: {figures['rows']:,} responses, {figures['tokens']:,} tokens, {figures['shards']} shards; {against}",
        ),
        soft_wrap=True,
    )


def show_inspection(figures: Mapping[str, Any]) -> None:
    """All that lopd cache inspect --json gives, for a reader."""
    console = _console()
    for title, value in _lines(figures):
        console.print(Text.assemble((f"{title:26}", "dim"), value), soft_wrap=True)
    for title, name in (
        ("response lengths, tokens", "lengths"),
        ("teacher log-probability, nats", "teacher_logprobs"),
        ("sampling log-probability, nats", "sampling_logprobs"),
        ("advantage at the start (teacher - sampling), nats", "advantage_at_start"),
        ("the teacher's probability outside of its top-K", "teacher_tail"),
        ("the teacher's entropy, nats", "teacher_entropy"),
    ):
        if figures.get(name):
            console.print(
                Text(f"\n{title}: {_moments(figures[name])}", style="bold"), soft_wrap=True
            )
            for line in histogram_lines(figures[name]["histogram"]):
                console.print(Text(line))


def _lines(figures: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    teacher, lineage, sampling = figures["teacher"], figures["lineage"], figures["sampling"]
    yield (
        "artifact",
        f"{figures['kind']}, {'complete' if figures['complete'] else 'NOT COMPLETE'}, schema {figures['schema_version']}",
    )
    yield "fingerprint", figures["fingerprint"] or "none"
    if len(figures["teachers"]) < 2:
        yield (
            "teacher",
            "unknown"
            if teacher is None
            else f"{teacher['path']} (weights {teacher['weights'][:12]})",
        )
    yield "student", figures["student"] or "unknown"
    if "consistent" in lineage:
        same = (
            "the teacher of the demonstrations"
            if lineage["consistent"]
            else "NOT shown to be the teacher of the demonstrations"
        )
        yield "teacher consistency", f"{same} ({lineage.get('evidence', 'unknown')})"
    for weights, rows in figures["rows_by_teacher"].items():
        yield "  rows of teacher", f"{figures['teachers'].get(weights) or weights[:12]}: {rows:,}"
    yield (
        "sampled with",
        ", ".join(f"{name} {value}" for name, value in sampling.items()) or "unknown",
    )
    yield (
        "responses",
        f"{figures['rows']:,} to {figures['prompts']:,} prompts, {figures['tokens']:,} tokens, in {figures['shards']} shards",
    )
    yield (
        "bytes per token",
        f"{figures['bytes_per_token']:.2f} in all, {figures['bytes_per_token_without_sampling_logprobs']:.2f} without sampling log-probabilities",
    )
    columns = sorted(figures["bytes_per_token_by_column"].items(), key=lambda item: -item[1])
    yield "  by column", ", ".join(f"{name} {size:.2f}" for name, size in columns if size >= 0.005)
    loss = figures["logprob_loss"]
    lossy = (
        f"16 bits: values moved by {loss['mean_abs']:.1e} nats on average, at most {loss['max_abs']:.1e}"
        if loss
        else "32 bits, lossless"
    )
    yield "log-probabilities", lossy
    if figures.get("top_k"):
        yield "teacher's top-K", f"{figures['top_k']} tokens at each place"
    yield "truncated", f"{figures['truncated_share']:.2%} of the responses"
    coverage = figures["end_token_coverage"]
    if coverage is not None:
        yield (
            "end token",
            f"{coverage:.2%} of the others end with {figures['end_token_ids']} (known from {figures['end_tokens_from']})",
        )
    yield (
        "duplicates",
        f"{figures['duplicate_keys']} keys, {figures['duplicate_sequences']} token sequences",
    )
    advantage = figures["advantage_at_start"]
    if advantage:
        yield (
            "advantage at the start",
            f"{advantage['share_over_1_nat']:.2%} of tokens over 1 nat, {advantage['share_clipped']:.3%} clipped at 10",
        )
    for reason in figures["lacks"]:
        yield "lacks", reason


def _moments(figures: Mapping[str, Any]) -> str:
    if "standard_deviation" in figures:
        return f"mean {figures['mean']:+.4f}, standard deviation {figures['standard_deviation']:.4f}, {figures['min']:.3g} to {figures['max']:.3g}"
    return f"mean {figures['mean']:.1f}, median {figures['median']:.0f}, 95% up to {figures['p95']:.0f}, {figures['min']:.0f} to {figures['max']:.0f}"


def histogram_lines(histogram: Mapping[str, Any]) -> list[str]:
    """A line a bin: bounds, share, bar. Bars grow with the square root of the count, so that rare
    bins are seen.
    """
    edges, counts = histogram["edges"], np.asarray(histogram["counts"])
    lines = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bounds = f"{'-inf' if low is None else f'{low:.4g}':>8} .. {'inf' if high is None else f'{high:.4g}':<8}"
        bar = "#" * round(_BAR * (count / max(1, counts.max())) ** 0.5)
        lines.append(f"{bounds} {count / max(1, counts.sum()):8.3%} {bar}")
    return lines


def show_responses(rows: Sequence[tuple[Response, Floats]], text_of: Callable[[int], str]) -> None:
    """Responses token by token: red where the teacher finds a token less likely than the student
    did, green where more. text_of: one token id as text.
    """
    console = _console()
    legend = Text(f"\n{LEGEND} ", style="bold")
    low = "-inf"
    for bound, style in _COLOURS:
        legend.append(f" {low}..{bound:g} ", style=style)
        low = f"{bound:g}"
    console.print(legend, soft_wrap=True)
    for response, teacher in rows:
        advantage = teacher.astype(np.float64) - response.sampling_logprobs
        worst = int(np.argmax(np.abs(advantage)))
        title = f"\n{response.prompt_id}/{response.sample_index}: {len(teacher)} tokens, {response.finish_reason}, sum {advantage.sum():+.2f} nats"
        console.print(
            Text(f"{title}, most at token {worst} ({advantage[worst]:+.2f})", style="bold"),
            soft_wrap=True,
        )
        console.print(
            Text("".join(text_of(int(token)) for token in response.prompt_ids), style="dim"),
            soft_wrap=True,
        )
        console.print(
            Text.assemble(
                *(
                    (text_of(int(token)), colour(value))
                    for token, value in zip(response.token_ids, advantage, strict=True)
                )
            ),
            soft_wrap=True,
        )


def colour(advantage: float) -> str:
    """rich's style of a token by the teacher's minus the student's log-probability, nats."""
    return next(style for bound, style in _COLOURS if advantage <= bound)


def show_residualisation(
    about: Mapping[str, Any], text_of: Callable[[int], str], count: int
) -> None:
    """What was taken away: the tokens that it moves most, positions by surprisal, and deviations
    before and after.
    """
    effect = about["effect"]
    rows = [
        (
            repr(text_of(row["token_id"])),
            str(row["token_id"]),
            f"{row['bias']:+.4f}",
            f"{row['share']:.2%}",
            f"{row['occurrences']:,}",
        )
        for row in about["tokens"][:count]
    ]
    show_table(
        "style by token: mean of log pi_teacher - log pi_student, nats",
        ("token", "id", "bias", "weight", "occurrences"),
        rows,
    )
    context = about["context"]
    columns = ("position", "0", *(f"{edge:.2g}" for edge in context["surprisal_edges"]))
    size = len(context["bias"])
    cells = [
        (f"{index / size:.0%}", *("" if value is None else f"{value:+.2f}" for value in line))
        for index, line in enumerate(context["bias"])
    ]
    show_table(
        "style by position in the response, from (rows), and surprisal of the student, from (columns, nats)",
        columns,
        cells,
    )
    show_line(
        f"tokens with a deviation over 1 nat: {effect['share_over_1_nat_before']:.3%} before, {effect['share_over_1_nat_after']:.3%} after"
    )
    show_line(
        f"mean deviation of a response: {effect['mean_before']:+.5f} nats per token before, {effect['mean_after']:+.5f} after"
    )
    show_line(
        f"root mean square: {effect['rms_before']:.4f} before, {effect['rms_after']:.4f} after"
        f" (fitted on the very responses it would be {effect['rms_after_in_sample']:.4f}: what cross-fitting keeps from leaking)"
    )


_VERDICTS = {"consistent": "bold green", "inconsistent": "bold red", "cannot tell": "bold yellow"}


def show_audit(result: Mapping[str, Any], picture: object = None) -> None:
    """The verdict, the figures behind it, and the curves."""
    console = _console()
    console.print(
        Text.assemble(
            (result["verdict"], _VERDICTS[result["verdict"]]),
            f": z = {result['z']:+.2f}, p = {result['p_value']:.2g}",
        )
    )
    mean = f"log p + entropy: {result['mean']:+.6f} ± {result['standard_error']:.6f} nats per token"
    show_line(
        f"{mean} over {result['tokens']:,} tokens of {result['responses']:,} responses, at temperature {result['temperature']:g}, top-p {result['top_p']:g}"
    )
    needed = f"{result['tolerance']:g} needs {result['tokens_needed']:,} tokens"
    show_line(
        f"so many show a drift of {result['detectable']:.6f} with probability {result['power']:.0%}; {needed}"
    )
    if result["impossible"]:
        show_line(
            f"{result['impossible']:,} tokens are outside the nucleus: it cannot have sampled them",
            "red",
        )
    for title, name in (
        ("position, from", "by_position"),
        ("entropy, from", "by_entropy"),
        ("kind of the token before", "by_kind"),
    ):
        rows = [
            (
                point["name"],
                f"{point['tokens']:,}",
                f"{point['mean']:+.6f}",
                f"{point['standard_error']:.6f}",
                _in_errors(point),
            )
            for point in result[name]
        ]
        if rows:
            show_table(
                f"by {title}", (title, "tokens", "mean", "standard error", "in errors"), rows
            )
    if picture is not None:
        show_line(f"picture: {picture}")


def _in_errors(point: Mapping[str, Any]) -> str:
    return f"{point['mean'] / point['standard_error']:+.1f}" if point["standard_error"] > 0 else ""


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose cells are never taken for markup."""
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _console().print(table)


def show_line(line: str, style: str = "") -> None:
    _console().print(Text(line, style=style), soft_wrap=True)
