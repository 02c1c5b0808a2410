"""What ``lopd cache`` shows in a terminal.

These are statistics, histograms, and responses in colours that show where teacher and student
disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lopd.records import Floats, Response
from lopd.report.text_width import printable
from lopd.report.token_pieces import pieces_of

# The width of the longest bar of a histogram, in characters.
_BAR = 40
# The bar of a bin that has values, but too few for half a character.
_RARE = "."
# The style of a token, by an upper bound of the teacher's minus the student's log-probability.
# The first bound that is not below the value decides. Half a nat to either side has no colour, or
# every token would have one.
_COLOURS = (
    (-5.0, "bold white on red"),
    (-2.0, "bold red"),
    (-0.5, "red"),
    (0.5, ""),
    (2.0, "green"),
    (float("inf"), "bold green"),
)
# The histograms of an inspection.
_HISTOGRAMS = {
    "lengths": "response lengths, tokens",
    "teacher_logprobs": "teacher log-probability, nats",
    "sampling_logprobs": "sampling log-probability, nats",
    "advantage_at_start": "advantage at the start (teacher - sampling), nats",
    "teacher_tail": "the teacher's probability outside of its top-K",
    "teacher_entropy": "the teacher's entropy, nats",
}
_SCALE = f"bars are linear in the share; {_RARE} stands for less than half a #"
# From this share of tokens in runs of zeros on, a reader should look.
_SUSPICIOUS_ZEROS = 0.01
LEGEND = "log pi_teacher - log pi_student of each token, nats:"


def _console() -> Console:
    return Console(highlight=False)


def show_findings(name: str, findings: Iterable[object], figures: Mapping[str, Any]) -> None:
    """Print one line per finding, and a last line with the verdict.

    Args:
        name: Of the cache.
        figures: As check_cache() returns them.
    """
    console = _console()
    # It is needed twice, for the lines and for the verdict.
    found = list(findings)
    for finding in found:
        console.print(Text.assemble(("wrong ", "bold red"), str(finding)), soft_wrap=True)
    size = figures["vocab_size"]
    # A check that was left out must be seen, or "sound" would claim too much.
    against = "ids not compared with a vocabulary (give --vocab-size)"
    if size:
        against = f"vocabulary of {size:,}"
    verdict = ("sound ", "green") if not found else ("not sound ", "bold red")
    counts = f"{figures['rows']:,} responses, {figures['tokens']:,} tokens"
    line = f"{name}: {counts}, {figures['shards']} shards; {against}"
    console.print(Text.assemble(verdict, line), soft_wrap=True)


def show_inspection(figures: Mapping[str, Any]) -> None:
    """Print the statistics of inspect_cache()."""
    console = _console()
    # Titles are dim and of one width, so that the values can be read as a column.
    for title, value in _inspection_lines(figures):
        console.print(Text.assemble((f"{title:26}", "dim"), value), soft_wrap=True)
    # The scale is explained once, above the first histogram.
    if any(figures.get(name) for name in _HISTOGRAMS):
        console.print(Text(f"\n{_SCALE}", style="dim"), soft_wrap=True)
    for name, title in _HISTOGRAMS.items():
        if figures.get(name):
            heading = Text(f"\n{title}: {_moments(figures[name])}", style="bold")
            console.print(heading, soft_wrap=True)
            for line in histogram_lines(figures[name]["histogram"]):
                console.print(Text(line))


def _inspection_lines(figures: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield the title and the value of each line."""
    state = "complete" if figures["complete"] else "NOT COMPLETE"
    yield "artifact", f"{figures['kind']}, {state}, schema {figures['schema_version']}"
    # An artifact that is not complete has no fingerprint yet.
    yield "fingerprint", figures["fingerprint"] or "none"
    yield from _model_lines(figures)
    prompts = f"{figures['rows']:,} to {figures['prompts']:,} prompts"
    tokens = f"{figures['tokens']:,} tokens"
    yield "responses", f"{prompts}, {tokens}, in {figures['shards']} shards"
    yield from _mask_lines(figures)
    yield from _size_lines(figures)
    yield from _alignment_lines(figures)
    if figures.get("top_k"):
        yield "teacher's top-K", f"{figures['top_k']} tokens at each place"
    yield from _ending_lines(figures)
    # Two kinds: a key that comes twice is a fault, and the same response twice may be chance.
    keys = f"{figures['duplicate_keys']} keys"
    yield "duplicates", f"{keys}, {figures['duplicate_sequences']} token sequences"
    advantage = figures["advantage_at_start"]
    if advantage:
        over = f"{advantage['share_over_1_nat']:.2%} of tokens over 1 nat"
        clipped = f"{advantage['share_clipped']:.3%} clipped at 10"
        yield "advantage at the start", f"{over}, {clipped}"
        # Zeros in place of unknown values look like this, and like perfect agreement.
        if advantage["share_in_runs_of_zeros"] >= _SUSPICIOUS_ZEROS:
            share = f"{advantage['share_in_runs_of_zeros']:.2%} of tokens are in runs of exactly 0"
            yield "  exactly 0", f"{share} by both: tokens of a tool need a loss_mask"
    yield from _regime_lines(figures["regime"])
    # What an import could not know. Each reason is a line of its own.
    for reason in figures["lacks"]:
        yield "lacks", reason


