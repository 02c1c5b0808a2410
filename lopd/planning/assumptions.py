"""What a plan assumes because nobody can know it before the run.

Each assumption can be set: ``lopd plan CONFIG --assume dense_utilisation=0.3``. docs/plan.md tells
how each value was found.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field

from lopd.errors import ConfigError

_GIB = 2**30
# These may be 0. All others divide something, or 0 would be no machine and no text.
_MAY_BE_ZERO = (
    "extra_forward_passes",
    "startup_s",
    "fragmentation",
    "context_bytes",
    "nccl_bytes",
    "context_nccl_bytes",
)


# What tokens, operations and disk follow from. The others are rates and sizes of GPUs.
WORK = (
    "extra_forward_passes",
    "prompt_len",
    "demonstration_share",
    "rollout_share",
    "evaluation_share",
    "file_prompts",
    "bytes_per_token",
)


def _assume(default: float, meaning: str, source: str = "assumed") -> float:
    """Return a dataclass field with its explanation.

    Args:
        default: The value, in the unit that the meaning names.
        meaning: One sentence without a full stop, which the plan's table shows.
        source: Where the value comes from: "fitted" to the paper's published hours, "published" by
            others, "measured" here, "read" in sources, "data sheet", or "assumed".
    """
    value: float = field(default=default, metadata={"meaning": meaning, "source": source})
    return value


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Rates of one GPU, shares, lengths in tokens, and sizes in bytes.

    Raises:
        ConfigError: A value is below 0, 0 where it may not be, or a share above 1.
    """

    # How fast.

    # Fitted so that the paper's 8B run needs its published 16 GPU hours of training (TP4 on H100).
    dense_utilisation: float = _assume(
        0.22,
        "training of a dense model: operations done, repeated ones included, over the GPU's "
        "bfloat16 peak",
        "fitted",
    )
    # NVIDIA's NeMo AutoModel performance summary: 512 sequences of 4,096 tokens in 21.773 s on 8
    # H100 are 83 microseconds per token and GPU. The exchange takes 11.5 of them, and the other
    # 71.5 do 23.0 GFLOP, which is 0.32 of the peak.
    moe_utilisation: float = _assume(
        0.32,
        "the same for a model with experts, without the exchanges between GPUs: NVIDIA's 277 "
        "TFLOP/s per H100 for Qwen3-30B-A3B, less its exchange",
        "published",
    )
    # An estimate. The same value is used above to take the exchange out of NVIDIA's figure.
    link_efficiency: float = _assume(
        0.7, "exchanges between the GPUs of a node: bytes over what the link could carry"
    )
    # An estimate: how uneven routers are has not been measured on these models.
    expert_slowdown: float = _assume(
        1.15,
        "experts' products and exchanges wait for the busiest rank: its tokens over the mean",
    )
    # Fitted to the paper's 4 GPU hours of scoring with Qwen3-32B on TP2 servers.
    prefill_utilisation: float = _assume(
        0.35, "scoring by a dense teacher: operations of the forward pass over the peak", "fitted"
    )
    # An estimate: there was no published time to fit it to.
    moe_prefill_utilisation: float = _assume(
        0.15, "scoring by a teacher with experts: operations of the forward pass over the peak"
    )
    # Fitted to the paper's 10 GPU hours of rollouts: 17,398 prompts, responses of 3,686 tokens.
    decode_efficiency: float = _assume(
        0.31,
        "sampling: tokens over those of the memory roofline (weights and KV cache are read once a "
        "step), long last responses included",
        "fitted",
    )
    # Read in lopd.megatron.training: one forward and one backward pass. The paper's code runs a
    # forward pass for old log-probabilities and one of a reference model besides.
    extra_forward_passes: float = _assume(
        0,
        "forward passes of a training step besides the one that is differentiated (the paper's "
        "code has 2)",
        "read",
    )
    # An estimate: the deterministic kernels of SGLang have not been timed here.
    deterministic_slowdown: float = _assume(
        2.0,
        "factor by which sampling with sglang.deterministic takes longer on a GPU (1.5 to 2.5, by "
        "what it switches off)",
    )
    # torch's AdamW in float32 on one core. Its fused form gave 5.3e8 on another machine.
    cpu_adam_rate: float = _assume(
        2.7e8,
        "weights per second that one CPU thread updates, if the optimizer is offloaded",
        "measured",
    )
    # An estimate for a usual machine with 8 GPUs.
    node_cores: float = _assume(
        96,
        "CPU cores of a node, which the ranks share if threads_per_rank is absent (two sockets of "
        "48)",
    )
    # An estimate of what two sockets reach together.
    host_bandwidth: float = _assume(
        4e11, "bytes per second of a node's memory: an update reads and writes 28 a weight"
    )
    # The data sheet's figure less about a fifth, for the protocol and for small copies.
    host_link: float = _assume(
        5e10,
        "bytes per second between a GPU and the host's memory (PCIe 5 with 16 lanes: 63e9)",
        "data sheet",
    )
    # An estimate: the transports have been timed on a CPU only.
    sync_rate: float = _assume(2e9, "bytes of weights per second that a sync moves and verifies")
    # An estimate: loading weights and capturing CUDA graphs take minutes.
    startup_s: float = _assume(
        180, "seconds before a stage computes: servers, process groups, loading"
    )

    # How much text. All are estimates, because prompt files and models are not read.

    prompt_len: float = _assume(200, "mean tokens of a prompt, chat template included")
    demonstration_share: float = _assume(
        0.6, "mean length of a demonstration over demonstrate.max_new_tokens"
    )
    # Thinking models write more than 4,096 tokens for most competition problems.
    rollout_share: float = _assume(
        0.9, "mean length of a rollout over rollout.max_new_tokens: most are cut at 4096 tokens"
    )
    evaluation_share: float = _assume(0.45, "mean length of an answer over evaluate.max_new_tokens")
    # This is near the 17,398 prompts of DAPO-Math-17k, which the paper uses.
    file_prompts: float = _assume(
        20_000, "prompts of a file that is not there, has no known format and no num_prompts"
    )

    # Memory of a GPU. All but logits_chunk are estimates: nothing has run on a GPU.

    context_bytes: float = _assume(1.0 * _GIB, "CUDA context, cuBLAS workspaces, loaded kernels")
    # Six communicators of that size.
    nccl_bytes: float = _assume(
        1.5 * _GIB,
        "NCCL's buffers of a trainer with more than one rank (about 0.25 GiB a communicator)",
    )
    context_nccl_bytes: float = _assume(
        0.5 * _GIB,
        "NCCL's buffers of context ranks, which also exchange keys and values: two more "
        "communicators",
    )
    fragmentation: float = _assume(
        0.06, "share of the allocated memory that the allocator cannot use"
    )
    # This is larger than expert_slowdown, because memory must hold the most uneven microbatch,
    # and time follows the mean.
    expert_imbalance: float = _assume(
        1.5,
        "tokens of the busiest expert rank over the mean: its activations are as many times larger",
    )
    served_runtime_bytes: float = _assume(
        4.0 * _GIB, "a server's CUDA context, CUDA graphs, communicators and activations"
    )
    # Read in SGLang 0.5.17: SGLANG_LOGPROB_CHUNK_SIZE.
    logits_chunk: float = _assume(
        2048,
        "tokens whose logits a server holds at once while it scores (SGLang 0.5.17's own limit)",
        "read",
    )

    # Memory of the machine, and disk.

    served_host_bytes: float = _assume(8.0 * _GIB, "host memory of a server process")
    rank_host_bytes: float = _assume(
        6.0 * _GIB,
        "host memory of a trainer's rank besides the offloaded optimizer and the samples",
    )
    # Parquet with zstd: token ids and two log-probabilities.
    bytes_per_token: float = _assume(
        6.64, "cache on disk per response token, measured on a cache of this project", "measured"
    )
    # 4 bytes of token id, 1 of mask, 4 of each of the two log-probabilities.
    sample_bytes_per_token: float = _assume(
        13,
        "host memory per token of the samples that a trainer's rank holds: ids, mask, two "
        "log-probabilities",
        "measured",
    )

    def __post_init__(self) -> None:
        # Every value is checked, the defaults too, so that no default can break its own bound.
        for each in dataclasses.fields(self):
            _check_bounds(each.name, getattr(self, each.name), each.metadata["meaning"])


