"""The open_clip package and what it calls our models."""

from __future__ import annotations

import logging
from typing import Any

from raytvb.experiment.base import TINY_MODEL
from raytvb.experiment.training import ModelConfig
from raytvb.suite import glyphs


def open_clip_package() -> Any:
    """The open_clip package, imported at first use: the driver and the basis actor save its
    seconds.
    """
    import open_clip

    return open_clip


def model_source(config: ModelConfig) -> str:
    """What open_clip calls the model."""
    return f"local-dir:{glyphs.MODEL_DIR}" if config.name == TINY_MODEL else config.name


def tag_options(config: ModelConfig) -> dict[str, Any]:
    """open_clip only warns where a tag was trained with QuickGELU and the named model has GELU: use
    what it had.
    """
    tag = (
        open_clip_package().get_pretrained_cfg(config.name, config.pretrained)
        if config.pretrained
        else None
    )
    return {"force_quick_gelu": bool(tag and tag.get("quick_gelu", False))}


def quiet_open_clip() -> None:
    """open_clip logs a page per model on the root logger; keep its errors only."""
    logging.getLogger().setLevel(max(logging.getLogger().level, logging.ERROR))
