"""Weights go from Hugging Face into Megatron and back bit for bit, whatever the layout; damaged or
foreign checkpoints are refused.
"""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lopd.config import ParallelSection
from lopd.errors import ArtifactError
from lopd.megatron.weights.architecture import read_architecture
from lopd.megatron.weights.hf_files import MAX_OPEN, CheckpointReader, CheckpointWriter
from lopd.megatron.weights.hf_mapping import global_name, hf_shapes, weights
from tests.megatron.launch import ROOT, run_ranks
from tests.models import write_qwen3_moe

TWO_RANKS = {
    "TP1EP1": {"ranks": 2},
    "TP2EP1": {"ranks": 2, "tensor": 2},
    "TP1EP2": {"ranks": 2, "expert": 2},
    "TP2EP2": {"ranks": 2, "tensor": 2, "expert": 2},
    "ETP2": {"ranks": 2, "expert_tensor": 2},
    "PP2": {"ranks": 2, "pipeline": 2},
}
BUCKET_BYTES = 40_000  # less than one embedding: many buckets


def _loaded(folder: Path, layout: dict[str, int], dtype: str = "float32") -> tuple[Any, Any]:
    from lopd.megatron.model.build import build_model
    from lopd.megatron.ranks import parallel
    from lopd.megatron.weights.transfer import load_hf

    arch = read_architecture(folder)
    section = ParallelSection(**layout)
    parallel.initialize(section, seed=1, timeout_s=500)
    model = build_model(arch, parallel=section, dtype=dtype, recompute="none", moe_aux_loss=0.0)
    load_hf(model, arch, folder)
    return model, arch


def _exported(model: Any, arch: Any) -> dict[str, Any]:
    """All tensors (none but on rank 0), the number of buckets, and the bytes of the largest."""
    from lopd.megatron.weights.transfer import export_hf

    buckets = list(export_hf(model, arch, bucket_bytes=BUCKET_BYTES))
    tensors = [pair for bucket in buckets for pair in bucket]
    largest = max(
        (sum(tensor.numel() * tensor.element_size() for _, tensor in bucket) for bucket in buckets),
        default=0,
    )
    return {"tensors": tensors, "num_buckets": len(buckets), "largest": largest}


def _changed(exported: dict[str, Any], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names whose bits differ, are missing or come twice."""
    tensors = dict(exported["tensors"])
    assert len(tensors) == len(exported["tensors"])
    both = tensors.keys() & expected.keys()
    return sorted(
        (tensors.keys() ^ expected.keys())
        | {name for name in both if not torch.equal(tensors[name], expected[name])}
    )


def _body(folder: str, layouts: dict[str, dict[str, int]], out: str) -> dict[str, Any]:
    from lopd.megatron.ranks import parallel
    from lopd.megatron.weights.transfer import export_hf, local_parameters, save_hf

    path = Path(folder)
    expected = load_file(path / "model.safetensors")
    result: dict[str, Any] = {}
    for name, layout in layouts.items():
        model, arch = _loaded(path, layout)
        exported = _exported(model, arch)
        entry: dict[str, Any] = {key: exported[key] for key in ("num_buckets", "largest")}
        if parallel.rank() == 0:
            entry["changed"] = _changed(exported, expected)
        with torch.no_grad():  # control: a single number on the last rank
            owned = local_parameters(model, arch)
            norm = f"decoder.layers.{arch.num_layers - 1}.self_attention.q_layernorm.weight"
            if norm in owned:
                owned[norm][0] += 1e-6
        mutated = _exported(model, arch)
        if parallel.rank() == 0:
            entry["control"] = _changed(mutated, expected)
        result[name] = entry
    save_hf(
        export_hf(model, arch, bucket_bytes=BUCKET_BYTES),
        Path(out),
        source=path,
        shard_bytes=200_000,
    )
    result["published_everywhere"] = (Path(out) / "config.json").exists()
    parallel.shutdown()
    return result


def _random_body(folder: str, out: str) -> dict[str, Any]:
    """On four ranks with every kind of parallelism: tied embeddings over two stages, bfloat16, and
    random weights that do not depend on the layout.
    """
    from lopd.megatron.model.build import init_random
    from lopd.megatron.ranks import parallel
    from lopd.megatron.weights.transfer import export_hf, save_hf

    layout = {"ranks": 4, "tensor": 2, "pipeline": 2, "expert": 2}
    path = Path(folder)
    model, arch = _loaded(path, layout, dtype="bfloat16")
    exported = _exported(model, arch)
    result: dict[str, Any] = {}
    if parallel.rank() == 0:
        result["changed"] = _changed(
            exported,
            {
                name: tensor.bfloat16()
                for name, tensor in load_file(path / "model.safetensors").items()
            },
        )
    save_hf(
        export_hf(model, arch, bucket_bytes=1 << 30), Path(out), source=path, shard_bytes=1 << 30
    )
    digests = []
    for other in (layout, {"ranks": 4}):
        model, arch = _loaded(path, other)
        init_random(model, arch, std=0.02, seed=5)
        tensors = dict(_exported(model, arch)["tensors"])
        digests.append(
            {
                name: [tensor.double().sum().item(), tensor.double().std().item()]
                for name, tensor in tensors.items()
                if tensor.numel() > 1
            }
        )
    result["same_random_weights"] = digests[0] == digests[1]
    result["random"] = digests[0]
    parallel.shutdown()
    return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_moe(tmp_path_factory.mktemp("weights") / "source")


@pytest.fixture(scope="module")
def round_trips(checkpoint: Path) -> dict[str, Any]:
    results = run_ranks(
        _body, 2, folder=str(checkpoint), layouts=TWO_RANKS, out=str(checkpoint.parent / "exported")
    )
    for name in TWO_RANKS:  # ranks iterate in step
        assert results[0][name]["num_buckets"] == results[1][name]["num_buckets"] > 5
        assert results[1][name]["largest"] == 0
    assert all(result["published_everywhere"] for result in results)
    return results[0]


@pytest.fixture(scope="module")
def on_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("tied")
    write_qwen3_moe(root / "source", tie_word_embeddings=True)
    result = run_ranks(_random_body, 4, folder=str(root / "source"), out=str(root / "exported"))[0]
    return {**result, "folder": root / "exported"}


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_hugging_face_to_megatron_and_back_is_bit_exact(
    round_trips: dict[str, Any], layout: str
) -> None:
    assert round_trips[layout]["changed"] == []


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_one_changed_number_is_noticed(round_trips: dict[str, Any], layout: str) -> None:
    assert round_trips[layout]["control"] == ["model.layers.1.self_attn.q_norm.weight"]


def test_buckets_are_bounded(round_trips: dict[str, Any]) -> None:
    largest_tensor = 512 * 64 * 4
    assert all(
        round_trips[layout]["largest"] <= BUCKET_BYTES + largest_tensor for layout in TWO_RANKS
    )


def test_exported_folder_is_a_checkpoint_of_transformers(
    checkpoint: Path, round_trips: dict[str, Any]
) -> None:
    """Several shards with an index, configuration, tokenizer and template; the same model but for
    the one number that the control changed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = checkpoint.parent / "exported"
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    total = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"][
        "total_size"
    ]
    assert total == sum(
        tensor.numel() * 4 for tensor in load_file(checkpoint / "model.safetensors").values()
    )
    assert not list(checkpoint.parent.glob(".*"))
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (folder, checkpoint)
    )
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == [
        "model.layers.1.self_attn.q_norm.weight"
    ]
    assert (
        AutoTokenizer.from_pretrained(folder).chat_template
        == AutoTokenizer.from_pretrained(checkpoint).chat_template
    )
    assert "trust_remote_code" not in (folder / "config.json").read_text()


