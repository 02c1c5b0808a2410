"""The process of a server: ``python -m sglang_rollout.servers.launch JSON``.

JSON holds the fields of SGLang's ServerArgs. The key and the fields that may hold a secret come in
the environment, because every user of the machine can read the command line of a process.

SGLang starts its workers by spawning, and each worker first imports this module as ``__mp_main__``.
What a CPU needs before SGLang is imported is therefore installed here, at import, once per process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from sglang_rollout.cpu.settings import OURS, on_cpu

# Variables and no arguments: the environment of a process is read by its user alone.
KEY_VARIABLE = "LOPD_SGLANG_KEY"
SECRETS_VARIABLE = "LOPD_SGLANG_SECRETS"
# In tokens. SGLang accepts prompts of up to 6 tokens less than its context_length
# (max_req_input_len), and it samples up to 2 tokens less (init_req_max_new_tokens). Our limit is
# exact: prompt and response together may have context_length tokens, to sample and to score. The
# client holds that limit, so a server never uses a position beyond it.
CONTEXT_MARGIN = 8

if on_cpu() and __name__ in ("__main__", "__mp_main__"):
    from sglang_rollout.cpu import stand_ins

    warnings.filterwarnings("ignore", message="Triton is not supported on current platform")
    stand_ins.install()


class _Key(str):
    """A key that the log does not show. SGLang logs its arguments by repr."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def main() -> None:
    """Run the server until it is ended."""
    # Only now: the stand-ins must be in place before the first import of SGLang.
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    from sglang_rollout.cpu.plugin import activate

    # The plugins of the workers read it: they inherit this environment.
    os.environ[OURS] = "1"
    load_plugins()
    # load_plugins() has called it, but only logs an error of a plugin. Here the error ends the
    # server: without its patches it would give results that depend on the batch.
    activate()
    # pop(): SGLang's workers and their logs must not see the secrets in their environment.
    secrets = json.loads(os.environ.pop(SECRETS_VARIABLE, "{}"))
    arguments = {**json.loads(sys.argv[1]), **secrets}
    context_length = arguments.pop("context_length")
    # SGLang refuses a context longer than the model's positions. The margin may exceed them.
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
        # After the import of http_server, so that the forked workers have all of SGLang already.
        workers.fork_workers()
    _check_original_logprobs()
    launch_server(server_args)


def _check_context(server_args: Any, context_length: int) -> None:
    """Make the check that SGLang was told to skip, without the margin."""
    from sglang.srt.configs.model_config import ModelConfig, get_context_length

    # ServerArgs has this method up to 0.5.18. Later versions make the configuration anew.
    kept = getattr(server_args, "get_model_config", None)
    model_config = kept() if kept is not None else ModelConfig.from_server_args(server_args)
    longest = get_context_length(model_config.hf_text_config)
    if context_length > longest:
        raise ValueError(
            f"sglang.context_length = {context_length} is larger than the {longest} "
            f"positions of {server_args.model_path}"
        )


def _check_original_logprobs() -> None:
    """Check that the sampler has read the variable that keeps log-probabilities at temperature 1.

    A version that ignores the variable would return log-probabilities of logits / temperature.
    They look like good ones, and the importance weights of the training would be wrong.
    """
    sampler = importlib.import_module("sglang.srt.layers.sampler")
    # Found at the start: wrong log-probabilities look like right ones, and would be trained on.
    if getattr(sampler, "SGLANG_RETURN_ORIGINAL_LOGPROB", None) is not True:
        raise RuntimeError(
            "SGLANG_RETURN_ORIGINAL_LOGPROB has no effect on this SGLang version: "
            "sampling_logprobs would not be at temperature 1"
        )


if __name__ == "__main__":
    main()
