"""Writes the folder of the example's small Qwen3-MoE without weights: config.json,
generation_config.json and a tokenizer of 32 tokens with its chat template.

    python examples/tiny_models/make_architecture.py FOLDER

``lopd sft`` with ``sft.init = "random"`` starts from such a folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

PAD = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"
SPECIAL = [PAD, START, END, "<think>", "</think>"]
# With these the tokenizer has a name for each of the model's 32 ids.
RESERVED = ["<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>"]
VOCABULARY = [*SPECIAL, "user", "assistant", "\n", *"0123456789+-*=?:;,>c ", *RESERVED]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, but for the special tokens and the names of the roles. No unknown
    token: an unknown character is an error, not a surprise.
    """
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"user|assistant|\n|."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # without it, decoding puts a space between tokens
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in [*SPECIAL, *RESERVED]]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_config() -> Qwen3MoeConfig:
    """Qwen3-MoE of 750 thousand parameters: 3 layers of width 128, 4 query and 2 key/value heads of
    32, 8 experts of width 64, 2 of them active.
    """
    pad = VOCABULARY.index(PAD)
    end = VOCABULARY.index(END)
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,  # of dense layers, of which there are none
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-6,
        initializer_range=0.053,  # 0.6 / sqrt(hidden)
        bos_token_id=None,
        eos_token_id=[end],
        pad_token_id=pad,
        dtype="float32",
    )


def write_architecture(folder: Path) -> Path:
    """Writes config, generation config and tokenizer into folder, which is made where it is
    missing; returns folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config()
    config.save_pretrained(folder)
    GenerationConfig(
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=True,
        temperature=1.0,
    ).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(write_architecture(Path(sys.argv[1])))
