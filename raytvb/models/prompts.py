"""Classes whose prompts the text tower cannot tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from raytvb.errors import UserError, listed
from raytvb.experiment.sections.model import ModelConfig
from raytvb.models.heads import Tokenizer, load_tokenizer, words


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
    same = listed(" = ".join(group) for group in groups)
    return [
        f"these classes have the same prompts, so the model cannot tell them apart: {same}; give "
        f"other names as `classes:`"
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
