"""Rotary embeddings of packed sequences on a CPU: the table once a microbatch, and one function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_patches.registry import patch, replace, require


class Rotation(NamedTuple):
    """Cosine and sine for every packed token, and what they were made of.

    Attributes:
        freqs: Megatron-Core's table of angles.
        mscale: The factor of cosine and sine.
        cosine: float32 [T, 1, D/2].
        sine: float32 [T, 1, D/2].
    """

    freqs: Tensor
    mscale: float
    cosine: Tensor
    sine: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, freqs: Tensor, mscale: float) -> Rotation | None:
        """Return the rotation, with positions that begin at 0 in each sequence.

        Args:
            cu_seqlens: int [S+1], the bounds of the sequences.
            freqs: [positions, 1, 1, D], the angles of each position.
            mscale: The factor of cosine and sine.

        Returns:
            None if the angles are those of the packed tokens, or if the two halves of a head are
            turned by different angles. Upstream knows what to do then.
        """
        half = freqs.shape[-1] // 2
        bounds = cu_seqlens.long()
        if len(freqs) == int(bounds[-1]) or not torch.equal(freqs[..., :half], freqs[..., half:]):
            return None
        starts = bounds[:-1].repeat_interleave(bounds.diff())
        positions = torch.arange(int(bounds[-1])) - starts
        # [positions, D/2]. The functions of a position are computed once, not for each token.
        angles = freqs[: int(bounds.diff().max()), 0, 0, :half]
        cosine = (angles.cos() * mscale).index_select(0, positions)
        sine = (angles.sin() * mscale).index_select(0, positions)
        return cls(freqs, mscale, cosine.unsqueeze(1), sine.unsqueeze(1))


class _Rotate(torch.autograd.Function):
    """Turn each pair of a head's first and second half. The backward pass turns back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotate(rows, cosine, sine)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotate(gradients[0], cosine, -sine), None, None


def _rotate(rows: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return rows [T, heads, D] after the rotation."""
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    first, second = rows.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cosine, out=out_first).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=out_second).addcmul_(first, sine)
    return out


@patch(
    upstream="megatron/core/models/common/embeddings/rope_utils.py:_apply_rotary_pos_emb_thd",
    checked="megatron-core 0.16.1 and 0.18.2",
    until="upstream computes the cosines of a microbatch once",
    without_cuda=True,
)
def rotation_once_a_microbatch() -> None:
    """For queries and keys of every layer upstream cuts the table of angles by sequence, joins it,
    computes cosine and sine of every token, and turns the heads by seven operations. All layers
    of a microbatch have the same bounds and the same table, so cosine and sine are now kept with
    the bounds, and the heads are turned in place. What is not float32, interleaved, cut over
    context ranks or turned in part still takes upstream's way.
    """
    import megatron.core.models.common.embeddings.rope_utils as rope_utils

    original = require(
        rope_utils,
        "_apply_rotary_pos_emb_thd",
        parameters=(
            "t",
            "cu_seqlens",
            "freqs",
            "rotary_interleaved",
            "multi_latent_attention",
            "mscale",
            "cp_group",
        ),
        source="freqs_packed = torch.cat(",
    )
    require(
        rope_utils,
        "_apply_rotary_pos_emb_bshd",
        source="t = (t * cos_) + (_rotate_half(t, rotary_interleaved) * sin_)",
    )

    def apply(
        t: Tensor,
        cu_seqlens: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
        cp_group: Any = None,
    ) -> Tensor:
        rotation = None
        is_whole = cp_group is not None and cp_group.size() == 1 and freqs.shape[-1] == t.shape[-1]
        is_plain = not rotary_interleaved and not multi_latent_attention
        if is_whole and is_plain and t.dtype == torch.float32:
            # The bounds are made anew for each microbatch, so the rotation can be kept on them.
            rotation = getattr(cu_seqlens, "rotation", None)
            if rotation is None or rotation.freqs is not freqs or rotation.mscale != mscale:
                rotation = Rotation.of(cu_seqlens, freqs, mscale)
                cu_seqlens.rotation = rotation  # type: ignore[attr-defined]
        if rotation is None:
            choice = (rotary_interleaved, multi_latent_attention, mscale, cp_group)
            return original(t, cu_seqlens, freqs, *choice)
        turned: Tensor = _Rotate.apply(t, rotation.cosine, rotation.sine)
        return turned

    replace(rope_utils, "_apply_rotary_pos_emb_thd", apply)
