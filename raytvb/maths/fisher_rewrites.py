"""Fused layers, rewritten as steps that the recorder of `fisher` can watch."""

from __future__ import annotations

import inspect
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


_ATTENTION = inspect.signature(F.multi_head_attention_forward)

_WHOLE_ONLY = ("bias_k", "bias_v", "key_padding_mask", "attn_mask", "static_k", "static_v")
"""If one of these arguments is given, attention is not taken apart."""


def _attention(*args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` in steps that are watched, samples as the first dimension.

    With masks, dropout or added keys it runs as a whole and is not watched. The check of the first
    image then detects that its parameters have no scores.
    """
    bound = _ATTENTION.bind(*args, **options)
    bound.apply_defaults()
    arguments = bound.arguments
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    plain = all(arguments[name] is None for name in _WHOLE_ONLY) and not arguments["add_zero_attn"]
    dropped = arguments["training"] and arguments["dropout_p"] > 0
    if not plain or dropped or query.dim() != 3:
        with torch._C.DisableTorchFunction():
            return F.multi_head_attention_forward(*args, **options)
    projected = _projections(arguments, query is key is value)
    q, k, v = (_split_heads(part, arguments["num_heads"]) for part in projected)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out = F.linear(mixed, arguments["out_proj_weight"], arguments["out_proj_bias"])
    return out.transpose(0, 1), None


def _projections(arguments: dict[str, Any], one_input: bool) -> Sequence[Tensor]:
    """Queries, keys and values (N, L, heads * E) of an attention layer with these arguments."""
    inputs = [arguments[name].transpose(0, 1) for name in ("query", "key", "value")]
    weight, bias = arguments["in_proj_weight"], arguments["in_proj_bias"]
    if one_input and weight is not None:
        return F.linear(inputs[0], weight, bias).chunk(3, dim=-1)
    weights = [arguments[f"{part}_proj_weight"] for part in ("q", "k", "v")]
    if weight is not None:
        weights = weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return list(map(F.linear, inputs, weights, biases))


def _split_heads(projected: Tensor, heads: int) -> Tensor:
    """(N, L, heads * E) to (N, heads, L, E)."""
    split: Tensor = projected.unflatten(-1, (heads, -1)).transpose(1, 2)
    return split


REWRITES: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.multi_head_attention_forward: _attention,
}
