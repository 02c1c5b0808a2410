"""What a fake server answers to /generate. Imports nothing, so that a process of its own starts at
once.
"""

from __future__ import annotations

from typing import Any

STOP_ID = 2
VOCAB_SIZE = 512
LOGPROB = -0.5


def sequences(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The bodies that would ask for each sequence of a body alone."""
    if not isinstance(body.get("rid"), list):
        return [body]
    names = ("rid", "input_ids", "logprob_start_len")
    return [
        {**body, **dict(zip(names, values, strict=True))}
        for values in zip(*(body[name] for name in names), strict=True)
    ]


def generations(body: dict[str, Any], weight_version: str) -> Any:
    """The answer to a body, a list where it has several sequences."""
    found = [generation(one, weight_version) for one in sequences(body)]
    return found if isinstance(body.get("rid"), list) else found[0]


def generation(body: dict[str, Any], weight_version: str) -> dict[str, Any]:
    """Three tokens that depend on prompt and seed, then the stop token; or the echo of a sequence
    to score.
    """
    ids = body["input_ids"]
    params = body["sampling_params"]
    meta: dict[str, Any] = {
        "id": body.get("rid"),
        "weight_version": weight_version,
        "output_token_logprobs": [],
        "finish_reason": {"type": "length", "length": 0},
    }
    if params["max_new_tokens"] == 0:
        entries = [[LOGPROB, token, None] for token in ids[body["logprob_start_len"] :]]
        entries[0][0] = None
        return {"output_ids": [], "meta_info": {**meta, "input_token_logprobs": entries}}
    output = [
        10 + (sum(ids) + params.get("sampling_seed", 0) + step) % 100 for step in range(3)
    ] + [STOP_ID]
    output = output[: params["max_new_tokens"]]
    stopped = output[-1] == STOP_ID
    meta["output_token_logprobs"] = [[LOGPROB, token, None] for token in output]
    meta["finish_reason"] = (
        {"type": "stop", "matched": STOP_ID}
        if stopped
        else {"type": "length", "length": len(output)}
    )
    return {"output_ids": output, "meta_info": meta}