def test_all_parallelisms_with_tied_embeddings_and_bfloat16(on_four_ranks: dict[str, Any]) -> None:
    assert on_four_ranks["changed"] == []
    assert json.loads((on_four_ranks["folder"] / "config.json").read_text())["dtype"] == "bfloat16"
    assert "lm_head.weight" not in load_file(on_four_ranks["folder"] / "model.safetensors")


def test_random_weights_do_not_depend_on_the_layout(on_four_ranks: dict[str, Any]) -> None:
    assert on_four_ranks["same_random_weights"]
    figures = on_four_ranks["random"]
    assert figures["model.embed_tokens.weight"][1] == pytest.approx(0.02, rel=0.02)
    assert figures["model.norm.weight"] == [64.0, 0.0]
    # Each tensor has numbers of its own, except the norms, which are all ones.
    assert len({total for total, _ in figures.values()}) > len(figures) - 12


def test_a_part_of_each_tensor_for_each_rank_covers_it_once(checkpoint: Path) -> None:
    for weight in weights(read_architecture(checkpoint)):
        counts = [torch.zeros(shape, dtype=torch.int32) for shape in weight.shapes]
        for rank in range(2):
            for count, part in zip(counts, weight.parts(rank, 2), strict=True):
                count[part] += 1
        wanted = 2 if weight.layout == "whole" else 1
        assert all((count == wanted).all() for count in counts), weight.megatron


def test_query_key_and_value_rows_are_interleaved_by_group(checkpoint: Path) -> None:
    """Megatron wants q q k v for each key-value head; a plain concatenation would pass every shape
    check.
    """
    weight = next(
        weight for weight in weights(read_architecture(checkpoint)) if weight.layout == "qkv"
    )
    pieces = [
        torch.full(shape, float(value))
        for value, shape in zip((1, 2, 3), weight.shapes, strict=True)
    ]
    joined = weight.join(pieces)
    head_dim = 16
    assert joined[::head_dim, 0].tolist() == [1, 1, 2, 3, 1, 1, 2, 3]
    assert all(
        torch.equal(back, piece) for back, piece in zip(weight.split(joined), pieces, strict=True)
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.4.input_layernorm.weight",
        ),
        (
            "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
            "decoder.layers.3.pre_mlp_layernorm.weight",
        ),
        (
            "decoder.layers.0.mlp.experts.linear_fc2.weight1",
            "decoder.layers.3.mlp.experts.local_experts.9.linear_fc2.weight",
        ),
        (
            "decoder.layers.2.mlp.experts.local_experts.0.linear_fc1.weight",
            "decoder.layers.5.mlp.experts.local_experts.8.linear_fc1.weight",
        ),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
    ],
)
def test_names_of_both_layer_specs_become_the_names_of_the_table(theirs: str, ours: str) -> None:
    assert global_name(theirs, first_layer=3, first_expert=8) == ours


