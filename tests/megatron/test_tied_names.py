"""Of a tied weight's two names safetensors' save_model keeps lm_head.weight, not the embedding."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_model
from transformers import Qwen3ForCausalLM

from lopd.errors import ArtifactError
from lopd.megatron.weights.architecture import read_architecture
from lopd.megatron.weights.hf_files import CheckpointReader
from tests.models import write_qwen3_dense

KEPT = "lm_head.weight"
DROPPED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as transformers writes it: with the embedding, without the output layer."""
    return write_qwen3_dense(tmp_path_factory.mktemp("tied"))


def test_a_tied_model_written_by_save_model_is_refused_by_name(tied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(tied, folder)
    file = folder / "model.safetensors"
    save_model(Qwen3ForCausalLM.from_pretrained(tied), str(file))
    assert KEPT in load_file(file), "save_model now keeps the embedding: docs/surprises.md"
    with pytest.raises(ArtifactError, match=f"1 tensors are missing, for example {DROPPED}"):
        CheckpointReader(folder, read_architecture(folder))


def test_control_as_transformers_writes_it_is_read(tied: Path) -> None:
    names = load_file(tied / "model.safetensors")
    assert DROPPED in names
    assert KEPT not in names
    with CheckpointReader(tied, read_architecture(tied)) as reader:
        assert reader.tensor(DROPPED).get_shape()
