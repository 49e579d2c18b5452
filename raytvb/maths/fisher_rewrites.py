"""Fused layers in steps that the recorder of `fisher` can watch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _affine(
    normalised: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]
) -> Tensor:
    if weight is not None:
        normalised = normalised * weight.view(shape)
    return normalised if bias is None else normalised + bias.view(shape)


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    with torch._C.DisableTorchFunction():
        normalised = F.layer_norm(x, normalized_shape, None, None, eps)
    return _affine(normalised, weight, bias, tuple(normalized_shape))


def _batch_norm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    with torch._C.DisableTorchFunction():
        normalised = F.batch_norm(x, mean, var, None, None, training, momentum, eps)
    return _affine(normalised, weight, bias, (-1, *(1,) * (x.dim() - 2)))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero: bool,
    dropout: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` in steps that are watched, the samples first; without masks
    and dropout.
    """
    if (
        any(
            o is not None for o in (bias_k, bias_v, key_padding_mask, attn_mask, static_k, static_v)
        )
        or add_zero
        or (training and dropout > 0)
        or query.dim() != 3
    ):
        with (
            torch._C.DisableTorchFunction()
        ):  # not watched, so the check finds its parameters without scores
            return F.multi_head_attention_forward(
                query,
                key,
                value,
                embed_dim,
                heads,
                in_weight,
                in_bias,
                bias_k,
                bias_v,
                add_zero,
                dropout,
                out_weight,
                out_bias,
                training,
                key_padding_mask,
                need_weights,
                attn_mask,
                use_separate_proj_weight,
                q_proj_weight,
                k_proj_weight,
                v_proj_weight,
                static_k,
                static_v,
                **options,
            )
    inputs = [t.transpose(0, 1) for t in (query, key, value)]
    if query is key is value and in_weight is not None:
        q, k, v = F.linear(inputs[0], in_weight, in_bias).chunk(3, dim=-1)
    else:
        weights: Any = (
            (q_proj_weight, k_proj_weight, v_proj_weight)
            if in_weight is None
            else in_weight.chunk(3)
        )
        biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip(inputs, weights, biases, strict=True))
    split = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    return F.linear(mixed, out_weight, out_bias).transpose(0, 1), None


REWRITES: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.multi_head_attention_forward: _attention,
}
