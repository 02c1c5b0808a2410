"""The process of a server: ``python -m sglang_rollout.servers.launch JSON``, where JSON holds the
fields of SGLang's ServerArgs.

The key, and fields that may hold a secret, come in the environment, so that they stand in no list
of processes. SGLang starts its workers by spawning, and each worker first imports this module as
``__mp_main__``: what a CPU needs before SGLang is imported is therefore put in place here, at
import, once per process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from sglang_rollout.cpu.plugin import OURS, activate, on_cpu

KEY_VARIABLE = "LOPD_SGLANG_KEY"
SECRETS_VARIABLE = "LOPD_SGLANG_SECRETS"
CONTEXT_MARGIN = 8
"""SGLang accepts up to 6 tokens less than its context_length (max_req_input_len) and samples up to
2 less (init_req_max_new_tokens). Ours is exact: prompt and response together may have
context_length tokens, to sample and to score. The client holds that limit, so no position beyond it
is ever used.
"""

if on_cpu() and __name__ in ("__main__", "__mp_main__"):
    from sglang_rollout.cpu import stand_ins

    warnings.filterwarnings("ignore", message="Triton is not supported on current platform")
    stand_ins.install()


class _Key(str):
    """SGLang writes its arguments into the log by repr; this one shows nothing."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def main() -> None:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    os.environ[OURS] = "1"
    load_plugins()
    activate()  # once more: SGLang only logs a plugin's error, here it ends the server
    arguments = {**json.loads(sys.argv[1]), **json.loads(os.environ.pop(SECRETS_VARIABLE, "{}"))}
    context_length = arguments.pop("context_length")
    os.environ["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    server_args = ServerArgs(
        **arguments,
        context_length=context_length + CONTEXT_MARGIN,
        api_key=_Key(os.environ.pop(KEY_VARIABLE)),
    )
    _check_context(server_args, context_length)
    from sglang.srt.entrypoints.http_server import launch_server

    if on_cpu():
        from sglang_rollout.cpu import workers

        workers.import_one_model_only(Path(server_args.model_path))
        workers.fork_workers()
    _check_original_logprobs()
    launch_server(server_args)


def _check_context(server_args: Any, context_length: int) -> None:
    """SGLang's own check, which CONTEXT_MARGIN had to be let through."""
    from sglang.srt.configs.model_config import ModelConfig, get_context_length

    kept = getattr(server_args, "get_model_config", None)  # up to 0.5.18, where it is asked again
    model_config = kept() if kept is not None else ModelConfig.from_server_args(server_args)
    longest = get_context_length(model_config.hf_text_config)
    if context_length > longest:
        raise ValueError(
            f"sglang.context_length = {context_length} is more than the {longest} positions of {server_args.model_path}"
        )


def _check_original_logprobs() -> None:
    """The environment variable that keeps log-probabilities at temperature 1 must have been read by
    the sampler.
    """
    sampler = importlib.import_module("sglang.srt.layers.sampler")
    if getattr(sampler, "SGLANG_RETURN_ORIGINAL_LOGPROB", None) is not True:
        raise RuntimeError(
            "SGLANG_RETURN_ORIGINAL_LOGPROB has no effect on this SGLang version: sampling_logprobs would not be at temperature 1"
        )


if __name__ == "__main__":
    main()
