"""Linear, LayerNormLinear, GroupedLinear, RMSNorm and DotProductAttention in plain torch;
communication over tensor ranks by Megatron-Core's own functions.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from transformer_engine.pytorch.context import attention_across_ranks


class _CudaRNGStatesTracker:
    """A base class that Megatron-Core asks for when it is imported."""


distributed = SimpleNamespace(CudaRNGStatesTracker=_CudaRNGStatesTracker)


def _weight(
    rows: int,
    columns: int,
    init: Callable[[Tensor], Any],
    dtype: torch.dtype,
    device: Any,
    mode: str | None,
) -> torch.nn.Parameter:
    """As Transformer Engine 2.16.1 makes and marks one: split over tensor ranks, or (mode None)
    with no mark at all.

    tests/image/test_engine.py compares the marks with those of the real one.
    """
    weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device))
    with torch.no_grad():
        init(weight)
    if mode is not None:
        weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        weight.partition_dim = 1 if mode == "row" else 0  # type: ignore[attr-defined]
        weight.partition_stride = 1  # type: ignore[attr-defined]
    return weight


class RMSNorm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-5,
        *,
        sequence_parallel: bool,
        hidden_size: int | None = None,
        params_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        **_: Any,
    ) -> None:
        """As in Transformer Engine 2, hidden_size and params_dtype are the former names of
        normalized_shape and dtype.
        """
        super().__init__()
        self.eps = eps
        size = hidden_size if normalized_shape is None else normalized_shape
        self.weight = torch.nn.Parameter(
            torch.ones(size, dtype=params_dtype or dtype, device=device)
        )
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(RMSNorm):
    def __init__(self, *args: Any, **named: Any) -> None:
        raise AssertionError("no model here has a LayerNorm")


class Linear(torch.nn.Module):
    """parallel_mode column: rows of the weight are split; row: columns are; None: neither, and
    nothing is communicated.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        tp_group: Any,
        tp_size: int,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
        params_dtype: torch.dtype,
        device: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = bias
        self.tp_size = tp_size
        self.parallel_mode = parallel_mode
        self._sequence_parallel = sequence_parallel
        self._group = tp_group
        self._return_bias = return_bias
        rows = out_features // (tp_size if parallel_mode == "column" else 1)
        columns = in_features // (tp_size if parallel_mode == "row" else 1)
        self.weight = _weight(rows, columns, init_method, params_dtype, device, parallel_mode)
        self.bias = (
            torch.nn.Parameter(torch.zeros(rows, dtype=params_dtype, device=device))
            if bias
            else None
        )

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        from megatron.core import tensor_parallel

        if self.parallel_mode == "column":
            gather = (
                tensor_parallel.gather_from_sequence_parallel_region
                if self._sequence_parallel
                else tensor_parallel.copy_to_tensor_model_parallel_region
            )
            x = gather(x, group=self._group)
        out = functional.linear(x, self.weight, None if self._return_bias else self.bias)
        if self.parallel_mode == "row":
            scatter = tensor_parallel.reduce_scatter_to_sequence_parallel_region
            reduce = (
                scatter
                if self._sequence_parallel
                else tensor_parallel.reduce_from_tensor_model_parallel_region
            )
            out = reduce(out, group=self._group)
        return (out, self.bias) if self._return_bias else out


class LayerNormLinear(Linear):
    """A norm and the linear layer behind it, in one module."""

    def __init__(
        self, in_features: int, out_features: int, *, eps: float, normalization: str, **named: Any
    ) -> None:
        assert normalization == "RMSNorm"
        super().__init__(in_features, out_features, **named)
        self._eps = eps
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(in_features, dtype=named["params_dtype"], device=named.get("device"))
        )
        self.layer_norm_weight.sequence_parallel = named["sequence_parallel"]

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        return super().forward(
            functional.rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self._eps)
        )


class GroupedLinear(torch.nn.Module):
    """num_gemms linear layers, weight0 and so on, each for its part of the rows."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        parallel_mode: str | None,
        tp_size: int,
        params_dtype: torch.dtype,
        device: Any = None,
        **_: Any,
    ) -> None:
        assert not bias
        super().__init__()
        self.num_gemms = num_gemms
        self.use_bias = bias
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        rows = out_features // (tp_size if parallel_mode == "column" else 1)
        columns = in_features // (tp_size if parallel_mode == "row" else 1)
        for index in range(num_gemms):
            # The weight is not marked, whatever the mode is.
            weight = _weight(rows, columns, init_method, params_dtype, device, None)
            self.register_parameter(f"weight{index}", weight)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass

    def init_fp8_metadata(self, num_gemms: int) -> None:
        pass

    def forward(
        self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
    ) -> Tensor:
        parts = [
            functional.linear(part, getattr(self, f"weight{index}"))
            for index, part in enumerate(x.split(m_splits))
        ]
        return torch.cat(parts)


class DotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        *,
        num_gqa_groups: int,
        attention_dropout: float,
        softmax_scale: Any,
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_comm_type: str = "p2p",
        **_: Any,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0
        assert cp_group is None or len(cp_global_ranks or []) == cp_group.size()
        self._scale = softmax_scale or kv_channels**-0.5
        self._group = cp_group
        self.cp_comm_type = cp_comm_type

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        *,
        attn_mask_type: str,
        qkv_format: str,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        cu_seqlens_q_padded: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        from megatron_patches.attention import PaddedGroups, packed_attention

        assert attn_mask_type == "padding_causal", attn_mask_type
        assert qkv_format == "thd", qkv_format
        assert mask is None
        assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
        assert cu_seqlens_q.dtype == torch.int32
        if self._group is not None:
            assert cu_seqlens_q_padded is cu_seqlens_q, (
                "Transformer Engine would take it for room between the sequences"
            )
            return attention_across_ranks(
                query, key, value, cu_seqlens_q, self._group, scale=self._scale
            ).flatten(1)
        return packed_attention(
            query,
            key,
            value,
            PaddedGroups.of(cu_seqlens_q.tolist(), query.device),
            scale=self._scale,
        ).flatten(1)
