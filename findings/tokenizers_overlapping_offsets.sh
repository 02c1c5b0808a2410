#!/usr/bin/env bash
# Offsets of a byte-level BPE's tokens overlap with unequal lengths: a token that holds a space and
# the first byte of a character spans both characters, the tokens of its other bytes one of them.
# So spans cannot colour a text by token, and whoever joins them writes characters twice.
# Vocabularies of Qwen's kind have such tokens. Size: 70 MB on disk.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq tokenizers==0.22.2
cd "$folder"
"$folder/venv/bin/python" -I - <<'PYTHON'
import sys

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {letter: number for number, letter in enumerate(alphabet)}
vocabulary["Ġå"] = len(vocabulary)  # a space and the first of three bytes of many characters
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "å")]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
# As in the tokenizer.json of such models: spaces belong to their token's span.
tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)

text = "x 山"
encoding = tokenizer.encode(text)
joined = "".join(text[start:end] for start, end in encoding.offsets)
print("tokenizers", tokenizers.__version__)
print(f"text {text!r}, tokens {encoding.tokens}, spans {encoding.offsets}")
print("expected: spans of one character's pieces are disjoint, or all the same: (2, 3) thrice")
print("seen:", encoding.offsets[1:], "overlap and differ; joined they are", repr(joined))
print("decoding is right:", repr(tokenizer.decode(encoding.ids)))
if tokenizer.decode(encoding.ids) != text:
    sys.exit("no longer so: the text does not come back at all")
if encoding.offsets != [(0, 1), (1, 3), (2, 3), (2, 3)]:
    sys.exit("no longer so: the spans are others")
PYTHON
