"""SGLang servers from Python, without lopd's stages: two servers, samples of prompts, their scores,
and weights of your own into the running servers.

    python examples/sglang_from_python.py examples/tiny_models/student --dtype float32 [--kill]

--kill ends one of the servers in the middle of sampling (kill -9): it is started again, and every
response comes exactly once.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from lopd.config import SGLangSection, SyncSection
from lopd.records import Response
from lopd.tasks.tokenizer import load_tokenizer, stop_token_ids
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.requests.fleet import serve
from sglang_rollout.requests.sampling import SamplingParams, SamplingRequest, request_seed
from sglang_rollout.requests.scoring import ScoreRequest
from sglang_rollout.weight_sync import build_receiver
from sglang_rollout.weight_sync.interface import await_servers

PROMPTS = 10
SAMPLES = 4
SEED = 17


def requests(model: Path) -> Iterator[SamplingRequest]:
    """One sample of every prompt, then a second of every: the server then has the prompts' prefixes
    cached. A request's seed decides its response.
    """
    tokenizer = load_tokenizer(model)
    for sample in range(SAMPLES):
        for number in range(PROMPTS):
            messages = [{"role": "user", "content": f"{number + 3}*{number + 4}="}]
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            seed = request_seed(SEED, f"p{number}", sample, "example")
            yield SamplingRequest(f"p{number}", sample, np.array(ids, np.int32), seed)


def generate(
    engine: SGLangEngine, model: Path, *, version: str | None = None, kill: bool = False
) -> list[Response]:
    """In the order in which they were done. version: of the weights that must answer. OtherWeights:
    others did, as after a restart: send them again.
    """
    ends = stop_token_ids(model, load_tokenizer(model))
    params = SamplingParams(
        temperature=0.8, top_p=0.95, top_k=-1, min_p=0.0, max_new_tokens=24, stop_token_ids=ends
    )
    responses = []
    # The requests come from a generator, which is read only as the servers have room.
    for response in engine.generate(requests(model), params, version=version):
        responses.append(response)
        server = engine.engines[-1].server
        if kill and len(responses) == 1 and server is not None:
            os.killpg(server.group_id, signal.SIGKILL)
    return responses


def my_weights(model: Path) -> Iterator[list[tuple[str, Tensor]]]:
    """Buckets of whole tensors under the checkpoint's names: here its own, a little larger; of
    yours, what your trainer gathers.

    The names are those of the files. A model loaded by transformers 5 has the experts of a layer
    fused into one parameter (experts.gate_up_proj); give them as the files do
    (experts.0.gate_proj.weight, ...).
    """
    for file in sorted(model.glob("*.safetensors")):
        yield [(name, tensor * 1.01) for name, tensor in load_file(file).items()]


def send(
    engine: SGLangEngine, model: Path, section: SyncSection, version: str, folder: Path
) -> str:
    """Puts weights into all servers, and says what that cost.

    weights_file is where the servers' owner reads which weights one that dies must come back with:
    after a sync by disk these, from its folder; after one of the others its first ones, under their
    version, so that generate(version=...) notices.
    """
    server = engine.server
    receiver = build_receiver(
        section,
        engine.engines,
        folder=folder,
        template_dir=model,
        weights_file=server.weights_file if server is not None else None,
    )
    await_servers(engine.engines, section.timeout_s)  # one may be on its way back
    try:
        receiver.begin(version)
        for bucket in my_weights(model):
            receiver.receive(bucket)
        receiver.commit()
    except BaseException:
        receiver.abandon()  # servers that hold a mixture of versions answer nobody
        raise
    return receiver.report.line()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument(
        "--kill", action="store_true", help="end a server in the middle of sampling"
    )
    options = parser.parse_args()
    settings = SGLangSection(dtype=options.dtype, replicas=2, context_length=256)
    with (
        tempfile.TemporaryDirectory(prefix="sglang-example-") as name,
        serve(
            options.model, settings, log=Path(name) / "sglang.log", name="student", tell=print
        ) as engine,
    ):
        responses = generate(engine, options.model, kill=options.kill)
        print(
            f"{len(responses)} responses, "
            f"{len({response.key for response in responses})} of them different"
        )

        items = (
            ScoreRequest(*response.key, response.prompt_ids, response.token_ids)
            for response in responses
        )
        scores = {score.key: score.teacher_logprobs for score in engine.score(items)}
        worst = max(
            float(np.abs(scores[response.key] - response.sampling_logprobs).max())
            for response in responses
        )
        print(
            f"{len(scores)} scores, "
            f"at most {worst:.1e} nats from the log-probabilities of sampling: "
            "both are at temperature 1"
        )

        for section in (
            SyncSection(transport="disk"),
            SyncSection(transport="tensor"),
            SyncSection(transport="distributed"),
        ):
            version = f"by-{section.transport}"
            print(send(engine, options.model, section, version, Path(name) / "sync"))
            responses = generate(engine, options.model, version=version)
            print(f"{len(responses)} responses of the weights {responses[0].weight_version}")


if __name__ == "__main__":
    main()
