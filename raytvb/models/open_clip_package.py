"""The open_clip package, and its names for our models."""

from __future__ import annotations

import logging
from typing import Any

from raytvb.experiment.fields import TINY_MODEL
from raytvb.experiment.sections.model import ModelConfig
from raytvb.suite.task_names import MODEL_DIR


def open_clip_package() -> Any:
    """The open_clip package, imported at first use.

    The import takes seconds. The driver and the basis actor do not need it.
    """
    import open_clip

    return open_clip


def model_source(config: ModelConfig) -> str:
    """open_clip's name for the model."""
    return f"local-dir:{MODEL_DIR}" if config.name == TINY_MODEL else config.name


def tag_options(config: ModelConfig) -> dict[str, bool]:
    """Options with which open_clip creates a model with the activation its weights were trained on.

    Some tags were trained with QuickGELU, while the model of that name has GELU. By itself,
    open_clip only warns.
    """
    tag = None
    if config.pretrained:
        tag = open_clip_package().get_pretrained_cfg(config.name, config.pretrained)
    return {"force_quick_gelu": bool(tag and tag.get("quick_gelu", False))}


def described_model(source: str, **options: Any) -> Any:
    """A model of open_clip with random values, as its name or folder describes it.

    Nothing is fetched for its towers: the values come from a checkpoint afterwards.
    """
    logger = logging.getLogger()
    level = logger.level
    quiet_open_clip()  # it warns of the random values
    try:
        return open_clip_package().create_model(
            source, load_weights=False, pretrained_text=False, **options
        )
    finally:
        logger.setLevel(level)


def quiet_open_clip() -> None:
    """Show only errors on the root logger, where open_clip logs a page for each model."""
    logging.getLogger().setLevel(max(logging.getLogger().level, logging.ERROR))