def _check_bounds(name: str, value: float, meaning: str) -> None:
    may_be_zero = name in _MAY_BE_ZERO
    # Shares are known by their names, so that a new assumption needs no further entry.
    is_share = name.endswith(("_utilisation", "_share", "_efficiency")) or name == "fragmentation"
    # Not `value <= 0`: a comparison with nan must refuse it too.
    is_large_enough = value > 0 or (value == 0 and may_be_zero)
    if is_large_enough and not (is_share and value > 1):
        return
    limit = "at least 0" if may_be_zero else "above 0"
    if is_share:
        limit += ", at most 1"
    raise ConfigError(
        f"{name} = {value:g} is out of range",
        where="--assume",
        limit=limit,
        remedy=f"correct this assumption. It means: {meaning}",
    )


def read_assumptions(settings: Sequence[str]) -> Assumptions:
    """Return the assumptions with some of them replaced.

    Args:
        settings: Words of the form ``name=value``.

    Raises:
        ConfigError: A name is unknown (the error names the nearest), a value is no number, or it
            is out of bounds.
    """
    # The fields themselves are the list of names, so it cannot be out of date.
    known = [each.name for each in dataclasses.fields(Assumptions)]
    found: dict[str, float] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip()
        if name not in known or not equals:
            # With cutoff 0 there always is a nearest name.
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"unknown assumption {setting!r:.80}",
                where="--assume",
                limit="name=value",
                remedy=f"the nearest known name is {nearest}; docs/plan.md lists all",
            )
        found[name] = _number(name, text)
    return Assumptions(**found)


def _number(name: str, text: str) -> float:
    """Return a number in TOML syntax, so that 20_000 and 2.7e8 are numbers too."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = None
    # In Python True is an int. In a plan it is no number.
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(
            f"{name} = {text!r:.60} is not a number",
            where="--assume",
            limit="a number",
            remedy=f"write for example --assume {name}=0.5",
        )
    return float(value)


def meanings() -> dict[str, str]:
    """Return what each assumption means, by its name."""
    # A test compares these with the table of docs/plan.md.
    return {each.name: each.metadata["meaning"] for each in dataclasses.fields(Assumptions)}


def sources() -> dict[str, str]:
    """Return where each value comes from, in a word or two, by its name."""
    return {each.name: each.metadata["source"] for each in dataclasses.fields(Assumptions)}
