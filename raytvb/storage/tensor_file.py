"""Whole safetensors files, in memory, as somebody else may have written them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from raytvb.storage.damage import unreadable

_MALFORMED = (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, OverflowError)
"""What `load` raises: for a header that lies, for a dtype that torch lacks, or for a shape that no
tensor has.
"""


def tensors_of(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors in the bytes of a file; `where` names the file.

    Raises DamagedError if the bytes are not a safetensors file that torch can read.
    """
    try:
        return load(data)
    except _MALFORMED as error:
        raise unreadable(where, f"{error!r:.200}") from None


def tensor_of(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, dimensions: int, where: str
) -> Tensor:
    """One tensor of a file; `where` names the file.

    Raises DamagedError if it is missing, or has another dtype or number of dimensions.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise unreadable(where, f"it has no tensor {name}")
    if tensor.dtype != dtype or tensor.ndim != dimensions:
        raise unreadable(where, f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor
