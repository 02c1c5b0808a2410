"""Small random Hugging Face checkpoints for tests, written to disk as a user's would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 512
EOS_ID = 2


def write_qwen3_moe(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A Qwen3-MoE of 2 layers, 4 experts and 512 tokens with weights large enough that parity
    errors show; returns folder.
    """
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": EOS_ID,
        "pad_token_id": 0,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**settings, **overrides})).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else 1 + 0.1 * noise)
    model.save_pretrained(folder)
    write_tokenizer(folder, model.config.vocab_size)
    return folder


def write_qwen3_dense(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen3 without experts, with the input embedding as output layer, which a pipeline holds
    twice; weights only, no tokenizer.
    """
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=True,
        **sizes,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """A word-level tokenizer: <pad> <bos> <eos> <unk>, then w4, w5, ..., with a small chat
    template.
    """
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": EOS_ID, "<unk>": 3}
    vocab.update({f"w{index}": index for index in range(4, vocab_size)})
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    fast.chat_template = "{% for message in messages %}<bos> {{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
