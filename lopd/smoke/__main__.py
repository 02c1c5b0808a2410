"""``python -m lopd.smoke --work DIR [--cpu]``: prints one line for each thing that works.

The first thing that does not work ends it with exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from lopd.errors import EXIT_CODE, ConfigError, EngineError, LopdError
from lopd.megatron.ranks.launch import run_ranks
from lopd.report.console import print_line, show_error
from lopd.smoke.forms import FORMS, Form, write_model
from lopd.stages.training import SERVER_KEY
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest
from sglang_rollout.servers.server import SGLangServer

# What servers and trainer are built on.
IMPORTS = ("torch", "megatron.core", "transformers", "pyarrow", "lopd.megatron.training.trainer")
# On a CPU only the server's own process can import SGLang (sglang_rollout/cpu).
IMPORTS_ON_GPU = ("transformer_engine.pytorch", "triton", "sglang")
# Requests that the server answers, and tokens of each answer.
NUM_REQUESTS = 4
ANSWER_LEN = 8


def main() -> None:
    """Parse the command line, and run."""
    arguments = _parser().parse_args()
    # Without --cpu a machine without enough GPUs is refused: a trial of less would prove nothing.
    form = "cpu" if arguments.cpu else "node"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Megatron-Core warns at length of packages that are not installed.
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    try:
        if arguments.work is not None:
            smoke(form, arguments.work, arguments.tokenizer)
        else:
            with tempfile.TemporaryDirectory(prefix="lopd-smoke-") as folder:
                smoke(form, Path(folder), arguments.tokenizer)
    except LopdError as error:
        show_error(error)
        sys.exit(EXIT_CODE)
    print_line(f"smoke: all of it works, {time.perf_counter() - start:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lopd.smoke",
        description="Does everything that a run needs work together on this machine? "
        "Writes a model with random weights and logs into the folder of --work.",
        epilog="Example:  python -m lopd.smoke --cpu --tokenizer examples/tiny_models/student",
    )
    parser.add_argument(
        "--work", type=Path, help="folder for the model and logs; if absent, a temporary one"
    )
    parser.add_argument(
        "--cpu", action="store_true", help="try a tiny model on two processes, without a GPU"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="folder of any Hugging Face tokenizer, for example examples/tiny_models/student",
    )
    return parser


def smoke(name: str, folder: Path, tokenizer: Path) -> None:
    """Try everything.

    Args:
        name: The form: node or cpu.
        folder: Where the model and the logs are written.
        tokenizer: The folder of any Hugging Face tokenizer.

    Raises:
        LopdError: The first thing that does not work.
    """
    form = FORMS[name]
    print_line(f"smoke: {form.name}")
    # The cheapest check first: a missing package would otherwise show after minutes.
    _check_imports(form)
    model = folder / "model"
    # Files of an earlier run could make this one pass.
    if model.exists():
        raise ConfigError(
            "this folder has an earlier smoke run",
            where=str(folder),
            remedy="set --work to another folder, or remove this folder",
        )
    # The checkpoint is in the format that both the server and the trainer read.
    architecture = write_model(form, model, tokenizer)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    print_line(f"smoke: model of {architecture.num_layers} layers and {size / 1e9:.2f} GB written")
    start = time.perf_counter()
    with SGLangServer(model, form.server, log=folder / "sglang.log") as server:
        engine = SGLangEngine(server.url, server.api_key, form.server, server=server)
        print_line(f"smoke: SGLang serves it after {time.perf_counter() - start:.1f} s")
        # Once before any sync: if the server itself is wrong, no transport is to blame.
        _check_answers(engine, version=None)
        _run_trainer(name, model, server, folder)
        # The worker names the version of each sync after its transport (lopd.smoke.worker).
        _check_answers(engine, version=f"smoke-{form.transports[-1]}")


def _run_trainer(name: str, model: Path, server: SGLangServer, folder: Path) -> None:
    """Run the ranks to their end: training steps, and a weight sync by each transport."""
    job_file = folder / "job.json"
    job = {"form": name, "model": str(model), "url": server.url, "folder": str(folder)}
    job_file.write_text(json.dumps(job), encoding="utf-8")
    settings = FORMS[name].training
    run_ranks(
        "lopd.smoke.worker",
        [str(job_file)],
        ranks=settings.parallel.ranks,
        threads_per_rank=1,
        log=folder / "train.log",
        timeout_s=settings.timeout_s,
        # The key goes through the environment. A command line and a file could be read by others.
        env={**os.environ, SERVER_KEY: server.api_key},
        # The ranks write much else, which is in the log.
        on_line=lambda line: print_line(line) if line.startswith("smoke: ") else None,
    )


def _check_imports(form: Form) -> None:
    """Import everything that a run needs, and count the GPUs."""
    import torch

    needed = form.training.parallel.ranks
    on_gpu = form is FORMS["node"]
    # Counting GPUs costs nothing, and importing Megatron-Core costs seconds.
    if on_gpu and torch.cuda.device_count() < needed:
        raise ConfigError(
            f"this machine has only {torch.cuda.device_count()} GPUs",
            where="this machine",
            limit=f"at least {needed}",
            remedy="use a machine with more GPUs, or add --cpu to run the CPU form",
        )
    # One by one, so that the error names the package and not the file that wanted it.
    for module in (*IMPORTS, *(IMPORTS_ON_GPU if on_gpu else ())):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"{module} cannot be imported: {error}",
                where="imports",
                remedy="use the image (docker/)",
            ) from None
    print_line(f"smoke: imports; {torch.cuda.device_count()} GPUs, torch {torch.__version__}")


def _check_answers(engine: SGLangEngine, version: str | None) -> None:
    """Sample a few tokens from the server.

    Args:
        engine: The server.
        version: The weight version that the answers must come from. None accepts any.

    Raises:
        EngineError: There is no answer with finite log-probabilities, or it is from other weights.
    """
    # Token 2 ends a response in the models of lopd.smoke.forms.
    params = SamplingParams(
        temperature=1.0,
        top_p=1.0,
        top_k=-1,
        min_p=0.0,
        max_new_tokens=ANSWER_LEN,
        stop_token_ids=(2,),
    )
    # Any ids will do as a prompt: the weights are random.
    # All requests have the same prompt. Their seeds differ.
    prompt = np.arange(4, 20, dtype=np.int32)
    requests = [
        SamplingRequest(f"smoke-{index}", 0, prompt, index) for index in range(NUM_REQUESTS)
    ]
    responses = list(engine.generate(iter(requests), params))
    # Wrong weights or a broken kernel show first as values that are no numbers.
    are_finite = all(np.isfinite(response.sampling_logprobs).all() for response in responses)
    if not responses or not are_finite:
        raise EngineError(
            "the server gave no answer with finite log-probabilities",
            where="SGLang",
            remedy="read sglang.log",
        )
    if version is None:
        print_line(f"smoke: {len(responses)} answers")
        return
    # All answers must be from one version: a server in between would be a torn update.
    versions = sorted({response.weight_version for response in responses})
    if versions != [version]:
        raise EngineError(
            f"the answers come from the weights {', '.join(versions)}",
            where="SGLang",
            limit=f"exactly {version}",
            remedy="read sglang.log and train.log",
        )
    print_line(f"smoke: {len(responses)} answers from the weights that were synced last")


if __name__ == "__main__":
    main()
