"""Switches off the recomputation of activations (gradient checkpointing) for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_FLAGS = ("grad_checkpointing", "gradient_checkpointing", "use_checkpoint")
"""Attributes of modules in open_clip, timm, transformers and torchvision."""


@contextmanager
def without_recomputation(model: nn.Module) -> Iterator[None]:
    """Within the block, no module of the model recomputes its activations in the backward pass.

    A recorder of a forward pass cannot follow the second one. Gradients are the same either way;
    only the memory for activations grows.
    """
    changed: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        for flag in _FLAGS:
            if getattr(module, flag, None) is True:
                setattr(module, flag, False)
                changed.append((module, flag))
    try:
        yield
    finally:
        for module, flag in changed:
            setattr(module, flag, True)
