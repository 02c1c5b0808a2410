"""A model's shape, read from a Hugging Face config.json, and whether a layout of ranks divides it.
No torch and no megatron.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lopd.config import ParallelSection, ScoreSection
from lopd.errors import ConfigError, LopdError
from lopd.megatron.weights.families import FAMILIES
from lopd.megatron.weights.families.fields import Yarn

# The vocabulary is padded to a multiple of it, so that it divides by up to 8 tensor ranks, and a
# checkpoint fits every one of these layouts.
VOCAB_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Architecture:
    """What is needed to build a decoder-only transformer and to name its weights. Sizes in
    elements.

    num_experts 0: dense, with MLPs of ffn_hidden_size. Otherwise every layer has that many experts
    of moe_ffn_hidden_size.
    """

    family: str  # model_type of config.json
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    rope_factor: float = 1.0  # Llama 3's scaling of rotary frequencies; 1: none
    yarn: Yarn | None = None  # YaRN's
    num_experts: int = 0
    experts_per_token: int = 0
    moe_ffn_hidden_size: int = 0
    norm_topk_prob: bool = False  # router weights of the chosen experts sum to 1

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output layer, over all tensor ranks. Those past
        vocab_size are zeros; checkpoints do not have them.
        """
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a Hugging Face checkpoint folder.

    LopdError: no readable config.json, an unknown model_type, or a feature that is not supported
    here (named, with its value).
    """
    path = folder / "config.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LopdError(
            "no such file", where=str(path), remedy="give the folder of a Hugging Face checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise LopdError(f"cannot be read ({error})", where=str(path)) from None
    if not isinstance(table, dict):
        raise LopdError("holds no JSON object", where=str(path))
    family = table.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise LopdError(
            f"model_type {family!r} is not supported",
            where=str(path),
            limit=f"one of {', '.join(sorted(FAMILIES))}",
        )
    return Architecture(**FAMILIES[family](table, str(path)))


def validate_layout(
    arch: Architecture, parallel: ParallelSection, *, where: str = "parallel"
) -> None:
    """ConfigError, the first of layout_problems, where the layout does not divide the model."""
    for problem in layout_problems(arch, parallel, where=where):
        raise problem


def layout_problems(
    arch: Architecture, parallel: ParallelSection, *, where: str = "parallel"
) -> Iterator[ConfigError]:
    """Everything of ranks, heads, experts, layers, vocabulary and hidden sizes that does not divide
    by the layout.
    """
    tp, pp, cp, ep, etp, ranks = (
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        parallel.expert,
        parallel.expert_tensor,
        parallel.ranks,
    )
    if arch.num_experts == 0 and (ep > 1 or etp > 1):
        yield ConfigError(
            f"expert = {ep}, expert_tensor = {etp}, but {arch.family} has no experts",
            where=where,
            limit="1 and 1",
            remedy="set both to 1",
        )
    dense, sparse = tp * pp * cp, ep * etp * pp
    if ranks % dense:
        yield ConfigError(
            f"ranks = {ranks} is no multiple of tensor * pipeline * context = {dense}",
            where=where,
            remedy=_ranks_remedy(ranks, dense),
        )
    if arch.num_experts and ranks % sparse:
        yield ConfigError(
            f"ranks = {ranks} is no multiple of expert * expert_tensor * pipeline = {sparse}",
            where=where,
            remedy=_ranks_remedy(ranks, sparse),
        )
    divisions = [
        (arch.num_heads, tp, "number of attention heads", "tensor"),
        (arch.num_kv_heads, tp, "number of key-value heads", "tensor"),
        (arch.padded_vocab_size, tp, "vocabulary size, padded", "tensor"),
        (arch.num_layers, pp, "number of layers", "pipeline"),
    ]
    if arch.num_experts:
        divisions.append((arch.num_experts, ep, "number of experts", "expert"))
        divisions.append(
            (arch.moe_ffn_hidden_size, etp, "hidden size of an expert", "expert_tensor")
        )
    else:
        divisions.append((arch.ffn_hidden_size, tp, "hidden size of the MLP", "tensor"))
    for number, divisor, what, by in divisions:
        if number % divisor:
            fitting = [str(size) for size in range(1, divisor) if number % size == 0]
            yield ConfigError(
                f"{what} ({number}) does not divide by {by} ({divisor})",
                where=where,
                remedy=f"{by} may be {', '.join(fitting)}",
            )


def scorer_problems(score: ScoreSection, arch: Architecture | None) -> Iterator[ConfigError]:
    """What the chosen scoring engine cannot give, and where the teacher (None: not known) does not
    divide by the layout of Megatron-Core's ranks.
    """
    if score.engine == "sglang":
        if score.entropy:
            remedy = "set score.engine = 'megatron' or score.entropy = false"
            yield ConfigError(
                "score.entropy is set, and SGLang gives none",
                where="score.engine = 'sglang'",
                remedy=remedy,
            )
        if arch is not None and score.top_k > arch.vocab_size:
            limit = f"the teacher's vocabulary: {arch.vocab_size}"
            yield ConfigError(
                f"score.top_k = {score.top_k}",
                where="score",
                limit=limit,
                remedy="lower score.top_k",
            )
        return
    if score.top_k:
        remedy = "set score.engine = 'sglang' or score.top_k = 0"
        yield ConfigError(
            f"score.top_k = {score.top_k}, and this scorer gives none",
            where="score.engine = 'megatron'",
            remedy=remedy,
        )
    if score.forward.parallel.nodes > 1:
        yield ConfigError(
            f"nodes = {score.forward.parallel.nodes}",
            where="score.forward.parallel",
            limit="1: this scorer runs on one machine",
        )
    if arch is not None:
        yield from layout_problems(arch, score.forward.parallel, where="score.forward.parallel")


def _ranks_remedy(ranks: int, product: int) -> str:
    return f"set ranks to a multiple of {product}, or lower the sizes so that their product divides {ranks}"
