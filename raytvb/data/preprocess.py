"""How pixels become the input of an image tower."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raytvb.storage.contract import JsonObject


@dataclass(frozen=True)
class Preprocess:
    """How images are resized and normalised for the image tower of a model."""

    size: int
    """Side of the square image in pixels: S."""
    mean: tuple[float, ...]
    """Mean of each channel, for pixels from 0 to 1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, for pixels from 0 to 1."""
    config: Mapping[str, object]
    """open_clip's `preprocess_cfg`, the input of its `image_transform_v2`; plain JSON values."""

    def normalise(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to normalised float32 of the same shape."""
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        return (images.float() / 255.0 - mean) / std

    def to_json(self) -> JsonObject:
        """`config` as JSON values, with lists instead of tuples."""
        values: JsonObject = json.loads(self.config_text)
        return values

    @property
    def config_text(self) -> str:
        """`config` as a JSON document."""
        return json.dumps(dict(self.config))
