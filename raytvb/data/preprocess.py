"""How pixels become a tower's input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """How pixels become the tower's input: side of the square image in pixels, and mean and
    deviation per channel.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    config: Mapping[str, Any]

    def normalise(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to normalised float32 of the same shape."""
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        return (images.float() / 255.0 - mean) / std
