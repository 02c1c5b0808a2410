"""From a Megatron trainer's ranks into real servers: tensor-, expert- and pipeline-parallel
weights, tied embeddings, a padded vocabulary, a server of two ranks.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from lopd.errors import EngineError
from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.servers.server import SGLangServer
from sglang_rollout.weight_sync import update_weights_from_disk
from tests.megatron.launch import run_ranks
from tests.models import write_qwen3_dense, write_qwen3_moe
from tests.sglang.conftest import settings
from tests.sglang.sync_cases import push_from_all_layouts
from tests.sglang.test_parity import MAX_DIFFERENCE
from tests.sglang.weight_syncing import TRANSPORTS, receiver, worst_difference


@pytest.mark.timeout(600)
def test_every_layout_by_every_transport(tmp_path: Path) -> None:
    # The trainer pads this vocabulary to 520 rows, and SGLang pads it in its own way.
    experts = write_qwen3_moe(tmp_path / "experts", vocab_size=515)
    tied = write_qwen3_dense(tmp_path / "tied")
    with ExitStack() as stack:
        cases = []
        engines = {}
        for model, ranks, vocab_size, layouts in (
            (experts, 2, 515, ["tensor-expert", "pipeline"]),
            (tied, 1, 512, ["pipeline"]),
        ):
            server = stack.enter_context(
                SGLangServer(model, settings(tensor=ranks), log=tmp_path / f"{model.name}.log")
            )
            cases.append(
                {
                    "model": str(model),
                    "url": server.url,
                    "key": server.api_key,
                    "vocab_size": vocab_size,
                    "layouts": layouts,
                }
            )
            engines[model.name] = SGLangEngine(
                server.url, server.api_key, server.settings, server=server
            )
        reports, _ = run_ranks(push_from_all_layouts, 2, cases=cases, folder=str(tmp_path))
        for case in cases:
            name = Path(str(case["model"])).name
            assert "nats per token from those of the trainer" in reports.pop(
                f"{name} caught"
            )  # the control
            for layout in case["layouts"]:
                assert reports[f"{name} {layout} tensor scores"]["sent_tensors"] > 20
                for transport in TRANSPORTS:
                    report = reports[f"{name} {layout} {transport} tensors"]
                    assert (
                        report["verified_tensors"]
                        == report["sent_tensors"]
                        == report["num_tensors"]
                        > 20
                    )
                    # There are two buffers: a bucket, and a tensor that does not fit. Both are
                    # aligned.
                    assert report["extra_bytes"] < 2 * (20_000 + 520 * 64 * 4 + 100 * 512)
        engine = engines["experts"]
        update_weights_from_disk(engine, tmp_path / "experts-trained", version="trained")
        assert worst_difference(engine, tmp_path / "experts-trained") <= MAX_DIFFERENCE
        assert worst_difference(engine, experts) > 100 * MAX_DIFFERENCE


@pytest.mark.slow
def test_a_parameter_that_no_tensor_feeds_is_named(tmp_path: Path) -> None:
    """SGLang 0.5.17 does not tie the embeddings of a Qwen3-MoE: it would answer from an output
    layer that nobody has filled.
    """
    model = write_qwen3_moe(tmp_path / "model", tie_word_embeddings=True)
    with SGLangServer(model, settings(), log=tmp_path / "server.log") as server:
        to = receiver(
            "tensor",
            SGLangEngine(server.url, server.api_key, server.settings, server=server),
            tmp_path,
            model,
        )
        with pytest.raises(
            EngineError, match=r"is loaded into parameter lm_head\.weight of the served model"
        ):
            to.begin("v1")
