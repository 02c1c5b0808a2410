"""Writes the folder of a Qwen3-MoE of the examples without weights: config.json,
generation_config.json and a tokenizer of 32 tokens with its chat template.

    python examples/tiny_models/make_architecture.py FOLDER [--small]

Without --small it is the model of 750 thousand parameters, which is the teacher and the student of
examples/tiny_moe.toml. With --small it is the student of examples/small_student.toml, of 128
thousand parameters.

``lopd sft`` with ``sft.init = "random"`` starts from such a folder.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Shape:
    """The sizes in which the models of the examples differ."""

    hidden: int
    layers: int
    # Of one head. There are 4 query and 2 key/value heads.
    head_dim: int
    # How many there are. 2 of them are active, each of width 64.
    experts: int


USUAL = Shape(hidden=128, layers=3, head_dim=32, experts=8)
SMALL = Shape(hidden=64, layers=2, head_dim=16, experts=4)


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


def make_config(shape: Shape) -> Qwen3MoeConfig:
    """The configuration of a Qwen3-MoE of this shape."""
    pad = VOCABULARY.index(PAD)
    end = VOCABULARY.index(END)
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=len(VOCABULARY),
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,  # of dense layers, of which there are none
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-6,
        initializer_range=round(0.6 / shape.hidden**0.5, 3),
        bos_token_id=None,
        eos_token_id=[end],
        pad_token_id=pad,
        dtype="float32",
    )


def write_architecture(folder: Path, shape: Shape = USUAL) -> Path:
    """Writes config, generation config and tokenizer into folder, which is made where it is
    missing; returns folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(shape)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true", help="the model of 128 thousand parameters")
    options = parser.parse_args()
    print(write_architecture(options.folder, SMALL if options.small else USUAL))
