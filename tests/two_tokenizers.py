"""Two small tokenizers of different kinds, trained here, and models of the tiny example whose
tokens differ.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.stand_ins import TINY_MODELS

CHINESE = "好的，我们来解这道题：设小明有 12 个苹果，给了小红三分之一🙂。還剩幾個？\n\n8 個。"
CODE = 'def f(x: int) -> int:\n    """Größe."""\n\tif x > 10_000:\n        return x\n'
LATEX = (
    r"Thus $\frac{1}{2}\int_0^{\infty} e^{-x^2}\,dx = \frac{\sqrt{\pi}}{4}$: \boxed{\tfrac{1}{4}}."
)
DIGITS = "1234567890 + 987654321 = 2222222211; 3.14159265358979, 1,000,000 and 0x1F40"
TEXTS = {"chinese": CHINESE, "code": CODE, "latex": LATEX, "digits": DIGITS}
END = "<|im_end|>"


def write_byte_level(folder: Path, *, size: int = 420, composes: bool = True) -> Path:
    """Write a tokenizer of Qwen's kind: bytes as letters, single digits, composed letters."""
    tokenizer = Tokenizer(models.BPE())
    if composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", END, "<|image|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*TEXTS.values(), "the theme of these other things is there"] * 3, trainer
    )
    return _write(folder, tokenizer)


def write_sentencepiece(folder: Path, *, size: int = 300) -> Path:
    """Write a tokenizer of Llama 2's kind: a space is a letter, unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(of_bytes) + size,
        special_tokens=["<unk>", "<|endoftext|>", END, *of_bytes],
        show_progress=False,
    )
    # It has never seen Chinese, so it has bytes for it.
    tokenizer.train_from_iterator([CODE, LATEX, DIGITS, "these other things are thin"] * 3, trainer)
    # The tokens of bytes are no special tokens, only the trainer adds them so.
    about = json.loads(tokenizer.to_str())
    about["added_tokens"] = [one for one in about["added_tokens"] if one["content"] not in of_bytes]
    return _write(folder, Tokenizer.from_str(json.dumps(about)))


def _write(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def renumber_tokens(folder: Path, *, shift: int = 7) -> dict[int, int]:
    """Give a tiny model's ordinary tokens other ids, in its tokenizer alone.

    Returns:
        The new id of each old one.
    """
    path = folder / "tokenizer.json"
    about: dict[str, Any] = json.loads(path.read_text())
    vocabulary = about["model"]["vocab"]
    special = {token["content"] for token in about["added_tokens"]}
    names = [name for name in vocabulary if name not in special]
    numbers = [vocabulary[name] for name in names]
    moved = dict(zip(names, numbers[shift:] + numbers[:shift], strict=True))
    renumbered = {vocabulary[name]: moved.get(name, vocabulary[name]) for name in vocabulary}
    about["model"]["vocab"] = {name: renumbered[number] for name, number in vocabulary.items()}
    path.write_text(json.dumps(about))
    return renumbered


def write_two_tokenizers(folder: Path, config: str) -> Path:
    """A user's folder whose teacher numbers its tokens otherwise; returns the config's path."""
    for role in ("teacher", "student"):
        shutil.copytree(TINY_MODELS / role, folder / role)
    renumber_tokens(folder / "teacher")
    path = folder / "config.toml"
    config = config.replace('student = "student"', 'student = "student"\nchat_template = "student"')
    path.write_text(f'{config}\n[score]\ntokenizer = "aligned"\n')
    return path
