"""How a figure is written: the name of its metric, its unit, its digits and its interval."""

from __future__ import annotations

from typing import NamedTuple

from examples.study.figures import Interval


class Style(NamedTuple):
    """How a metric is written.

    Attributes:
        name: What it is called.
        unit: The unit of a value.
        unit_of_difference: The unit of the difference of two values.
        factor: What a value is multiplied by to have this unit.
        digits: The number of digits behind the point.
    """

    name: str
    unit: str
    unit_of_difference: str
    factor: float
    digits: int

    @property
    def head(self) -> str:
        """The head of a column of values."""
        return f"{self.name}, {self.unit}"

    @property
    def head_of_differences(self) -> str:
        """The head of a column of differences."""
        return f"{self.name}, {self.unit_of_difference}"


_NATS = "nats per token"
STYLES = {
    "greedy": Style("greedy", "%", "points", 100.0, 1),
    "sampled": Style("T=1", "%", "points", 100.0, 1),
    "reverse_kl": Style("reverse KL", _NATS, _NATS, 1.0, 4),
    "kl_from_sft": Style("KL from SFT", _NATS, _NATS, 1.0, 4),
}


def shown(interval: Interval, metric: str, *, sign: bool = False) -> str:
    """Return a mean and its interval in the unit of the metric, without the unit.

    Args:
        interval: A mean of values, or of differences.
        metric: Their metric.
        sign: Whether positive numbers have a sign, as differences should.
    """
    style = STYLES[metric]
    return interval.text(f"{'+' if sign else ''}.{style.digits}f", style.factor)


def words(difference: Interval, metric: str) -> str:
    """Return a difference as the words of a sentence, with its interval and its unit."""
    return f"{shown(difference, metric, sign=True)} {STYLES[metric].unit_of_difference}"
