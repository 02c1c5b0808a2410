#!/usr/bin/env bash
# transformers 5.12.1 reads the tokenizer of a GGUF file of Qwen's kind with three added tokens,
# whatever the file has. Every other one, such as <think>, is in the vocabulary, and is cut into
# pieces where a text has it, so prompts have other tokens than the model has learned. The file is
# written here: the bytes and five added tokens. Size: 1.4 GB with torch for CPUs.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.12.1 gguf==0.19.0 torch==2.13.0 numpy==2.4.6
export TMPDIR="$folder"
cd "$folder"
export HF_HUB_OFFLINE=1 HF_HOME="$folder/cache"
"$folder/venv/bin/python" -I - 2>log <<'PYTHON' || { cat log >&2; exit 1; }
import sys
from importlib.metadata import version

from gguf import GGUFWriter, TokenType
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

ADDED = {
    "<|endoftext|>": TokenType.CONTROL,
    "<|im_start|>": TokenType.CONTROL,
    "<|im_end|>": TokenType.CONTROL,
    "<|vision_start|>": TokenType.CONTROL,
    "<think>": TokenType.USER_DEFINED,
}
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
merges = ["i n", "k >"]
tokens = [*letters, *(merge.replace(" ", "") for merge in merges), *ADDED]

writer = GGUFWriter("tokenizer.gguf", "qwen3")
writer.add_block_count(1)
writer.add_embedding_length(16)
writer.add_feed_forward_length(16)
writer.add_head_count(2)
writer.add_context_length(64)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
writer.add_token_list(tokens)
writer.add_token_types([ADDED.get(token, TokenType.NORMAL) for token in tokens])
writer.add_token_merges(merges)
writer.add_eos_token_id(tokens.index("<|im_end|>"))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="tokenizer.gguf")
print("transformers", version("transformers"), "gguf", version("gguf"))
whole = {}
for token, kind in ADDED.items():
    pieces = tokenizer.tokenize(token)
    whole[token] = pieces == [token]
    print(f"{token}: {kind.name} in the file, token {tokens.index(token)}, read as {pieces}")
print("expected: each is one token, as with the tokenizer.json that such a file is made from")
print("seen:", [token for token in ADDED if not whole[token]], "are cut into pieces of text")
if [token for token in ADDED if whole[token]] != ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]:
    sys.exit("no longer so")
PYTHON
