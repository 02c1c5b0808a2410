"""The order of requests in which a server computes the prefix of a prompt once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

from lopd.records import Response

T = TypeVar("T")


def in_passes(prompts: Sequence[Sequence[T]], at_once: int) -> list[T]:
    """Return the samples in passes: one of every prompt, then a second of every prompt, and so on.

    Args:
        prompts: The samples of each prompt.
        at_once: About how many prompts form a block; a block is finished before the next begins.
            With 1 the samples of a prompt follow each other.
    """
    # Samples of a prompt that meet in one prefill compute its prefix each for itself: only what was
    # prefilled before is in the server's cache. So a block has at least as many prompts as there
    # are requests in flight. It has not many more, because the cache must hold the prefix while the
    # other prompts of the block pass through it.
    num_blocks = max(1, len(prompts) // at_once)
    bounds = [len(prompts) * number // num_blocks for number in range(num_blocks + 1)]
    order: list[T] = []
    for first, end in pairwise(bounds):
        block = prompts[first:end]
        num_passes = max(map(len, block), default=0)
        for number in range(num_passes):
            order += [samples[number] for samples in block if number < len(samples)]
    return order


def by_length(responses: Iterable[Response], at_once: int) -> list[Response]:
    """Return responses to be scored, long ones first, in passes over blocks of prompts.

    Prompts with responses of similar length are neighbours, so what a server computes together has
    similar lengths.

    Args:
        responses: The responses, several of which may belong to one prompt.
        at_once: See in_passes.
    """
    # The longest first: a long response at the end would leave the server with nothing else to do.
    groups: dict[str, list[Response]] = {}
    for response in responses:
        groups.setdefault(response.prompt_id, []).append(response)
    samples = [
        sorted(group, key=lambda response: -len(response.token_ids)) for group in groups.values()
    ]
    samples.sort(key=lambda group: -len(group[0].prompt_ids) - len(group[0].token_ids))
    return in_passes(samples, at_once)
