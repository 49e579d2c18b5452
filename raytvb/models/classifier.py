"""The image classifier that is fine-tuned."""

from __future__ import annotations

from torch import Tensor, nn


class ImageClassifier(nn.Module):
    """The image tower with a frozen zero-shot head: normalised images (N, 3, H, W) to logits (N,
    C).

    Its parameters are those of the tower, under their open_clip names (`visual.…`).
    """

    head: Tensor

    def __init__(self, visual: nn.Module, head: Tensor) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("head", head)

    def forward(self, images: Tensor) -> Tensor:
        """Logits; the features are made unit length, the logit scale is part of the head."""
        found = self.visual(images)
        features = (
            found[0] if isinstance(found, tuple) else found
        )  # CoCa's tower gives its tokens as well
        return nn.functional.normalize(features, dim=-1) @ self.head.T
