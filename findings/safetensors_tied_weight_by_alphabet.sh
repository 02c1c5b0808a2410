#!/usr/bin/env bash
# Of two names of one tied weight, safetensors' save_model keeps the one that is first in the
# alphabet, lm_head.weight, and drops the embedding, the name that it was made under. transformers
# writes the same model with the embedding and without lm_head.weight, and so do checkpoints on the
# Hub; a reader that looks names up finds no embedding. Size: 1.2 GB with torch for CPUs.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0 safetensors==0.8.0 transformers==5.12.1 \
    numpy==2.4.6
export TMPDIR="$folder"
cd "$folder"
export HF_HUB_OFFLINE=1 HF_HOME="$folder/cache"
"$folder/venv/bin/python" -I - 2>log <<'PYTHON' || { cat log >&2; exit 1; }
import sys
from importlib.metadata import version

from safetensors import safe_open
from safetensors.torch import save_model
from transformers import Qwen3Config, Qwen3ForCausalLM

print(*(f"{name} {version(name)}" for name in ("torch", "safetensors", "transformers")))
config = Qwen3Config(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
)
model = Qwen3ForCausalLM(config)
model.save_pretrained("pretrained")
save_model(model, "model.safetensors")


def tied(path):
    with safe_open(path, "pt") as file:
        return [name for name in file.keys() if "embed" in name or "lm_head" in name]


names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
both = [name for name in names if "embed" in name or "lm_head" in name]
by_transformers = tied("pretrained/model.safetensors")
by_safetensors = tied("model.safetensors")
print("the model's order of both names:", both)
print("transformers' save_pretrained keeps", by_transformers)
print("expected: save_model keeps the same, the first in the model's order")
print("seen: safetensors' save_model keeps", by_safetensors, "the first in the alphabet")
if by_transformers != ["model.embed_tokens.weight"] or by_safetensors != ["lm_head.weight"]:
    sys.exit("no longer so")
PYTHON
