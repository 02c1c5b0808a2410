"""An index, the headers of its files and config.json are held against each other before anything
starts: whatever is wrong with one of them is one line, and no weight is read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lopd.errors import ArtifactError, LopdError
from lopd.megatron.weights import headers
from lopd.megatron.weights.architecture import read_architecture
from lopd.megatron.weights.checkpoint_files import INDEX, SINGLE, inspect_checkpoint
from lopd.megatron.weights.headers import read_header
from lopd.megatron.weights.hf_files import CheckpointReader, CheckpointWriter
from tests.models import write_qwen3_dense, write_qwen3_moe

NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in several files and in one, and a tied one."""
    root = tmp_path_factory.mktemp("models")
    write_qwen3_moe(root / "single")
    tensors = load_file(root / "single" / SINGLE)
    with CheckpointWriter(root / "many", source=root / "single", shard_bytes=60_000) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    write_qwen3_dense(root / "tied")
    return root


@pytest.fixture
def many(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "many", tmp_path / "many"))


@pytest.fixture
def tied(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "tied", tmp_path / "tied"))


def problems(folder: Path) -> list[str]:
    """What is wrong; each fault is one line."""
    found = inspect_checkpoint(folder, read_architecture(folder)).problems
    lines = [str(problem) for problem in found]
    assert not any("\n" in line for line in lines)
    return lines


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit_index(folder: Path, edit: Callable[[Any], object]) -> None:
    path = folder / INDEX
    table = json.loads(path.read_text())
    edit(table)
    path.write_text(json.dumps(table))


def edit_shard(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_control_what_is_right_has_no_problem(models: Path) -> None:
    for name in ("single", "many", "tied"):
        assert problems(models / name) == []


def test_headers_are_those_of_the_library_and_no_weight_is_read(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in shards(models / "many"):
        found = {name: tensor.shape for name, tensor in read_header(path).items()}
        assert found == {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}

    def refuse(*_: object) -> list[bytes]:
        raise AssertionError("rows were read")

    monkeypatch.setattr("lopd.megatron.weights.checkpoint_files.read_rows", refuse)
    assert problems(models / "many") == []


def append(path: Path, content: bytes) -> None:
    path.write_bytes(path.read_bytes() + content)


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def double(folder: Path) -> None:
    """A second holder of a tensor of the last file, which the index gives to the last one alone."""
    name = next(iter(load_file(shards(folder)[-1])))
    edit_shard(
        shards(folder)[0],
        lambda tensors: tensors.update({name: load_file(shards(folder)[-1])[name]}),
    )


def swap(folder: Path) -> None:
    def move(table: Any) -> None:
        table["weight_map"][NORM] = shards(folder)[0].name

    edit_index(folder, move)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda folder: shards(folder)[2].unlink(), "1 file (model-00003-of-"),
    "no index": (lambda folder: (folder / INDEX).unlink(), f"and there is no {INDEX} for"),
    "index is no JSON": (
        lambda folder: (folder / INDEX).write_text("{"),
        "the file cannot be read",
    ),
    "index is a list": (
        lambda folder: (folder / INDEX).write_text("[]"),
        "the file cannot be read",
    ),
    "index is empty": (
        lambda folder: edit_index(folder, lambda table: table["weight_map"].clear()),
        "the index names no tensor",
    ),
    "file elsewhere": (
        lambda folder: edit_index(folder, lambda t: t["weight_map"].update(x="../a.safetensors")),
        "says that x is in '../a.safetensors'; limit: exactly the name of a file",
    ),
    "only in the index": (
        lambda folder: edit_index(
            folder, lambda t: t["weight_map"].update(ghost=shards(folder)[0].name)
        ),
        "1 tensors of the index are in no file, for example ghost (not in model-00001-of-",
    ),
    "only in the file": (
        lambda folder: edit_index(folder, lambda table: table["weight_map"].pop(NORM)),
        f"1 tensors are not in the index, for example {NORM} (in model-",
    ),
    "twice": (double, "1 tensors are in several files"),
    "in another file": (swap, f"are in another file than the index says, for example {NORM}"),
    "total": (
        lambda folder: edit_index(folder, lambda table: table["metadata"].update(total_size=7)),
        "total_size = 7 is wrong; limit: exactly",
    ),
    "truncated": (lambda folder: cut(shards(folder)[1], 100), "truncated: it has"),
    "too long": (lambda folder: append(shards(folder)[1], b"0000"), "too long: it has"),
    "empty file": (
        lambda folder: shards(folder)[1].write_bytes(b""),
        "0 bytes do not hold a header of safetensors",
    ),
    "pointer": (
        lambda folder: shards(folder)[1].write_text("version https://git-lfs.github.com/spec/v1"),
        "a pointer of git-lfs",
    ),
    "huge header": (
        lambda folder: shards(folder)[1].write_bytes(b"\xff" * 64),
        "64 bytes do not hold a header",
    ),
    "a file of another": (
        lambda folder: shutil.copy(shards(folder)[0], folder / SINGLE),
        f"1 file ({SINGLE}) beside {INDEX}",
    ),
    "adapter": (
        lambda folder: shutil.copy(shards(folder)[0], folder / "adapter_model.safetensors"),
        "adapter_model.safetensors) beside",
    ),
    "wrong width": (
        lambda folder: edit_config(folder, moe_intermediate_size=96),
        "but config.json gives",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_index_or_file_is_one_line(many: Path, name: str) -> None:
    spoil, said = FAULTS[name]
    spoil(many)
    found = problems(many)
    assert len(found) == 1, found
    assert said in found[0]
    with pytest.raises(ArtifactError):
        CheckpointReader(many, read_architecture(many))


def test_several_faults_are_several_lines_and_the_reader_counts_them(many: Path) -> None:
    (many / INDEX).write_text("{")
    cut(shards(many)[0], 8)
    shards(many)[1].write_bytes(b"")
    assert len(problems(many)) == 3
    with pytest.raises(ArtifactError, match=r"cannot be read .* \(and 2 more: lopd check"):
        CheckpointReader(many, read_architecture(many))


def test_an_index_without_a_total_is_right(many: Path) -> None:
    edit_index(many, lambda table: table.pop("metadata"))
    assert problems(many) == []


def write_raw(path: Path, table: dict[str, Any], content: bytes = b"") -> Path:
    header = json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)
    return path


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "a has 4 bytes, and its shape"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "begin at"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "a has 4 bytes"),
        ({"dtype": "F32", "shape": [1]}, "header cannot be read"),
        ([1], "header cannot be read"),
    ],
)
def test_a_header_that_contradicts_itself(tmp_path: Path, entry: Any, said: str) -> None:
    with pytest.raises(ArtifactError, match="damaged") as error:
        read_header(write_raw(tmp_path / "a", {"a": entry}, b"0000"))
    assert said in str(error.value)
    right = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    assert read_header(write_raw(tmp_path / "a", {"a": right}, b"0000"))["a"].shape == (1,)