def _regime_lines(regime: Mapping[str, Any] | None) -> Iterable[tuple[str, str]]:
    """Yield how far the teacher is from the student, and which loss suits that."""
    # Rollouts have no scores.
    if regime is None:
        return
    recommendation = regime["recommendation"]
    if recommendation is None:
        yield "regime", f"unknown: {regime['num_tokens']:,} tokens are too few to tell"
        return
    yield "regime", f"{recommendation['regime']}: {recommendation['seen']}"
    told = [f"mean advantage {regime['mean_advantage']:+.3f} nats per token"]
    if regime["teacher_entropy"] is not None:
        bound = "at least " if regime["entropy_is_bound"] else ""
        told.append(f"the teacher's entropy is {bound}{regime['teacher_entropy']:.3f}")
    if regime["top_k_coverage"] is not None:
        told.append(f"its top {regime['top_k']} hold {regime['top_k_coverage']:.2%} of the tokens")
    yield "  further", ", ".join(told)
    for knob in ("loss", "advantage_clip", "importance_cap"):
        advice = recommendation[knob]
        value = advice["value"]
        # A knob of the three is a name, and the others are numbers.
        shown = value if isinstance(value, str) else "off" if value is None else f"{value:g}"
        yield f"  {knob}", f"{shown}: {advice['reason']}"