def _copy(checkpoint: Path, target: Path) -> dict[str, torch.Tensor]:
    shutil.copytree(checkpoint, target)
    return load_file(target / "model.safetensors")


def test_a_checkpoint_that_is_complete_opens(checkpoint: Path) -> None:
    arch = read_architecture(checkpoint)
    with CheckpointReader(checkpoint, arch) as reader:
        assert {
            name: tuple(reader.tensor(name).get_shape()) for name in hf_shapes(arch)
        } == hf_shapes(arch)


def test_a_checkpoint_of_many_files_is_read_with_few_of_them_mapped(
    checkpoint: Path, tmp_path: Path
) -> None:
    """So that loading takes a rank its own share and little more; benchmarks/load_memory.py
    measures it.
    """
    expected = load_file(checkpoint / "model.safetensors")
    with CheckpointWriter(tmp_path / "many", source=checkpoint, shard_bytes=60_000) as writer:
        for name, tensor in expected.items():
            writer.add(name, tensor)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 4
    with CheckpointReader(tmp_path / "many", read_architecture(checkpoint)) as reader:
        for name, tensor in sorted(expected.items()):  # an order that is not that of the files
            assert torch.equal(reader.tensor(name)[:], tensor)
        assert 0 < _mapped(tmp_path) <= MAX_OPEN
    assert _mapped(tmp_path) == 0


def _mapped(folder: Path) -> int:
    lines = [
        line.split()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(folder) in line
    ]
    return len({line[-1] for line in lines})


@pytest.mark.slow
def test_a_rank_that_loads_holds_its_share_and_no_more_than_one_tensor_beside_it(
    tmp_path: Path,
) -> None:
    """A checkpoint of 2.2 GB on two ranks with TP2 EP2."""
    file = tmp_path / "figures.json"
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "load_memory.py"), "--json", str(file)],
        check=True,
        timeout=280,
    )
    figures = json.loads(file.read_text())
    assert figures["checkpoint_bytes"] > 2e9
    for rank in figures["ranks"]:
        assert rank["own"] < 0.51 * figures["checkpoint_bytes"]
        assert rank["loading"] < rank["largest"]


@pytest.mark.parametrize(
    "fault", ["missing tensor", "unknown tensor", "other shape", "truncated", "no file"]
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    checkpoint: Path, tmp_path: Path, fault: str
) -> None:
    folder = tmp_path / "bad"
    tensors = _copy(checkpoint, folder)
    file = folder / "model.safetensors"
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    expected = {
        "missing tensor": name,
        "unknown tensor": "extra",
        "other shape": name,
        "truncated": "damaged",
        "no file": "no such file",
    }[fault]
    if fault == "missing tensor":
        del tensors[name]
        save_file(tensors, file)
    elif fault == "unknown tensor":
        save_file({**tensors, "model.layers.0.self_attn.q_proj.extra": torch.zeros(1)}, file)
    elif fault == "other shape":
        save_file({**tensors, name: tensors[name].t().contiguous()}, file)
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        file.unlink()
    with pytest.raises(ArtifactError, match=expected):
        CheckpointReader(folder, read_architecture(folder))


def _write(folder: Path, source: Path, tensors: dict[str, torch.Tensor]) -> None:
    with CheckpointWriter(folder, source=source, shard_bytes=1 << 20) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def test_a_checkpoint_replaces_an_older_one_and_the_rest_of_a_killed_one(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "shard-0").write_bytes(b"cut short")
    for value in (1.0, 2.0):
        _write(folder, checkpoint, {"tensor": torch.full((3,), value)})
    assert load_file(folder / "model.safetensors")["tensor"].tolist() == [2.0, 2.0, 2.0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_leaves_what_was_there_before(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    folder = tmp_path / "model"
    if older:
        _write(folder, checkpoint, {"tensor": torch.ones(3)})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        _write(folder, checkpoint, {"tensor": torch.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if older else [])
    assert not older or load_file(folder / "model.safetensors")["tensor"].tolist() == [
        1.0,
        1.0,
        1.0,
    ]


def test_an_error_of_the_exporter_publishes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def broken() -> None:
        with CheckpointWriter(tmp_path / "model", source=checkpoint, shard_bytes=1 << 20) as writer:
            writer.add("tensor", torch.ones(3))
            raise ConnectionError("a rank was lost")

    with pytest.raises(ConnectionError):
        broken()
    assert list(tmp_path.iterdir()) == []
