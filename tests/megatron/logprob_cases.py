"""Cases of the log-probabilities without logits, those that two ranks run in Triton's interpreter,
and the compiler's word on the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lopd.megatron.model import logprobs
from lopd.megatron.model.logprobs import token_logprobs

LIMIT = 1e-5
NUM_TOKENS = 37
HIDDEN = 24
VOCAB = 302
SMALL_BLOCK = NUM_TOKENS * 50 * 4  # seven blocks, the last one shorter
# With this many rows the vocabulary has padding, which the second of two ranks holds.
PADDED_FROM = 291
VOCABULARIES = {"all rows": VOCAB, "second rank has padding only": 150}  # of two ranks


class Case:
    """Random hidden states, weight, labels and upstream gradients that are zero for every third
    token.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        vocab: int = VOCAB,
        *,
        num_labels: int = 1,
        num_tokens: int = NUM_TOKENS,
        num_rows: int = VOCAB,
        hidden_size: int = HIDDEN,
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        self.hidden = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
        self.weight = (
            torch.randn(num_rows, hidden_size, generator=generator) * (HIDDEN / hidden_size) ** 0.5
        ).to(dtype)
        shape = (num_tokens, num_labels) if num_labels > 1 else (num_tokens,)
        self.labels = torch.randint(0, vocab, shape, generator=generator)
        if num_labels > 1:
            self.labels[::4, 1] = self.labels[::4, 0]  # one token twice at a place
        self.upstream = torch.randn(shape, generator=generator)  # of log-probabilities
        self.upstream_entropy = torch.randn(num_tokens, generator=generator)
        self.upstream[::3] = self.upstream_entropy[::3] = 0
        self.vocab = vocab

    def run(self, way: Any, dtype: torch.dtype, part: slice = slice(None)) -> dict[str, Tensor]:
        """Values and gradients of way(hidden, weight) -> (logprobs, entropy or None), weight being
        these rows.
        """
        hidden, weight = (
            tensor.to(dtype).clone().requires_grad_() for tensor in (self.hidden, self.weight[part])
        )
        logprobs, entropy = way(hidden, weight)
        found = {"logprobs": logprobs.detach()}
        loss = (logprobs * self.upstream).sum()
        if entropy is not None:
            found["entropy"] = entropy.detach()
            loss = loss + (entropy * self.upstream_entropy).sum()
        loss.backward()
        return {**found, "hidden": hidden.grad, "weight": weight.grad}

    def dense(
        self, dtype: torch.dtype = torch.float64, *, entropy: bool = True
    ) -> dict[str, Tensor]:
        def way(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
            distribution = (hidden @ weight[: self.vocab].t()).log_softmax(1)
            chosen = distribution.gather(1, self.labels.view(len(hidden), -1)).view(
                self.labels.shape
            )
            return chosen, -(distribution.exp() * distribution).sum(1) if entropy else None

        return self.run(way, dtype)

    def blocks(self, dtype: torch.dtype = torch.float32, **settings: Any) -> dict[str, Tensor]:
        settings = {
            "block_bytes": SMALL_BLOCK,
            "vocab_size": self.vocab,
            "entropy": True,
            **settings,
        }
        return self.run(
            lambda hidden, weight: token_logprobs(hidden, weight, self.labels, **settings), dtype
        )


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Largest, relative to the largest entry."""
    return {
        name: (
            (ours[name].double() - theirs[name].double()).abs().max() / theirs[name].abs().max()
        ).item()
        for name in theirs
    }


# ---- in Triton's interpreter ----


def on_two_ranks() -> dict[str, Any]:
    """Runs with TRITON_INTERPRET=1. Both ranks: the two kernels over split rows. Each rank: its
    half of the Triton kernel's cases on one rank.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with interpreter():
        split = _split_rows(dist)
        own = {name: case() for name, case in sorted(TRITON_CASES.items())[rank::2]}
    dist.destroy_process_group()
    return {"split rows": split, "one rank": own}


@contextmanager
def interpreter() -> Iterator[None]:
    """Triton's interpreter with tiles so small that there are several of tokens, rows and hidden
    size, and splits of rows, of which the last are not full.
    """
    from triton.runtime import interpreter as upstream

    from lopd.megatron.model import logprobs_triton

    patch_tensor = upstream._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        """Upstream's int(array of one) raises from numpy 2.4 on (Triton 3.6)."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

    settings = {name: getattr(logprobs_triton, name) for name in ("TILES", "SPLIT_ROWS", "GROUP")}
    small = logprobs_triton.Tile(16, 64, 16, num_warps=4, num_stages=1)
    upstream._patch_lang_tensor = patched
    logprobs_triton.TILES = dict.fromkeys(settings["TILES"], small)
    logprobs_triton.SPLIT_ROWS = 128
    logprobs_triton.GROUP = 2
    try:
        yield
    finally:
        upstream._patch_lang_tensor = patch_tensor
        for name, value in settings.items():
            setattr(logprobs_triton, name, value)


def _split_rows(dist: Any) -> dict[str, float]:
    """Each rank holds half of the rows; the gradient of the hidden states is summed as Megatron's
    gathering would.
    """
    part = slice(dist.get_rank() * VOCAB // 2, (dist.get_rank() + 1) * VOCAB // 2)
    results = {}
    for rows, vocab in VOCABULARIES.items():
        case = Case(vocab=vocab)
        expected = case.dense()
        expected["weight"] = expected["weight"][part]
        for name, block_bytes, kernel in (
            ("blocks", SMALL_BLOCK, "blocks"),
            ("kept", None, "blocks"),
            ("triton", 2 * SMALL_BLOCK, "triton"),
        ):
            for group in (dist.group.WORLD, None):
                settings: dict[str, Any] = {
                    "group": group,
                    "block_bytes": block_bytes,
                    "vocab_size": vocab if group else None,
                    "kernel": kernel,
                }
                found = case.run(
                    partial(token_logprobs, labels=case.labels, entropy=True, **settings),
                    torch.float32,
                    part,
                )
                dist.all_reduce(found["hidden"])
                results[f"{rows}, {name}{'' if group else ', not reduced'}"] = max(
                    differences(found, expected).values()
                )
    return results


def _triton(
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    entropy: bool = True,
    change: Callable[[Case], None] | None = None,
) -> dict[str, float]:
    """Return the differences from the dense form in float64.

    change is applied to the case after the dense form and before the kernel.
    """
    expected = case.dense(entropy=entropy)
    if change is not None:
        change(case)
    found = case.blocks(dtype, entropy=entropy, kernel="triton", block_bytes=3 * SMALL_BLOCK)
    assert logprobs.KERNELS["cpu"] != "triton"
    return differences(found, expected)


def _large_padding() -> dict[str, float]:
    case = Case(vocab=PADDED_FROM)
    case.weight[PADDED_FROM:] *= 1e6  # would win every softmax
    return _triton(case)


def _far_above() -> dict[str, float]:
    """The first tile's logits are 100 above the others': exp of that overflows where the running
    maximum is lost.
    """
    case = Case()
    case.hidden[:, 0] = 8
    case.weight[:, 0] = 0
    case.weight[:64, 0] = 12.5
    return _triton(case)


def _move_label(case: Case) -> None:
    case.labels[4] = (case.labels[4] + 1) % VOCAB


def _count_padding(case: Case) -> None:
    case.vocab = VOCAB


def _wrong_mask() -> dict[str, float]:
    """The kernels take what lies beyond the last row of a tile for logits of 0."""
    from lopd.megatron.model import logprobs_triton

    nothing = logprobs_triton._NOTHING
    logprobs_triton._NOTHING = 0.0
    try:
        return _triton(Case())
    finally:
        logprobs_triton._NOTHING = nothing


def _no_gradient() -> dict[str, float]:
    case = Case()
    case.upstream.zero_()
    case.upstream_entropy.zero_()
    found = case.blocks(kernel="triton")
    return {name: found[name].abs().max().item() for name in ("hidden", "weight")}


def _columns_first() -> dict[str, float]:
    case = Case()
    expected = case.dense()
    case.weight = case.weight.t().contiguous().t()
    case.hidden = case.hidden.t().contiguous().t()
    found = case.run(
        partial(
            token_logprobs,
            labels=case.labels,
            entropy=True,
            block_bytes=3 * SMALL_BLOCK,
            kernel="triton",
        ),
        torch.float32,
    )
    return differences(found, expected)


TRITON_CASES: dict[str, Callable[[], dict[str, float]]] = {
    "all rows": lambda: _triton(Case()),
    "padding": _large_padding,
    "first tile far above": _far_above,
    "without entropy": lambda: _triton(Case(vocab=PADDED_FROM), entropy=False),
    "three labels": lambda: _triton(Case(num_labels=3)),
    "bfloat16": lambda: _triton(Case(torch.bfloat16), torch.bfloat16),
    "two tokens": lambda: _triton(Case(num_tokens=2)),  # of which the first has no gradient
    "strides": _columns_first,
    "no gradient": _no_gradient,
    "control: label": lambda: _triton(Case(), change=_move_label),
    "control: padding counted": lambda: _triton(Case(vocab=PADDED_FROM), change=_count_padding),
    "control: mask": _wrong_mask,
}


# ---- through Triton's compiler ----


def compile_kernel(name: str, dtype: torch.dtype, *, num_labels: int, capability: int = 90) -> Any:
    """The kernel compiled for a GPU that need not be there, with the arguments of a real model:
    sizes divisible by 16, entropy asked for.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lopd.megatron.model import logprobs_triton

    kernel = getattr(logprobs_triton, name)
    tile = logprobs_triton.TILES[dtype]
    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = {"hidden": pointer, "weight": pointer, "out": pointer, "labels": "*i64"}
    constants: dict[str, Any] = {
        "BLOCK_T": tile.tokens,
        "BLOCK_V": tile.rows,
        "BLOCK_H": tile.inner,
        "GROUP_T": logprobs_triton.GROUP,
    }
    constants |= {"SPLIT": logprobs_triton.SPLIT_ROWS, "ENTROPY": True, "UPCAST": False}
    if num_labels == 1:  # as Triton does with an argument that is 1
        constants["num_labels"] = 1
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {}
    for argument in kernel.arg_names:
        number = "i32" if argument.startswith("num_") or argument == "hidden_size" else "*fp32"
        signature[argument] = "constexpr" if argument in constants else types.get(argument, number)
    by_16 = [
        argument
        for argument, kind in signature.items()
        if kind.startswith("*") or argument in ("hidden_size", "num_rows")
    ]
    attributes = {
        (kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in by_16
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )
