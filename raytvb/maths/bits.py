"""Masks packed to one bit a parameter."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Bool (D,) to uint8 (ceil(D/8),). Entry i is bit i % 8 of byte i // 8, lowest bit first.

    Bits beyond the last entry are zero.
    """
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little"))


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Inverse of `pack_bits`: the first `count` bits as bool (count,)."""
    return torch.from_numpy(
        np.unpackbits(packed.cpu().numpy(), count=count, bitorder="little").view(np.bool_)
    )
