"""Which token ids all models of a run know.

Models of one family share a tokenizer and still differ in the rows of their embedding: 152,064 and
151,936 for a tokenizer of 151,665 tokens. The rows past the tokens mean no text, but a model can
sample their ids, if hardly ever. Another model of the run may have no such row: a teacher cannot
score such an id, and a student cannot learn from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from lopd.config import Config
from lopd.errors import DataError
from lopd.megatron.weights.architecture import read_architecture
from lopd.records import Response
from lopd.report.console import print_line


def num_shared_ids(config: Config) -> int:
    """Return the number of token ids that every model of a run has a row for.

    Raises:
        LopdError: The config.json of a model cannot be read.
    """
    base = config.models.teacher_base
    bases = () if base is None else (base,)
    folders = (*config.student_token_models, *bases)
    return min(read_architecture(folder).vocab_size for folder in folders)


def within_ids(responses: Iterable[Response], num_ids: int, *, title: str) -> Iterator[Response]:
    """Yield the responses, each cut before its first token that not all models know.

    What stands before that token was sampled as it should be, and every model knows it. A response
    that was cut counts as truncated. At the end a line says how many there were.

    Args:
        responses: What a model sampled.
        num_ids: The number of ids that all models know; see num_shared_ids.
        title: What was sampled, for the line.

    Raises:
        DataError: The first token of a response is such an id, so nothing of it is left.
    """
    # Cut and not thrown away: a shard is complete only with a response to each of its requests.
    num_cut = 0
    for response in responses:
        # Checkpoints pad the vocabulary. A model can sample a row past the tokenizer's tokens.
        outside = np.flatnonzero(response.token_ids >= num_ids)
        if not outside.size:
            yield response
            continue
        num_cut += 1
        yield _cut(response, int(outside[0]), num_ids)
    if num_cut:
        print_line(
            f"{title}: {num_cut} responses were cut before a token id from {num_ids} on, for which "
            "another model of the run has no row"
        )


def _cut(response: Response, length: int, num_ids: int) -> Response:
    if length == 0:
        raise DataError(
            f"response {response.key} begins with token {int(response.token_ids[0])}",
            limit=f"below {num_ids}: every model of the run must have a row for it",
            remedy="take away the rows past the tokenizer's tokens from the model that sampled "
            "(resize_token_embeddings of transformers)",
        )
    routed = response.routed_experts
    return replace(
        response,
        token_ids=response.token_ids[:length],
        sampling_logprobs=response.sampling_logprobs[:length],
        # It has no end token, as where the limit of tokens cut it.
        finish_reason="length",
        loss_mask=None if response.loss_mask is None else response.loss_mask[:length],
        # One row for each token that was fed in. The last token of a response is sampled and not
        # fed in.
        routed_experts=None if routed is None else routed[: len(response.prompt_ids) + length - 1],
    )
