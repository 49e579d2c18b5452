"""Classes whose prompts the text tower cannot tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from raytvb.errors import UserError
from raytvb.experiment.sections.model import ModelConfig
from raytvb.models.heads import Tokenizer, load_tokenizer, words

NAMED = 10
"""A warning names at most this many groups of classes."""


def prompt_warnings(
    config: ModelConfig, classes: Sequence[str], templates: Sequence[str]
) -> list[str]:
    """A warning if classes have the same prompts, and so the same row of the zero-shot head.

    Names that differ in upper case only have, and so have names that differ behind the end of what
    the text tower reads. A tokenizer that cannot be loaded is not an error here: the zero-shot head
    needs it, too, and then says so.
    """
    try:
        tokenizer = _tokenizer(config)
    except UserError as error:
        return [f"the prompts were not compared: {error}"]
    groups = same_prompts(tokenizer, classes, templates)
    if not groups:
        return []
    listed = [" = ".join(group) for group in groups[:NAMED]]
    more = f", and {len(groups) - NAMED} more" if len(groups) > NAMED else ""
    return [
        f"these classes have the same prompts, so the model cannot tell them apart: "
        f"{', '.join(listed)}{more}; give other names as `classes:`"
    ]


def same_prompts(
    tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str]
) -> list[list[str]]:
    """Groups of classes that have the same tokens with every template."""
    tokens = []
    for template in templates:
        tokens.append(tokenizer([template.format(word) for word in words(classes)]))
    rows = torch.cat(tokens, dim=1)  # (C, templates * L)
    groups: dict[bytes, list[str]] = {}
    for name, row in zip(classes, rows, strict=True):
        groups.setdefault(row.numpy().tobytes(), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


@cache
def _tokenizer(config: ModelConfig) -> Tokenizer:
    return load_tokenizer(config)
