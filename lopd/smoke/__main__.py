"""``python -m lopd.smoke --work DIR [--cpu]``: one line for each thing that works; the first that
does not ends it with exit code 2.
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

from lopd.errors import EXIT_CODE, ConfigError, EngineError, LopdError
from lopd.megatron.ranks.launch import run_ranks
from lopd.report.console import say, show_error
from lopd.smoke.forms import FORMS, Form, write_model
from lopd.stages.training import SERVER_KEY

IMPORTS = ("torch", "megatron.core", "transformers", "pyarrow", "lopd.megatron.training.trainer")
IMPORTS_ON_GPU = (
    "transformer_engine.pytorch",
    "triton",
    "sglang",
)  # on a CPU only its own process can import SGLang (sglang_rollout/cpu)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lopd.smoke",
        description="Does everything that a run needs work together on this machine?",
    )
    parser.add_argument(
        "--work", type=Path, help="folder for the model and logs; absent: a temporary one"
    )
    parser.add_argument("--cpu", action="store_true", help="the tiny form, on two processes")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="folder of any Hugging Face tokenizer, for example examples/tiny_models/student",
    )
    arguments = parser.parse_args()
    form = "cpu" if arguments.cpu else "node"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")  # Megatron-Core tells at length of what is not installed
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
    say(f"smoke: all of it works, {time.perf_counter() - start:.0f} s")


def smoke(name: str, work: Path, tokenizer: Path) -> None:
    """LopdError: the first thing that does not work."""
    from sglang_rollout.requests.client import SGLangEngine
    from sglang_rollout.servers.server import SGLangServer

    form = FORMS[name]
    say(f"smoke: {form.name}")
    _imports(form)
    model = work / "model"
    if model.exists():
        raise ConfigError(
            "a former smoke run is there",
            where=str(work),
            remedy="give another --work, or remove it",
        )
    architecture = write_model(form, model, tokenizer)
    say(
        f"smoke: model of {architecture.num_layers} layers and {sum(path.stat().st_size for path in model.glob('*.safetensors')) / 1e9:.2f} GB written"
    )
    begun = time.perf_counter()
    with SGLangServer(model, form.server, log=work / "sglang.log") as server:
        engine = SGLangEngine(server.url, server.api_key, form.server, server=server)
        say(f"smoke: SGLang serves it after {time.perf_counter() - begun:.1f} s")
        _answers(engine, "before")
        job = work / "job.json"
        job.write_text(
            json.dumps({"form": name, "model": str(model), "url": server.url, "folder": str(work)}),
            encoding="utf-8",
        )
        training = form.training
        run_ranks(
            "lopd.smoke.worker",
            [str(job)],
            ranks=training.parallel.ranks,
            threads_per_rank=1,
            log=work / "train.log",
            timeout_s=training.timeout_s,
            env={**os.environ, SERVER_KEY: server.api_key},
            on_line=lambda line: say(line) if line.startswith("smoke: ") else None,
        )
        _answers(engine, f"smoke-{form.transports[-1]}")


def _imports(form: Form) -> None:
    import torch

    needed = form.training.parallel.ranks
    on_gpu = form is FORMS["node"]
    if on_gpu and torch.cuda.device_count() < needed:
        raise ConfigError(
            f"{torch.cuda.device_count()} GPUs",
            where="this machine",
            limit=str(needed),
            remedy="run the CPU form: --cpu",
        )
    for module in (*IMPORTS, *(IMPORTS_ON_GPU if on_gpu else ())):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"{module} cannot be imported: {error}",
                where="imports",
                remedy="use the image (docker/)",
            ) from None
    say(f"smoke: imports; {torch.cuda.device_count()} GPUs, torch {torch.__version__}")


def _answers(engine: object, version: str) -> None:
    """A few sampled tokens with finite log-probabilities. EngineError: none, or from other weights
    than those that were put there.
    """
    import numpy as np

    from sglang_rollout.requests.client import SGLangEngine
    from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest

    assert isinstance(engine, SGLangEngine)
    params = SamplingParams(
        temperature=1.0, top_p=1.0, top_k=-1, min_p=0.0, max_new_tokens=8, stop_token_ids=(2,)
    )
    prompt = np.arange(4, 20, dtype=np.int32)
    responses = [
        *engine.generate(
            iter([SamplingRequest(f"smoke-{index}", 0, prompt, index) for index in range(4)]),
            params,
        )
    ]
    if not responses or not all(
        np.isfinite(response.sampling_logprobs).all() for response in responses
    ):
        raise EngineError(
            "no answer with finite log-probabilities", where="SGLang", remedy="see sglang.log"
        )
    if version != "before" and any(response.weight_version != version for response in responses):
        served = ", ".join(sorted({response.weight_version for response in responses}))
        raise EngineError(
            f"answers come from weights {served}",
            where="SGLang",
            limit=version,
            remedy="see sglang.log and train.log",
        )
    say(
        f"smoke: {len(responses)} answers"
        + ("" if version == "before" else " from the weights that were synced last")
    )


if __name__ == "__main__":
    main()
