"""The image classifier that is fine-tuned."""

from __future__ import annotations

from torch import Tensor, nn


class ImageClassifier(nn.Module):
    """The image tower with a frozen zero-shot head: images (N, 3, H, W) to logits (N, C).

    Images must be normalised. The parameters of the classifier are those of the tower, under their
    open_clip names (`visual.…`). The head is a buffer.
    """

    head: Tensor
    """(C, E) float32; the logit scale is part of it."""

    def __init__(self, visual: nn.Module, head: Tensor) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("head", head)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C)."""
        return nn.functional.normalize(tower_features(self.visual(images)), dim=-1) @ self.head.T


def tower_features(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The features (N, E) in a tower's output. CoCa's tower returns its tokens as well."""
    return output[0] if isinstance(output, tuple) else output
