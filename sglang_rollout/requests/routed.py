"""The experts that a server has chosen, as they stand in an answer.

SGLang returns the choice of each router at every position but the last one, prompt included, as
int32 values in base64 (``meta_info.routed_experts``). Read in SGLang 0.5.17 and 0.5.23.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lopd.errors import EngineError
from lopd.records import Int16s, Key
from sglang_rollout.requests.checks import response_name


@dataclass(frozen=True, slots=True)
class RouterShape:
    """What the routers of a model choose from. Every layer has a router."""

    num_layers: int
    num_experts: int
    experts_per_token: int


def read_routed_experts(
    key: Key, meta: Mapping[str, Any], num_positions: int, shape: RouterShape
) -> Int16s:
    """Return the experts that the server chose, int16 [num_positions, layers, k].

    Args:
        key: The prompt id and the sample index of the response.
        meta: ``meta_info`` of the answer.
        num_positions: The tokens of prompt and response without the last one, which is never
            routed.
        shape: The shape of the model's routers.

    Raises:
        EngineError: The answer has no experts, or they cannot be those of this response.
    """
    where = response_name(key)
    encoded = meta.get("routed_experts")
    if encoded is None:
        raise EngineError(
            "the server returned no routed experts",
            where=where,
            remedy="start the servers of sglang.student_urls with --enable-return-routed-experts, "
            "or set rollout.routed_experts = false",
        )
    expected = (num_positions, shape.num_layers, shape.experts_per_token)
    try:
        values = np.frombuffer(base64.b64decode(encoded, validate=True), dtype="<i4")
    except (binascii.Error, ValueError, TypeError) as error:
        raise EngineError(
            f"the server returned routed experts that cannot be read ({error})",
            where=where,
            remedy="use a supported version of SGLang, or set rollout.routed_experts = false",
        ) from None
    if len(values) != int(np.prod(expected)):
        raise EngineError(
            f"the server returned {len(values)} routed experts",
            where=where,
            limit=f"{int(np.prod(expected))}: {expected[0]} positions x {expected[1]} layers x "
            f"{expected[2]} experts",
            remedy="check that the server serves the student, and a supported version of SGLang",
        )
    experts = values.reshape(expected)
    _check_choice(experts, shape, where)
    return experts.astype(np.int16)


def _check_choice(experts: np.ndarray[Any, Any], shape: RouterShape, where: str) -> None:
    """Raise EngineError for experts that no router can have chosen."""
    if experts.size == 0:
        return
    wrong = (experts < 0) | (experts >= shape.num_experts)
    if wrong.any():
        raise EngineError(
            f"the server returned the expert {int(experts[wrong][0])}",
            where=where,
            limit=f"at least 0 and at most {shape.num_experts - 1}",
            remedy="check that the server serves the student",
        )
    # A router chooses different experts. Where the server has kept nothing its buffer has zeros,
    # which would pass for a choice of expert 0.
    ordered = np.sort(experts, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        position = int(np.argwhere((ordered[..., 1:] == ordered[..., :-1]).any((1, 2)))[0, 0])
        raise EngineError(
            f"the routed experts of position {position} name one expert twice",
            where=where,
            remedy="do not use these experts: the server has not kept them",
        )
