"""Fills a hub's folder for a trial of run_qwen3_30b_a3b.sh on a CPU: ``LOPD_HUB=DIR python -m
tests.examples.flagship``.

Teacher and student have the structure of Qwen3-30B-A3B (128 experts of which 8 are chosen, 8 query
heads for each key-value head) in a tiny size with random weights, and a tokenizer of single bytes.
Each data set has a few rows in the columns that it publishes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lopd.megatron.weights.architecture import read_architecture
from lopd.megatron.weights.hf_mapping import hf_shapes
from tests.planning.filled_hub import fill_prompts, model_folder

TEACHER = "Qwen3-30B-A3B-Thinking-2507"
STUDENT = "Qwen3-30B-A3B-Base"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 2
# the special tokens, 256 bytes, and one more so that four tensor ranks have as many rows each
VOCAB_SIZE = 260
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 192,
    "moe_intermediate_size": 16,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "router_aux_loss_coef": 0.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 0,
    "eos_token_id": END,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """Every byte is a token, so any text of the data sets can be read."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[END], pad_token=SPECIAL[0]
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def write_model(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1), encoding="utf-8")
    end = {"eos_token_id": [END], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(end), encoding="utf-8")
    write_tokenizer(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * 0.1
        for name, shape in hf_shapes(read_architecture(folder)).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    for seed, name in enumerate((TEACHER, STUDENT)):
        write_model(model_folder(name), seed)
    fill_prompts()


if __name__ == "__main__":
    main()
