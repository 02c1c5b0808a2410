"""The shape of a model, read from a Hugging Face config.json, and the layouts that divide it.

This module imports neither torch nor megatron, so that checks run before anything heavy is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd.config import ParallelSection, ScoreSection
from lopd.errors import ConfigError, LopdError
from lopd.megatron.weights.families import FAMILIES
from lopd.megatron.weights.families.fields import Yarn, refuse_quantised

# The vocabulary is padded to a multiple of this number. So it divides by up to 8 tensor ranks, and
# a checkpoint of the trainer fits every one of these layouts.
VOCAB_MULTIPLE = 8
_COPY = "copy the file again from the source of the model"


@dataclass(frozen=True, slots=True)
class Architecture:
    """What is needed to build a decoder-only transformer and to name its weights.

    All sizes are numbers of elements. With num_experts 0 the model is dense, and its MLPs have
    ffn_hidden_size. Otherwise every layer has num_experts experts of moe_ffn_hidden_size.
    """

    # The model_type of config.json.
    family: str
    # Every layer is alike. Models with several kinds of layers are refused when they are read.
    num_layers: int
    hidden_size: int
    # Query heads and key-value heads.
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
    # Llama 3's scaling of the rotary frequencies. 1 means that there is none.
    rope_factor: float = 1.0
    # YaRN's scaling. None means that there is none.
    yarn: Yarn | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    moe_ffn_hidden_size: int = 0
    # The router weights of the chosen experts sum to 1.
    norm_topk_prob: bool = False

    @property
    def padded_vocab_size(self) -> int:
        """The rows of the embedding and of the output layer, over all tensor ranks.

        The rows past vocab_size are zeros. Hugging Face checkpoints do not have them.
        """
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def read_architecture(folder: str | Path) -> Architecture:
    """Return the architecture of a Hugging Face checkpoint folder.

    Raises:
        LopdError: config.json cannot be read, its model_type is unknown, or it asks for a feature
            that is not supported here. The message names the feature and its value.
    """
    folder = Path(folder)
    path = folder / "config.json"
    table = _read_table(path)
    # Before the family: published quantised checkpoints are of supported and other families.
    refuse_quantised(table, str(path))
    family = table.get("model_type")
    # The value may be of any JSON type, and a list cannot be looked up in a dictionary.
    if not isinstance(family, str) or family not in FAMILIES:
        raise LopdError(
            f"model_type {family!r} is not supported",
            where=str(path),
            limit=f"one of {', '.join(sorted(FAMILIES))}",
            remedy="choose a model of one of these families",
        )
    return Architecture(**FAMILIES[family](table, str(path)))


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        # PEFT's folder of adapters, for example one that a training of ours has written.
        if (path.parent / "adapter_config.json").is_file():
            raise LopdError(
                "this folder has adapters and no model",
                where=str(path.parent),
                limit="the folder of a Hugging Face checkpoint",
                remedy="give the model with the adapters in it; of a training of lopd it is the "
                "folder model beside this one",
            ) from None
        raise LopdError(
            "no such file",
            where=str(path),
            remedy="give the folder of a Hugging Face checkpoint",
        ) from None
    except (OSError, ValueError) as error:
        raise LopdError(f"cannot be read ({error})", where=str(path), remedy=_COPY) from None
    if not isinstance(table, dict):
        raise LopdError("the file does not hold a JSON object", where=str(path), remedy=_COPY)
    return table


def validate_layout(
    arch: Architecture, parallel: ParallelSection, *, where: str = "parallel"
) -> None:
    """Raise the first of layout_problems.

    Raises:
        ConfigError: The layout does not divide the model.
    """
    # Checks show all problems. To build a model the first one is enough.
    for problem in layout_problems(arch, parallel, where=where):
        raise problem


def layout_problems(
    arch: Architecture, parallel: ParallelSection, *, where: str = "parallel"
) -> Iterator[ConfigError]:
    """Yield an error for everything of the model that the layout does not divide.

    Args:
        arch: The model.
        parallel: The layout of the ranks.
        where: The name of the section, for the messages.
    """
    ranks = parallel.ranks
    if arch.num_experts == 0 and (parallel.expert > 1 or parallel.expert_tensor > 1):
        sizes = f"expert = {parallel.expert}, expert_tensor = {parallel.expert_tensor}"
        yield ConfigError(
            f"{sizes} cannot be used: {arch.family} has no experts",
            where=where,
            limit="exactly 1 for both",
            remedy="set both to 1",
        )
    # Dense layers and experts have grids of their own over the same ranks. What remains of each
    # grid is data parallelism, so the ranks must be a multiple of both products.
    dense = parallel.tensor * parallel.pipeline * parallel.context
    sparse = parallel.expert * parallel.expert_tensor * parallel.pipeline
    if ranks % dense:
        yield ConfigError(
            f"ranks = {ranks} is not a multiple of tensor * pipeline * context = {dense}",
            where=where,
            remedy=_ranks_remedy(ranks, dense),
        )
    if arch.num_experts and ranks % sparse:
        yield ConfigError(
            f"ranks = {ranks} is not a multiple of expert * expert_tensor * pipeline = {sparse}",
            where=where,
            remedy=_ranks_remedy(ranks, sparse),
        )
    # All problems are reported at once, so that the user does not repair one after the other.
    for number, divisor, what, by in _divisions(arch, parallel):
        if number % divisor:
            # The smaller sizes that would do. There is always 1.
            fitting = [str(size) for size in range(1, divisor) if number % size == 0]
            yield ConfigError(
                f"{what} ({number}) does not divide by {by} ({divisor})",
                where=where,
                remedy=f"set {by} to a divisor of {number}, for example {', '.join(fitting)}",
            )


def _divisions(
    arch: Architecture, parallel: ParallelSection
) -> Iterator[tuple[int, int, str, str]]:
    """Yield (number, divisor, name of the number, knob of the divisor)."""
    tensor = parallel.tensor
    yield arch.num_heads, tensor, "number of attention heads", "tensor"
    # Models have fewer key-value heads than query heads, so this is mostly what bounds tensor.
    yield arch.num_kv_heads, tensor, "number of key-value heads", "tensor"
    yield arch.padded_vocab_size, tensor, "vocabulary size, padded", "tensor"
    yield arch.num_layers, parallel.pipeline, "number of layers", "pipeline"
    # A model with experts has no dense MLP, so ffn_hidden_size does not matter there.
    if arch.num_experts:
        yield arch.num_experts, parallel.expert, "number of experts", "expert"
        width = arch.moe_ffn_hidden_size
        yield width, parallel.expert_tensor, "hidden size of an expert", "expert_tensor"
    else:
        yield arch.ffn_hidden_size, tensor, "hidden size of the MLP", "tensor"


def router_problems(arch: Architecture, *, where: str) -> Iterator[ConfigError]:
    """Yield an error if a model has no routers whose choices could be kept or replayed.

    Args:
        arch: The student.
        where: The key that asks for the choices.
    """
    if not arch.num_experts:
        yield ConfigError(
            f"{where} = true, but the student has no experts",
            where=where,
            limit="a student with experts, whose routers choose among them",
            remedy=f"remove {where}",
        )


def scorer_problems(score: ScoreSection, arch: Architecture | None) -> Iterator[ConfigError]:
    """Yield an error for everything that the chosen scoring engine cannot give.

    Args:
        score: The section of the scoring stage.
        arch: The teacher. None means that it is not known yet, and what depends on it is not
            checked.
    """
    # SGLang divides the teacher in its own way, so no layout of ours is checked here.
    if score.engine == "sglang":
        if score.entropy:
            yield ConfigError(
                "score.entropy is set, but SGLang returns no entropies",
                where="score.engine = 'sglang'",
                remedy="set score.engine = 'megatron' or score.entropy = false",
            )
        if arch is not None and score.top_k > arch.vocab_size:
            yield ConfigError(
                f"score.top_k = {score.top_k} is too large",
                where="score",
                limit=f"at most the vocabulary of the teacher: {arch.vocab_size}",
                remedy="lower score.top_k",
            )
        return
    # The scorer computes the log-probabilities of given tokens in blocks. It never holds a whole
    # row of logits in which it could look for the K largest.
    if score.top_k:
        yield ConfigError(
            f"score.top_k = {score.top_k}, but this scorer returns no top-K scores",
            where="score.engine = 'megatron'",
            remedy="set score.engine = 'sglang' or score.top_k = 0",
        )
    if score.forward.parallel.nodes > 1:
        yield ConfigError(
            f"nodes = {score.forward.parallel.nodes} is too large",
            where="score.forward.parallel",
            limit="exactly 1, because this scorer runs on one machine",
            remedy="set score.forward.parallel.nodes to 1",
        )
    if arch is not None:
        yield from layout_problems(arch, score.forward.parallel, where="score.forward.parallel")


def _ranks_remedy(ranks: int, product: int) -> str:
    lower = f"lower the sizes so that their product divides {ranks}"
    return f"set ranks to a multiple of {product}, or {lower}"