def test_a_name_that_stands_twice_in_a_header(tmp_path: Path) -> None:
    entry = '{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    header = f'{{"a": {entry}, "a": {entry}}}'.encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ArtifactError, match="a occurs twice"):
        read_header(tmp_path / "a")


# ---- quantised ----

DTYPES = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_another_dtype_under_their_names_are_quantised(
    tied: Path, dtype: torch.dtype
) -> None:
    edit_shard(tied / SINGLE, lambda tensors: tensors.update({DOWN: tensors[DOWN].to(dtype)}))
    (line,) = problems(tied)
    assert "the weights are quantised: 1 tensors have dtype" in line
    assert DOWN in line


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_control_floating_point_weights_are_read(tied: Path, dtype: torch.dtype) -> None:
    edit_shard(tied / SINGLE, lambda tensors: tensors.update({DOWN: tensors[DOWN].to(dtype)}))
    assert problems(tied) == []


@pytest.mark.parametrize(
    ("suffix", "method"),
    [("qweight", "GPTQ or AWQ"), ("weight_scale_inv", "FP8"), ("weight_packed", "compressed")],
)
def test_the_tensors_beside_quantised_weights_name_the_method(
    tied: Path, suffix: str, method: str
) -> None:
    name = DOWN.replace("weight", suffix)
    edit_shard(tied / SINGLE, lambda tensors: tensors.update({name: torch.zeros(2)}))
    (line,) = problems(tied)
    assert f"the weights are quantised by {method}" in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "'fp8'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "'awq'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "'compressed-tensors'"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype = 'float8_e4m3fn'"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
    ],
)
def test_config_json_that_says_quantised(tied: Path, changes: Any, said: str) -> None:
    edit_config(tied, **changes)
    with pytest.raises(LopdError, match="the weights are quantised") as error:
        read_architecture(tied)
    assert said in error.value.what
    for key in changes:
        edit_config(tied, **{key: None})
    assert read_architecture(tied).tied_embeddings


def test_only_other_files_of_weights(tied: Path) -> None:
    (tied / SINGLE).rename(tied / "model-Q4_1.gguf")
    (line,) = problems(tied)
    assert "convert model-Q4_1.gguf, which may be quantised, to safetensors" in line


# ---- tying ----


def with_head(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    edit_shard(
        folder / SINGLE,
        lambda tensors: tensors.update({HEAD: change(tensors[EMBEDDING].clone()).contiguous()}),
    )


def test_an_output_layer_that_is_stored_twice_is_the_embedding(tied: Path) -> None:
    with_head(tied, lambda rows: rows)
    assert problems(tied) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows + 1e-3,
        lambda rows: torch.cat([rows[:-1], rows[-1:] * 2]),
        lambda rows: rows[:-8],
        lambda rows: rows.bfloat16(),
    ],
    ids=["all rows", "the last row", "fewer rows", "dtype"],
)
def test_tied_beside_another_output_layer(
    tied: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    with_head(tied, change)
    (line,) = problems(tied)
    assert f"tie_word_embeddings = true, but {HEAD} is not {EMBEDDING}" in line


def test_few_rows_are_compared(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a check of a large model stays quick."""
    monkeypatch.setattr("lopd.megatron.weights.checkpoint_files._COMPARED_ROWS", 4)
    counts: list[int] = []
    read = headers.read_rows

    def counting(path: Path, tensor: headers.TensorHeader, rows: range) -> list[bytes]:
        counts.append(len(rows))
        return read(path, tensor, rows)

    monkeypatch.setattr("lopd.megatron.weights.checkpoint_files.read_rows", counting)
    with_head(tied, lambda rows: rows)
    assert problems(tied) == []
    assert counts == [4, 4]


def test_untied_without_an_output_layer(tied: Path) -> None:
    edit_config(tied, tie_word_embeddings=False)
    (line,) = problems(tied)
    assert (
        f"1 tensors are missing, for example {HEAD} (config.json has tie_word_embeddings = false)"
        in line
    )
    assert "set tie_word_embeddings to true if" in line


@pytest.mark.parametrize("value", ["false", 0, "true"])
def test_a_text_is_no_truth_value(tied: Path, value: Any) -> None:
    edit_config(tied, tie_word_embeddings=value)
    with pytest.raises(LopdError, match="is neither true nor false"):
        read_architecture(tied)