def _model_lines(figures: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield who scored, who sampled, and how."""
    teacher = figures["teacher"]
    lineage = figures["lineage"]
    # Several teachers have a line each, further below.
    if len(figures["teachers"]) < 2:
        # 12 of the 64 digits are enough to tell models apart on a screen.
        known = teacher and f"{teacher['path']} (weights {teacher['weights'][:12]})"
        yield "teacher", known or "unknown"
    yield "student", figures["student"] or "unknown"
    # Demonstrations and rollouts have no scores and nothing to be consistent with.
    if "consistent" in lineage:
        same = "" if lineage["consistent"] else "NOT shown to be "
        evidence = lineage.get("evidence", "unknown")
        yield "teacher consistency", f"{same}the teacher of the demonstrations ({evidence})"
    for weights, rows in figures["rows_by_teacher"].items():
        yield "  rows of teacher", f"{figures['teachers'].get(weights) or weights[:12]}: {rows:,}"
    sampling = ", ".join(f"{name} {value}" for name, value in figures["sampling"].items())
    yield "sampled with", sampling or "unknown"


def _mask_lines(figures: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield how many tokens carry loss, where some do not."""
    if not figures["has_loss_mask"]:
        return
    share = figures["loss_tokens"] / max(1, figures["tokens"])
    turns = figures["turns"] / max(1, figures["rows"])
    told = f"{share:.2%} of the tokens, in {turns:.2f} turns per response"
    yield "carry loss", f"{told}; the figures below are about these alone"


def _alignment_lines(figures: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield what became of the tokens, where the teacher has another tokenizer."""
    about = figures.get("token_alignment")
    if about:
        tokenizers = [str(about.get(f"{name}_tokenizer"))[:12] for name in ("teacher", "student")]
        told = f"{about.get('method')}, from the tokenizer {tokenizers[0]} to {tokenizers[1]}"
        yield "other tokenizer", told
    if figures.get("alignment"):
        yield "  tokens", figures["alignment_line"]


def _size_lines(figures: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield the bytes per token and the number format."""
    size = f"{figures['bytes_per_token']:.2f} in all"
    smaller = f"{figures['bytes_per_token_without_sampling_logprobs']:.2f}"
    yield "bytes per token", f"{size}, {smaller} without sampling log-probabilities"
    # The largest column first: it is the one worth leaving out.
    columns = sorted(figures["bytes_per_token_by_column"].items(), key=lambda item: -item[1])
    # What would be shown as 0.00 is left out.
    yield "  by column", ", ".join(f"{name} {size:.2f}" for name, size in columns if size >= 0.005)
    # None for a cache in 32 bits.
    loss = figures["logprob_loss"]
    # In scientific notation, because the change is thousands of times smaller than a nat.
    change = loss and f"{loss['mean_abs']:.1e} nats on average, at most {loss['max_abs']:.1e}"
    yield "log-probabilities", f"16 bits: values moved by {change}" if loss else "32 bits, lossless"


def _ending_lines(figures: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield how the responses end."""
    yield "truncated", f"{figures['truncated_share']:.2%} of the responses"
    # Of the responses that ended by themselves. There may be none.
    coverage = figures["end_token_coverage"]
    if coverage is not None:
        ends = f"{coverage:.2%} of the others end with {figures['end_token_ids']}"
        yield "end token", f"{ends} (known from {figures['end_tokens_from']})"


def _moments(figures: Mapping[str, Any]) -> str:
    """Return the statistics of a distribution as one line, for nats or for lengths in tokens."""
    # Two kinds of figures: values around 0 need a sign and a spread, lengths need a middle and a
    # tail.
    if "standard_deviation" in figures:
        spread = (
            f"mean {figures['mean']:+.4f}, standard deviation {figures['standard_deviation']:.4f}"
        )
        return f"{spread}, {figures['min']:.3g} to {figures['max']:.3g}"
    middle = f"mean {figures['mean']:.1f}, median {figures['median']:.0f}"
    ends = f"{figures['min']:.0f} to {figures['max']:.0f}"
    return f"{middle}, 95% up to {figures['p95']:.0f}, {ends}"


def histogram_lines(histogram: Mapping[str, Any]) -> list[str]:
    """Return one line per bin, with its bounds, its share and a bar.

    Args:
        histogram: ``edges`` (None is infinite) and ``counts``.
    """
    edges = histogram["edges"]
    counts = np.asarray(histogram["counts"])
    lines = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        lower = "-inf" if low is None else f"{low:.4g}"
        upper = "inf" if high is None else f"{high:.4g}"
        # Linear, so that a bar of twice the length is twice the share.
        bar = "#" * round(_BAR * count / max(1, counts.max()))
        # A rare bin is not an empty one.
        if count and not bar:
            bar = _RARE
        lines.append(f"{lower:>8} .. {upper:<8} {count / max(1, counts.sum()):8.3%} {bar}")
    return lines


@dataclass(frozen=True, slots=True)
class ShownResponse:
    """A response with the texts that a reader sees.

    Attributes:
        response: The response.
        scores: The teacher's log-probabilities [R], or None where nothing was scored.
        prompt: The text of the prompt, with the chat template.
        pieces: The text that each token adds; one more piece where the last is no whole character.
        verdict: What the verifier said of an answer, or None where it was not asked.
    """

    response: Response
    scores: Floats | None
    prompt: str
    pieces: Sequence[str]
    verdict: str | None

    def as_json(self) -> dict[str, Any]:
        """Return the texts for programs."""
        return {
            "prompt_id": self.response.prompt_id,
            "sample_index": self.response.sample_index,
            "finish_reason": self.response.finish_reason,
            "prompt": self.prompt,
            "response": "".join(self.pieces),
            "verdict": self.verdict,
            "scores": None if self.scores is None else self.scores.tolist(),
        }


def show_responses(rows: Sequence[ShownResponse]) -> None:
    """Print prompts and responses as text.

    Where a response has scores, a token is red if it is less likely for the teacher than for the
    student, and green if it is likelier.
    """
    console = _console()
    if any(row.scores is not None for row in rows):
        console.print(legend(), soft_wrap=True)
    for row in rows:
        response = row.response
        # The form in which findings and errors name a response.
        name = f"{response.prompt_id}/{response.sample_index}"
        about = f"{len(response.token_ids)} tokens, {response.finish_reason}"
        advantage = None
        is_sampled = bool(np.isfinite(response.sampling_logprobs).all())
        # Imported responses may have scores, and nothing to compare them with.
        if row.scores is not None and len(row.scores) and is_sampled:
            advantage = row.scores.astype(np.float64) - response.sampling_logprobs
            # A token without loss may have no score, and a 0 in its place.
            if response.loss_mask is not None:
                advantage[~response.loss_mask] = 0.0
            # The token to look at first.
            worst = int(np.argmax(np.abs(advantage)))
            about += f", sum {advantage.sum():+.2f} nats"
            about += f", most at token {worst} ({advantage[worst]:+.2f})"
        console.print(Text(f"\n{name}: {about}", style="bold"), soft_wrap=True)
        console.print(Text(printable(row.prompt), style="dim"), soft_wrap=True)
        # A character of several tokens has the colour of all of them together.
        coloured = [
            (printable(piece.text), "" if piece.value is None else colour(piece.value))
            for piece in pieces_of(row.pieces, advantage, len(response.token_ids))
        ]
        console.print(Text.assemble(*coloured), soft_wrap=True)
        if row.verdict is not None:
            console.print(Text(f"verdict: {row.verdict}", style="bold"), soft_wrap=True)


def legend() -> Text:
    """Return the ranges of the colours, each in its own colour."""
    # Not in the style of the whole text, which would make every colour bold.
    legend = Text.assemble((f"\n{LEGEND} ", "bold"))
    low = "-inf"
    for bound, style in _COLOURS:
        legend.append(f" {low}..{bound:g} ", style=style)
        low = f"{bound:g}"
    return legend


def colour(advantage: float) -> str:
    """Return rich's style of a token.

    Args:
        advantage: The teacher's minus the student's log-probability, in nats.
    """
    return next(style for bound, style in _COLOURS if advantage <= bound)


def show_residualisation(
    about: Mapping[str, Any], text_of: Callable[[int], str], count: int
) -> None:
    """Print the style that was taken away, and the deviations before and after.

    Args:
        about: ``extra.residualisation`` of the manifest.
        text_of: Returns the text of one token id.
        count: How many tokens are shown.
    """
    if "teachers" not in about:
        _show_style("", about, text_of, count)
    for name, own in about.get("teachers", {}).items():
        _show_style(f"{name}: ", own, text_of, count)
        _show_effect(own["effect"], f"{name}: ")
    _show_effect(about["effect"], "all teachers: " if "teachers" in about else "")


def _show_style(
    of: str, about: Mapping[str, Any], text_of: Callable[[int], str], count: int
) -> None:
    """Print the two tables of one teacher. ``of`` stands before their titles."""
    tokens = [
        (
            # repr(), because many of these tokens are spaces and line breaks.
            repr(text_of(row["token_id"])),
            str(row["token_id"]),
            f"{row['bias']:+.4f}",
            f"{row['share']:.2%}",
            f"{row['occurrences']:,}",
        )
        for row in about["tokens"][:count]
    ]
    title = f"{of}style by token: mean of log pi_teacher - log pi_student, nats"
    show_table(title, ("token", "id", "bias", "weight", "occurrences"), tokens)
    # A row is named by the position at which its bin begins, a column by the surprisal.
    context = about["context"]
    num_bins = len(context["bias"])
    cells = [
        (f"{index / num_bins:.0%}", *("" if value is None else f"{value:+.2f}" for value in line))
        for index, line in enumerate(context["bias"])
    ]
    title = (
        f"{of}style by position in the response, from (rows), "
        "and surprisal of the student, from (columns, nats)"
    )
    edges = [f"{edge:.2g}" for edge in context["surprisal_edges"]]
    show_table(title, ("position", "0", *edges), cells)


def _show_effect(effect: Mapping[str, float], of: str) -> None:
    before = f"{effect['share_over_1_nat_before']:.3%} before"
    after = f"{effect['share_over_1_nat_after']:.3%} after"
    show_line(f"{of}tokens with a deviation over 1 nat: {before}, {after}")
    before = f"{effect['mean_before']:+.5f} nats per token before"
    show_line(f"{of}mean deviation of a response: {before}, {effect['mean_after']:+.5f} after")
    rms = (
        f"{of}root mean square: {effect['rms_before']:.4f} before, {effect['rms_after']:.4f} after"
    )
    in_sample = f"{effect['rms_after_in_sample']:.4f}"
    show_line(
        f"{rms} (fitted on the very responses it would be {in_sample}: "
        "what cross-fitting keeps from leaking)"
    )


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    # As Text: a token may be "[red]", which rich would take for markup.
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        # Numbers of one column are compared, so they stand below each other.
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _console().print(table)


def show_line(line: str, style: str = "") -> None:
    """Print one line in a style of rich. It is never wrapped and never taken for markup."""
    _console().print(Text(line, style=style), soft_wrap=True)
